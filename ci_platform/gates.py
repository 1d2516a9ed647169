"""Gates: a run's durable waits for an event, as things that people decide.

The first decision wins. An approval becomes exactly one event of the type that the pipeline waits for, with
the payload `{"decision": "approve", "comment": …, "by": …}`. A rejection ends the run: it concludes `failure`,
"gate approval rejected by …"; its pipeline is not asked, so it cannot carry on regardless.

The decision is a row before anything follows from it; `Runs.project` sees to it that it does, also after a crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal, cast

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError
from ci_platform.instances import InstanceHandle
from ci_platform.model import Gate, Run
from ci_platform.notices import Notices
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock
from dynflow.errors import IllegalMoveError
from dynflow.types import InstanceStatus, StepStatus

Decision = Literal["approve", "reject"]
GateState = Literal["open", "approved", "rejected", "timed_out", "closed"]

_MAX_COMMENT = 4000


@dataclass(frozen=True, slots=True)
class GateView:
    """A gate as the API shows it. `closed` is one whose run went on or ended without a decision here."""

    run_id: str
    name: str
    count: int
    event_type: str
    state: GateState
    opened_at: datetime
    deadline: datetime | None
    decided_by: str | None
    decided_at: datetime | None
    comment: str | None


class Gates:
    """Lists gates and takes decisions."""

    def __init__(self, store: Store, clock: Clock, notices: Notices) -> None:
        self._store, self._clock, self._notices = store, clock, notices

    async def open(self, *, repo: str | None = None) -> list[GateView]:
        """Return the open gates of all runs, the one that waits longest first."""

        def find(tx: Transaction) -> Sequence[Gate]:
            gates = tx.all(Gate, *_OPEN, order=col(Gate.opened_at))
            if repo is None:
                return gates
            of_repo = {run.id for run in tx.all(Run, col(Run.repo) == repo, col(Run.conclusion).is_(None))}
            return [gate for gate in gates if gate.run_id in of_repo]

        return [gate_view(gate) for gate in await self._store.read(find)]

    async def of_run(self, run_id: str) -> list[GateView]:
        """Return all gates that the run has opened, in order."""
        return [gate_view(gate) for gate in await self._store.read(lambda tx: gates_of_run(tx, run_id))]

    async def decide(
        self, run_id: str, name: str, decision: Decision, *, by: str, comment: str | None = None
    ) -> GateView:
        """Decide the open gate `name` of a run. `by` is who the token says, never who the request says.

        Durable when this returns; the run goes on (or ends) soon after. Of several open gates of one name the
        first is decided. Raises InvalidInputError, NotFoundError, or ConflictError naming the decision that was
        first.
        """
        if decision not in {"approve", "reject"}:
            raise InvalidInputError(f"a decision is 'approve' or 'reject', not {decision!r:.50}")
        if comment is not None and len(comment) > _MAX_COMMENT:
            raise InvalidInputError(f"a comment has at most {_MAX_COMMENT:,} characters")
        gate = await self._store.write(lambda tx: self._decide(tx, run_id, name, decision, by, comment))
        self._notices.add(run_id)
        return gate_view(gate)

    def _decide(
        self, tx: Transaction, run_id: str, name: str, decision: Decision, by: str, comment: str | None
    ) -> Gate:
        where = (col(Gate.run_id) == run_id, col(Gate.name) == name)
        gate = tx.first(Gate, *where, *_OPEN, order=col(Gate.id))
        if gate is None:
            raise _why_not(tx, run_id, name)
        now = self._clock.now()
        values = {"decision": decision, "decided_by": by, "comment": comment, "decided_at": now}
        # Conditional again: on Postgres another decision may have come between.
        if not tx.change(Gate, values, col(Gate.id) == gate.id, *_OPEN):
            raise ConflictError(f"gate {name!r} has just been decided by somebody else")
        if decision == "reject":
            reason = f"gate {name} rejected by {by}" + (f": {comment}" if comment else "")
            stop = {"stop_conclusion": "failure", "stop_reason": reason}
            tx.change(Run, stop, col(Run.id) == run_id, col(Run.stop_conclusion).is_(None))
        return cast("Gate", tx.get(Gate, gate.id))

    # --- for runs ------------------------------------------------------------------------------

    async def send_approvals(self, run_id: str, handle: InstanceHandle, status: InstanceStatus) -> bool:
        """Send the events of approvals that the engine does not have yet; return whether there were any.

        One caller per run at a time. After a crash between sending and noting it, the wait is not open any more
        and nothing is sent again.
        """
        approved = await self._store.read(
            lambda tx: tx.all(
                Gate,
                col(Gate.run_id) == run_id,
                col(Gate.decision) == "approve",
                col(Gate.sent_at).is_(None),
                order=col(Gate.id),
            )
        )
        waiting = {_identity(step) for step in waits(status)}
        for gate in approved:
            if (gate.name, gate.count, gate.opened_at) in waiting:
                payload = {"decision": "approve", "comment": gate.comment, "by": gate.decided_by}
                with suppress(IllegalMoveError):  # the run ended meanwhile: nobody waits any more
                    await handle.send_event(type=gate.event_type, payload=payload)
            await self._store.write(partial(_mark_sent, gate=gate, now=self._clock.now()))
        return bool(approved)

    def project(self, tx: Transaction, run_id: str, status: InstanceStatus) -> None:
        """Make the gates be what the engine says: open those that wait, close those that do not any more."""
        known = {(gate.name, gate.count, gate.opened_at): gate for gate in gates_of_run(tx, run_id)}
        waiting = {_identity(step): step for step in waits(status)}
        for identity, step in waiting.items():
            gate = known.get(identity)
            if gate is None:
                tx.add(_gate(run_id, step))
            elif gate.deadline != step.deadline:  # a pause shifts it
                tx.change(Gate, {"deadline": step.deadline}, col(Gate.id) == gate.id)
        ended = {_identity(step): step for step in status.steps if step.kind == "wait_for_event"}
        for identity, gate in known.items():
            if gate.decided_at is None and gate.closed_at is None and identity not in waiting:
                values = {"closed_at": self._clock.now(), "outcome": _outcome(ended.get(identity))}
                tx.change(Gate, values, col(Gate.id) == gate.id, *_OPEN)


_OPEN = (col(Gate.decided_at).is_(None), col(Gate.closed_at).is_(None))


def gates_of_run(tx: Transaction, run_id: str) -> Sequence[Gate]:
    """Return the run's gates in the order of their opening."""
    return tx.all(Gate, col(Gate.run_id) == run_id, order=col(Gate.id))


