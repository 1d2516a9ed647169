"""The main job on a platform whose user has no privileges at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import ROOT, Server, at_gate, concluded
from tests.scenarios.test_main_job import REPO, approve, push_to_main, server_log

NOBODY = 65534


def python_for_everybody() -> tuple[str, ...]:
    """Return an interpreter that any user may run and that takes this environment's packages."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for path in (sys.executable, f"/usr/bin/python{version}"):
        try:
            found = subprocess.run(
                [path, "-c", "pass"], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=False
            )
        except OSError:
            continue
        if found.returncode == 0:
            return (path,)
    pytest.skip(f"no Python {version} here that an unprivileged user may run")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the unprivileged user's own; pytest's are root's alone."""
    path = Path(tempfile.mkdtemp(prefix="dynflow-unprivileged-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_the_main_job_runs_without_privileges(folder: Path) -> None:
    command = python_for_everybody()
    bare, sha = make_repository(folder / "repo")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    packages = [str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    with serve_github() as github:
        settings = {
            "DYNFLOW_GITHUB_API_URL": github.url,
            "DYNFLOW_ALLOW_FILE_REMOTES": "true",
            "DYNFLOW_ALLOW_CONTAINERS": "false",
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(packages)),
            "HOME": str(folder),
        }
        server = Server(folder / "data", settings, command, NOBODY)
        server.start()
        try:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(at_gate, "the gate to open")
            approve(server, run)
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "success", run
            assert "deployed" in server_log(server, run, "deploy")
        finally:
            server.stop()
