"""What a replay keeps and what it does again, on every engine: workflows.md sections 1 and 2."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar
from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest

from dynflow.engines import NewInstance
from dynflow.serialization import encode
from dynflow.types import Event, Schedule, StepContext
from dynflow.workflow import current_step
from tests.engine_world import DEADLINE, Gate, World, noting, quick, step_of


async def test_run_begins_at_its_top_after_each_interruption_and_only_results_survive(world: World) -> None:
    """Hibernation, crash, pause: locals are gone, what steps returned is there."""
    tops: list[dict[str, Any]] = []

    async def run(event: Any, step: Any) -> Any:
        memory: dict[str, Any] = {}
        tops.append(memory)
        assert memory == {}
        memory["kept"] = await step.do("kept", lambda: len(tops))
        await step.sleep("nap", 10)
        memory["local"] = len(tops)
        await step.wait_for_event("w", type="go")
        return [memory, len(tops)]

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(10)  # hibernation
    await world.parked(instance, 2)
    await world.reopen()  # a crash
    instance = await world.engine.binding("run").get(instance.id)
    await instance.pause()
    await instance.resume()
    await world.parked(instance, 3)
    await instance.send_event(type="go")
    assert await instance.result(timeout=DEADLINE) == [{"kept": 1, "local": 4}, 4]


async def test_a_result_of_none_is_a_result(world: World) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        first = await step.do("nothing", noting(calls, "called"))
        await step.sleep("nap", 1)
        return first

    assert await world.run_through(await world.start(run)) is None
    assert calls == ["called"]


async def test_registered_dataclasses_are_plain_data_and_come_back_as_themselves(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        made = await step.do("make", lambda: {"event": Event("t", (1,), event.timestamp)})
        await step.sleep("nap", 1)
        return made

    instance = await world.start(run)
    result = await world.run_through(instance)
    assert result == {"event": Event("t", (1,), (await instance.status()).created_at)}


async def test_a_schedule_reaches_the_workflow_as_it_was_given(world: World) -> None:
    schedule = Schedule("*/5 * * * *", world.clock.now() - timedelta(minutes=1))

    async def run(event: Any, step: Any) -> Any:
        await step.sleep("nap", 1)
        return event.schedule

    binding = world.register(run)
    item = NewInstance("scheduled", encode({}), encode(schedule))
    assert await world.engine.create("run", "", [item]) == [True]
    assert await world.run_through(await binding.get("scheduled")) == schedule


async def test_a_result_is_stored_before_the_call_of_its_step_returns(world: World) -> None:
    seen: list[Any] = []

    async def run(event: Any, step: Any) -> Any:
        async def look(ctx: StepContext) -> None:
            first = step_of(await (await world.engine.binding("run").get("me")).status(), "first")
            seen.append((first.status, first.output))

        await step.do("first", lambda: "stored")
        await step.do("look", look)

    await (await world.start(run, id="me")).result(timeout=DEADLINE)
    assert seen == [("complete", "stored")]


async def test_steps_of_different_kinds_with_one_name_are_different_steps(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        done = await step.do("same", lambda ctx: ctx.step.count)
        await step.sleep("same", 1)
        await step.sleep_until("same", 0)
        got = await step.wait_for_event("same", type="go")
        return [done, got.payload, await step.do("same", lambda ctx: ctx.step.count)]

    instance = await world.start(run)
    await instance.send_event(type="go", payload="got")
    assert await world.run_through(instance) == [1, "got", 2]
    steps = [(step.kind, step.name, step.count) for step in (await instance.status()).steps]
    assert steps == [
        ("do", "same", 1), ("sleep", "same", 1), ("sleep_until", "same", 1), ("wait_for_event", "same", 1),
        ("do", "same", 2),
    ]  # fmt: skip


async def test_numbers_are_taken_at_the_call_and_not_when_it_is_awaited(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        first, second = (
            step.do("same", lambda ctx: ctx.step.count),
            step.do("same", lambda ctx: ctx.step.count),
        )
        return [await second, await first]

    assert await world.result(run) == [2, 1]


async def test_exponential_delays_have_no_cap_and_no_jitter(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.do("fails", quick(15, 1, "exponential"), lambda: 1 / 0)

    instance = await world.start(run)
    with pytest.raises(ZeroDivisionError):
        await world.run_through(instance)
    delays = [attempt.retry_delay for attempt in step_of(await instance.status(), "fails").attempts]
    assert delays[:-1] == [timedelta(seconds=2**n) for n in range(15)]


@pytest.mark.parametrize(("limit", "attempts"), [(0, [1, 2]), (1, [1, 2]), (2, [1, 2, 3])])
async def test_an_attempt_that_a_crash_cut_off_counts_as_made_but_is_never_the_last(
    world: World, limit: int, attempts: list[int]
) -> None:
    gate, made = Gate(), []

    async def work(ctx: StepContext) -> None:
        made.append(ctx.attempt)
        if ctx.attempt == 1:
            await gate()
        raise ValueError("no luck")

    async def run(event: Any, step: Any) -> None:
        await step.do("work", quick(limit, 0), work)

    instance = await world.start(run)
    await gate.reached()
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    with pytest.raises(ValueError, match="no luck"):
        await world.run_through(instance)
    assert made == attempts


async def test_crashes_alone_never_use_a_step_up(world: World) -> None:
    gate, made = Gate(), []

    async def work(ctx: StepContext) -> str:
        made.append(ctx.attempt)
        return "done" if ctx.attempt == 5 else await gate()

    async def run(event: Any, step: Any) -> Any:
        return await step.do("work", quick(1, 0), work)

    instance = await world.start(run)
    for _ in range(4):
        await gate.reached()
        gate.entered.clear()
        await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    assert await instance.result(timeout=DEADLINE) == "done"
    assert made == [1, 2, 3, 4, 5]


async def test_nothing_of_an_attempt_runs_on_after_its_timeout(world: World) -> None:
    gate, ran_on = Gate(), []

    async def helper() -> None:
        await gate()
        ran_on.append("helper")

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(helper())
            group.create_task(helper())
        ran_on.append("work")

    async def run(event: Any, step: Any) -> str:
        with contextlib.suppress(TimeoutError):
            await step.do("work", quick(0, 0) | {"timeout": 5}, work)
        return await step.do("after", gate.opened.set) or "timed out"

    instance = await world.start(run)
    await gate.reached()
    world.advance(5)
    assert await instance.result(timeout=DEADLINE) == "timed out"
    for _ in range(20):
        await asyncio.sleep(0)
    assert (ran_on, gate.cancelled) == ([], 2)


async def test_the_event_given_to_a_callback_cannot_be_changed(world: World) -> None:
    async def run(event: Any, step: Any) -> str:
        try:
            event.payload = "changed"
        except FrozenInstanceError:
            return "frozen"
        return "changed"

    assert await world.result(run) == "frozen"


mine: ContextVar[str] = ContextVar("mine", default="nobody's")


async def test_an_instance_inherits_nothing_of_who_made_or_woke_it(world: World) -> None:
    """Whoever creates or wakes an instance may be a step of another tenant: its identity stays its own."""
    seen: list[Any] = []

    async def child(event: Any, step: Any) -> None:
        seen.append((current_step.get(), mine.get()))
        await step.do("look", lambda ctx: seen.append((ctx.step.name, mine.get())))
        await step.wait_for_event("w", type="go")
        seen.append((current_step.get(), mine.get()))

    async def parent(event: Any, step: Any) -> None:
        async def make() -> None:
            mine.set("the parent's")
            await world.engine.binding("child").create(id="made")

        await step.do("make", make)

    world.register(child)
    await world.result(parent)
    instance = await world.engine.binding("child").get("made")
    await world.parked(instance)
    mine.set("the waker's")
    await instance.send_event(type="go")
    await instance.result(timeout=DEADLINE)
    start, wake = (None, "nobody's"), (None, "nobody's")
    assert seen == [start, ("look", "nobody's"), start, wake]
