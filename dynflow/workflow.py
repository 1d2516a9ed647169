"""What tenants subclass and call: entrypoints, and the `step` object.

The step object only gives each call its identity and hands it to a port; the port is the wire in an
isolate and the segment itself in this process. Stdlib only: it runs inside isolates.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, overload

from dynflow.errors import WorkflowFatalError
from dynflow.outbound import HttpRequest, HttpResponse, fetch
from dynflow.types import Event, StepContext, StepInfo, StepKind, WorkflowEvent

Callback = Callable[..., Any]
T = TypeVar("T")

current_env: ContextVar[Any] = ContextVar("current_env")
"""The bindings of the entrypoint that is running: how a tenant's helper finds `env` without being handed it."""


@dataclass(slots=True)
class Attempt:
    """The attempt that is running. The steps within it are called anew by each attempt, from the first on.

    `path` is what their stored names begin with; `counts` how often each has been called in this attempt.
    """

    ctx: StepContext
    path: str = ""
    counts: dict[tuple[StepKind, Any], int] = field(default_factory=dict)


current_attempt: ContextVar[Attempt | None] = ContextVar("current_attempt", default=None)
"""The attempt within which steps are called, None where `run` itself calls them."""


class _CurrentStep:
    def get(self) -> StepContext | None:
        """Return the context of the step attempt that is running, None outside of a step."""
        attempt = current_attempt.get()
        return None if attempt is None else attempt.ctx


current_step = _CurrentStep()
"""The step attempt that is running, as its callback is told of it."""


class WorkflowEntrypoint:
    """Base class of a workflow: subclass it and write `async def run(self, event, step)`.

    `self.env` holds the bindings, `self.ctx` the execution context (`ctx.props`, `ctx.metadata`).
    `run` is executed again from the top after every hibernation and crash; only step results survive.
    """

    def __init__(self, ctx: Any, env: Any) -> None:
        self.ctx, self.env = ctx, env

    async def run(self, event: WorkflowEvent, step: WorkflowStep) -> Any:
        """Run the workflow; what it returns becomes the instance's output."""
        raise NotImplementedError(f"{type(self).__name__} has no run(self, event, step)")


class WorkerEntrypoint:
    """Base class of a service: its public methods, sync or async, can be called from outside the isolate."""

    def __init__(self, ctx: Any, env: Any) -> None:
        self.ctx, self.env = ctx, env


@dataclass(frozen=True, slots=True)
class ExecutionContext:
    """What an entrypoint gets as `self.ctx`: `props` from whoever called, `metadata` from the loader."""

    props: Any = None
    metadata: Any = None


@dataclass(slots=True)  # frozen, it would take three times as long to make, at every call
class StepCall:
    """One call of a method of `step`, as its port gets it, nothing checked yet.

    `argument` is the duration of `sleep`, the time of `sleep_until`, the timeout of `wait_for_event`.
    """

    kind: StepKind
    name: Any
    count: int
    config: Any = None
    callback: Callback | None = None
    rollback: Callback | None = None
    rollback_config: Any = None
    argument: Any = None
    event_type: Any = None
    within: str = ""
    """The path of the attempt that makes the call, see `Attempt`; the segment sets it."""
    seq: int = 0
    """The step's place in the order of starts, if it has it from its call; the segment sets it."""

    @property
    def stored_name(self) -> str:
        """What identifies the step in its instance, together with kind and count."""
        return self.within + self.name if self.within else self.name  # type: ignore[no-any-return]


PORT_GONE = "the isolate is gone"
"""The message of a cancellation of a step call that the workflow did not ask for."""


class StepPort(Protocol):
    """Performs step calls. The returned awaitable may never finish: that is how a workflow is suspended.

    Cancelling it, unless with the message PORT_GONE, says that the workflow cancelled the step.
    """

    @property
    def is_over(self) -> bool:
        """Whether the workflow's code is being dropped: what it did not get to is no mistake of its own."""

    def call(self, call: StepCall) -> Awaitable[Any]:
        """Perform `call`; its result or error is final and durable when the awaitable finishes."""


