"""Steps that a tenant cancels, or that its isolate leaves behind: told apart across the wire."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynflow import create_dynamic_workflow_entrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import Capability, ProcessLoader, TrustedLoader, WorkerCode
from tests.engine_world import World, step_of

DEADLINE = 30

CODE = """
import asyncio, os
from dynflow import WorkflowEntrypoint

NO_RETRIES = {"retries": {"limit": 0, "delay": 0}}

class Cancels(WorkflowEntrypoint):
    async def run(self, event, step):
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(step.wait_for_event("lost", type="go"))
                group.create_task(step.do("fails", NO_RETRIES, lambda: 1 / 0))
        except ExceptionGroup:
            pass
        await step.sleep("nap", 60)
        return (await step.wait_for_event("next", type="go")).payload

class AlwaysDies(WorkflowEntrypoint):
    async def run(self, event, step):
        delay = 0 if event.payload == "number" else lambda ctx, error: 0
        await step.do("dies", {"retries": {"limit": 2, "delay": delay}}, lambda: os._exit(1))

class LeavesAStep(WorkflowEntrypoint):
    async def run(self, event, step):
        await self.env.HOLD.hold()
        left = asyncio.ensure_future(step.do("left", NO_RETRIES, lambda: 1))
        await asyncio.wait([left], timeout=0.5)
        if not left.done():
            os._exit(1)
        return repr(left.exception())

class Dies(WorkflowEntrypoint):
    async def run(self, event, step):
        def die(ctx):
            if ctx.attempt == 1:
                os._exit(1)
            return "survived"

        died = step.do("dies", {"retries": {"limit": 1, "delay": 60}}, die)
        waited, died = await asyncio.gather(step.wait_for_event("kept", type="go"), died)
        return [waited.payload, died]
"""


class _Hold(Capability):
    """Lets nothing be stored until the tenant's `release`."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant

    async def hold(self) -> None:
        """Hold up what is submitted from now on."""
        self._tenant.engine._storage.submit(lambda _: self._tenant.release.wait(DEADLINE))


class Tenant(World):
    """An engine that runs one tenant's code in isolates of a kind."""

    def __init__(self, folder: Path, loader: Any) -> None:
        async def code() -> WorkerCode:
            return WorkerCode("index.py", {"index.py": CODE}, env={"HOLD": _Hold(self)})

        def make(**options: Any) -> EmbeddedEngine:
            engine = EmbeddedEngine(folder / "flow.db", synchronous="NORMAL", **options)
            for name in ("Cancels", "Dies", "AlwaysDies", "LeavesAStep"):

                async def load_runner(context: Any, name: str = name) -> Any:
                    return loader.get("tenant", code).get_entrypoint(name)

                engine.register(name, create_dynamic_workflow_entrypoint(load_runner))
            return engine

        super().__init__(make)
        self.release = threading.Event()

    async def create(self, workflow: str, params: Any = None) -> Any:
        envelope = {"__dispatcher_metadata": {"tenant_id": "t"}, "params": params}
        return await self.engine.binding(workflow).create(id="one", params=envelope)


@pytest.fixture(params=[TrustedLoader, ProcessLoader], ids=["trusted", "process"])
async def tenant(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tenant]:
    async with request.param() as loader, Tenant(tmp_path, loader) as tenant:
        yield tenant


async def test_a_wait_that_tenant_code_cancels_takes_no_event(tenant: Tenant) -> None:
    instance = await tenant.create("Cancels")
    assert step_of(await tenant.parked(instance), "lost").status == "cancelled"
    await instance.send_event(type="go", payload="for the next")
    tenant.advance(60)
    assert await instance.result(timeout=DEADLINE) == "for the next"
    assert tenant.kinds(instance)["wait.cancelled"] == 1


@pytest.mark.parametrize("tenant", [ProcessLoader], ids=["process"], indirect=True)
async def test_an_isolate_that_dies_cancels_nothing(tenant: Tenant) -> None:
    instance = await tenant.create("Dies")
    await tenant.saw(instance, "attempt.errored")
    status = await tenant.parked(instance)
    assert step_of(status, "kept").status == "waiting"
    error = step_of(status, "dies").attempts[0].error
    assert error is not None
    assert error.name == "IsolateCrashedError"
    await instance.send_event(type="go", payload="kept")
    await tenant.saw(instance, "wait.completed")
    await tenant.parked(instance, 2)
    tenant.advance(60)
    assert await instance.result(timeout=DEADLINE) == ["kept", "survived"]
    assert not [kind for kind in tenant.order(instance) if kind.endswith("cancelled")]


@pytest.mark.parametrize("delay", ["number", "function"])
@pytest.mark.parametrize("tenant", [ProcessLoader], ids=["process"], indirect=True)
async def test_a_step_that_always_ends_its_isolate_uses_its_attempts_up(tenant: Tenant, delay: str) -> None:
    instance = await tenant.create("AlwaysDies", delay)
    status = await tenant.status(instance, "errored")
    attempts = step_of(status, "dies").attempts
    assert [(attempt.number, attempt.error and attempt.error.name) for attempt in attempts] == [
        (1, "IsolateCrashedError"),
        (2, "IsolateCrashedError"),
        (3, "IsolateCrashedError"),
    ]


@pytest.mark.parametrize("tenant", [ProcessLoader], ids=["process"], indirect=True)
async def test_a_step_whose_isolate_dies_before_its_start_is_stored_has_failed(tenant: Tenant) -> None:
    """Nobody has taken it back: its attempt is made, and counted, though there is nobody to make it."""
    instance = await tenant.create("LeavesAStep")
    segments = tenant.engine._scheduler._live.values()

    async def died() -> None:
        while not any(live.segment._isolate_down for live in segments):  # noqa: ASYNC110 - while nothing is stored
            await asyncio.sleep(0.01)  # nothing says so

    await asyncio.wait_for(died(), DEADLINE)
    tenant.release.set()
    assert "IsolateCrashedError" in await instance.result(timeout=DEADLINE)
    assert [attempt.number for attempt in step_of(await instance.status(), "left").attempts] == [1]
