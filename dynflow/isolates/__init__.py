"""Contracts of isolates: where tenant orchestration code runs.

A WorkerLoader keeps workers by id; a WorkerStub hands out entrypoints; an EntrypointStub is called like the
tenant's own class. Two implementations: `ProcessLoader` (a confined process per isolate) and `TrustedLoader`
(this process, for code that the host itself ships).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Protocol, Self

from dynflow.errors import InvalidArgumentError
from dynflow.isolates.limits import CallLimits, IsolateLimits
from dynflow.isolates.tails import Tail, TailEvent
from dynflow.types import StepContext
from dynflow.workflow import StepPort, WorkflowStep


@dataclass(frozen=True, slots=True)
class WorkerCode:
    """A tenant's code: `modules` maps file names to what they hold.

    `"pkg/mod.py"` is source. Under any other name there is text, bytes or plain data: `import` gives a module whose
    `value` it is (`"prompts/hello.txt"`: `from prompts import hello; hello.value`); text under `….json` is parsed.
    `env` holds plain data (copied into the isolate) and bindings (called through the wire).
    `metadata` is what tenants see as `ctx.metadata`.
    `compatibility_date` (`"2026-11-01"`) says which day's behaviour of the library the code was written for. There
    is one behaviour so far; code that names a day keeps it when there are more.
    `global_outbound`, an object with `async def fetch(request: HttpRequest) -> HttpResponse`, gets all HTTP of the
    code; without one it has no network.
    `tails` are told what the code prints, logs, warns of and fails with, see dynflow.isolates.tails.
    `tenant` says whose code it is: what one tenant may have at the same time holds for all of its workers together.
    None: each worker is a tenant of its own.
    """

    main_module: str
    modules: Mapping[str, Any]
    env: Mapping[str, Any] = field(default_factory=dict)
    metadata: Any = None
    limits: IsolateLimits = IsolateLimits()  # noqa: RUF009 - frozen
    compatibility_date: str | None = None
    tails: Sequence[Tail] = ()
    global_outbound: Any = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        """Raise InvalidArgumentError for a date that is none."""
        if self.compatibility_date is None:
            return
        try:
            date.fromisoformat(self.compatibility_date)
        except (TypeError, ValueError):
            raise InvalidArgumentError(
                f"compatibility_date is a day such as '2026-11-01', not {self.compatibility_date!r:.100}"
            ) from None


CodeSource = Callable[[], WorkerCode | Awaitable[WorkerCode]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a capability call.

    Everything here was bound by the host; nothing came out of the isolate but the choice of which of its own
    live step attempts makes the call.

    `props` is the object given to `get_entrypoint(props=…)`, unchanged; `instance_id`, `workflow_name` and
    `step` are None outside of a workflow, `step` also outside of a step.
    """

    worker_id: str
    metadata: Any = None
    props: Any = None
    instance_id: str | None = None
    workflow_name: str | None = None
    step: StepContext | None = None


current_caller: ContextVar[Caller] = ContextVar("current_caller")
"""Set by the isolate's host side around every capability call."""


class Capability:
    """Base of host objects that go into a worker's `env`.

    The public `async def` methods of the subclass are the whole surface that tenant code can reach; arguments
    and results are plain data. Who calls is in `current_caller.get()`. A call is cancelled when the step
    attempt that made it times out, is terminated, or its isolate ends.
    """


@dataclass(frozen=True, slots=True)
class BoundObject:
    """An ordinary object of the host in a worker's `env`: what `binding` returns."""

    target: object
    methods: frozenset[str] | None = None


def binding(target: object, *, methods: Collection[str] | None = None) -> BoundObject:
    """Return `target` as a binding for `env`: tenants reach its public `async def` methods, or only `methods`."""
    return BoundObject(target, None if methods is None else frozenset(methods))


@dataclass(frozen=True, slots=True)
class WrappedBinding:
    """A place in a worker's `env` for a tenant's workflow binding; its loader fills in what `bind` got."""

    metadata: Any
    binding_name: str = "WORKFLOWS"


