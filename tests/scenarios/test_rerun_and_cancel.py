"""Rerun, cancel, gates and lists over the HTTP API of one server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scenarios.github_server import GitHubServer, serve_github
from tests.scenarios.kill_fuzz import pushed
from tests.scenarios.leftovers import mounts_below
from tests.scenarios.pipelines import git, make_repository
from tests.scenarios.server import Server, at_gate, concluded, running_server, step_named

REPO = "me/app"
# What a branch is called says what its run does.
PIPELINE = """\
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha, branch = (event.payload[key] for key in ("repo", "sha", "branch"))
        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        command = lambda script: run_in_sandbox(workspace, ["sh", "-c", script])
        await step.do("install", lambda: command("echo install >> done.txt && echo ran"))
        if branch.startswith("slow"):
            await step.do("slow", lambda: command("echo slow-started && sleep 600"))
        await step.do("test", lambda: command("echo before && cat done.txt && echo test >> done.txt"))
        if branch.startswith("gate"):
            await step.wait_for_event("approval", type="deploy-approval", timeout="1 hour")
        await step.do("deploy", lambda: command("echo deploy >> done.txt && echo deployed"))
        await step.do("count", lambda: command("cat done.txt"))
"""
FILES = "install\ntest\ndeploy\n"


@dataclass
class World:
    """The server, and a repository to push to."""

    server: Server
    github: GitHubServer
    work: Path
    bare: Path
    numbers: Iterator[int] = field(default_factory=count)

    def push(self, what: str) -> str:
        """Push to a new branch of which the name begins with `what`; return the run's id."""
        branch = f"{what}-{next(self.numbers)}"
        git(self.work, "commit", "--quiet", "--allow-empty", "-m", branch)
        git(self.work, "push", "--quiet", str(self.bare), f"HEAD:refs/heads/{branch}")
        sha = git(self.work, "rev-parse", "HEAD")
        assert self.server.deliver("push", pushed(REPO, sha, branch)).status_code == 202
        found: list[str] = []

        def look() -> bool:
            found.extend(run["id"] for run in self.runs(ref=branch))
            return bool(found)

        self.server.wait_until(look, "the run to be there")
        return found[0]

    def runs(self, **params: Any) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.server.api("GET", "/runs", params=params)["items"]
        return items

    def get(self, run_id: str) -> dict[str, Any]:
        run: dict[str, Any] = self.server.api("GET", f"/runs/{run_id}")
        return run

    def reach(self, run_id: str, condition: Any, what: str) -> dict[str, Any]:
        self.server.wait_until(
            lambda: condition(self.get(run_id)), what, lambda: str(self.get(run_id))[-3000:]
        )
        return self.get(run_id)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        url = f"{self.server.url}/api/v1/runs/{path}"
        return httpx.post(url, json=body or {}, headers=self.server.headers, timeout=30)

    def log(self, run_id: str, step: str) -> str:
        url = f"{self.server.url}/api/v1/runs/{run_id}/steps/{step}/log"
        response = httpx.get(url, headers=self.server.headers, timeout=30)
        return response.text if response.is_success else ""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("rerun-and-cancel")
    bare, _ = make_repository(folder / "repo", PIPELINE)
    with (
        serve_github() as github,
        running_server(
            folder / "data", github_api_url=github.url, allow_file_remotes="true", allow_containers="false"
        ) as server,
    ):
        server.register(REPO, bare)
        yield World(server, github, folder / "repo" / "work", bare)


def message(response: httpx.Response) -> str:
    """Return what an error says; fail on one of another shape."""
    error = response.json()["error"]
    assert set(error) == {"code", "message", "details"}
    return str(error["message"])


def nothing_is_left(world: World) -> bool:
    """Whether no command's layer, mount or sandbox is left of runs that have ended."""
    data = world.server.data
    return not list(data.glob("workspaces/*/pending/*")) and not mounts_below(data)


def test_a_whole_rerun_begins_with_the_commits_files(world: World) -> None:
    run_id = world.push("plain")
    first = world.reach(run_id, concluded, "the conclusion")
    assert world.post(f"{run_id}/rerun").status_code == 202
    again = world.reach(run_id, concluded, "the second conclusion")
    assert (first["conclusion"], again["conclusion"], again["attempt"]) == ("success", "success", 2)
    assert world.log(run_id, "count").endswith(FILES) or FILES in world.log(run_id, "count")
    assert world.log(run_id, "count").count("install\n") == 2  # one count each, with one line each
    assert world.log(run_id, "install").count("ran\n") == 2


def test_a_rerun_from_a_step_repeats_no_earlier_one_and_sees_the_files_as_they_were(world: World) -> None:
    run_id = world.push("plain")
    first = world.reach(run_id, concluded, "the conclusion")
    assert world.post(f"{run_id}/rerun", {"from_step": "test"}).status_code == 202
    again = world.reach(run_id, concluded, "the second conclusion")
    assert again["conclusion"] == "success"
    for name in ("checkout", "install"):
        assert step_named(again, name) == step_named(first, name)
    assert step_named(again, "test")["started_at"] > step_named(first, "count")["ended_at"]
    assert world.log(run_id, "install").count("ran\n") == 1
    # `test` saw install's file alone, both times; later layers were gone.
    assert world.log(run_id, "test").count("before\ninstall\n") == 2
    assert "deploy\n" not in world.log(run_id, "test").replace("echo deploy", "")
    assert world.log(run_id, "count").count(FILES) == 2
    world.github.wait_for(lambda: world.github.statuses(first["sha"])[-1]["state"] == "success")


