"""The clocks: a manual one that moves by hand, and the system's."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from dynflow.clock import ManualClock, SystemClock, to_datetime, to_microseconds


async def test_due_callbacks_run_in_the_order_of_their_times_each_at_its_time() -> None:
    clock = ManualClock()
    seen: list[object] = []
    start = clock.now_us()

    def note(seconds: int) -> None:
        seen.append((seconds, clock.now_us() - start))

    for seconds in (3, 1, 2):
        clock.call_at(start + seconds * 1_000_000, partial(note, seconds))
    clock.advance(2.5)
    assert seen == [(1, 1_000_000), (2, 2_000_000)]
    clock.advance(timedelta(seconds=0.5))
    assert seen[-1] == (3, 3_000_000)


async def test_a_time_that_has_come_calls_back_soon_and_a_cancelled_timer_never() -> None:
    clock, called = ManualClock(), asyncio.Event()
    clock.call_at(clock.now_us(), called.set)
    await called.wait()
    clock.call_at(clock.now_us() + 5, lambda: pytest.fail("it was cancelled")).cancel()
    clock.advance(1)


async def test_advance_to_next_skips_cancelled_timers() -> None:
    clock = ManualClock()
    seen: list[object] = []
    clock.call_at(clock.now_us() + 5, lambda: seen.append("cancelled")).cancel()
    clock.call_at(clock.now_us() + 9, lambda: seen.append("kept"))
    assert clock.advance_to_next()
    assert seen == ["kept"]
    assert not clock.advance_to_next()


async def test_a_cancelled_timer_holds_nothing() -> None:
    class Held:
        def call(self) -> None:
            pass

    for clock in (ManualClock(), SystemClock()):
        held = Held()
        reference = weakref.ref(held)
        timer = clock.call_at(clock.now_us() + 3_600_000_000, held.call)
        timer.cancel()
        del held, timer
        gc.collect()
        assert reference() is None


async def test_the_system_clock_calls_back_not_before_its_time() -> None:
    clock, called = SystemClock(), asyncio.Event()
    when = clock.now_us() + 2000
    clock.call_at(when, called.set)
    await called.wait()
    assert clock.now_us() >= when


def test_stored_times_come_back() -> None:
    moment = datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    assert to_datetime(to_microseconds(moment)) == moment
    assert to_microseconds(datetime(1960, 1, 1, tzinfo=UTC)) < 0


async def test_a_delay_of_the_system_clock_is_as_long_when_the_clock_is_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, called = SystemClock(), asyncio.Event()
    clock.call_later(50_000, called.set)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3_600_000_000_000)
    async with asyncio.timeout(10):
        await called.wait()
