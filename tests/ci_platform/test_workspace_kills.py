"""kill -9 before each change of a file that forks, seals, drops, merges, collections make: nothing torn is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ci_platform.source import Source
from ci_platform.source.hydrating import unavailable
from tests.ci_platform.git_repositories import Content, Link, Script, working_copy
from tests.ci_platform.killed_workspaces import REPO

# All of them take more than three minutes.
EVERY = 8 if os.environ.get("CI") else 1
SELDOM = {"collect": 3, "grafts": 7, "grafts-collected": 5, "lazy": 12, "with-cache": 7}
"""Times `EVERY`: of what has very many places, or takes long at each."""

GRAFTS = ("grafts", "grafts-collected", "lazy", "with-cache")
NO_LAZY_TREES = unavailable()

FILES: dict[str, Content] = {
    "README.md": b"hello\n",
    "src/a.py": b"a\n",
    "run.sh": Script(b"#!/bin/sh\n"),
    "link": Link("src/a.py"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "scenario", ["fork", "seal", "drop", "flatten", "snapshots", "collect", "forked-run", *GRAFTS]
)
async def test_a_kill_before_any_change_leaves_whole_layers_and_nothing_else(
    tmp_path: Path, scenario: str
) -> None:
    if scenario == "lazy" and NO_LAZY_TREES is not None:
        pytest.skip(f"no lazy trees here: {NO_LAZY_TREES}")
    remote, source = working_copy(tmp_path / "remote"), Source(tmp_path / "source")
    shas = [remote.commit(FILES), remote.commit({"src/a.py": b"changed\n", "run.sh": None, "new/x": b"x"})]
    await source.create(REPO)
    remote.git("push", "--quiet", str(source.path(REPO)), "main")
    (tmp_path / "shas.json").write_text(json.dumps(shas))
    command = [
        sys.executable,
        "-m",
        f"tests.ci_platform.killed_{'grafts' if scenario in GRAFTS else 'workspaces'}",
        str(tmp_path),
        scenario,
        str(EVERY * SELDOM.get(scenario, 1) if EVERY > 1 else 1),
    ]
    done = subprocess.run(  # noqa: ASYNC221 - nothing else runs here
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 15
