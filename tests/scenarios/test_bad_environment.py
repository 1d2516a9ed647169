"""What is wrong with the machine: clear errors, nothing acknowledged is lost, and it goes on when the cause is gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.scenarios.github_server import serve_github
from tests.scenarios.leftovers import Leftovers, below
from tests.scenarios.pipelines import git, make_repository
from tests.scenarios.server import ROOT, Server, at_gate, concluded, running_server
from tests.scenarios.test_crash import PIPELINE, approve, run_is_in
from tests.scenarios.test_main_job import REPO, push_to_main

QUICK = PIPELINE.format(slow="nothing", seconds=0)


def serve_and_fail(data: Path, *options: str) -> str:
    """Start a server that cannot; return what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "ci_platform", "serve", "--data", str(data), "--port", "0", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in {2, 4}, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@contextmanager
def small_disk(folder: Path, size: str, *options: str) -> Iterator[Path]:
    """Mount a small file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", "mode=0700", *options]), "tmpfs"]
    if subprocess.run([*command, str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until nothing more fits; return the file that takes the room."""
    path = folder / "ballast"
    with path.open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 16, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return path


def test_a_second_server_on_one_data_folder_is_refused_and_the_first_is_unharmed(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE.format(slow="lint", seconds=2))
    data = tmp_path / "data"
    with (
        serve_github() as github,
        running_server(data, github_api_url=github.url, allow_file_remotes="true") as server,
    ):
        server.register(REPO, bare)
        server.deliver("push", push_to_main(sha))
        run_is_in(server, "lint")
        assert "in use by another dynflow process" in serve_and_fail(data)
        run = server.wait_for_run(at_gate, "the gate to open")
        assert all(len(step["attempts"]) <= 1 for step in run["steps"])
        approve(server, run)
        assert server.wait_for_run(concluded, "the run to conclude")["conclusion"] == "success"


def test_a_data_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "data", "1m", "ro") as data:
        assert "Read-only file system" in serve_and_fail(data)
    (tmp_path / "file").write_text("")
    assert "cannot make the data folder" in serve_and_fail(tmp_path / "file" / "data")


def test_a_full_disk_at_the_start_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "data", "1m") as data:
        fill(data)
        serve_and_fail(data)


