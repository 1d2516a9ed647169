"""A clock that is set an hour forward or back under a running engine: nothing is lost, and everything goes on."""

from __future__ import annotations

from typing import Any

import pytest

from dynflow.clock import ManualClock
from tests.engine_world import DEADLINE, World, step_of

HOUR = 3600


def set_back(clock: ManualClock, seconds: int) -> None:
    clock._now_us -= seconds * 1_000_000


async def sleeps_and_waits(event: Any, step: Any) -> Any:
    await step.do("first", lambda: None)
    await step.sleep("nap", 600)
    got = await step.wait_for_event("w", type="go", timeout="1 day")
    return [got.payload, await step.do("last", lambda: "last")]


async def test_an_hour_forward_ends_what_is_due_by_then(world: World) -> None:
    instance = await world.start(sleeps_and_waits)
    await world.parked(instance)
    world.advance(HOUR)
    await world.parked(instance, 2)
    await instance.send_event(type="go", payload="kept")
    assert await instance.result(timeout=DEADLINE) == ["kept", "last"]


@pytest.mark.parametrize("reopened", [False, True])
async def test_an_hour_back_holds_deadlines_where_they_are(world: World, reopened: bool) -> None:  # noqa: FBT001
    """A deadline is a time of day: what was to sleep until it sleeps longer, and nothing ends early or is lost."""
    instance = await world.start(sleeps_and_waits)
    deadline = step_of(await world.parked(instance), "nap").deadline
    await instance.send_event(type="go", payload="kept")
    set_back(world.clock, HOUR)
    if reopened:
        await world.reopen()
        instance = await world.engine.binding("sleeps_and_waits").get(instance.id)
    assert step_of(await instance.status(), "nap").deadline == deadline
    other = await world.engine.binding("sleeps_and_waits").create(id="other")
    await world.parked(other)
    world.advance(600)
    await world.saw(other, "wait.started")
    assert step_of(await instance.status(), "nap").status == "waiting"
    world.advance(HOUR)
    assert await instance.result(timeout=DEADLINE) == ["kept", "last"]
    events = [event async for event in instance.subscribe()]
    assert [event.event_id for event in events] == sorted(event.event_id for event in events)


async def test_a_pause_over_a_clock_that_was_set_back_moves_no_deadline_backwards(world: World) -> None:
    instance = await world.start(sleeps_and_waits)
    deadline = step_of(await world.parked(instance), "nap").deadline
    await instance.pause()
    await world.status(instance, "paused")
    set_back(world.clock, HOUR)
    await instance.resume()
    await world.status(instance, "waiting")
    assert step_of(await instance.status(), "nap").deadline == deadline


async def test_a_step_during_which_the_clock_is_set_back_completes(world: World) -> None:
    def body() -> str:
        set_back(world.clock, HOUR)
        return "done"

    async def run(event: Any, step: Any) -> Any:
        return await step.do("work", body)

    instance = await world.start(run)
    assert await instance.result(timeout=DEADLINE) == "done"
    assert step_of(await instance.status(), "work").status == "complete"