class Activity(Protocol):
    """A part of a segment that can make progress by itself. A segment parks when all of its parts are idle."""

    def active(self) -> None:
        """Say that code runs, or is about to because it was just sent something."""

    def idle(self) -> None:
        """Say that nothing can happen here until one of the outstanding step calls is answered."""

    def close(self) -> None:
        """Say that this part is gone."""


class SegmentPort(StepPort, Protocol):
    """The port of a step object on the host's side: `step.port` of what an EntrypointStub's `run` is given."""

    @property
    def instance_id(self) -> str:
        """The instance's id as its tenant knows it."""

    @property
    def workflow_name(self) -> str:
        """The name that the workflow is registered under."""

    def activity(self) -> Activity:
        """Register a part, active from now."""

    async def pin(self, digest: str, modules: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the modules that this instance started with.

        The first call stores `modules` under `digest` (`sha256:…`) durably and returns them.
        """


class EntrypointStub(ABC):
    """One entrypoint of a worker. Any other attribute is an async function: the tenant's method of that name.

    *Order of calls*: any; calls run concurrently. *Cancellation*: cancelling a call cancels it inside and,
    where the code does not obey within a second, stops the isolate. *Errors*: the tenant's own exception where
    its class is a builtin, dynflow's or pipelines', else InstanceFailedError with name and message (`run` of a
    confined worker raises RemoteError with the whole failure instead, for its segment); WorkerLoadError,
    IsolateLimitError, IsolateCrashedError for the isolate itself.
    """

    @abstractmethod
    async def run(self, event: Any, step: WorkflowStep) -> Any:
        """Run the workflow class. Step calls go to `step.port`, a SegmentPort."""

    @abstractmethod
    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the entrypoint, or a function of the main module for the default one."""

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **kwargs: self.call(method, *args, **kwargs)


class WorkerStub(ABC):
    """A worker, loaded when it is first used."""

    @abstractmethod
    def get_entrypoint(
        self, name: str | None = None, *, props: Any = None, limits: CallLimits | None = None
    ) -> EntrypointStub:
        """Return the entrypoint class `name` (None: the main module's functions, such as `fetch`).

        `props` reaches the tenant as `ctx.props` if it is plain data, and capabilities as `caller.props` as it is.
        `limits` hold for each call made through it; of them and the worker's own the lower one counts.
        """


class WorkerLoader(ABC):
    """Workers by id.

    *Order of calls*: inside `async with loader` only. *Concurrency*: one event loop. *Idempotency*: the same id
    is the same code; `code` is called again only after eviction. *Errors*: WorkerLoadError from the stubs' calls.
    """

    @abstractmethod
    def get(self, worker_id: str, code: CodeSource) -> WorkerStub:
        """Return the worker `worker_id`; `code` is asked for its code when that is first needed."""

    @abstractmethod
    def load(self, code: WorkerCode) -> WorkerStub:
        """Return a worker of its own for `code`, which nobody else gets and which no id leads to again."""

    @abstractmethod
    def bind(self, name: str, wrap: Callable[[Any], Any]) -> None:
        """Make a workflow binding known, for `wrap_workflow_binding(…, binding_name=name)` in workers' env.

        `wrap(metadata)` is asked at every call and returns the tenant's binding: `create`, `create_batch`,
        `get`, `delete_batch`, handles with the methods of an instance.
        """

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None:
        """Stop all isolates; none is left behind."""


_HOME = {
    "ProcessLoader": "dynflow.isolates.loader",
    "TrustedLoader": "dynflow.isolates.trusted",
    "describe_walls": "dynflow.isolates.zygotes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynflow.isolates' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


__all__ = [
    "Activity",
    "BoundObject",
    "CallLimits",
    "Caller",
    "Capability",
    "CodeSource",
    "EntrypointStub",
    "IsolateLimits",
    "ProcessLoader",
    "SegmentPort",
    "Tail",
    "TailEvent",
    "TrustedLoader",
    "WorkerCode",
    "WorkerLoader",
    "WorkerStub",
    "WrappedBinding",
    "binding",
    "current_caller",
    "describe_walls",
]