def test_a_full_disk_refuses_deliveries_and_stops_nothing_for_good(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", QUICK)
    with small_disk(tmp_path / "data", "32m") as data, serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true", "allow_containers": "false"}
        with running_server(data, **settings) as server:
            server.register(REPO, bare)
            assert server.deliver("push", push_to_main(sha)).status_code == 202
            run = server.wait_for_run(at_gate, "the gate to open")

            ballast = fill(data)
            answer = server.deliver("push", push_to_main("1" * 40))
            while answer.status_code == 202:  # what had room is kept; the journals fill up in the end
                fill(data)
                answer = server.deliver("push", push_to_main(os.urandom(20).hex()))
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "unavailable"
            with suppress(AssertionError):  # refused, or stored
                approve(server, run)
            assert server.process is not None
            assert server.process.poll() is None, server.log()

            ballast.unlink()
            if server.api("GET", "/gates", params={"state": "open"})["items"]:
                approve(server, run)

            def done() -> bool:
                return concluded(server.api("GET", f"/runs/{run['id']}"))

            server.wait_until(done, "the run to conclude", timeout=90)
            assert server.api("GET", f"/runs/{run['id']}")["conclusion"] == "success"
            github.wait_for(lambda: github.statuses(sha)[-1]["state"] == "success")


def test_a_disk_that_fills_while_commands_run_fails_no_run_for_good(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE.format(slow="lint", seconds=2))
    with small_disk(tmp_path / "data", "32m") as data, serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true", "allow_containers": "false"}
        with running_server(data, **settings) as server:
            server.register(REPO, bare)
            assert server.deliver("push", push_to_main(sha)).status_code == 202
            run_is_in(server, "lint")
            ballast = fill(data)
            found = server.api("GET", "/runs")["items"][0]
            assert server.process is not None

            def the_step_has_ended() -> bool:
                run = server.api("GET", f"/runs/{found['id']}")
                steps = {step["name"]: step for step in run["steps"]}
                return "exited" in _log(server, found["id"], "lint") or len(steps["lint"]["attempts"]) > 1

            with suppress(AssertionError):
                server.wait_until(the_step_has_ended, "the step to end or fail", timeout=5)
            assert server.process.poll() is None, server.log()
            ballast.unlink()

            def over() -> bool:
                run = server.api("GET", f"/runs/{found['id']}")
                return at_gate(run) or concluded(run)

            server.wait_until(over, "the run to go on", timeout=90)
            run = server.api("GET", f"/runs/{found['id']}")
            # Ours to answer for, and a rerun from the step cures it; or it got through.
            assert at_gate(run) or run["conclusion"] == "error", run
            if concluded(run):
                server.api("POST", f"/runs/{found['id']}/rerun", json={})
            run = server.wait_for_run(at_gate, "the gate to open")
            approve(server, run)
            assert server.wait_for_run(concluded, "the run to conclude")["conclusion"] == "success"


def _log(server: Server, run_id: str, step: str) -> str:
    path = f"{server.url}/api/v1/runs/{run_id}/steps/{step}/log"
    return httpx.get(path, headers=server.headers, timeout=30).text


def test_without_the_engines_file_runs_that_had_begun_say_so_and_can_be_rerun(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", QUICK)
    data = tmp_path / "data"
    with (
        serve_github() as github,
        running_server(data, github_api_url=github.url, allow_file_remotes="true") as server,
    ):
        server.register(REPO, bare)
        server.deliver("push", push_to_main(sha))
        server.wait_for_run(at_gate, "the gate to open")
        server.stop()
        for path in data.glob("engine.db*"):
            path.unlink()
        server.start()
        run = server.wait_for_run(concluded, "the run to conclude")
        assert run["conclusion"] == "error"
        assert "no record" in run["reason"]
        assert server.api("GET", "/gates", params={"state": "open"})["items"] == []
        server.api("POST", f"/runs/{run['id']}/rerun", json={})
        run = server.wait_for_run(at_gate, "the gate to open again")
        approve(server, run)
        run = server.wait_for_run(concluded, "the run to conclude")
        assert run["conclusion"] == "success"


def test_with_an_older_copy_of_the_database_a_redelivery_finds_the_run(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", QUICK)
    data = tmp_path / "data"
    with (
        serve_github() as github,
        running_server(data, github_api_url=github.url, allow_file_remotes="true") as server,
    ):
        server.register(REPO, bare)
        server.stop()
        shutil.copy(data / "platform.db", tmp_path / "older.db")
        server.start()
        server.deliver("push", push_to_main(sha))
        run = server.wait_for_run(at_gate, "the gate to open")
        server.stop()
        for path in data.glob("platform.db*"):
            path.unlink()
        shutil.copy(tmp_path / "older.db", data / "platform.db")
        server.start()
        assert server.api("GET", "/runs")["items"] == []
        assert server.deliver("push", push_to_main(sha)).status_code == 202
        again = server.wait_for_run(at_gate, "the gate to be there again")
        assert again["id"] == run["id"]
        approve(server, again)
        assert server.wait_for_run(concluded, "the run to conclude")["conclusion"] == "success"


def test_a_run_does_not_wait_for_github_and_its_reports_come_later(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", QUICK)
    with (
        serve_github() as github,
        running_server(tmp_path / "data", github_api_url=github.url, allow_file_remotes="true") as server,
    ):
        github.down = True
        server.register(REPO, bare)
        server.deliver("push", push_to_main(sha))
        approve(server, server.wait_for_run(at_gate, "the gate to open"))
        assert server.wait_for_run(concluded, "the run to conclude")["conclusion"] == "success"
        server.kill()
        github.down = False
        refused = len(github.statuses(sha))
        server.start()
        github.wait_for(lambda: github.statuses(sha)[refused:], timeout=60)
        assert [body["state"] for body in github.statuses(sha)[refused:]] == ["success"]


def test_a_git_remote_that_hangs_holds_up_its_own_repository_alone(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", QUICK)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        serve_github() as github,
        running_server(tmp_path / "data", github_api_url=github.url, allow_file_remotes="true") as server,
    ):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/hangs.git"
        server.api("POST", "/repos", json={"name": "some/hanging", "forge": "github", "clone_url": url})
        server.register(REPO, bare)
        payload = push_to_main("2" * 40)
        payload["repository"]["full_name"] = "some/hanging"
        assert server.deliver("push", payload).status_code == 202
        assert server.deliver("push", push_to_main(sha)).status_code == 202
        server.wait_for_run(at_gate, "the gate to open", repo=REPO)
        # A git that waits for an answer notices nothing by itself.
        for end in (server.kill, server.stop):
            assert server.process is not None
            children = below(server.process.pid)
            assert _gits(server)
            end()
            server.start()
            Leftovers.wait_for_end_of(children)
            server.wait_until(lambda: bool(_gits(server)), "the next try")


def test_a_push_cut_off_right_after_its_refs_moved_still_becomes_a_run(tmp_path: Path) -> None:
    make_repository(tmp_path / "repo", QUICK)
    work = tmp_path / "repo" / "work"
    with running_server(tmp_path / "data", allow_containers="false") as server:
        server.api("POST", "/repos", json={"name": "me/app", "forge": "local"})
        for number in range(4):
            git(work, "commit", "--quiet", "--allow-empty", "-m", f"Change {number}")
            wanted = git(work, "rev-parse", "HEAD")
            token = server.headers["Authorization"].removeprefix("Bearer ")
            url = f"{server.url}/git/me/app.git".replace("http://", f"http://git:{token}@")
            moved = tmp_path / "data" / "source"
            killer = threading.Thread(target=_kill_when_moved, args=(server, moved, wanted))
            killer.start()
            with suppress(subprocess.CalledProcessError):
                git(work, "push", "--quiet", url, "HEAD:refs/heads/main")
            killer.join()
            assert server.process is not None
            assert server.process.returncode == -signal.SIGKILL
            server.start()

            def there(sha: str = wanted) -> bool:
                return sha in [run["sha"] for run in server.api("GET", "/runs")["items"]]

            server.wait_until(there, "the push to become a run")
        shas = [run["sha"] for run in server.api("GET", "/runs")["items"]]
        assert len(shas) == len(set(shas)) == 4


def _gits(server: Server) -> list[str]:
    assert server.process is not None
    return [child.name() for child in below(server.process.pid) if child.name().startswith("git")]


def _kill_when_moved(server: Server, folder: Path, sha: str) -> None:
    def has_moved() -> bool:
        with suppress(OSError):
            return (folder / "git/me/app.git/refs/heads/main").read_text().strip() == sha
        return False

    server.wait_until(has_moved, "the ref to move")
    server.kill()