class WorkflowStep:
    """The `step` of `run(event, step)`: durable steps, sleeps and waits."""

    __slots__ = ("_counts", "port")

    def __init__(self, port: StepPort) -> None:
        self.port = port
        self._counts: dict[tuple[StepKind, Any], int] = {}

    # For type checkers, the first that fits: what an async or a sync callback makes, without a config or with one; the
    # decorator.
    @overload
    def do(
        self,
        name: str,
        config: Callable[..., Coroutine[Any, Any, T]],
        *,
        rollback: Callback | None = None,
        rollback_config: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, T]: ...
    @overload
    def do(
        self,
        name: str,
        config: Callable[..., T],
        *,
        rollback: Callback | None = None,
        rollback_config: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, T]: ...
    @overload
    def do(
        self,
        name: str,
        config: Mapping[str, Any] | None,
        callback: Callable[..., Coroutine[Any, Any, T]],
        *,
        rollback: Callback | None = None,
        rollback_config: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, T]: ...
    @overload
    def do(
        self,
        name: str,
        config: Mapping[str, Any] | None,
        callback: Callable[..., T],
        *,
        rollback: Callback | None = None,
        rollback_config: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, T]: ...
    @overload
    def do(
        self,
        name: str,
        config: Mapping[str, Any] | None = None,
        *,
        rollback: Callback | None = None,
        rollback_config: Mapping[str, Any] | None = None,
    ) -> Decorator: ...
    def do(
        self,
        name: str,
        config: Mapping[str, Any] | Callback | None = None,
        callback: Callback | None = None,
        *,
        rollback: Callback | None = None,
        rollback_config: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `callback` once, durably: its result is stored and returned again on every replay.

        `step.do(name, callback)`, `step.do(name, config, callback)`, or as a decorator without a callback.
        The callback is sync or async and takes no argument or a StepContext.
        """
        if callback is None and config is not None and not _is_config(config):
            config, callback = None, config  # whether it can be called is checked when the step is performed
        if callback is not None:
            return self._do(name, config, callback, rollback, rollback_config)
        return Decorator(lambda chosen: self._do(name, config, chosen, rollback, rollback_config))

    def _do(
        self, name: Any, config: Any, callback: Callback | None, rollback: Any, rollback_config: Any
    ) -> _PendingCall:
        count = self._next("do", name)
        return _PendingCall(
            self.port, StepCall("do", name, count, config, callback, rollback, rollback_config)
        )

    def sleep(self, name: str, duration: Any) -> Coroutine[Any, Any, None]:
        """Sleep durably for a timedelta, seconds, or text such as `"5 minutes"`."""
        return _PendingCall(self.port, StepCall("sleep", name, self._next("sleep", name), argument=duration))

    def sleep_until(self, name: str, when: Any) -> Coroutine[Any, Any, None]:
        """Sleep durably until an aware datetime, or a number of seconds since the epoch."""
        count = self._next("sleep_until", name)
        return _PendingCall(self.port, StepCall("sleep_until", name, count, argument=when))

    def wait_for_event(
        self,
        name: str,
        *,
        type: str,  # noqa: A002 - the contract's names
        timeout: Any = "24 hours",
    ) -> Coroutine[Any, Any, Event]:
        """Wait for an event of this type; raises WorkflowTimeoutError when none came in time."""
        count = self._next("wait_for_event", name)
        return _PendingCall(
            self.port, StepCall("wait_for_event", name, count, argument=timeout, event_type=type)
        )

    def _next(self, kind: StepKind, name: Any) -> int:
        # Taken at the call, before any await: same-named parallel steps keep their numbers on replay.
        key = (kind, name) if isinstance(name, str) else (kind, repr(name))
        attempt = current_attempt.get()
        counts = self._counts if attempt is None else attempt.counts
        count = counts.get(key, 0) + 1
        counts[key] = count
        return count


def _is_config(given: object) -> bool:
    # An abstract class is asked last, being dear: most often it is a function that is given here.
    kind = type(given)
    return kind is dict or (kind is not types.FunctionType and isinstance(given, Mapping))


class _PendingCall(Coroutine[Any, Any, Any]):
    """A step call that has its number and starts when it is first awaited.

    A coroutine to asyncio, so that task groups and `create_task` take it as it is.
    """

    __slots__ = ("_begun", "_call", "_port", "_running")

    def __init__(self, port: StepPort, call: StepCall) -> None:
        self._port, self._call, self._begun = port, call, False
        self._running: Generator[Any, Any, Any] | None = None

    def __await__(self) -> Generator[Any, Any, Any]:
        self._begun = True
        return self._port.call(self._call).__await__()

    def send(self, value: Any) -> Any:
        """Go on, as a task does with its coroutine."""
        if self._running is None:
            self._running = self.__await__()
        return self._running.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise inside; before the start that is all there is to do."""
        if self._running is None:
            self._begun = True
            raise error[0]
        return self._running.throw(*error)

    def close(self) -> None:
        """Forget the call."""
        self._begun = True
        if self._running is not None:
            self._running.close()

    def __del__(self) -> None:
        # As of a coroutine. One of a workflow that was put to rest was on its way to be awaited, in a replay.
        if not self._begun and not self._port.is_over:
            call = f"step.{self._call.kind}({self._call.name!r:.300})"
            warnings.warn(
                f"{call} was never awaited: it did nothing", RuntimeWarning, stacklevel=2, source=self
            )


class Decorator:
    """`@step.do(name)`. Awaiting it says what is missing: its step is refused for having no callback."""

    def __init__(self, start: Callable[[Callback | None], _PendingCall]) -> None:
        self._start = start

    @overload
    def __call__(self, function: Callable[..., Coroutine[Any, Any, T]]) -> Decorated[T]: ...
    @overload
    def __call__(self, function: Callable[..., T]) -> Decorated[T]: ...
    def __call__(self, function: Callback) -> Decorated[Any]:
        return Decorated(function, self._start)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._start(None).__await__()


class Decorated(Generic[T]):
    """A function under `@step.do(name)`: awaiting it, or awaiting a call of it, runs the step."""

    def __init__(self, function: Callback, start: Callable[[Callback], _PendingCall]) -> None:
        functools.update_wrapper(self, function)
        self._function, self._start = function, start

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, T]:
        if args or kwargs:
            return self._start(functools.partial(self._function, *args, **kwargs))
        return self._start(self._function)

    def __await__(self) -> Generator[Any, Any, T]:
        return self._start(self._function).__await__()


