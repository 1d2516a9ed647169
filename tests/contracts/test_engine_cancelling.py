"""Steps that the workflow itself cancels, on every engine: they end for good, and replays agree."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.engine_world import DEADLINE, Gate, World, step_of


async def cancelled_by_a_failing_sibling(step: Any, *, gate: Any = None) -> None:
    """A wait for "go" in a task group whose other task fails."""
    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(step.wait_for_event("lost", type="go"))
            group.create_task(
                step.do("fails", {"retries": {"limit": 0, "delay": 0}}, gate or (lambda: 1 / 0))
            )


async def test_a_cancelled_wait_swallows_no_event(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        await cancelled_by_a_failing_sibling(step)
        return (await step.wait_for_event("next", type="go")).payload

    instance = await world.start(run)
    status = await world.parked(instance)
    assert step_of(status, "lost").status == "cancelled"
    assert step_of(status, "lost").deadline is None
    await instance.send_event(type="go", payload="for the next")
    assert await instance.result(timeout=DEADLINE) == "for the next"
    assert world.kinds(instance)["wait.cancelled"] == 1


async def test_replays_cancel_again_and_the_event_still_goes_to_the_other(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        await cancelled_by_a_failing_sibling(step)
        await step.sleep("nap", 60)
        return (await step.wait_for_event("next", type="go")).payload

    instance = await world.start(run)
    await world.parked(instance)
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    await instance.send_event(type="go", payload="kept")
    world.advance(60)
    assert await instance.result(timeout=DEADLINE) == "kept"
    assert world.kinds(instance)["wait.cancelled"] == 1


@pytest.mark.parametrize("how", ["event", "sleep", "retry"])
async def test_a_cancelled_wait_wakes_nobody(world: World, how: str) -> None:
    async def run(event: Any, step: Any) -> str:
        waits = {
            "event": lambda: step.wait_for_event("lost", type="go", timeout=10),
            "sleep": lambda: step.sleep("lost", 10),
            "retry": lambda: step.do("lost", {"retries": {"limit": 1, "delay": 10}}, lambda: 1 / 0),
        }
        waiting = asyncio.ensure_future(waits[how]())
        await step.do("meanwhile", lambda: None)
        if how == "retry":  # let it fail first
            await step.wait_for_event("failed", type="failed")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await step.sleep("nap", 100)
        return "done"

    instance = await world.start(run)
    if how == "retry":
        await world.saw(instance, "attempt.errored")
        await instance.send_event(type="failed")
    await world.saw(instance, "sleep.started", 2 if how == "sleep" else 1)
    await world.saw(instance, {"event": "wait", "sleep": "sleep", "retry": "step"}[how] + ".cancelled")
    await world.parked(instance, world.kinds(instance)["workflow.waiting"] or 1)
    assert step_of(await instance.status(), "lost").status == "cancelled"
    runs = world.kinds(instance)["workflow.running"]
    world.advance(50)
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    assert (await instance.status()).status == "waiting"
    assert world.kinds(instance)["workflow.running"] == runs
    world.advance(50)
    assert await instance.result(timeout=DEADLINE) == "done"


async def test_a_cancelled_attempt_is_not_made_again(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> str:
        working = asyncio.ensure_future(step.do("working", gate))
        await step.wait_for_event("stop", type="stop")
        working.cancel()
        await step.sleep("nap", 60)
        return "done"

    instance = await world.start(run)
    await gate.reached()
    await instance.send_event(type="stop")
    await world.saw(instance, "step.cancelled")
    await world.parked(instance)
    working = step_of(await instance.status(), "working")
    assert (working.status, len(working.attempts), gate.cancelled) == ("cancelled", 1, 1)
    world.advance(60)
    assert await instance.result(timeout=DEADLINE) == "done"
    assert gate.times == 1


@pytest.mark.parametrize("when", ["while it is called", "before it is awaited"])
async def test_a_callback_may_have_its_own_step_cancelled_before_it_is_awaited(
    world: World, when: str
) -> None:
    """What it has begun is cancelled at its first wait: neither forgotten, nor left to run on."""
    gate, ended = Gate(), asyncio.Event()

    async def run(event: Any, step: Any) -> str:
        loop = asyncio.get_running_loop()

        def work() -> Any:
            if when == "while it is called":
                working.cancel()
            else:
                loop.call_soon(working.cancel)
            return gate()

        working = asyncio.ensure_future(step.do("working", work))
        with pytest.raises(asyncio.CancelledError):
            await working
        await step.do("wait for its end", ended.wait)
        return "done"

    instance = await world.start(run)
    await world.saw(instance, "step.cancelled")
    ended.set()
    assert await instance.result(timeout=DEADLINE) == "done"
    assert step_of(await instance.status(), "working").status == "cancelled"
    assert (gate.times, gate.cancelled) == (1, 1)


async def test_the_attempts_of_a_cancelled_retry_are_shown_once(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        flaky = asyncio.ensure_future(step.do("flaky", {"retries": {"limit": 3, "delay": 10}}, lambda: 1 / 0))
        await step.wait_for_event("stop", type="stop")
        flaky.cancel()

    instance = await world.start(run)
    await world.saw(instance, "attempt.errored")
    await instance.send_event(type="stop")
    await world.saw(instance, "workflow.completed")
    attempts = step_of(await instance.status(), "flaky").attempts
    assert [(attempt.number, attempt.error and attempt.error.name) for attempt in attempts] == [
        (1, "ZeroDivisionError")
    ]


async def test_the_next_waiter_in_line_is_served_when_the_first_is_cancelled(world: World) -> None:
    gate = Gate()

    async def fails() -> None:
        await gate()
        raise ValueError

    async def run(event: Any, step: Any) -> Any:
        second = asyncio.ensure_future(step.wait_for_event("second", type="go"))
        await step.do("in between", lambda: None)
        await cancelled_by_a_failing_sibling(step, gate=fails)
        return (await second).payload

    instance = await world.start(run)
    await gate.reached()
    gate.opened.set()
    await world.parked(instance)
    await instance.send_event(type="go", payload="second")
    assert await instance.result(timeout=DEADLINE) == "second"


async def test_a_wait_under_a_timer_of_the_workflow_is_cancelled_at_each_replay(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(step.wait_for_event("lost", type="go"), 0.001)
        await step.sleep("nap", 60)
        return (await step.wait_for_event("next", type="go")).payload

    instance = await world.start(run)
    await world.parked(instance)
    await instance.send_event(type="go", payload="late")
    world.advance(60)
    assert await instance.result(timeout=DEADLINE) == "late"


async def test_a_step_that_was_cancelled_but_is_awaited_on_replay_does_not_hang_the_instance(
    world: World,
) -> None:
    """A workflow that is not deterministic: it ends with an error that says so instead of waiting for ever."""
    runs: list[int] = []

    async def run(event: Any, step: Any) -> Any:
        runs.append(1)
        waiting = asyncio.ensure_future(step.wait_for_event("lost", type="go"))
        await step.do("one", lambda: None)
        if len(runs) == 1:
            waiting.cancel()
            await step.sleep("nap", 60)
        await waiting

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(60)
    with pytest.raises(Exception, match="never happen"):
        await instance.result(timeout=DEADLINE)
