"""The event loop that orchestration code runs on in this process.

`run(event, step)` of a workflow must wait for steps and timers only, and its host must know when it can do
nothing more by itself. So it runs on a small loop of its own, driven by the host's: tasks, futures, gather,
task groups and timers work; sockets, threads and subprocesses are refused with a message that says to use a
step. After each burst of callbacks the loop reports whether it is idle: nothing ready and no timer running.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import contextvars
import functools
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, TypeVarTuple

from dynflow.discard import discard_tasks

T = TypeVar("T")
_Ts = TypeVarTuple("_Ts")

# How many callbacks one burst runs before the host's loop gets its turn: code that spins must not stop the host.
_LONGEST_BURST = 1_000
_REST = 0.001


class WorkflowLoop(asyncio.AbstractEventLoop):
    """A loop inside `host`, the running loop. `on_idle` and `on_active` are called at each change."""

    def __init__(
        self, host: asyncio.AbstractEventLoop, *, on_idle: Callable[[], None], on_active: Callable[[], None]
    ) -> None:
        self.host = host
        self._on_idle, self._on_active = on_idle, on_active
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: set[_Timer] = set()
        self._outside = 0
        self._outside_tasks: set[asyncio.Task[Any]] = set()
        self._scheduled = False
        self._closed = False
        self.tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    def inside(
        cls,
        host: asyncio.AbstractEventLoop,
        *,
        on_idle: Callable[[], None],
        on_active: Callable[[], None],
    ) -> WorkflowLoop:
        """Return a loop inside `host`. What is abstract of a loop refuses, see the end of this module."""
        return cls(host, on_idle=on_idle, on_active=on_active)

    # --- what tasks and futures ask of a loop ---

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Run `callback` in the next burst."""
        handle = asyncio.Handle(callback, args, self, context)
        if self._closed:
            return handle
        self._ready.append(handle)
        if not self._scheduled:
            self._scheduled = True
            self._on_active()
            self.host.call_soon(self._burst)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Run `callback` in the next burst, from another thread."""
        handle = asyncio.Handle(callback, args, self, context)
        self.host.call_soon_threadsafe(lambda: self.call_soon(handle._run))  # noqa: SLF001 - Handle has no public run
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run `callback` after `delay` seconds. A running timer keeps the workflow from hibernating."""
        return self.call_at(self.host.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run `callback` at `when` of this loop's `time()`."""
        timer = _Timer(when, callback, args, self, context)
        if not self._closed:
            self._timers.add(timer)
            timer.host_handle = self.host.call_at(when, self._timer_due, timer)
        return timer

    def time(self) -> float:
        """Return the host loop's time."""
        return self.host.time()

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future of this loop."""
        return asyncio.Future(loop=self)

    def begin(self, coro: Any) -> asyncio.Task[Any]:
        """Start the task that the loop is there for; it is kept until the loop is closed."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self)
        self.tasks.add(task)
        return task

    def create_task(
        self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        """Start a task on this loop."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def get_debug(self) -> bool:
        """Return False: debug mode is the host loop's."""
        return False

    def is_running(self) -> bool:
        """Return whether the loop is open."""
        return not self._closed

    def is_closed(self) -> bool:
        """Return whether the loop is closed."""
        return self._closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Pass to the host loop, unless this loop is closed."""
        if not self._closed:
            self.host.call_exception_handler(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Pass to the host loop."""
        self.host.default_exception_handler(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._drop_timer(handle)  # type: ignore[arg-type]

    # --- life ---

    @property
    def is_idle(self) -> bool:
        """Whether nothing can happen here until a future is resolved from outside."""
        return not self._ready and not self._timers and not self._outside

    def close(self) -> None:
        """Drop everything, see `discard`."""
        self.discard()

    def discard(self) -> list[asyncio.Task[Any]]:
        """Drop everything, unnoticed by the code that ran here; callbacks that come later are ignored.

        Returns the host tasks that were started by `outside`, already cancelled.
        """
        self._closed = True
        self._ready.clear()
        discard_tasks(self.tasks)
        self.tasks.clear()
        for task in self._outside_tasks:
            task.cancel()
        for timer in self._timers:
            if timer.host_handle is not None:
                timer.host_handle.cancel()
        self._timers.clear()
        return list(self._outside_tasks)

    def now(self, callback: Callable[[*_Ts], object], *args: *_Ts) -> None:
        """Call `callback` from outside, and run what that makes ready in this turn of the host's loop."""
        if self._scheduled or self._closed:
            callback(*args)
            return
        self._scheduled = True
        self._on_active()
        callback(*args)
        self._burst()

    def _burst(self) -> None:
        # The host loop's own identity is put back afterwards: this is called from one of its callbacks.
        asyncio.events._set_running_loop(self)  # noqa: SLF001 - meant for loops
        try:
            for _ in range(_LONGEST_BURST):
                if not self._ready:
                    break
                handle = self._ready.popleft()
                if not handle._cancelled:  # noqa: SLF001
                    try:  # noqa: SIM105 - a context manager for each would be dear
                        handle._run()  # noqa: SLF001
                    except SystemExit:  # its task keeps it; it must not end the host
                        pass
        finally:
            asyncio.events._set_running_loop(self.host)  # noqa: SLF001
        self._scheduled = bool(self._ready)
        if self._scheduled:
            # Resting, not just taking turns: a thread that waits for the interpreter's lock gets it only then.
            self.host.call_later(_REST, self._burst)
        if not self._closed and self.is_idle:
            self._on_idle()

    def _timer_due(self, timer: _Timer) -> None:
        self._timers.discard(timer)
        if not timer.cancelled():
            self.call_soon(timer._run)  # noqa: SLF001

    def _drop_timer(self, timer: _Timer) -> None:
        if timer.host_handle is not None:
            timer.host_handle.cancel()
        if timer in self._timers:
            self._timers.discard(timer)
            self.call_soon(_nothing)  # look again whether the loop is idle

    async def outside(self, awaitable: Awaitable[T], *, keeps_awake: bool) -> T:
        """Await something of the host loop from inside; it runs as a task there, in a copy of this context."""
        task: asyncio.Task[T] = self.host.create_task(_await(awaitable), context=contextvars.copy_context())
        done = self.create_future()
        self._outside += keeps_awake

        def finished(_: asyncio.Task[T]) -> None:
            self._outside -= keeps_awake
            self._outside_tasks.discard(task)
            if not task.cancelled():
                task.exception()  # the loop may be closed before anybody asks for it
            if not done.done():
                done.set_result(None)
            elif not self._closed:
                self.call_soon(_nothing)

        self._outside_tasks.add(task)
        task.add_done_callback(finished)
        try:
            await done
        except asyncio.CancelledError:
            task.cancel()
            raise
        return task.result()


class _Timer(asyncio.TimerHandle):
    host_handle: asyncio.TimerHandle | None = None


async def outside(awaitable: Awaitable[T], *, keeps_awake: bool = True) -> T:
    """Await `awaitable` on the host's loop, from wherever this is called.

    `keeps_awake=False` is for what reports its own activity to the segment (an isolate's session).
    """
    loop = asyncio.get_running_loop()
    if isinstance(loop, WorkflowLoop):
        return await loop.outside(awaitable, keeps_awake=keeps_awake)
    return await awaitable


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise RuntimeError(
        f"a workflow's run() cannot use {name} of the event loop (no sockets, threads or processes): "
        "do it inside a step, step.do(name, callback)"
    )


for _name in dir(asyncio.AbstractEventLoop):
    if not _name.startswith("_") and _name not in vars(WorkflowLoop):
        setattr(WorkflowLoop, _name, staticmethod(functools.partial(_refuse, _name)))


def _nothing() -> None:
    pass


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable
