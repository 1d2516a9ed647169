"""Limits on every engine: each is a setting with the default of workflows.md section 8."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from dynflow.engines import Limits
from dynflow.errors import (
    InvalidArgumentError,
    ValueTooLargeError,
    WorkflowFatalError,
    WorkflowInternalError,
)
from tests.engine_world import DEADLINE, World, quick, step_of


async def test_limits_have_the_defaults_of_the_contract(world: World) -> None:
    year = timedelta(days=365)
    contract = Limits(
        payload=2**20, state=2**30, steps=10_000, retries=10_000, wait=timedelta(days=365), batch=100
    )
    assert world.engine.limits == contract == Limits()

    async def run(event: Any, step: Any) -> Any:
        waits = [step.sleep("nap", year), step.wait_for_event("w", type="go", timeout=year)]
        return await asyncio.gather(*waits, step.do("a", quick(10_000, 0), lambda: 1), return_exceptions=True)

    instance = await world.start(run)
    status = await world.parked(instance)
    assert step_of(status, "nap").deadline == step_of(status, "w").deadline == world.clock.now() + year
    assert step_of(status, "a").status == "complete"
    assert len(await world.engine.binding("run").create_batch([{} for _ in range(100)])) == 100


async def over_payload(step: Any) -> None:
    await step.do("a", lambda: "x" * 99)


async def over_steps(step: Any) -> None:
    for _ in range(3):
        await step.do("a", lambda: 1)


async def over_state(step: Any) -> None:
    for _ in range(100):
        await step.do("a", lambda: "x" * 90)


@pytest.mark.parametrize(
    ("limits", "over", "error"),
    [
        (Limits(payload=100), over_payload, WorkflowInternalError),
        (Limits(steps=2), over_steps, WorkflowFatalError),
        (Limits(state=5_000), over_state, WorkflowInternalError),
        (Limits(retries=2), lambda step: step.do("a", quick(3, 0), lambda: 1), WorkflowFatalError),
        (Limits(wait=timedelta(60)), lambda step: step.sleep("a", "61 days"), WorkflowFatalError),
        (Limits(wait=timedelta(60)), lambda step: step.sleep_until("a", 4e9), WorkflowFatalError),
        (
            Limits(wait=timedelta(60)),
            lambda step: step.wait_for_event("a", type="go", timeout="61 days"),
            WorkflowFatalError,
        ),
    ],
    ids=["payload", "steps", "state", "retries", "sleep", "sleep_until", "wait"],
)
async def test_each_limit_of_a_workflow_is_a_setting(
    engine_factory: Any, limits: Limits, over: Any, error: type[Exception]
) -> None:
    async def run(event: Any, step: Any) -> Any:
        await over(step)

    async def within(event: Any, step: Any) -> Any:
        await step.sleep("a", 0)
        return await step.do("a", quick(2, 0), lambda: "x" * 90)

    async with World(engine_factory, limits=limits) as world:
        with pytest.raises(error):
            await world.result(run)
        assert await world.result(within) == "x" * 90


async def test_each_limit_of_a_call_is_a_setting(engine_factory: Any) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.wait_for_event("w", type="go")

    async with World(engine_factory, limits=Limits(payload=100, batch=2)) as world:
        binding = world.register(run)
        with pytest.raises(ValueTooLargeError):
            await binding.create(params="x" * 99)
        instance = await binding.create(params="x" * 98)
        with pytest.raises(ValueTooLargeError):
            await instance.send_event(type="go", payload="x" * 99)
        with pytest.raises(InvalidArgumentError):
            await binding.create_batch([{}] * 3)
        with pytest.raises(InvalidArgumentError):
            await binding.delete_batch(["a"] * 3)
        assert len(await binding.create_batch([{}] * 2)) == 2
        await instance.send_event(type="go", payload="x" * 98)
        await instance.result(timeout=DEADLINE)
