"""Contracts of engines: what a segment reads and records (Journal), and what a binding asks (Engine).

An engine schedules and stores. It never sees tenant code: that runs in `segment.py` and `step.py`, which know
no engine. Times are microseconds since the epoch; payloads are encoded bytes, opaque to engines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from dynflow.failure import Failure
from dynflow.serialization import MEBIBYTE
from dynflow.step_config import StepConfig
from dynflow.types import HistoryEvent, InstanceStatus, RollbackStatus, StepKind

StepState = Literal["running", "waiting", "complete", "errored", "cancelled"]
StepKey = tuple[StepKind, str, int]
# Between the parts of the stored name of an inner step: outer name, outer count, inner name. No name has it.
WITHIN = "\x1f"


def shown_name(stored: str) -> str:
    """Return a step's name as its workflow gave it."""
    return stored.rpartition(WITHIN)[2] if WITHIN in stored else stored


def outer_name(stored: str) -> str:
    """Return the name of the step that a step is within, empty where there is none."""
    outer = stored.rpartition(WITHIN)[0].removesuffix(f"{WITHIN}delay")  # of a step's delay function
    return shown_name(outer.rpartition(WITHIN)[0])


@dataclass(slots=True)
class StepRecord:
    """One step as the journal has it. `seq` is its place in the order of starts, from 1.

    `name` is the stored one: that of an inner step begins with its outer step's name and count, see `shown_name`.

    `deadline` is when a sleep, a retry delay or a wait ends. `attempt` counts attempts made, `failures` holds
    the last one's. Only the segment that has the lease changes it.
    """

    kind: StepKind
    name: str
    count: int
    seq: int
    state: StepState = "running"
    attempt: int = 0
    config: StepConfig | None = None
    started_at: int = 0
    attempt_at: int = 0
    ended_at: int | None = None
    output: bytes | None = None
    failure: Failure | None = None
    deadline: int | None = None
    event_type: str | None = None

    @property
    def key(self) -> StepKey:
        """What identifies the step in its instance."""
        return (self.kind, self.name, self.count)

    @property
    def path(self) -> str:
        """What the stored names of steps within this one begin with."""
        return f"{self.name}{WITHIN}{self.count}{WITHIN}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance may use (workflows.md section 8)."""

    payload: int = MEBIBYTE
    state: int = 1024 * MEBIBYTE
    steps: int = 10_000
    retries: int = 10_000
    wait: timedelta = timedelta(days=365)
    batch: int = 100


Told = Callable[[BaseException | None], None]
"""Is called on the event loop, once: with None when what was recorded is durable, else with why it was not stored."""
Store = Callable[[StepRecord, Told], None]