def gate_view(gate: Gate) -> GateView:
    """Return the row as the API shows it."""
    return GateView(
        run_id=gate.run_id,
        name=gate.name,
        count=gate.count,
        event_type=gate.event_type,
        state=_state(gate),
        opened_at=gate.opened_at,
        deadline=gate.deadline,
        decided_by=gate.decided_by,
        decided_at=gate.decided_at,
        comment=gate.comment,
    )


def waits(status: InstanceStatus) -> list[StepStatus]:
    """Return the waits for an event that are open in an unfinished instance."""
    if status.status in {"complete", "errored", "terminated"}:
        return []
    return [step for step in status.steps if step.kind == "wait_for_event" and step.status == "waiting"]


def _mark_sent(tx: Transaction, gate: Gate, now: datetime) -> None:
    tx.change(Gate, {"sent_at": now}, col(Gate.id) == gate.id)


def _identity(step: StepStatus) -> tuple[str, int, datetime]:
    return step.name, step.count, step.started_at


def _gate(run_id: str, step: StepStatus) -> Gate:
    return Gate(
        run_id=run_id,
        name=step.name,
        count=step.count,
        event_type=step.event_type or step.name,
        opened_at=step.started_at,
        deadline=step.deadline,
    )


def _outcome(step: StepStatus | None) -> str:
    return "timed_out" if step is not None and step.status == "errored" else "closed"


def _state(gate: Gate) -> GateState:
    if gate.decision is not None:
        return "approved" if gate.decision == "approve" else "rejected"
    if gate.closed_at is not None:
        return "timed_out" if gate.outcome == "timed_out" else "closed"
    return "open"


def _why_not(tx: Transaction, run_id: str, name: str) -> NotFoundError | ConflictError:
    if tx.first(Run, col(Run.id) == run_id) is None:
        return NotFoundError(f"there is no run {run_id[:100]}")
    gate = tx.first(Gate, col(Gate.run_id) == run_id, col(Gate.name) == name, order=col(Gate.id).desc())
    if gate is None:
        return NotFoundError(f"the run has no open gate {name[:256]!r}")
    details: Mapping[str, Any] = {"approve": "approved", "reject": "rejected"}
    if gate.decision is not None and gate.decided_at is not None:
        when = gate.decided_at.isoformat(timespec="seconds")
        return ConflictError(f"gate {name!r} was {details[gate.decision]} by {gate.decided_by} at {when}")
    return ConflictError(f"gate {name!r} is not open any more: {_state(gate).replace('_', ' ')}")
