"""A machine without the essential walls: refused by name, and gone on with where that was asked for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.ci_platform.api.world import QUICK
from tests.ci_platform.command_line.conftest import DEADLINE, CommandLine, wait_for_address
from tests.ci_platform.command_line.test_cli_local import project

# Inside this user namespace none may be made: as on hosts that switch them off.
_NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
_THERE = ["unshare", "--user", "--map-root-user", "sh", "-c", _NO_NAMESPACES, "sh"]


@pytest.fixture
def bare(dynflow: CommandLine) -> CommandLine:
    """The command line on a machine without user namespaces."""
    if subprocess.run([*_THERE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespace here to try it in")
    return dynflow


def command(*arguments: str) -> Sequence[str]:
    return [*_THERE, sys.executable, "-m", "ci_platform", *arguments]


def call(line: CommandLine, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=dict(line.environ),
        cwd=line.cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["serve", "--port", "0"], ["validate", "project"]])
def test_without_an_essential_wall_it_refuses_says_which_and_what_to_do(
    bare: CommandLine, tmp_path: Path, arguments: list[str]
) -> None:
    project(tmp_path, QUICK)
    done = call(bare, *arguments)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    assert "Essential walls that are missing: namespaces (" in told
    assert "filesystem (it takes the namespaces)" in told
    assert "user.max_user_namespaces" in told
    assert "--unsafe-no-isolation" in told
    assert "dynflow doctor" in told


def test_with_the_flag_it_serves_and_warns_at_each_start(bare: CommandLine) -> None:
    data = bare.cwd / ".local" / "share" / "dynflow"
    for _ in range(2):
        with subprocess.Popen(
            command("serve", "--port", "0", "--no-allow-containers", "--unsafe-no-isolation"),
            env=dict(bare.environ),
            cwd=bare.cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as server:
            try:
                wait_for_address(data, server)
            finally:
                server.send_signal(signal.SIGTERM)
                told = server.communicate(timeout=30)[0]
        assert "--unsafe-no-isolation is on" in told
        assert "WITHOUT the essential walls namespaces, filesystem" in told


def test_with_the_flag_pipelines_are_loaded_behind_the_walls_that_are_left(
    bare: CommandLine, tmp_path: Path
) -> None:
    bare = CommandLine({**bare.environ, "DYNFLOW_UNSAFE_NO_ISOLATION": "true"}, bare.cwd)
    project(tmp_path, "import socket\nsocket.socket()\n" + QUICK)
    done = call(bare, "validate", "project")
    assert (done.returncode, "PermissionError" in done.stderr) == (1, True), done.stderr
    assert "--unsafe-no-isolation is on" in done.stderr


def test_doctor_says_what_is_missing_and_warns_of_the_flag(bare: CommandLine) -> None:
    done = call(bare, "doctor", "--json")
    found = {item["name"]: item for item in json.loads(done.stdout) if item["area"] == "isolates"}
    assert done.returncode == 4
    assert (
        found["namespaces"]["state"] == found["filesystem"]["state"] == found["pipelines"]["state"] == "bad"
    )
    assert "user.max_user_namespaces" in found["namespaces"]["value"]
    assert found["seccomp"]["state"] == "good"

    warned = call(bare, "doctor", "--json", "--unsafe-no-isolation")
    found = {item["name"]: item for item in json.loads(warned.stdout) if item["area"] == "isolates"}
    assert found["--unsafe-no-isolation"]["state"] == "fair"
    assert "WITHOUT the essential walls namespaces, filesystem" in found["--unsafe-no-isolation"]["value"]
    assert "bad" not in {item["state"] for item in found.values()}


def test_where_all_walls_stand_the_flag_is_said_to_be_of_no_use(dynflow: CommandLine) -> None:
    found = json.loads(dynflow("doctor", "--json", "--unsafe-no-isolation").stdout)
    told = next(item["value"] for item in found if item["name"] == "--unsafe-no-isolation")
    if "WITHOUT" in told:
        pytest.skip("essential walls are missing here")
    assert "not needed: all essential walls stand here" in told
