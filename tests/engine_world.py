"""What the engine's contract tests share: an engine on a manual clock, workflows as plain functions."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Self

from dynflow.binding import WorkflowBinding, WorkflowInstance
from dynflow.clock import ManualClock
from dynflow.engines import InstanceRef
from dynflow.errors import InstanceNotFoundError, InvalidArgumentError
from dynflow.types import HistoryEvent, InstanceStatus, StepStatus, WorkflowEvent
from dynflow.workflow import WorkflowEntrypoint, WorkflowStep

Run = Callable[[WorkflowEvent, WorkflowStep], Awaitable[Any]]

# A test that waits longer than this for something has failed.
DEADLINE = 30.0

NO_RETRIES = {"retries": {"limit": 0, "delay": 0}}


def quick(limit: int, delay: Any = "10 seconds", backoff: str = "constant") -> dict[str, Any]:
    """A config with so many retries."""
    return {"retries": {"limit": limit, "delay": delay, "backoff": backoff}}


def noting(calls: list[Any], what: Any, result: Any = None) -> Callable[[], Any]:
    """A step callback that appends `what` to `calls` and returns `result`."""

    def callback() -> Any:
        calls.append(what)
        return result

    return callback


class World:
    """One engine at a time over one storage; `restart` closes it and opens the next."""

    def __init__(self, make_engine: Callable[..., Any], **options: Any) -> None:
        self.clock = ManualClock()
        self.many: int = getattr(make_engine, "many", 2000)
        """How many instances are many for this engine: so many take a few seconds."""
        self._make, self._options = make_engine, options
        self._registered: dict[str, tuple[type[WorkflowEntrypoint], dict[str, Any]]] = {}
        self._runs: dict[str, Run] = {}
        self._changed = asyncio.Event()
        self.history: list[tuple[str, HistoryEvent]] = []
        self.told: dict[InstanceRef, list[HistoryEvent]] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.engine = self._make(clock=self.clock, **self._options)
        self._runs.clear()
        for name, (entrypoint, options) in self._registered.items():
            self.engine.register(name, entrypoint, **options)
        self.engine.add_listener(self._heard)
        await self._stack.enter_async_context(self.engine)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def reopen(self, **options: Any) -> None:
        """Close the engine and open another on the same storage."""
        await self._stack.aclose()
        self._options |= options
        await self.__aenter__()

    async def check_histories(self) -> None:
        """Hold what was told live of each instance against what a late reader of its history finds."""
        for name in self._registered:
            binding = self.engine.binding(name)
            for ref, events in [item for item in self.told.items() if item[0].workflow == name]:
                told = {event.event_id: event for event in events}
                with contextlib.suppress(
                    InstanceNotFoundError, InvalidArgumentError
                ):  # deleted, of two tenants
                    instance = await binding.get(ref.id)
                    read = await self._read(instance, max(told))
                    others = {number: event for number, event in told.items() if read[number] != event}
                    assert not others, {number: read[number] for number in others}
                    assert list(read) == list(range(1, len(read) + 1))

    async def _read(self, instance: WorkflowInstance, last: int) -> dict[int, HistoryEvent]:
        """Read a history up to this event: that of an instance that has not ended has no end."""
        read: dict[int, HistoryEvent] = {}
        async with asyncio.timeout(DEADLINE), contextlib.aclosing(instance.subscribe()) as events:
            while last not in read:
                event = await anext(events)
                read[event.event_id] = event
        return read

    def _heard(self, ref: InstanceRef, event: HistoryEvent) -> None:
        if event.event_id == 1:  # a new instance, maybe one whose id another one had
            self.told.pop(ref, None)
        self.told.setdefault(ref, []).append(event)
        self.history.append((ref.id, event))
        self._changed.set()

    def register(self, run: Run, name: str | None = None, **options: Any) -> WorkflowBinding:
        """Register `run` as a workflow, where that has not been done yet; returns its binding."""
        name = name or run.__name__
        if self._runs.setdefault(name, run) == run and name in self._registered:
            return self.engine.binding(name)  # type: ignore[no-any-return]
        entrypoint = type(name, (WorkflowEntrypoint,), {"run": lambda _, event, step: run(event, step)})
        self._registered[name] = (entrypoint, options)
        self.engine.register(name, entrypoint, **options)
        return self.engine.binding(name)  # type: ignore[no-any-return]

    async def start(
        self,
        run: Run,
        params: Any = None,
        id: str | None = None,  # noqa: A002 - the contract's name
        **options: Any,
    ) -> WorkflowInstance:
        """Register `run` and create an instance of it."""
        return await self.register(run, **options).create(id=id, params=params)

    async def result(self, run: Run, params: Any = None, **options: Any) -> Any:
        """Run to the end; return the output."""
        return await (await self.start(run, params, **options)).result(timeout=DEADLINE)

    async def status(self, instance: WorkflowInstance, *wanted: str) -> InstanceStatus:
        """Wait until the instance has one of these statuses."""
        async with asyncio.timeout(DEADLINE):
            while True:
                self._changed.clear()
                status = await instance.status()
                if status.status in wanted:
                    return status
                await self._changed.wait()

    async def saw(self, instance: WorkflowInstance, kind: str, times: int = 1) -> None:
        """Wait until this kind of event has happened to the instance so many times."""
        async with asyncio.timeout(DEADLINE):
            while self.kinds(instance)[kind] < times:
                self._changed.clear()
                await self._changed.wait()

    def kinds(self, instance: WorkflowInstance) -> Counter[str]:
        """How often each kind of event has happened to the instance, in the order of first times."""
        return Counter(event.type for id_, event in self.history if id_ == instance.id)

    def order(self, instance: WorkflowInstance) -> list[str]:
        """The kinds of the instance's events, in order."""
        return [event.type for id_, event in self.history if id_ == instance.id]

    async def parked(self, instance: WorkflowInstance, times: int = 1) -> InstanceStatus:
        """Wait until the instance has been parked so many times; it is waiting now."""
        await self.saw(instance, "workflow.waiting", times)
        return await self.status(instance, "waiting")

    def advance(self, seconds: float | timedelta) -> None:
        """Move the clock."""
        self.clock.advance(seconds)

    async def run_through(self, instance: WorkflowInstance) -> Any:
        """Move the clock to each next deadline until the instance has ended; return its output or raise."""
        ended = asyncio.ensure_future(instance.result(timeout=DEADLINE))
        while not ended.done():
            self._changed.clear()
            status = await instance.status()
            if status.status == "waiting":
                self.clock.advance_to_next()
            if status.status not in {"complete", "errored", "terminated"}:
                waiting = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({ended, waiting}, timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            else:
                await asyncio.wait({ended})
        return ended.result()


def step_of(status: InstanceStatus, name: str, count: int = 1) -> StepStatus:
    """The step of this name."""
    return next(step for step in status.steps if (step.name, step.count) == (name, count))


async def fewer_tasks(most: int) -> None:
    """Wait until there are no more tasks than this: calls to a server may end a moment after their callers."""
    async with asyncio.timeout(DEADLINE):
        while len(asyncio.all_tasks()) > most:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


class Gate:
    """Holds step callbacks up until the test lets them through."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.cancelled = 0
        self.times = 0

    async def __call__(self) -> str:
        self.times += 1
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return "through"

    async def reached(self) -> None:
        """Wait until a callback has come."""
        await asyncio.wait_for(self.entered.wait(), DEADLINE)
