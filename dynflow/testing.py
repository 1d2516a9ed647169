"""For tests of workflows: an engine in a temporary folder whose time stands still, and scripts for instances.

A script says, before an instance runs, what its steps, waits and sleeps do. Steps keep all that the engine does
with them: they are stored, retried, timed out, replayed. Time never really passes: `engine.clock` is moved by
hand, and what a script disables is not waited for.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

from dynflow.clock import ManualClock
from dynflow.engines import InstanceRef, NewInstance, StepRecord, shown_name
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import (
    InstanceNotFoundError,
    InvalidArgumentError,
    WorkflowFatalError,
    WorkflowTimeoutError,
)
from dynflow.instance import FINISHED, UNFINISHED, check_event_type, check_instance_id
from dynflow.segment import Segment
from dynflow.serialization import decode, encode
from dynflow.step_host import checked_name
from dynflow.types import HistoryEvent, InstanceStatus, StepContext, StepStatus, WorkflowEvent
from dynflow.workflow import StepCall, begin

# How long a test waits, in real seconds, for what should come by itself.
_DEADLINE = 10.0
_INSTANT = timedelta(microseconds=1)

_Target = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class _Fault:
    """What the first `times` attempts of a step raise; None: all of them."""

    make: Callable[[StepContext], BaseException]
    times: int | None


@dataclass(slots=True)
class _Plan:
    """What a script has said so far. Names of sleeps and waits; None stands for all of them."""

    sleeps: set[str | None] = field(default_factory=set)
    delays: set[str | None] = field(default_factory=set)
    timeouts: set[str] = field(default_factory=set)
    results: dict[_Target, bytes] = field(default_factory=dict)
    faults: dict[_Target, _Fault] = field(default_factory=dict)
    events: list[tuple[str, bytes]] = field(default_factory=list)


class InstanceScript:
    """What one instance's steps and waits do in a test. Say it before the instance is created.

    `name` is a step's name; `count` its occurrence, None for each one of that name.
    """

    def __init__(self, engine: TestingEngine, workflow: str, instance_id: str) -> None:
        self._engine, self._workflow, self._id = engine, workflow, instance_id
        self._plan = _Plan()

    # --- what shall happen ---

    def disable_sleeps(self, *names: str) -> None:
        """Let these sleeps be over at once; without names, all."""
        self._plan.sleeps.update(map(_checked, names) if names else (None,))

    def disable_retry_delays(self, *names: str) -> None:
        """Let the next attempts of these steps come at once; without names, of all."""
        self._plan.delays.update(map(_checked, names) if names else (None,))

    def mock_step_result(self, name: str, result: Any, *, count: int | None = None) -> None:
        """Let a step return `result`, plain data, instead of calling its callback."""
        self._plan.results[_target(name, count)] = encode(result)

    def mock_step_error(
        self, name: str, error: BaseException, *, times: int | None = None, count: int | None = None
    ) -> None:
        """Let the first `times` attempts of a step raise `error` (None: all), and the others go on as usual."""
        if not isinstance(error, Exception):
            raise InvalidArgumentError(f"a step fails with an exception, not with {error!r:.100}")
        self._plan.faults[_target(name, count)] = _Fault(lambda _: error, _times(times))

    def force_step_timeout(self, name: str, *, times: int | None = None, count: int | None = None) -> None:
        """Let the first `times` attempts of a step end as if their timeout had passed (None: all)."""
        self._plan.faults[_target(name, count)] = _Fault(_timed_out, _times(times))

    def mock_event(self, *, type: str, payload: Any = None) -> None:  # noqa: A002 - the contract's names
        """Send an event as soon as the instance is created. Raises InvalidArgumentError once it is."""
        if (self._workflow, self._id) in self._engine.created:
            raise InvalidArgumentError(f"instance {self._id!r} is there already: use its send_event")
        self._plan.events.append((check_event_type(type), encode(payload)))

    def force_event_timeout(self, name: str) -> None:
        """Let a wait for an event time out at once, unless its event is there already."""
        self._plan.timeouts.add(_checked(name))

    # --- what has happened ---

    async def wait_for_status(self, *wanted: str, timeout: float = _DEADLINE) -> InstanceStatus:  # noqa: ASYNC109
        """Wait until the instance has one of these statuses.

        Raises TimeoutError after `timeout` real seconds, AssertionError when it has ended with another status.
        """
        if not wanted or not set(wanted) <= FINISHED | UNFINISHED:
            raise InvalidArgumentError(f"statuses are {sorted(FINISHED | UNFINISHED)}, not {wanted!r:.100}")
        found: InstanceStatus = await self._until(
            lambda status: status if status.status in wanted else None, wanted, timeout
        )
        return found

    async def wait_for_step_result(
        self,
        name: str,
        *,
        count: int = 1,
        timeout: float = _DEADLINE,  # noqa: ASYNC109
    ) -> Any:
        """Wait until a step, sleep or wait has ended; return its output.

        A sensitive output is `[REDACTED]`, as everywhere. Raises AssertionError naming the error of one that
        failed, or when the instance ended without the step; TimeoutError after `timeout` real seconds.
        """
        target = _target(name, count)
        step = await self._until(partial(_ended_step, target), f"a result of step {name!r}", timeout)
        if step.status != "complete":
            reason = f" with {step.error.name}: {step.error.message}" if step.error is not None else ""
            raise AssertionError(f"step {name!r} is {step.status}{reason}")
        return step.output

    async def _until(self, look: Callable[[InstanceStatus], Any], wanted: object, deadline: float) -> Any:
        status: InstanceStatus | None = None
        try:
            async with asyncio.timeout(deadline):
                while True:
                    changed = self._engine.changed
                    status = await self._status()
                    found = None if status is None else look(status)
                    if found is not None:
                        return found
                    if status is not None and status.status in FINISHED:
                        raise AssertionError(f"{self._described(status)} and never had {wanted}")
                    await changed.wait()
        except TimeoutError:
            raise TimeoutError(f"{self._described(status)}; it did not come to {wanted}") from None

    async def _status(self) -> InstanceStatus | None:
        try:
            return await self._engine.status(InstanceRef(self._workflow, self._id))
        except InstanceNotFoundError:
            return None

    def _described(self, status: InstanceStatus | None) -> str:
        if status is None:
            return f"instance {self._id!r} was not created"
        steps = ", ".join(f"{step.name} {step.status}" for step in status.steps)
        return f"instance {self._id!r} is {status.status} ({steps or 'no steps'}; error: {status.error})"

    # --- for the segment ---

    def rewrite(self, call: StepCall) -> StepCall:
        """Return the step call that takes the place of `call`."""
        if call.kind == "do" and isinstance(call.name, str):
            return replace(call, callback=self._callback(call))
        if call.kind in {"sleep", "sleep_until"} and _named(self._plan.sleeps, call.name):
            return replace(call, argument=0)
        if call.kind == "wait_for_event" and call.name in self._plan.timeouts:
            return replace(call, argument=_INSTANT)
        return call

    def _callback(self, call: StepCall) -> Any:
        fault, result = _of(self._plan.faults, call), _of(self._plan.results, call)
        if fault is None and result is None:
            return call.callback
        usual = call.callback if result is None else lambda: decode(result)
        return usual if fault is None else _failing(fault, usual)

    def is_instant(self, record: StepRecord) -> bool:
        """Return whether a retry delay is not waited for."""
        return record.kind in {"do", "rollback"} and _named(self._plan.delays, shown_name(record.name))

    def times_out(self, record: StepRecord) -> bool:
        """Return whether a wait for an event is over as soon as it begins."""
        return record.kind == "wait_for_event" and shown_name(record.name) in self._plan.timeouts

    def events(self) -> Sequence[tuple[str, bytes]]:
        """Return the events that are sent at the instance's creation."""
        return self._plan.events