def test_what_cannot_be_rerun_is_refused(world: World) -> None:
    run_id = world.push("gate")
    world.reach(run_id, at_gate, "the gate")
    refused = world.post(f"{run_id}/rerun")
    assert refused.status_code == 409
    assert "has not ended" in message(refused)
    assert world.post(f"{run_id}/cancel").status_code == 202
    world.reach(run_id, concluded, "the conclusion")
    unknown = world.post(f"{run_id}/rerun", {"from_step": "nonsense"})
    assert unknown.status_code == 404
    assert "nonsense" in message(unknown)
    assert world.get(run_id)["conclusion"] == "cancelled"
    assert world.post("nothing/rerun").status_code == 404


def test_a_run_is_cancelled_at_its_gate_once_and_can_be_rerun(world: World) -> None:
    run_id = world.push("gate")
    world.reach(run_id, at_gate, "the gate")
    assert world.post(f"{run_id}/cancel", {"reason": "not today"}).status_code == 202
    run = world.reach(run_id, concluded, "the conclusion")
    assert run["conclusion"] == "cancelled"
    assert "not today" in run["reason"]
    assert [gate["state"] for gate in run["gates"]] == ["closed"]
    twice = world.post(f"{run_id}/cancel")
    assert twice.status_code == 409
    assert "cancelled" in message(twice)
    late = world.post(f"{run_id}/gates/approval", {"decision": "approve"})
    assert late.status_code == 409
    assert nothing_is_left(world)
    assert world.post(f"{run_id}/rerun", {"from_step": "test"}).status_code == 202
    world.reach(run_id, at_gate, "the gate again")
    assert world.post(f"{run_id}/gates/approval", {"decision": "approve"}).status_code == 200
    assert world.reach(run_id, concluded, "the conclusion")["conclusion"] == "success"


def test_a_run_is_cancelled_during_a_command_which_ends_at_once(world: World) -> None:
    run_id = world.push("slow")
    world.server.wait_until(lambda: "slow-started\n" in world.log(run_id, "slow"), "the command to run")
    answers = [world.post(f"{run_id}/cancel").status_code for _ in range(2)]
    assert answers[0] == 202
    assert answers[1] in {202, 409}  # still going down, or down
    run = world.reach(run_id, concluded, "the conclusion")
    assert run["conclusion"] == "cancelled"
    world.server.wait_until(lambda: nothing_is_left(world), "the command's layer to be dropped")
    world.server.wait_until(lambda: "stopped after" in world.log(run_id, "slow"), "the log's last word")
    world.github.wait_for(lambda: world.github.statuses(run["sha"])[-1]["state"] == "error")


def test_a_run_is_cancelled_before_it_has_begun(world: World) -> None:
    run_id = world.push("slow")
    assert world.post(f"{run_id}/cancel").status_code == 202
    assert world.reach(run_id, concluded, "the conclusion")["conclusion"] == "cancelled"
    world.server.wait_until(lambda: nothing_is_left(world), "nothing to be left")


def test_a_rejected_gate_ends_the_run_with_who_and_why(world: World) -> None:
    run_id = world.push("gate")
    world.reach(run_id, at_gate, "the gate")
    rejected = {"decision": "reject", "comment": "on a Friday?"}
    assert world.post(f"{run_id}/gates/approval", rejected).status_code == 200
    run = world.reach(run_id, concluded, "the conclusion")
    assert run["conclusion"] == "failure", run
    assert "on a Friday?" in run["reason"]
    assert [gate["state"] for gate in run["gates"]] == ["rejected"]
    assert not any(step["name"] == "deploy" for step in run["steps"])
    assert world.post(f"{run_id}/gates/approval", {"decision": "approve"}).status_code == 409


def test_the_second_decision_is_refused_and_told_the_first(world: World) -> None:
    run_id = world.push("gate")
    world.reach(run_id, at_gate, "the gate")
    assert world.post(f"{run_id}/gates/approval", {"decision": "approve"}).status_code == 200
    for decision in ("approve", "reject"):
        second = world.post(f"{run_id}/gates/approval", {"decision": decision})
        assert second.status_code == 409
        assert "approved by local-admin" in message(second)
    assert world.reach(run_id, concluded, "the conclusion")["conclusion"] == "success"


def test_pages_of_runs_skip_and_repeat_none_while_runs_come_in(world: World) -> None:
    wanted = [world.push("page") for _ in range(4)]
    params: dict[str, Any] = {"limit": 1, "repo": REPO}
    seen: list[str] = []
    while True:
        page = world.server.api("GET", "/runs", params=params)
        seen += [run["id"] for run in page["items"]]
        if page["cursor"] is None:
            break
        params["cursor"] = page["cursor"]
        if len(seen) < 4:
            world.push("page")
    assert len(seen) == len(set(seen))
    assert [run_id for run_id in seen if run_id in wanted] == wanted[::-1]
    for run_id in wanted:
        world.reach(run_id, concluded, "the conclusion")
    branch = world.get(wanted[0])["branch"]
    assert [run["id"] for run in world.runs(ref=branch)] == [wanted[0]]
    assert [run["id"] for run in world.runs(ref=f"refs/heads/{branch}", status="success")] == [wanted[0]]
    assert world.runs(ref=branch, status="cancelled") == []
    assert world.runs(repo="nobody/nothing") == []
    bad = httpx.get(
        f"{world.server.url}/api/v1/runs", params={"cursor": "x"}, headers=world.server.headers, timeout=30
    )
    assert bad.status_code == 400