class Journal(ABC):
    """What one segment reads and records of its instance.

    *Order of calls*: any, concurrently; each record belongs to one step call. *Concurrency*: one event loop.
    *Idempotency*: none needed; the segment calls each once. *Cancellation*: a cancelled call may still be stored.
    *Errors*: LeaseLostError once the instance was terminated, restarted or taken over: nothing was stored.
    StorageError where storage failed: the segment ends, and a later one goes on from what is stored.
    WorkflowInternalError where the instance has used its state limit up. When a method returns, what it says is
    durable; those that every step needs, `begin_attempt` and `finish_step`, return at once and say so by `told`.
    """

    steps: dict[StepKey, StepRecord]
    """All steps of earlier segments and of this one."""

    @abstractmethod
    def begin_attempt(self, record: StepRecord, told: Told) -> None:
        """Store that attempt `record.attempt` starts (and the step, at its first)."""

    @abstractmethod
    def finish_step(self, record: StepRecord, told: Told) -> None:
        """Store the step's final state: output or failure."""

    @abstractmethod
    async def delay_retry(self, record: StepRecord) -> None:
        """Store that the attempt failed and the next may start at `record.deadline`."""

    @abstractmethod
    async def begin_wait(self, record: StepRecord) -> None:
        """Store a sleep or a wait. A buffered event that matches completes `record` in the same transaction."""

    @abstractmethod
    async def end_wait(self, record: StepRecord) -> None:
        """End a wait whose deadline has passed; sets `record` to what it became (an event may have won)."""

    @abstractmethod
    async def cancel(self, record: StepRecord) -> list[StepRecord]:
        """Store that the workflow cancelled the step, unless it has ended; sets `record` to what it became.

        An event that the workflow was not given any more goes to the next waiter, else back to the head of the
        buffer. Returns the waits that this ended.
        """

    @abstractmethod
    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the pinned code of the instance; pin this one where there is none yet."""


class NewInstance(NamedTuple):
    """What `create` stores. `params` and `schedule` are encoded."""

    id: str
    params: bytes
    schedule: bytes | None = None
    retention: Mapping[str, timedelta] | None = None


class InstanceRef(NamedTuple):
    """Which instance. `tenant` None finds the id among all tenants, if one alone has it."""

    workflow: str
    id: str
    tenant: str | None = None


class NewFork(NamedTuple):
    """What `fork` stores. `params` None: those of the instance that it is forked from."""

    id: str
    params: bytes | None = None
    retention: Mapping[str, timedelta] | None = None


Listener = Callable[[InstanceRef, HistoryEvent], None]


class Engine(ABC):
    """Creates instances, wakes them, controls them.

    *Order of calls*: inside `async with engine`, after `register`. *Concurrency*: any number of callers on the
    engine's event loop. *Idempotency*: creating an existing id does nothing and says so. *Cancellation*: a
    cancelled call may still take effect. *Errors*: those of `dynflow.errors` that the instance API names;
    StorageError where the storage fails. What a method has returned survives a crash.
    """

    limits: Limits

    @abstractmethod
    async def create(self, workflow: str, tenant: str, items: Sequence[NewInstance]) -> list[bool]:
        """Queue instances; False in the place of each whose id exists."""

    @abstractmethod
    async def find(self, ref: InstanceRef) -> InstanceRef:
        """Return the reference with its tenant. Raises InstanceNotFoundError."""

    @abstractmethod
    async def status(self, ref: InstanceRef) -> InstanceStatus:
        """Return status, result and steps."""

    @abstractmethod
    async def control(
        self, ref: InstanceRef, move: Literal["pause", "resume", "terminate"], *, rollback: bool = False
    ) -> None:
        """Move the instance. Raises IllegalMoveError."""

    @abstractmethod
    async def restart(self, ref: InstanceRef, from_step: StepKey | None) -> None:
        """Start again, keeping what was started before `from_step` (None: nothing)."""

    @abstractmethod
    async def fork(self, ref: InstanceRef, before: StepKey, new: NewFork) -> bool:
        """Queue another instance, with the steps and sleeps that `ref` had started before a step and that have ended.

        False where the id exists. Nothing of `ref` is changed; waits for events, and pinned code, stay its own.
        """

    @abstractmethod
    async def send_event(self, ref: InstanceRef, event_type: str, payload: bytes) -> None:
        """Deliver or buffer an event."""

    @abstractmethod
    async def delete(self, refs: Sequence[InstanceRef]) -> list[bool]:
        """Delete instances with all they have; False in the place of each that does not exist."""

    @abstractmethod
    def history(self, ref: InstanceRef, cursor: int) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what happened after `cursor`, then what happens, up to the end of the instance."""

    @abstractmethod
    async def result(self, ref: InstanceRef) -> Any:
        """Wait for the end; return the output or raise the instance's error."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The workflow returned; `output` is encoded."""

    output: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """An error left `run`. `rollback` says how the handlers did, where there were any."""

    failure: Failure
    rollback: RollbackStatus | None = None


@dataclass(frozen=True, slots=True)
class Terminated:
    """The rollback of a terminated instance is over."""

    rollback: RollbackStatus | None


@dataclass(frozen=True, slots=True)
class Blocked:
    """Only durable waits are left. `waits` are their steps' seqs, `wake_at` the earliest deadline."""

    waits: tuple[int, ...]
    wake_at: int | None


@dataclass(frozen=True, slots=True)
class Paused:
    """A pause took effect: nothing runs."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The isolate went down under a step; what happened is recorded, go on in another one."""


Outcome = Completed | Failed | Terminated | Blocked | Paused | Interrupted