def _named(names: set[str | None], name: Any) -> bool:
    return None in names or name in names


def _of(planned: dict[_Target, Any], call: StepCall) -> Any:
    return planned.get((call.name, call.count), planned.get((call.name, None)))


def _failing(fault: _Fault, usual: Any) -> Any:
    def attempt(ctx: StepContext) -> Any:
        if fault.times is None or ctx.attempt <= fault.times:
            raise fault.make(ctx)
        return begin(usual, ctx)

    return attempt


def _timed_out(ctx: StepContext) -> WorkflowTimeoutError:
    limit = ctx.config["timeout"]
    return WorkflowTimeoutError(
        f"step {ctx.step.name!r}, attempt {ctx.attempt}, ran longer than its timeout of {limit}"
    )


def _times(given: int | None) -> int | None:
    if given is not None and (type(given) is not int or given < 1):
        raise InvalidArgumentError(f"times must be an int of at least 1 or None, not {given!r:.100}")
    return given


def _target(name: str, count: int | None) -> _Target:
    if count is not None and (type(count) is not int or count < 1):
        raise InvalidArgumentError(f"count must be an int of at least 1, not {count!r:.100}")
    return _checked(name), count


def _checked(name: str) -> str:
    try:
        return checked_name(name)
    except WorkflowFatalError as error:  # nothing of the kind can be in a workflow
        raise InvalidArgumentError(str(error)) from None


