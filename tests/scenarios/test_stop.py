"""SIGTERM: the server is gone within ten seconds, whatever hangs, and goes on at its next start."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.scenarios.github_server import serve_github
from tests.scenarios.leftovers import Leftovers, below, dead_groups, mounts_below
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import Server, at_gate, concluded, running_server
from tests.scenarios.test_crash import PIPELINE, approve, run_is_in
from tests.scenarios.test_main_job import REPO, push_to_main

LONGEST = 10.0


@contextmanager
def hanging_engine(path: Path) -> Iterator[str]:
    """Stand in for a Docker engine that accepts connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        yield f"unix://{path}"


def stop_and_time(server: Server, going_on: list[psutil.Process] | None = None) -> float:
    """Send SIGTERM, and return how many seconds the process took to end well.

    `going_on` gets the processes that were below it, where a command runs, which goes on without it.
    """
    assert server.process is not None
    children = below(server.process.pid)
    started = time.monotonic()
    server.stop()
    took = time.monotonic() - started
    assert server.process.returncode == 0, server.log()
    if going_on is None:
        Leftovers.wait_for_end_of(children)
    else:
        going_on += children
    return took


def follow(url: str, headers: dict[str, str], opened: threading.Semaphore) -> None:
    with (
        suppress(httpx.HTTPError),
        httpx.stream("GET", url, headers=headers, timeout=60) as response,
    ):
        for _ in response.iter_lines():
            opened.release()


def test_a_stop_under_load_is_quick_and_the_next_start_goes_on(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE.format(slow="lint", seconds=2))
    data = tmp_path / "data"
    going_on: list[psutil.Process] = []
    with serve_github() as github, hanging_engine(tmp_path / "docker.sock") as engine:
        github.down = True
        server = Server(
            data,
            {
                "DYNFLOW_GITHUB_API_URL": github.url,
                "DYNFLOW_ALLOW_FILE_REMOTES": "true",
                "DOCKER_HOST": engine,
            },
        )
        server.start()
        try:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run_is_in(server, "lint")
            run = server.api("GET", "/runs")["items"][0]
            opened = threading.Semaphore(0)
            paths = [f"/runs/{run['id']}/events", f"/runs/{run['id']}/steps/lint/log?follow=1"]
            followers = [
                threading.Thread(target=follow, args=(f"{server.url}/api/v1{path}", server.headers, opened))
                for path in paths * 3
            ]
            for follower in followers:
                follower.start()
                opened.acquire()
            assert stop_and_time(server, going_on) < LONGEST
            for follower in followers:
                follower.join(timeout=10)
                assert not follower.is_alive()

            server.start()
            run = server.wait_for_run(at_gate, "the gate to open")
            github.down = False
            approve(server, run)
            assert server.wait_for_run(concluded, "the run to conclude")["conclusion"] == "success"
            assert stop_and_time(server) < LONGEST
            Leftovers.wait_for_end_of(going_on)
            assert mounts_below(data) == []
        finally:
            server.stop()
    assert dead_groups(server.pids) == []


def test_a_github_that_says_nothing_holds_up_no_stop(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE.format(slow="nothing", seconds=0))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"github_api_url": url, "allow_file_remotes": "true", "allow_containers": "false"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            connection, _ = silent.accept()  # the first report is under way
            with connection:
                server.wait_for_run(at_gate, "the gate to open")
                assert stop_and_time(server) < LONGEST


def test_an_idle_server_stops_within_moments(tmp_path: Path) -> None:
    with running_server(tmp_path / "data", allow_containers="false") as server:
        assert stop_and_time(server) < LONGEST / 2
