"""Native cancellation of a task becomes cancellation of a scope: shields hold, however often it is cancelled."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import anyio
import anyio.to_thread
import pytest

from ci_platform.cancellation import with_shields

_here: ContextVar[str] = ContextVar("_here")


async def test_the_result_and_the_context_pass() -> None:
    _here.set("caller's")

    async def work() -> str:
        return _here.get()

    assert await with_shields(work) == "caller's"


async def test_errors_pass() -> None:
    async def work() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        await with_shields(work)


async def test_without_it_a_cancellation_cuts_a_shielded_section_in_two() -> None:
    entered, done = asyncio.Event(), []

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            entered.set()
            await asyncio.sleep(0.01)
            done.append("whole")

    task = asyncio.ensure_future(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == []


async def test_a_shielded_section_ends_before_the_cancellation_leaves() -> None:
    entered, go_on, done = asyncio.Event(), asyncio.Event(), []

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            entered.set()
            await go_on.wait()
            done.append("whole")
        await anyio.sleep_forever()

    task = asyncio.ensure_future(with_shields(work))
    await entered.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["whole"]


async def test_cleaning_up_is_not_interrupted_by_a_second_cancellation() -> None:
    started, cleaning, go_on, cleaned = (asyncio.Event() for _ in range(4))

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                cleaning.set()
                await go_on.wait()
                cleaned.set()

    task = asyncio.ensure_future(with_shields(work))
    await started.wait()
    task.cancel()
    await cleaning.wait()
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()
