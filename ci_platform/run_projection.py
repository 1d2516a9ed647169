"""Runs seen to their conclusions: row and instance of a run are made to agree.

`project` looks at the instance: it creates one that is missing, carries out a rerun, ends what is to be stopped,
sends approvals, and writes down gates, phase and conclusion. It can be repeated at any point, so a crash between
two of its steps loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, cast
from weakref import WeakValueDictionary

import anyio

from ci_platform.admission import Admission
from ci_platform.backoff import backoff
from ci_platform.errors import UnavailableError
from ci_platform.gates import Gates
from ci_platform.instances import InstanceHandle, Layers, WorkflowsBinding
from ci_platform.model import Run
from ci_platform.notices import Notices
from ci_platform.outcomes import (
    Outcome,
    Stop,
    in_words,
    outcome_of,
    phase_of,
    shown,
    started_at,
    state_of,
    waiting_for,
)
from ci_platform.reports import Reports
from ci_platform.run_forks import RunForks
from ci_platform.run_queries import RunQueries, params_of
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock
from dynflow.errors import IllegalMoveError, InstanceExistsError, InstanceNotFoundError
from dynflow.types import InstanceStatus

_log = logging.getLogger(__name__)

_AT_ONCE = 16
# Deadlines are known when they arise; this is for those that another process may have written.
_LOOK_EVERY = timedelta(minutes=1)


class RunProjection(RunQueries):
    """Sees runs to their conclusions. `serve` runs beside the server, in the same event loop."""

    def __init__(  # noqa: PLR0913 - the services that it works through
        self,
        store: Store,
        clock: Clock,
        notices: Notices,
        *,
        workflows: WorkflowsBinding,
        gates: Gates,
        reports: Reports,
        layers: Layers,
        forks: RunForks,
        run_timeout: timedelta = timedelta(hours=6),
        admission: Admission | None = None,
    ) -> None:
        super().__init__(store, clock, workflows)
        self._notices, self._gates, self._reports = notices, gates, reports
        self._layers, self._forks, self._run_timeout = layers, forks, run_timeout
        self._admission = admission or Admission()
        self._busy: set[str] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._failures: dict[str, int] = {}
        self._retry_at: dict[str, datetime] = {}
        self._due_at: datetime | None = None
        self._concluded = anyio.Event()

    # --- seeing to it --------------------------------------------------------------------------

    async def serve(self) -> None:
        """Look at every unfinished run once, then at each that something happens to, for ever."""
        for run_id in await self._unfinished():
            self._notices.add(run_id)
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as group:
            while True:
                await self._note_what_is_due()
                for run_id in self._notices.take(but=self._busy):
                    self._busy.add(run_id)
                    group.start_soon(self._project_in_lane, run_id, limiter)
                await self._notices.wait(self._due_at)

    async def sweep(self) -> int:
        """Look at every unfinished run, one after the other, and return how many there were."""
        run_ids = await self._unfinished()
        for run_id in run_ids:
            await self.project(run_id)
        return len(run_ids)

    async def _project_in_lane(self, run_id: str, limiter: anyio.CapacityLimiter) -> None:
        try:
            async with limiter:
                await self.project(run_id)
        except Exception as error:  # noqa: BLE001 - one run's trouble must not keep the others from concluding
            self._try_later(run_id, error)
        else:
            self._failures.pop(run_id, None)
        finally:
            self._busy.discard(run_id)
            self._notices.wake()

    def _try_later(self, run_id: str, error: Exception) -> None:
        failures = self._failures[run_id] = self._failures.get(run_id, 0) + 1
        self._retry_at[run_id] = self._clock.now() + backoff(failures)
        self._due_by(self._retry_at[run_id])
        known = isinstance(error, UnavailableError)
        _log.warning("run %s could not be looked at: %s", run_id, error, exc_info=None if known else error)

    async def project(self, run_id: str) -> None:
        """Make row and instance of a run agree; see the module's docstring. Callers of one run take turns."""
        lock = self._turns.setdefault(run_id, asyncio.Lock())
        async with lock:
            await self._project(run_id)

    async def _project(self, run_id: str) -> None:
        run = await self._store.read(lambda tx: tx.first(Run, col(Run.id) == run_id))
        if run is None or run.conclusion is not None:
            return
        handle = await self._instance(run)
        if handle is None:
            return
        if run.fork_pending:
            done = {"fork_pending": False}
            await self._store.write(lambda tx: tx.change(Run, done, col(Run.id) == run_id))
        if run.rerun_pending:
            if run.stop_conclusion is None and await self._held_back(run):
                return
            await self._carry_out_rerun(run, handle)
        status = await handle.status()
        if run.stop_conclusion is not None and phase_of(status) != "finished":
            with suppress(IllegalMoveError):  # it ended meanwhile
                await handle.terminate()
            status = await handle.status()
        if await self._gates.send_approvals(run_id, handle, status):
            status = await handle.status()
        if await self._store.write(lambda tx: self._write_down(tx, run_id, run.attempt, status)):
            self._tell_waiters()
        self._reports.wake()

    async def _instance(self, run: Run, *, is_new: bool = False) -> InstanceHandle | None:
        """Return the run's instance, created if it is not yet; None where the run was concluded without, or is held.

        A run that is new takes over nothing: an instance of its id is of a row that was lost (a database
        restored from an older copy), and its workspaces are gone too.
        """
        with suppress(InstanceNotFoundError):
            found = cast("InstanceHandle", await self._workflows.get(run.id))
            if not is_new:
                return found
            await found.delete()
        if run.stop_conclusion is not None:
            await self._conclude_without_instance(
                run, Stop(cast("Any", run.stop_conclusion), run.stop_reason or "")
            )
            return None
        if run.started_at is not None:
            await self._conclude_without_instance(
                run, Stop("error", "the engine has no record of this run any more")
            )
            return None
        if await self._held_back(run):
            return None
        if run.forked_from is not None:
            lost = await self._forks.carry_out(run)
            if lost is not None:
                await self._conclude_without_instance(run, Stop("error", lost))
                return None
            return cast("InstanceHandle", await self._workflows.get(run.id))
        if run.rerun_pending:  # what it is rerun from is lost: its files would be those of nothing
            await self._layers.delete_run(run.id)
        with suppress(InstanceExistsError):
            await self._workflows.create(id=run.id, params=params_of(run))
        return cast("InstanceHandle", await self._workflows.get(run.id))

    async def _held_back(self, run: Run) -> bool:
        """Whether a run may not begin now; the reason is shown then."""
        why = self._admission.refusal(run.id)
        if why is not None and why != run.waiting_for:
            now = {"phase": "queued", "waiting_for": why}

            def show(tx: Transaction) -> None:
                if tx.change(Run, now, col(Run.id) == run.id, col(Run.conclusion).is_(None)):
                    self._reports.put_status(tx, run, "pending", f"queued, waiting for {why}")

            await self._store.write(show)
            self._reports.wake()
        return why is not None

    def let_go(self) -> None:
        """Look at the runs again that were held back, where they may begin by now."""
        for run_id in self._admission.released():
            self._notices.add(run_id)
            self._tell_waiters()

    def _tell_waiters(self) -> None:
        concluded, self._concluded = self._concluded, anyio.Event()
        concluded.set()

    async def _conclude_without_instance(self, run: Run, stop: Stop) -> None:
        outcome, now = Outcome(stop.conclusion, stop.reason), self._clock.now()

        def write(tx: Transaction) -> None:
            self._gates.project(tx, run.id, InstanceStatus(run.id, "terminated", run.created_at))
            self._conclude(tx, run, outcome, now)

        await self._store.write(write)
        self._tell_waiters()
        self._reports.wake()

    async def _carry_out_rerun(self, run: Run, handle: InstanceHandle) -> None:
        """Restart the instance, its workspaces first. One that has not ended, or ended since, was restarted already."""
        status = await handle.status()
        ended_since = run.ended_at and status.ended_at and status.ended_at > run.ended_at
        if phase_of(status) == "finished" and not ended_since:
            from_step = None if run.rerun_from is None else _step_key(run.rerun_from)
            await self._layers.rewind_run(run.id, _steps_from(status, from_step))
            await handle.restart(from_step)
        done = {"rerun_pending": False, "rerun_from": None, "ended_at": None}
        await self._store.write(lambda tx: tx.change(Run, done, col(Run.id) == run.id))

    # --- writing down --------------------------------------------------------------------------

    def _write_down(self, tx: Transaction, run_id: str, attempt: int, status: InstanceStatus) -> bool:
        """Store what `status` says of attempt `attempt`; return whether the run has concluded."""
        run = tx.lock(Run, col(Run.id) == run_id)
        if run is None or run.attempt != attempt or run.conclusion is not None or run.rerun_pending:
            return False  # the status is of an earlier attempt
        self._gates.project(tx, run_id, status)
        now, phase = self._clock.now(), phase_of(status)
        run.started_at = (
            run.started_at or started_at(status, run.created_at) or (now if phase != "queued" else None)
        )
        stop = Stop(cast("Any", run.stop_conclusion), run.stop_reason or "") if run.stop_conclusion else None
        outcome = outcome_of(status, stop, run.started_at)
        if outcome is not None:
            self._conclude(tx, run, outcome, status.ended_at or now)
            return True
        active = phase == "running"
        values = {
            "phase": phase,
            "waiting_for": waiting_for(status),
            "started_at": run.started_at,
            "active_since": (run.active_since or now) if active else None,
        }
        tx.change(Run, values, col(Run.id) == run_id)
        if active:
            self._due_by(now + self._run_timeout)
        if stop is None:
            self._reports.put_status(tx, run, *shown(status))
        return False

    def _conclude(self, tx: Transaction, run: Run, outcome: Outcome, ended_at: datetime) -> None:
        values = {
            "phase": "finished",
            "waiting_for": None,
            "started_at": run.started_at,
            "active_since": None,
            "ended_at": ended_at,
            "conclusion": outcome.conclusion,
            "conclusion_reason": outcome.reason,
            "rerun_pending": False,
            "fork_pending": False,
        }
        if tx.change(Run, values, col(Run.id) == run.id, col(Run.conclusion).is_(None)):
            first_line = outcome.reason.partition("\n")[0]
            self._reports.put_status(tx, run, state_of(outcome.conclusion), first_line)

    # --- time ----------------------------------------------------------------------------------

    async def _unfinished(self) -> Sequence[str]:
        rows = await self._store.read(
            lambda tx: tx.all(Run, col(Run.conclusion).is_(None), order=col(Run.seq))
        )
        return [row.id for row in rows]

    async def _note_what_is_due(self) -> None:
        now = self._clock.now()
        if self._due_at is not None and now < self._due_at:
            return
        for run_id in [run_id for run_id, when in self._retry_at.items() if when <= now]:
            del self._retry_at[run_id]
            self._notices.add(run_id)
        late = await self._store.read(
            lambda tx: tx.all(Run, *_ACTIVE, col(Run.active_since) <= now - self._run_timeout)
        )
        for run in late:
            await self._stop_for_time(run.id)
            self._notices.add(run.id)
        first = await self._store.read(lambda tx: tx.first(Run, *_ACTIVE, order=col(Run.active_since)))
        moments = [*self._retry_at.values(), now + _LOOK_EVERY]
        if first is not None and first.active_since is not None:
            moments.append(first.active_since + self._run_timeout)
        self._due_at = min(moments)

    async def _stop_for_time(self, run_id: str) -> None:
        reason = f"the run worked for more than {in_words(self._run_timeout)} without waiting"
        stop = {"stop_conclusion": "timed_out", "stop_reason": reason}
        await self._store.write(lambda tx: tx.change(Run, stop, col(Run.id) == run_id, *_ACTIVE))

    def _due_by(self, moment: datetime) -> None:
        """See to it that something is looked at again by then."""
        self._due_at = None if self._due_at is None else min(self._due_at, moment)


_ACTIVE = (
    col(Run.active_since).is_not(None),
    col(Run.stop_conclusion).is_(None),
    col(Run.conclusion).is_(None),
)


def _step_key(stored: Sequence[Any]) -> tuple[str, int, str]:
    """Return name, count and kind of a step, as a row has them: without a kind it is a `do`."""
    name, count, kind = (*stored, "do")[:3]
    return str(name), int(count), str(kind)


def _steps_from(status: InstanceStatus, from_step: tuple[str, int, str] | None) -> list[tuple[str, int]]:
    """Return the steps that a rerun forgets: that one and all that started after it; all without one."""
    steps = list(status.steps)
    if from_step is not None:
        first = next((step for step in steps if (step.name, step.count, step.kind) == from_step), None)
        position = len(steps) if first is None else steps.index(first)
        # Those listed later started later; a tie in time is theirs as well, as it is the engine's.
        steps = [
            step
            for index, step in enumerate(steps)
            if index >= position or step.started_at > steps[position].started_at
        ]
    return [(step.name, step.count) for step in steps if step.kind == "do"]
