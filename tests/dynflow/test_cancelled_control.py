"""Calls whose callers are cancelled after they were submitted: what is durable is told and acted upon all the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynflow.binding import WorkflowInstance
from dynflow.engines import Limits
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import (
    InstanceNotFoundError,
    InstanceTerminatedError,
    InvalidArgumentError,
    WorkflowInternalError,
)
from tests.engine_world import DEADLINE, Gate, World


async def cancelled(call: Coroutine[Any, Any, None]) -> None:
    """Start a call and cancel it before its answer can have come."""
    task = asyncio.ensure_future(call)
    asyncio.get_running_loop().call_soon(task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def waits(event: Any, step: Any) -> Any:
    return (await step.wait_for_event("w", type="go")).payload


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(partial(EmbeddedEngine, tmp_path / "flow.db", synchronous="NORMAL")) as world:
        yield world


async def held(world: World) -> WorkflowInstance:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        await step.do("gate", gate)

    instance = await world.start(run)
    await gate.reached()
    return instance


async def test_who_waits_for_the_end_is_told_of_a_termination(world: World) -> None:
    instance = await held(world)
    waiting = asyncio.ensure_future(instance.result(timeout=DEADLINE))
    await instance.status()  # behind what the result has asked
    await cancelled(instance.terminate())
    with pytest.raises(InstanceTerminatedError):
        await waiting


async def test_who_asks_after_a_termination_is_told_too(world: World) -> None:
    instance = await held(world)
    await cancelled(instance.terminate())
    with pytest.raises(InstanceTerminatedError):
        await instance.result(timeout=DEADLINE)


async def test_followers_see_a_termination(world: World) -> None:
    instance = await held(world)

    async def follow() -> list[str]:
        return [event.type async for event in instance.subscribe()]

    following = asyncio.ensure_future(follow())
    await instance.status()
    await cancelled(instance.terminate())
    async with asyncio.timeout(DEADLINE):
        assert (await following)[-1] == "workflow.terminated"


async def test_an_event_wakes_its_instance(world: World) -> None:
    instance = await world.start(waits)
    await world.parked(instance)
    await cancelled(instance.send_event(type="go", payload=1))
    assert await instance.result(timeout=DEADLINE) == 1


async def test_a_restarted_instance_runs(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return await step.do("one", lambda: 1)

    instance = await world.start(run)
    await instance.result(timeout=DEADLINE)
    await cancelled(instance.restart())
    await world.saw(instance, "workflow.completed", 2)


async def test_who_waits_for_the_end_is_told_of_a_deletion(world: World) -> None:
    instance = await world.start(waits)
    await world.parked(instance)
    waiting = asyncio.ensure_future(instance.result(timeout=DEADLINE))
    await instance.status()
    await cancelled(instance.delete())
    with pytest.raises(InstanceNotFoundError):
        await waiting


async def test_a_tenant_whose_name_is_no_text_is_refused_and_troubles_nobody(world: World) -> None:
    binding = world.register(waits, "waits")
    instance = await binding.for_metadata({"tenant_id": "good"}).create()
    await world.parked(instance)
    with pytest.raises(InvalidArgumentError, match="tenant"):
        await binding.for_metadata({"tenant_id": "\ud800"}).create()
    await instance.send_event(type="go", payload=1)
    assert await instance.result(timeout=DEADLINE) == 1


async def fill(instance: WorkflowInstance) -> None:
    for _ in range(15):
        await instance.send_event(type="other", payload="x" * 5000)


async def test_events_to_an_instance_that_runs_count_into_its_state(tmp_path: Path) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        await step.do("gate", gate)
        await step.do("after", lambda: None)

    limits = Limits(state=100_000)
    make = partial(EmbeddedEngine, tmp_path / "flow.db", synchronous="NORMAL", limits=limits)
    async with World(make) as world:
        instance = await world.start(run)
        await gate.reached()
        for _ in range(15):
            await instance.send_event(type="other", payload="x" * 5000)
        with pytest.raises(WorkflowInternalError, match="takes no more events"):
            await fill(instance)
        gate.opened.set()
        with pytest.raises(WorkflowInternalError, match="the limit is 100,000 bytes"):
            await instance.result(timeout=DEADLINE)
