"""`dynflow backup` and `dynflow restore`, of a platform that runs."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ci_platform.client import Client
from tests.ci_platform.api.world import GATED
from tests.ci_platform.command_line.conftest import CommandLine, Served, wait_for_address
from tests.ci_platform.command_line.test_cli_server import push


@pytest.mark.slow
def test_a_run_at_a_gate_goes_on_from_a_backup(served: Served, tmp_path: Path) -> None:
    run_id = push(served, tmp_path, GATED)
    while not served.client.get(f"/api/v1/runs/{run_id}")["gates"]:
        pass
    backup, elsewhere = tmp_path / "backup", tmp_path / "elsewhere"
    done = served.dynflow("backup", str(backup))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(backup / "engine.db"), str(backup / "platform.db")]
    assert {path.name for path in backup.iterdir()} == {"engine.db", "platform.db"}
    assert {path.stat().st_mode & 0o777 for path in (backup, *backup.iterdir())} == {0o700, 0o600}
    restored = served.dynflow("restore", str(backup), "--data", str(elsewhere))
    assert (restored.returncode, restored.stderr) == (0, "")
    for folder in ("workspaces", "source", "logs"):  # what docs/command-line.md says to copy besides
        if (served.data / folder).exists():
            subprocess.run(["cp", "-a", served.data / folder, elsewhere / folder], check=True)
    shutil.copy(served.data / "token", elsewhere / "token")
    serve = ["serve", "--port", "0", "--no-allow-containers", "--data", str(elsewhere)]
    with served.dynflow.start(*serve) as process:
        try:
            address = wait_for_address(elsewhere, process)
            token = (elsewhere / "token").read_text().strip()
            with Client(address.url, token) as client:
                run = client.get(f"/api/v1/runs/{run_id}")
                assert [gate["name"] for gate in run["gates"]] == ["approval"]
                assert client.get("/api/v1/runs")["items"]
            here = {"DYNFLOW_URL": address.url, "DYNFLOW_TOKEN": token}
            assert served.dynflow("approve", run_id, "approval", **here).returncode == 0
            watched = served.dynflow("show", run_id, "--watch", **here)
            assert watched.returncode == 0, watched.stdout + watched.stderr
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
    again = served.dynflow("restore", str(backup), "--data", str(elsewhere))
    assert again.returncode == 4
    assert "exists: move it away first" in again.stderr


def test_a_folder_in_use_is_not_restored_to(served: Served, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    assert served.dynflow("backup", str(backup)).returncode == 0
    done = served.dynflow("restore", str(backup))
    assert done.returncode != 0
    assert "in use" in done.stderr


def test_wrong_folders_are_said_and_nothing_is_left(dynflow: CommandLine, tmp_path: Path) -> None:
    done = dynflow("backup", str(tmp_path / "backup"), "--data", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "no " in done.stderr
    assert not (tmp_path / "backup").exists()
    (tmp_path / "empty").mkdir()
    done = dynflow("restore", str(tmp_path / "empty"), "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert "is not a backup: it has no engine.db" in done.stderr
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "engine.db").write_text("no database")
    done = dynflow("backup", str(tmp_path / "backup"), "--data", str(tmp_path / "data"))
    assert done.returncode == 4
    assert "engine.db" in done.stderr
    assert not (tmp_path / "backup").exists()
