"""Steps within steps of tenants: what holds in this process holds across the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynflow import create_dynamic_workflow_entrypoint
from dynflow.binding import WorkflowInstance
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import ProcessLoader, TrustedLoader, WorkerCode
from tests.engine_world import DEADLINE, World, step_of

TENANT = """
import asyncio
from dynflow import WorkflowEntrypoint

class Nested(WorkflowEntrypoint):
    async def run(self, event, step):
        if event.payload == "whose":
            return await self.whose(step)
        async def outer(ctx):
            if event.payload == "pause":
                await step.wait_for_event("before", type="go")
                return await step.do("inner", lambda: "in")
            if ctx.attempt == 1:
                return await step.do("inner", asyncio.Event().wait)
            return await step.do("inner", lambda: f"attempt {ctx.attempt}")

        config = {"retries": {"limit": 2, "delay": 10}, "timeout": 60}
        return [await step.do("outer", config, outer), await step.do("after", lambda: "out")]

    async def whose(self, step):
        async def outer(item, ctx):
            found = await asyncio.gather(*(step.do("inner", lambda n=n: f"{item}{n}") for n in range(2)))
            if ctx.attempt == 1:
                raise ConnectionError
            return found

        results = []
        for item in "ab":
            retries = {"retries": {"limit": 1, "delay": 10 if item == "a" else 0}}
            results.append(await step.do(item, retries, lambda ctx: outer(item, ctx)))
            await step.sleep("nap", 60)
        return results, await step.do("inner", lambda: "at the top")
"""


class Tenant(World):
    """An engine that runs the tenant's workflow in isolates of a kind."""

    def __init__(self, folder: Path, loader: Any) -> None:
        def make(**options: Any) -> EmbeddedEngine:
            async def load_runner(_: Any) -> Any:
                return loader.get("t", lambda: WorkerCode("index.py", {"index.py": TENANT})).get_entrypoint()

            engine = EmbeddedEngine(folder / "flow.db", synchronous="NORMAL", **options)
            engine.register("nested", create_dynamic_workflow_entrypoint(load_runner))
            return engine

        super().__init__(make)

    async def create(self, params: str) -> WorkflowInstance:
        envelope = {"__dispatcher_metadata": {"tenant_id": "t"}, "params": params}
        made: WorkflowInstance = await self.engine.binding("nested").create(params=envelope)
        return made


@pytest.fixture(params=[TrustedLoader, ProcessLoader], ids=["trusted", "process"])
async def tenant(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tenant]:
    async with request.param() as loader, Tenant(tmp_path, loader) as tenant:
        yield tenant


async def test_an_inner_step_that_the_timeout_of_the_outer_cut_off_is_made_again(tenant: Tenant) -> None:
    instance = await tenant.create("time out")
    await tenant.saw(instance, "attempt.started", 2)
    tenant.advance(60)
    await tenant.parked(instance)
    tenant.advance(10)
    assert await instance.result(timeout=DEADLINE) == ["attempt 2", "out"]


async def test_a_pause_lets_an_attempt_with_steps_of_its_own_finish(tenant: Tenant) -> None:
    instance = await tenant.create("pause")
    await tenant.saw(instance, "wait.started")
    await instance.send_event(type="go")
    await instance.pause()
    status = await tenant.status(instance, "paused", "complete")
    if status.status == "paused":
        assert [step.name for step in status.steps] == ["outer", "before", "inner"]
        assert step_of(status, "outer").status == "complete"
        await instance.resume()
    assert await instance.result(timeout=DEADLINE) == ["in", "out"]


async def test_inner_steps_of_different_outer_steps_are_different_ones(tenant: Tenant) -> None:
    instance = await tenant.create("whose")
    results = [["a0", "a1"], ["b0", "b1"]]
    assert await tenant.run_through(instance) == (results, "at the top")
    inner = [step.output for step in (await instance.status()).steps if step.name == "inner"]
    assert sorted(inner) == ["a0", "a1", "at the top", "b0", "b1"]
