"""SIGKILL at any moment: the run goes on from its last finished step, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.scenarios.github_server import serve_github
from tests.scenarios.leftovers import Leftovers
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import Server, at_gate, concluded, running_server, step_named
from tests.scenarios.test_main_job import REPO, push_to_main

# The first attempt of the slow command says that it runs and takes `seconds` to kill it in; the next ends at once.
PIPELINE = """\
import asyncio
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

SLOW = {slow!r}

def command(name, ctx=None):
    pause = " && sleep {seconds}" if name == SLOW and ctx.attempt == 1 else ""
    says = f"echo {{name}}-started{{pause}} && echo {{name}} >> ran-{{name}}.txt && echo {{name}}-finished"
    return ["sh", "-c", says]

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha = event.payload["repo"], event.payload["sha"]

        async def checkout(ctx):
            workspace = await self.env.ARTIFACTS.fork(repo, sha=sha)
            await run_in_sandbox(workspace, command("checkout", ctx))
            return workspace

        workspace = await step.do("checkout", checkout)
        await step.do("install", lambda: run_in_sandbox(workspace, command("install")))
        await asyncio.gather(
            step.do("lint", lambda ctx: run_in_sandbox(workspace, command("lint", ctx))),
            step.do("test", lambda: run_in_sandbox(workspace, command("test"))),
        )
        await step.wait_for_event("approval", type="deploy-approval", timeout="24 hours")
        await step.do("deploy", lambda ctx: run_in_sandbox(workspace, command("deploy", ctx)))
        result = await step.do("count", lambda: run_in_sandbox(workspace, ["sh", "-c", "cat ran-*.txt"]))
        return result.output.split()
"""
STEPS = ["checkout", "install", "lint", "test", "deploy"]


def log_of(server: Server, run: dict[str, Any], step: str) -> str:
    response = httpx.get(
        f"{server.url}/api/v1/runs/{run['id']}/steps/{step}/log", headers=server.headers, timeout=30
    )
    return response.text if response.is_success else ""


def run_is_in(server: Server, step: str) -> None:
    """Wait until the command of `step` is running."""

    def look() -> bool:
        runs = server.api("GET", "/runs")["items"]
        return bool(runs) and f"{step}-started\n" in log_of(server, runs[0], step)

    server.wait_until(look, f"step {step} to run")


def sibling_is_recorded(run: dict[str, Any]) -> bool:
    return any(step["name"] == "test" and step["status"] == "complete" for step in run["steps"])


def kill_and_check(server: Server) -> list[psutil.Process]:
    """SIGKILL the server; every process below it must go too, but for the command that runs, which goes on.

    Returns the command's: its supervisor, its init, and its own two.
    """
    assert server.process is not None
    below = psutil.Process(server.process.pid).children(recursive=True)
    server.kill()
    gone, alive = psutil.wait_procs(below, timeout=3)
    assert gone
    assert len(alive) in {0, 4}, [(process.pid, process.cmdline()) for process in alive]
    return alive


def approve(server: Server, run: dict[str, Any]) -> None:
    server.api("POST", f"/runs/{run['id']}/gates/approval", json={"decision": "approve"})


@pytest.mark.parametrize("moment", ["checkout", "lint", "gate", "deploy"])
def test_a_killed_run_goes_on_and_repeats_no_finished_step(tmp_path: Path, moment: str) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE.format(slow=moment, seconds=60))
    data = tmp_path / "data"
    left: list[psutil.Process] = []
    with (
        serve_github() as github,
        running_server(data, github_api_url=github.url, allow_file_remotes="true") as server,
    ):
        server.register(REPO, bare)
        server.deliver("push", push_to_main(sha))
        if moment in {"checkout", "lint"}:
            run_is_in(server, moment)
            if (
                moment == "lint"
            ):  # its sibling has finished only once that is recorded, not when its command has
                server.wait_for_run(sibling_is_recorded, "step test to be recorded")
            left += kill_and_check(server)
            server.start()
        run = server.wait_for_run(at_gate, "the gate to open")
        if moment == "gate":
            assert kill_and_check(server) == []
            server.start()
            run = server.wait_for_run(at_gate, "the gate to be open again")
        approve(server, run)
        if moment == "deploy":
            run_is_in(server, "deploy")
            left += kill_and_check(server)
            server.start()
        run = server.wait_for_run(concluded, "the run to conclude")

        assert run["conclusion"] == "success", run
        # The next attempt asked for another command, so what went on was of no use.
        Leftovers.wait_for_end_of(left)
        # Each step's files are there once: no layer of a killed attempt was kept, none of a finished one is lost.
        assert step_named(run, "count")["status"] == "complete"
        for step in STEPS:
            text = log_of(server, run, step)
            assert text.count(f"{step}-finished\n") == 1, (step, text)
            attempts = len(step_named(run, step)["attempts"])
            assert attempts == (2 if step == moment else 1), (step, attempts)
        counted = log_of(server, run, "count")
        assert [counted.count(f"{step}\n") for step in STEPS] == [1] * len(STEPS), counted
        assert list(data.glob("workspaces/*/pending/*")) == []
        github.wait_for(lambda: github.statuses(sha)[-1]["state"] == "success")


GOING_ON = """\
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

SCRIPT = "i=0; while [ $((i=i+1)) -le 60 ]; do echo long-line-$i; sleep 0.1; done; echo long-finished; echo x >>made"

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        workspace = await step.do(
            "checkout", lambda: self.env.ARTIFACTS.fork(event.payload["repo"], sha=event.payload["sha"])
        )
        first = 'echo long-started; ' + SCRIPT
        await step.do("long", lambda: run_in_sandbox(workspace, ["sh", "-c", first]))
        result = await step.do("count", lambda: run_in_sandbox(workspace, ["cat", "made"]))
        return result.output
"""


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_command_goes_on_over_a_restart_of_the_server(tmp_path: Path, way: str) -> None:
    """A deploy of the platform interrupts no build: the step goes on, its log unbroken, and nothing runs twice."""
    bare, sha = make_repository(tmp_path / "repo", GOING_ON)
    with (
        serve_github() as github,
        running_server(
            tmp_path / "data", github_api_url=github.url, allow_file_remotes="true", allow_containers="false"
        ) as server,
    ):
        server.register(REPO, bare)
        server.deliver("push", push_to_main(sha))
        run_is_in(server, "long")
        assert server.process is not None
        below = psutil.Process(server.process.pid).children(recursive=True)
        if way == "kill":
            server.kill()
        else:
            server.stop()
        server.start()
        run = server.wait_for_run(concluded, "the run to conclude")
        assert run["conclusion"] == "success", run
        lines = [line for line in log_of(server, run, "long").splitlines() if line[0] not in "$="]
        assert lines == ["long-started", *(f"long-line-{n}" for n in range(1, 61)), "long-finished"]
        assert log_of(server, run, "count").splitlines()[1] == "x"
        Leftovers.wait_for_end_of(below)
        assert list((tmp_path / "data" / "commands").iterdir()) == []
