"""What the page on what-ifs says: its commands, run as they stand there, one after the other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from ci_platform.demo import wait_for_run
from ci_platform.repository_push import Destination, push_folder
from tests.ci_platform.command_line.conftest import ROOT, Served

PAGE = (ROOT / "docs" / "what-if.md").read_text()
REPO = "demo/notes"


def block(language: str) -> str:
    found = re.search(rf"^```{language}[^\n]*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def commands() -> list[list[str]]:
    found = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[2:] for each in found for line in each.splitlines()]


def push(served: Served, folder: Path, pipeline: str, branch: str) -> None:
    (folder / ".dynflow").mkdir(parents=True, exist_ok=True)
    (folder / ".dynflow" / "ci.py").write_text(pipeline)
    (folder / "notes.txt").write_text("one\n")
    token = (served.data / "token").read_text().strip()
    sha = push_folder(folder, Destination(served.client.url, REPO, branch, token), f"On {branch}")
    run = wait_for_run(served.client, REPO, sha)
    assert served.dynflow("show", run["id"], "--watch").returncode == 0


def newest(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(served.dynflow("show", "last", "--json").stdout)
    return found


def test_the_commands_of_the_page_do_what_it_says(served: Served, tmp_path: Path) -> None:
    served.client.post("/api/v1/repos", {"name": REPO})
    pipeline = block("python")
    push(served, tmp_path / "main", pipeline, "main")
    push(served, tmp_path / "other", pipeline.replace('"install"', '"prepare"'), "try-it")
    (served.dynflow.cwd / "fix.diff").write_text(block("diff"))
    patch, log, inputs, code, show = commands()
    done = served.dynflow(*patch)
    assert done.returncode == 0, done.stderr
    done = served.dynflow(*log)
    assert done.returncode == 0, done.stderr
    assert "slow\none\ntwo\n" in done.stdout
    assert served.dynflow(*inputs).returncode == 0
    run = newest(served)
    assert run["forked"]["inputs"] == {"branch": "release", "labels": [1, 2]}
    while not served.client.get(f"/api/v1/runs/{run['id']}")["gates"]:
        pass
    assert served.dynflow("reject", run["id"], "ship-it").returncode == 0
    assert served.dynflow(*code).returncode == 0
    told = served.dynflow(*show).stdout
    assert "what-if: forked from demo/notes#1 before step test" in told
    assert "its code did not call install #1, of which the result was kept" in told


def test_wrong_use_is_told(served: Served) -> None:
    wrong = served.dynflow("runs", "what-if", "last", "--input", "nothing")
    assert (wrong.returncode, "NAME=VALUE" in wrong.stderr) == (2, True)
    (served.dynflow.cwd / "latin").write_bytes(b"\xff")
    wrong = served.dynflow("runs", "what-if", "last", "--patch", "latin")
    assert (wrong.returncode, "not UTF-8" in wrong.stderr) == (2, True)
    unknown = served.dynflow("runs", "what-if", "nobody/nothing#7")
    assert unknown.returncode == 2
