"""What instances show of themselves on every engine: status, history, frozen values (workflows.md section 5)."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from dynflow import types
from dynflow.types import ErrorInfo, StepContext
from tests.engine_world import DEADLINE, NO_RETRIES, Gate, World, quick, step_of


def test_every_value_is_a_frozen_dataclass() -> None:
    values = [
        value
        for value in vars(types).values()
        if isinstance(value, type) and value.__module__ == types.__name__
    ]
    assert len(values) >= 10
    for value in values:
        assert dataclasses.is_dataclass(value)
        assert value.__dataclass_params__.frozen, value  # type: ignore[attr-defined]


async def test_a_status_shows_output_steps_and_attempts_with_their_times_errors_and_delays(
    world: World,
) -> None:
    start = world.clock.now()

    def flaky(ctx: StepContext) -> str:
        if ctx.attempt == 1:
            raise ConnectionError("down")
        return "up"

    async def run(event: Any, step: Any) -> Any:
        await step.do("flaky", quick(1, 30), flaky)
        return "output"

    instance = await world.start(run, id="shown")
    await world.parked(instance)
    during = step_of(await instance.status(), "flaky")
    assert (during.status, during.deadline) == ("waiting", start + timedelta(seconds=30))
    world.advance(30)
    assert await instance.result(timeout=DEADLINE) == "output"
    status = await instance.status()
    assert (status.id, status.status, status.output, status.error, status.rollback) == (
        "shown", "complete", "output", None, None,
    )  # fmt: skip
    assert (status.created_at, status.ended_at) == (start, start + timedelta(seconds=30))
    (step,) = status.steps
    assert (step.name, step.kind, step.count, step.status, step.output) == (
        "flaky",
        "do",
        1,
        "complete",
        "up",
    )
    first, second = step.attempts
    assert (first.number, first.started_at, first.ended_at) == (1, start, start)
    assert (first.error, first.retry_delay) == (ErrorInfo("ConnectionError", "down"), timedelta(seconds=30))
    assert (second.number, second.started_at) == (2, start + timedelta(seconds=30))
    assert (second.ended_at, second.error, second.retry_delay) == (start + timedelta(seconds=30), None, None)


async def test_statuses_are_those_of_the_contract(engine_factory: Any) -> None:
    gate, seen = Gate(), set()

    async def run(event: Any, step: Any) -> None:
        await step.do("gate", gate)
        await step.sleep("nap", 10)
        if event.payload == "fails":
            raise ValueError("no")

    async with World(engine_factory, concurrency=1) as world:
        binding = world.register(run)
        first = await binding.create()
        await gate.reached()
        second = await binding.create(params="fails")
        seen |= {(await instance.status()).status for instance in (first, second)}
        await first.pause()
        seen.add((await first.status()).status)
        gate.opened.set()
        seen.add((await world.status(first, "paused")).status)
        await first.resume()
        for instance in (first, second):
            seen.add((await world.parked(instance)).status)
        third = await binding.create()
        await world.parked(third)
        await third.terminate()
        world.advance(10)
        seen.add((await world.status(first, "complete")).status)
        seen.add((await world.status(second, "errored")).status)
        seen.add((await third.status()).status)
    assert seen == {
        "queued", "running", "waiting", "waiting_for_pause", "paused", "complete", "errored", "terminated",
    }  # fmt: skip


async def test_the_history_of_a_run_with_everything_in_it(world: World) -> None:
    def flaky(ctx: StepContext) -> str:
        return "up" if ctx.attempt > 1 else str(1 / 0)

    async def run(event: Any, step: Any) -> None:
        await step.do("flaky", quick(1, 10), flaky, rollback=lambda: None)
        await step.sleep("nap", 10)
        for name in ("got", "missed"):
            try:
                await step.wait_for_event(name, type="go", timeout=10)
            except TimeoutError:
                await step.do("fails", NO_RETRIES, lambda: 1 / 0)

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(10)
    await world.parked(instance, 2)
    await instance.pause()
    await instance.resume()
    await world.parked(instance, 3)
    await instance.send_event(type="go")
    world.advance(10)
    with pytest.raises(ZeroDivisionError):
        await world.run_through(instance)
    events = [event async for event in instance.subscribe()]
    told = [event.type for event in events]
    began = ["workflow.queued", "workflow.started", "workflow.running", "step.started", "attempt.started"]
    assert told[: len(began)] == began
    for kind, times in {
        "attempt.started": 4, "attempt.errored": 1, "attempt.completed": 1, "step.completed": 1, "step.errored": 1,
        "sleep.started": 1, "sleep.completed": 1, "wait.started": 2, "wait.completed": 1, "wait.timed_out": 1,
        "rollback.started": 1, "rollback.completed": 1, "workflow.paused": 1, "workflow.errored": 1,
    }.items():  # fmt: skip
        assert told.count(kind) >= times, kind
    assert told[-1] == "workflow.errored"
    numbers = [event.event_id for event in events]
    assert numbers == sorted(set(numbers))
    assert all(event.timestamp.tzinfo for event in events)
    errored = next(event for event in events if event.type == "attempt.errored")
    assert (errored.data["step"], errored.data["count"], errored.data["attempt"]) == ("flaky", 1, 1)
    assert errored.data["error"]["name"] == "ZeroDivisionError"


async def test_live_events_come_to_every_subscriber_each_once(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        for number in range(5):
            await step.wait_for_event(f"w{number}", type="go")

    instance = await world.start(run)

    async def follow() -> list[int]:
        return [event.event_id async for event in instance.subscribe()]

    followers = [asyncio.ensure_future(follow()) for _ in range(3)]
    for _ in range(5):
        await instance.send_event(type="go")
    await instance.result(timeout=DEADLINE)
    async with asyncio.timeout(DEADLINE):
        seen = await asyncio.gather(*followers)
    history = [event.event_id async for event in instance.subscribe()]
    assert seen == [history] * 3


async def test_a_subscription_goes_on_over_the_end_of_a_run_that_was_restarted(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return (await step.wait_for_event("w", type="go")).payload

    instance = await world.start(run)
    await instance.send_event(type="go", payload=1)
    await instance.result(timeout=DEADLINE)
    await instance.restart()
    await world.status(instance, "waiting")
    seen: list[str] = []
    async with asyncio.timeout(DEADLINE):
        async for event in instance.subscribe():
            seen.append(event.type)
            if seen.count("wait.started") == 2 and seen[-1] == "workflow.waiting":
                await instance.send_event(type="go", payload=2)
    assert seen.count("workflow.completed") == 2
    assert seen[-1] == "workflow.completed"
    assert await instance.result(timeout=DEADLINE) == 2


async def test_who_waits_for_a_result_waits_for_that_of_the_run_that_is(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        return await step.do("gate", gate)

    instance = await world.start(run)
    await gate.reached()
    waiting = [asyncio.ensure_future(instance.result(timeout=DEADLINE)) for _ in range(3)]
    await asyncio.sleep(0)
    await instance.restart()
    assert not any(each.done() for each in waiting)
    gate.opened.set()
    assert await asyncio.gather(*waiting) == ["through"] * 3