def _ended_step(target: _Target, status: InstanceStatus) -> StepStatus | None:
    ended = (
        step
        for step in status.steps
        if (step.name, step.count) == target and step.status in {"complete", "errored", "cancelled"}
    )
    return next(ended, None)


class TestingEngine(EmbeddedEngine):
    """An embedded engine in a temporary folder, on a clock that only `engine.clock.advance(…)` moves.

    Use it like any engine, inside `async with`; keywords are those of EmbeddedEngine. `reopen` is a crash.
    """

    __test__ = False  # not a class of tests, whatever pytest makes of its name

    clock: ManualClock

    def __init__(self, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dynflow-testing-")
        clock = options.pop("clock", None) or ManualClock()
        # The folder goes with the engine: nothing has to survive a power loss.
        super().__init__(
            Path(self._folder.name) / "flow.db",
            clock=clock,
            synchronous="NORMAL",
            **options,
        )
        self._scripts: dict[tuple[str, str], InstanceScript] = {}
        self.created: set[tuple[str, str]] = set()
        self.changed = asyncio.Event()
        self.add_listener(self._heard)

    def script(self, workflow: str, instance_id: str) -> InstanceScript:
        """Return the script of an instance, created or not; the same one at each call."""
        key = (workflow, check_instance_id(instance_id))
        return self._scripts.setdefault(key, InstanceScript(self, *key))

    async def create(self, workflow: str, tenant: str, items: Sequence[NewInstance]) -> list[bool]:
        """Queue instances, and send them the events of their scripts."""
        made = await super().create(workflow, tenant, items)
        for item, is_new in zip(items, made, strict=True):
            if is_new:
                self.created.add((workflow, item.id))
                for event_type, payload in self.script(workflow, item.id).events():
                    await self.send_event(InstanceRef(workflow, item.id, tenant), event_type, payload)
        return made

    async def reopen(self) -> Self:
        """Stop as a crash would, and go on from what is stored."""
        await super().__aexit__()
        return await super().__aenter__()

    async def __aexit__(self, *exc_info: object) -> None:
        await super().__aexit__(*exc_info)
        self._folder.cleanup()

    def _heard(self, _: InstanceRef, __: HistoryEvent) -> None:
        # A new one for whoever looks from now on: nobody clears what another one has not seen.
        before, self.changed = self.changed, asyncio.Event()
        before.set()

    def _segment(self, event: WorkflowEvent, *args: Any, **options: Any) -> Segment:
        return _ScriptedSegment(self.script(event.workflow_name, event.instance_id), event, *args, **options)


class _ScriptedSegment(Segment):
    def __init__(self, script: InstanceScript, event: WorkflowEvent, *args: Any, **options: Any) -> None:
        super().__init__(event, *args, **options)
        self._script = script

    def call(self, call: StepCall) -> Any:
        return super().call(self._script.rewrite(call))

    async def wait(self, record: StepRecord) -> None:
        if self._script.is_instant(record):
            await asyncio.sleep(0)
            return
        if self._script.times_out(record) and isinstance(self.clock, ManualClock):
            self.clock.advance(_INSTANT)
        await super().wait(record)


__all__ = ["InstanceScript", "ManualClock", "TestingEngine"]
