"""The loop that orchestration code runs on, and the discarding of what is suspended on it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynflow.discard import discard
from dynflow.loop import WorkflowLoop, outside
from tests.engine_world import DEADLINE


class Watched:
    """A loop and when it was idle."""

    def __init__(self) -> None:
        self.idle = asyncio.Event()
        self.changes: list[str] = []
        self.loop = WorkflowLoop.inside(
            asyncio.get_running_loop(), on_idle=self._idle, on_active=self._active
        )

    def _idle(self) -> None:
        self.changes.append("idle")
        self.idle.set()

    def _active(self) -> None:
        self.changes.append("active")
        self.idle.clear()

    async def run(self, coroutine: Any) -> Any:
        task = self.loop.create_task(coroutine)
        done = asyncio.Event()
        task.add_done_callback(lambda _: done.set())
        await asyncio.wait_for(done.wait(), DEADLINE)
        return task.result()


async def test_tasks_gather_groups_timeouts_queues_and_context_variables_work() -> None:
    variable = contextvars.ContextVar("variable", default="outer")

    async def work() -> Any:
        assert isinstance(asyncio.get_running_loop(), WorkflowLoop)
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def produce() -> None:
            for number in range(3):
                await queue.put(number)
                await asyncio.sleep(0)

        async def consume() -> list[int]:
            variable.set("inner")
            return [await queue.get() for _ in range(3)]

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            consumed = group.create_task(consume())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.get_running_loop().create_future()
        return [consumed.result(), variable.get(), await asyncio.wait_for(asyncio.sleep(0, "slept"), 5)]

    assert await Watched().run(work()) == [[0, 1, 2], "outer", "slept"]


async def test_it_is_idle_when_only_the_outside_can_go_on() -> None:
    watched = Watched()
    future = watched.loop.create_future()
    task = watched.loop.create_task(_awaiting(future))
    await asyncio.wait_for(watched.idle.wait(), DEADLINE)
    assert watched.loop.is_idle
    future.set_result(7)
    assert not watched.idle.is_set()
    await asyncio.wait_for(watched.idle.wait(), DEADLINE)
    assert task.result() == 7
    assert watched.changes == ["active", "idle"] * 2


async def _awaiting(future: Any) -> Any:
    return await future


async def test_a_running_timer_keeps_it_awake() -> None:
    watched = Watched()
    task = watched.loop.create_task(asyncio.sleep(3600))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not watched.loop.is_idle
    task.cancel()
    await asyncio.wait_for(watched.idle.wait(), DEADLINE)
    watched.loop.close()


async def test_outside_runs_on_the_host_and_passes_results_errors_and_cancellation() -> None:
    host, cancelled = asyncio.get_running_loop(), asyncio.Event()

    async def on_host(fail: bool) -> Any:  # noqa: FBT001
        assert asyncio.get_running_loop() is host
        await asyncio.sleep(0)
        if fail:
            raise KeyError("outside")
        return "outside"

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def work() -> Any:
        results = [await outside(on_host(fail=False))]
        with pytest.raises(KeyError):
            await outside(on_host(fail=True))
        task = asyncio.ensure_future(outside(hangs()))
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return results

    assert await Watched().run(work()) == ["outside"]
    await asyncio.wait_for(cancelled.wait(), DEADLINE)
    assert await outside(on_host(fail=False)) == "outside"  # also where there is no loop inside


@pytest.mark.parametrize(
    "call", ["run_in_executor", "create_server", "add_reader", "subprocess_exec", "run_forever"]
)
async def test_what_a_workflow_must_not_do_is_refused_with_what_to_do(call: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{call}.*step\.do"):
        getattr(Watched().loop, call)()


async def test_discarded_code_does_not_notice(recwarn: pytest.WarningsRecorder) -> None:
    seen: list[str] = []

    class Held:
        pass

    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        try:
            yield
        finally:
            seen.append("manager")

    async def numbers(future: Any) -> AsyncIterator[int]:
        try:
            yield 1
            await future
        finally:
            seen.append("generator")

    async def inner(future: Any) -> None:
        held.append(Held())
        kept = held[-1]  # noqa: F841 - held by the frame
        try:
            async with manager():
                async for _ in numbers(future):
                    pass
        except BaseException as error:  # noqa: BLE001 - nothing may be seen here
            seen.append(repr(error))
        finally:
            seen.append("finally")

    held: list[Any] = []
    watched = Watched()
    watched.loop.create_task(inner(watched.loop.create_future()))
    await asyncio.wait_for(watched.idle.wait(), DEADLINE)
    reference = weakref.ref(held.pop())
    watched.loop.close()
    watched.loop.call_soon(seen.append, "late callback")
    del watched
    gc.collect()
    await asyncio.sleep(0)
    assert reference() is None
    assert seen == []
    assert not recwarn.list


async def test_discarding_a_coroutine_that_never_started_warns_of_nothing(
    recwarn: pytest.WarningsRecorder,
) -> None:
    discard(_awaiting(None))
    gc.collect()
    assert not recwarn.list
