"""What the API's tests do: push a pipeline, wait for runs, read event streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx

from ci_platform.repository_push import Destination, push_folder
from ci_platform.serving import Running

SECRET = "It's a Secret to Everybody"

HEAD = """
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha = event.payload["repo"], event.payload["sha"]
        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        def sh(name, script):
            return step.do(name, lambda: run_in_sandbox(workspace, ["sh", "-c", script]))
"""

QUICK = HEAD + '        await sh("greet", "echo hello; echo world")\n'
GATED = HEAD + (
    '        await sh("before", "echo before")\n'
    '        await step.wait_for_event("approval", type="go", timeout="1 hour")\n'
    '        await sh("after", "echo after")\n'
)
SLOW = HEAD + '        await sh("wait", "echo begun; while [ ! -e /nothing ]; do sleep 0.1; done")\n'
FAILING = HEAD + '        await sh("break", "echo broken; exit 3")\n'


@dataclass
class Event:
    id: str | None
    event: str
    data: Any


@dataclass
class World:
    served: Running
    http: httpx.AsyncClient
    folder: Path
    repo: str

    async def push(
        self, pipeline: str, *, files: Mapping[str, str] | None = None, branch: str = "main"
    ) -> str:
        """Push a pipeline; return the id of its run."""
        await self.http.post("/api/v1/repos", json={"name": self.repo})
        tree = self.folder / "tree"
        for name, text in {**(files or {}), ".dynflow/ci.py": pipeline}.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text, errors="surrogateescape")  # bytes that are no text are wanted, too
        destination = Destination(self.served.url, self.repo, branch, self.served.token)
        sha = await anyio.to_thread.run_sync(push_folder, tree, destination, "A change")
        with anyio.fail_after(30):
            while True:
                for run in await self.runs():
                    if run["sha"] == sha and run["branch"] == branch:
                        return str(run["id"])
                await anyio.sleep(0.01)

    async def runs(self, **query: Any) -> list[dict[str, Any]]:
        answer = await self.http.get("/api/v1/runs", params={"repo": self.repo, **query})
        assert answer.status_code == 200, answer.text
        items: list[dict[str, Any]] = answer.json()["items"]
        return items

    async def run(self, run_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/api/v1/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        run: dict[str, Any] = answer.json()
        return run

    async def concluded(self, run_id: str) -> dict[str, Any]:
        """Wait until the run has ended."""
        with anyio.fail_after(60):
            await self.served.platform.runs.concluded(run_id)
        return await self.run(run_id)

    async def at_gate(self, run_id: str) -> dict[str, Any]:
        """Wait until a gate of the run is open."""
        return await self.until(run_id, lambda run: any(gate["state"] == "open" for gate in run["gates"]))

    async def working_on(self, run_id: str, step: str) -> dict[str, Any]:
        """Wait until the run is in this step."""
        return await self.until(
            run_id,
            lambda run: any(one["name"] == step and one["status"] == "running" for one in run["steps"]),
        )

    async def until(self, run_id: str, wanted: Any) -> dict[str, Any]:
        with anyio.fail_after(60):
            while True:
                run = await self.run(run_id)
                if wanted(run):
                    return run
                assert run["conclusion"] is None, run
                await anyio.sleep(0.01)

    async def decide(self, run_id: str, decision: str, gate: str = "approval", **more: Any) -> httpx.Response:
        return await self.http.post(
            f"/api/v1/runs/{run_id}/gates/{gate}", json={"decision": decision, **more}
        )

    @asynccontextmanager
    async def events(self, path: str, **options: Any) -> AsyncIterator[AsyncIterator[Event]]:
        """Open an event stream."""
        async with self.http.stream("GET", path, **options) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            yield parse(response.aiter_lines())


async def parse(lines: AsyncIterator[str]) -> AsyncIterator[Event]:
    fields: dict[str, str] = {}
    async for line in lines:
        name, _, value = line.partition(":")
        if line:
            fields[name] = value.removeprefix(" ")
            continue
        if "data" in fields:
            yield Event(fields.get("id"), fields.get("event", "message"), json.loads(fields["data"]))
        fields = {}


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check the one shape of errors, and return the error."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"code", "message", "details"}
    assert error["code"] == code, error
    assert error["message"]
    return error