def begin(callback: Callback, argument: Any) -> Any:
    """Call a tenant's callback, which takes `argument` or nothing; returns its result or an awaitable of it."""
    return callback(argument) if _takes_argument(callback) else callback()


async def invoke(callback: Callback, argument: Any) -> Any:
    """Call a tenant's callback, which is sync or async and takes `argument` or nothing."""
    result = begin(callback, argument)
    return await result if inspect.isawaitable(result) else result


def awaitable(made: Any, run: Callable[..., Any]) -> Awaitable[Any]:
    """Return what a call of `run` made, to be awaited. Raises WorkflowFatalError where it was no `async def`."""
    if inspect.isawaitable(made):
        return made
    name = getattr(run, "__qualname__", repr(run))
    raise WorkflowFatalError(
        f"{name:.100}(event, step) must be `async def`: it returned {made!r:.100}, which cannot be awaited"
    )


def _takes_argument(callback: Callback) -> bool:
    # `inspect.signature` costs more than the rest of a step's bookkeeping: plain functions are asked directly.
    if type(callback) is types.FunctionType and not hasattr(callback, "__wrapped__"):
        code = callback.__code__
        required = code.co_argcount - len(callback.__defaults__ or ())
        return required > 0 or bool(code.co_flags & inspect.CO_VARARGS)
    try:
        parameters = inspect.signature(callback).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature; they take what they are given
        return False
    return any(
        parameter.kind is parameter.VAR_POSITIONAL
        or (parameter.kind in _POSITIONAL and parameter.default is parameter.empty)
        for parameter in parameters
    )


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


__all__ = [
    "Attempt",
    "ExecutionContext",
    "HttpRequest",
    "HttpResponse",
    "StepCall",
    "StepContext",
    "StepInfo",
    "StepPort",
    "WorkerEntrypoint",
    "WorkflowEntrypoint",
    "WorkflowStep",
    "awaitable",
    "begin",
    "current_attempt",
    "current_env",
    "current_step",
    "fetch",
    "invoke",
]
