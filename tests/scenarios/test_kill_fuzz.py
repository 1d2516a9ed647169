"""Kills: a few at random with a fixed seed (scripts/fuzz_kills.py does many), and those right after an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.github_server import GitHubServer, serve_github
from tests.scenarios.kill_fuzz import Fuzz, pushed
from tests.scenarios.leftovers import Leftovers, below
from tests.scenarios.pipelines import git, make_repository
from tests.scenarios.server import Server, at_gate, concluded, running_server, step_named
from tests.scenarios.test_crash import PIPELINE, STEPS, approve, log_of, run_is_in
from tests.scenarios.test_main_job import REPO


def test_random_kills_lose_nothing_repeat_nothing_and_leave_nothing(tmp_path: Path) -> None:
    with serve_github() as github:
        fuzz = Fuzz(tmp_path, github, seed=20261123, repositories=2, pushes=3)
        try:
            fuzz.run(kills=4, longest=1.5)
        finally:
            fuzz.end()


@pytest.fixture
def github() -> Iterator[GitHubServer]:
    with serve_github() as served:
        yield served


@pytest.fixture
def server(tmp_path: Path, github: GitHubServer) -> Iterator[Server]:
    settings = {"github_api_url": github.url, "allow_file_remotes": "true", "allow_containers": "false"}
    with running_server(tmp_path / "data", **settings) as served:
        yield served


def push(tmp_path: Path, server: Server, branch: str, slow: str = "nothing") -> str:
    """Push to a branch of a repository, and tell the server; return the commit."""
    folder = tmp_path / "repo"
    if not folder.exists():
        bare, _ = make_repository(folder, PIPELINE.format(slow=slow, seconds=60))
        server.register(REPO, bare)
    work, bare = folder / "work", folder / "origin.git"
    git(work, "commit", "--quiet", "--allow-empty", "-m", branch)
    git(work, "push", "--quiet", str(bare), f"HEAD:refs/heads/{branch}")
    sha = git(work, "rev-parse", "HEAD")
    assert server.deliver("push", pushed(REPO, sha, branch)).status_code == 202
    return sha


def die_and_rise(server: Server) -> None:
    """SIGKILL, and start again. A command that was running goes on until its run has ended."""
    server.kill()
    server.start()


def shas(server: Server) -> list[str]:
    return sorted(run["sha"] for run in server.api("GET", "/runs")["items"])


def test_deliveries_that_were_answered_right_before_a_kill_become_runs(
    tmp_path: Path, server: Server
) -> None:
    wanted = []
    for number in range(3):
        wanted.append(push(tmp_path, server, f"branch-{number}"))
        die_and_rise(server)
    server.wait_until(
        lambda: shas(server) == sorted(wanted), "each delivery to be a run", lambda: str(wanted)
    )


def test_a_cancellation_that_was_answered_right_before_a_kill_holds(
    tmp_path: Path, server: Server, github: GitHubServer
) -> None:
    sha = push(tmp_path, server, "topic", slow="lint")
    run_is_in(server, "lint")
    run = server.api("GET", "/runs")["items"][0]
    server.api("POST", f"/runs/{run['id']}/cancel", json={})
    assert server.process is not None
    children = below(server.process.pid)
    die_and_rise(server)
    assert server.wait_for_run(concluded, "the run to conclude")["conclusion"] == "cancelled"
    assert log_of(server, run, "lint").count("lint-finished\n") <= 1
    Leftovers.wait_for_end_of(children)
    github.wait_for(lambda: [body["state"] for body in github.statuses(sha)][-1:] == ["error"])


@pytest.mark.parametrize("body", [{}, {"from_step": "lint"}])
def test_a_rerun_that_was_answered_right_before_a_kill_happens_once(
    tmp_path: Path, server: Server, body: dict[str, Any]
) -> None:
    push(tmp_path, server, "topic")
    approve(server, server.wait_for_run(at_gate, "the gate to open"))
    run = server.wait_for_run(concluded, "the run to conclude")
    server.api("POST", f"/runs/{run['id']}/rerun", json=body)
    die_and_rise(server)
    approve(server, server.wait_for_run(at_gate, "the gate to open again"))
    again = server.wait_for_run(concluded, "the run to conclude again")
    assert (again["conclusion"], again["attempt"]) == ("success", 2)
    whole = not body
    assert log_of(server, run, "install").count("install-finished\n") == (2 if whole else 1)
    assert (step_named(again, "install") == step_named(run, "install")) is not whole
    counted = log_of(server, run, "count")
    assert [counted.count(f"{step}\n") for step in STEPS] == [2] * len(STEPS), counted


def test_an_approval_that_was_answered_right_before_a_kill_holds(tmp_path: Path, server: Server) -> None:
    push(tmp_path, server, "topic")
    approve(server, server.wait_for_run(at_gate, "the gate to open"))
    die_and_rise(server)
    run = server.wait_for_run(concluded, "the run to conclude")
    assert run["conclusion"] == "success"
    assert [gate["state"] for gate in run["gates"]] == ["approved"]
