import abc
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias

from dynflow.isolates.limits import CallLimits as CallLimits
from dynflow.isolates.limits import IsolateLimits as IsolateLimits
from dynflow.isolates.loader import ProcessLoader as ProcessLoader
from dynflow.isolates.tails import Tail as Tail
from dynflow.isolates.tails import TailEvent as TailEvent
from dynflow.isolates.trusted import TrustedLoader as TrustedLoader
from dynflow.isolates.zygotes import describe_walls as describe_walls
from dynflow.types import StepContext
from dynflow.workflow import StepPort, WorkflowStep

__all__ = [
    "Activity",
    "BoundObject",
    "CallLimits",
    "Caller",
    "Capability",
    "CodeSource",
    "EntrypointStub",
    "IsolateLimits",
    "SegmentPort",
    "Tail",
    "TailEvent",
    "WorkerCode",
    "WorkerLoader",
    "WorkerStub",
    "WrappedBinding",
    "binding",
    "current_caller",
]

@dataclass(frozen=True, slots=True)
class WorkerCode:
    main_module: str
    modules: Mapping[str, Any]
    env: Mapping[str, Any] = ...
    metadata: Any = ...
    limits: IsolateLimits = ...
    compatibility_date: str | None = ...
    tails: Sequence[Tail] = ...
    global_outbound: Any = ...
    tenant: str | None = ...
    def __post_init__(self) -> None: ...

CodeSource: TypeAlias = Callable[[], WorkerCode | Awaitable[WorkerCode]]

@dataclass(frozen=True, slots=True)
class Caller:
    worker_id: str
    metadata: Any = ...
    props: Any = ...
    instance_id: str | None = ...
    workflow_name: str | None = ...
    step: StepContext | None = ...

current_caller: ContextVar[Caller]

class Capability: ...

@dataclass(frozen=True, slots=True)
class BoundObject:
    target: object
    methods: frozenset[str] | None = ...

def binding(target: object, *, methods: Collection[str] | None = None) -> BoundObject: ...

@dataclass(frozen=True, slots=True)
class WrappedBinding:
    metadata: Any
    binding_name: str = ...

class Activity(Protocol):
    def active(self) -> None: ...
    def idle(self) -> None: ...
    def close(self) -> None: ...

class SegmentPort(StepPort, Protocol):
    @property
    def instance_id(self) -> str: ...
    @property
    def workflow_name(self) -> str: ...
    def activity(self) -> Activity: ...
    async def pin(self, digest: str, modules: Mapping[str, Any]) -> Mapping[str, Any]: ...

class EntrypointStub(ABC, metaclass=abc.ABCMeta):
    @abstractmethod
    async def run(self, event: Any, step: WorkflowStep) -> Any: ...
    @abstractmethod
    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any: ...
    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]: ...

class WorkerStub(ABC, metaclass=abc.ABCMeta):
    @abstractmethod
    def get_entrypoint(
        self, name: str | None = None, *, props: Any = None, limits: CallLimits | None = None
    ) -> EntrypointStub: ...

class WorkerLoader(ABC, metaclass=abc.ABCMeta):
    @abstractmethod
    def get(self, worker_id: str, code: CodeSource) -> WorkerStub: ...
    @abstractmethod
    def load(self, code: WorkerCode) -> WorkerStub: ...
    @abstractmethod
    def bind(self, name: str, wrap: Callable[[Any], Any]) -> None: ...
    @abstractmethod
    async def __aenter__(self) -> Self: ...
    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None: ...
