"""The embedded engine's SQL, as functions of a connection inside a transaction.

Each changes nothing before it has checked everything, so that raising leaves the transaction as it was.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynflow.clock import to_datetime
from dynflow.engines import InstanceRef, NewInstance, StepKey, StepRecord
from dynflow.errors import InstanceNotFoundError, InvalidArgumentError, LeaseLostError
from dynflow.failure import Failure
from dynflow.serialization import decode, encode
from dynflow.types import Event, Status

# Steps and history rows of an instance: its key, shifted by this, plus their number in it.
_BITS = 24
_MASK = (1 << _BITS) - 1
# Woken instances go before new ones, whose ranks are not negative.
_WOKEN_RANK = -(1 << 62)


@dataclass(frozen=True, slots=True)
class Happened:
    """A history row that was written: what listeners are told after the commit."""

    number: int
    at: int
    types: tuple[str, ...]
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """The small row of an instance."""

    key: int
    workflow: str
    tenant: str
    id: str
    status: Status
    epoch: int
    created_at: int
    ended_at: int | None
    paused_at: int | None
    output: bytes | None
    failure: bytes | None
    code: str | None

    @property
    def ref(self) -> InstanceRef:
        """Its full reference."""
        return InstanceRef(self.workflow, self.id, self.tenant)


_COLUMNS = "key, workflow, tenant, id, status, epoch, created_at, ended_at, paused_at, output, failure, code"


class FairQueue:
    """Ranks of queued instances: start-time fair queueing between tenants. Lives in the writer's thread.

    A tenant's next instance ranks one after its last, but never before what is being served now: whoever has
    many waits behind whoever has few. `virtual` is the rank served last.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        rows = db.execute(
            "SELECT tenant, max(rank) FROM instances WHERE status = 'queued' GROUP BY tenant"
        ).fetchall()
        self._last = {tenant: rank for tenant, rank in rows if rank is not None and rank >= 0}
        lowest = db.execute(
            "SELECT min(rank) FROM instances WHERE status = 'queued' AND rank >= 0"
        ).fetchone()[0]
        self._virtual = lowest or 0
        self._woken = 0

    def rank_new(self, tenant: str) -> int:
        """Return the rank of a new instance of `tenant`."""
        rank = max(self._last.get(tenant, -1) + 1, self._virtual)
        self._last[tenant] = rank
        return rank

    def rank_woken(self) -> int:
        """Return the rank of an instance that goes on: before all new ones, first come first served."""
        self._woken += 1
        return _WOKEN_RANK + self._woken

    def served(self, rank: int) -> None:
        """Note that the instance of this rank was claimed."""
        if rank > self._virtual:
            self._virtual = rank
        if len(self._last) > 10_000:  # tenants who are behind the virtual time need no memory of their own
            self._last = {tenant: last for tenant, last in self._last.items() if last >= self._virtual}


# --- finding -------------------------------------------------------------------------------------


def find(db: sqlite3.Connection, ref: InstanceRef) -> InstanceRow:
    """Return the instance; without a tenant, the only one of that id. Raises InstanceNotFoundError."""
    sql = f"SELECT {_COLUMNS} FROM instances WHERE workflow = ? AND id = ?"  # noqa: S608 - a constant
    if ref.tenant is None:
        found = db.execute(f"{sql} LIMIT 2", (ref.workflow, ref.id)).fetchall()
    else:
        found = db.execute(f"{sql} AND tenant = ?", (ref.workflow, ref.id, ref.tenant)).fetchall()
    if len(found) == 1:
        return InstanceRow(*found[0])
    if found:
        raise InvalidArgumentError(f"several tenants have an instance {ref.id!r}: name the tenant")
    raise InstanceNotFoundError(f"there is no instance {ref.id!r} of workflow {ref.workflow!r}")


def load_steps(db: sqlite3.Connection, key: int) -> dict[StepKey, StepRecord]:
    """Return all steps of an instance, in the order of their starts."""
    rows = db.execute(
        "SELECT step, kind, name, count, state, attempt, config, started_at, attempt_at, ended_at, output, failure,"
        " deadline, event_type FROM steps WHERE step BETWEEN ? AND ? ORDER BY step",
        (key << _BITS, key << _BITS | _MASK),
    )
    records = (_step_record(row) for row in rows)
    return {record.key: record for record in records}


def _step_record(row: tuple[Any, ...]) -> StepRecord:
    (
        step,
        kind,
        name,
        count,
        state,
        attempt,
        config,
        started,
        attempt_at,
        ended,
        output,
        failure,
        deadline,
        event_type,
    ) = row
    return StepRecord(
        kind, name, count, step & _MASK, state, attempt,
        None if config is None else decode(config),
        started, attempt_at, ended, output,
        None if failure is None else decode(failure),
        deadline, event_type,
    )  # fmt: skip


def load_attempts(db: sqlite3.Connection, key: int) -> dict[int, list[tuple[Any, ...]]]:
    """Return the unsuccessful attempts by step seq: (number, started_at, ended_at, failure, retry_at)."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    rows = db.execute(
        "SELECT step, number, started_at, ended_at, failure, retry_at FROM attempts WHERE step BETWEEN ? AND ?"
        " ORDER BY step, number",
        (key << _BITS, key << _BITS | _MASK),
    )
    for step, *attempt in rows:
        found.setdefault(step & _MASK, []).append(tuple(attempt))
    return found


def load_history(db: sqlite3.Connection, key: int, cursor: int, limit: int) -> list[Happened]:
    """Return history rows whose last event is after `cursor`."""
    rows = db.execute(
        "SELECT event, at, type, data FROM history WHERE event BETWEEN ? AND ? ORDER BY event LIMIT ?",
        (key << _BITS | max(cursor + 1, 0), key << _BITS | _MASK, limit),
    )
    return [
        Happened(event & _MASK, at, tuple(kinds.split("+")), json.loads(data))
        for event, at, kinds, data in rows
    ]


# --- history and the lease -----------------------------------------------------------------------


def log(
    db: sqlite3.Connection,
    key: int,
    at: int,
    kinds: str,
    data: Mapping[str, Any] | None = None,
    *,
    epoch: int | None = None,
) -> Happened:
    """Write a history row (`"a+b"`: two events). With `epoch` it is also the fence: raises LeaseLostError."""
    types = tuple(kinds.split("+"))
    if epoch is None:
        row = db.execute(
            "UPDATE instances SET events = events + ? WHERE key = ? RETURNING events", (len(types), key)
        ).fetchone()
    else:
        row = db.execute(
            "UPDATE instances SET events = events + ? WHERE key = ? AND epoch = ? RETURNING events",
            (len(types), key, epoch),
        ).fetchone()
    if row is None:
        raise LeaseLostError("the instance was terminated, restarted, deleted or taken over")
    number: int = row[0]
    payload = data or {}
    db.execute(
        "INSERT INTO history VALUES (?, ?, ?, ?)", (key << _BITS | number, at, kinds, json.dumps(payload))
    )
    return Happened(number, at, types, payload)


def fence(db: sqlite3.Connection, key: int, epoch: int) -> None:
    """Raise LeaseLostError unless the segment of `epoch` has the instance."""
    if not db.execute("SELECT 1 FROM instances WHERE key = ? AND epoch = ?", (key, epoch)).fetchone():
        raise LeaseLostError("the instance was terminated, restarted, deleted or taken over")


# --- life of an instance -------------------------------------------------------------------------


def create(
    db: sqlite3.Connection,
    queue: FairQueue,
    workflow: str,
    tenant: str,
    items: Sequence[NewInstance],
    now: int,
) -> list[tuple[int, Happened] | None]:
    """Queue new instances; None for each whose id exists."""
    return [_create_one(db, queue, workflow, tenant, item, now) for item in items]


def _create_one(
    db: sqlite3.Connection, queue: FairQueue, workflow: str, tenant: str, item: NewInstance, now: int
) -> tuple[int, Happened] | None:
    exists = db.execute(
        "SELECT 1 FROM instances WHERE workflow = ? AND tenant = ? AND id = ?", (workflow, tenant, item.id)
    ).fetchone()
    if exists:
        return None
    key = db.execute(
        "INSERT INTO instances (workflow, tenant, id, status, rank, created_at) VALUES (?, ?, ?, 'queued', ?, ?)",
        (workflow, tenant, item.id, queue.rank_new(tenant), now),
    ).lastrowid
    if key is None:
        raise sqlite3.DatabaseError("an insert gave no key")
    retention = None if item.retention is None else encode(dict(item.retention))
    db.execute("INSERT INTO inputs VALUES (?, ?, ?, ?)", (key, item.params, item.schedule, retention))
    return key, log(db, key, now, "workflow.queued")


def recover(db: sqlite3.Connection, queue: FairQueue) -> None:
    """Queue again what a process that is gone was running; this process holds the file's lock."""
    for (key,) in db.execute("SELECT key FROM instances WHERE status = 'running'").fetchall():
        requeue(db, queue, key)
    db.execute("UPDATE instances SET status = 'paused' WHERE status = 'waiting_for_pause'")


def requeue(db: sqlite3.Connection, queue: FairQueue, key: int) -> None:
    """Queue an instance that goes on; takes the lease from whoever has it."""
    db.execute(
        "UPDATE instances SET status = 'queued', rank = ?, wake_at = NULL, epoch = epoch + 1 WHERE key = ?",
        (queue.rank_woken(), key),
    )


def claim(
    db: sqlite3.Connection, queue: FairQueue, limit: int, workflows: Iterable[str], now: int
) -> list[tuple[Any, ...]]:
    """Take up to `limit` queued instances in the order of their ranks.

    Returns (row, params, schedule, steps, happened) for each.
    """
    known = tuple(workflows)
    marks = ",".join("?" * len(known))
    chosen = db.execute(
        f"SELECT key, rank FROM instances WHERE status = 'queued' AND workflow IN ({marks}) ORDER BY rank LIMIT ?",  # noqa: S608 - only marks
        (*known, limit),
    ).fetchall()
    claimed = []
    for key, rank in chosen:
        queue.served(rank)
        row = db.execute(
            "UPDATE instances SET status = 'running', rank = NULL, wake_at = NULL, epoch = epoch + 1 WHERE key = ?"
            f" RETURNING {_COLUMNS}",
            (key,),
        ).fetchone()
        params, schedule = db.execute("SELECT params, schedule FROM inputs WHERE key = ?", (key,)).fetchone()
        happened = log(db, key, now, "workflow.started+workflow.running" if rank >= 0 else "workflow.running")
        claimed.append((InstanceRow(*row), params, schedule, load_steps(db, key), happened))
    return claimed


def wake_due(db: sqlite3.Connection, queue: FairQueue, now: int) -> int | None:
    """Queue all waiting instances whose time has come; return when the next is due."""
    due = db.execute("SELECT key FROM instances WHERE wake_at <= ? ORDER BY wake_at", (now,)).fetchall()
    for (key,) in due:
        requeue(db, queue, key)
    return next_wake(db)


def next_wake(db: sqlite3.Connection) -> int | None:
    """Return the earliest deadline of a waiting instance."""
    found: int | None = db.execute("SELECT min(wake_at) FROM instances WHERE wake_at IS NOT NULL").fetchone()[
        0
    ]
    return found


def finish(
    db: sqlite3.Connection,
    key: int,
    epoch: int | None,
    status: Status,
    now: int,
    *,
    output: bytes | None = None,
    failure: Failure | None = None,
) -> Happened:
    """End an instance: complete, errored or terminated. Buffered events go with it."""
    kind = {"complete": "workflow.completed", "errored": "workflow.errored"}.get(
        status, "workflow.terminated"
    )
    data = {} if failure is None else {"error": {"name": failure.name, "message": failure.message}}
    happened = log(db, key, now, kind, data, epoch=epoch)
    db.execute(
        "UPDATE instances SET status = ?, rank = NULL, wake_at = NULL, paused_at = NULL, epoch = epoch + 1, ended_at = ?,"
        " output = ?, failure = ? WHERE key = ?",
        (status, now, output, None if failure is None else encode(failure), key),
    )
    db.execute("DELETE FROM events WHERE instance = ?", (key,))
    return happened


def park(
    db: sqlite3.Connection,
    queue: FairQueue,
    key: int,
    epoch: int,
    waits: Sequence[int],
    wake_at: int | None,
    now: int,
) -> tuple[Happened | None, bool]:
    """Leave the instance waiting. If a wait ended meanwhile, queue it instead; returns whether it was parked."""
    marks = ",".join("?" * len(waits))
    ended = db.execute(
        f"SELECT 1 FROM steps WHERE step IN ({marks}) AND state NOT IN ('waiting') LIMIT 1",  # noqa: S608 - only marks
        [key << _BITS | seq for seq in waits],
    ).fetchone() if len(waits) <= 30_000 else (1,)  # SQLite takes 32,766 marks; more waits are looked at by a replay  # fmt: skip
    if ended:
        fence(db, key, epoch)
        requeue(db, queue, key)
        return None, False
    happened = log(db, key, now, "workflow.waiting", epoch=epoch)
    db.execute(
        "UPDATE instances SET status = 'waiting', wake_at = ?, epoch = epoch + 1 WHERE key = ?",
        (wake_at, key),
    )
    return happened, True


def pause(db: sqlite3.Connection, key: int, now: int, *, live: bool) -> Happened | None:
    """Pause: at once where nothing runs, else ask the segment (`waiting_for_pause`)."""
    if live:
        db.execute("UPDATE instances SET status = 'waiting_for_pause' WHERE key = ?", (key,))
        return None
    return paused(db, key, None, now)


def paused(db: sqlite3.Connection, key: int, epoch: int | None, now: int) -> Happened:
    """Note that a pause has taken effect."""
    happened = log(db, key, now, "workflow.paused", epoch=epoch)
    db.execute(
        "UPDATE instances SET status = 'paused', rank = NULL, wake_at = NULL, paused_at = ?, epoch = epoch + 1 WHERE key = ?",
        (now, key),
    )
    return happened


def resume(db: sqlite3.Connection, queue: FairQueue, row: InstanceRow, now: int) -> Happened | None:
    """Go on: shift every stored deadline by the time paused. Takes a pause back that had no effect yet."""
    if row.status == "waiting_for_pause":
        db.execute("UPDATE instances SET status = 'running' WHERE key = ?", (row.key,))
        return None
    shift = now - (row.paused_at or now)
    db.execute(
        "UPDATE steps SET deadline = deadline + ? WHERE step BETWEEN ? AND ? AND state = 'waiting'",
        (shift, row.key << _BITS, row.key << _BITS | _MASK),
    )
    requeue(db, queue, row.key)
    db.execute("UPDATE instances SET paused_at = NULL WHERE key = ?", (row.key,))
    return log(db, row.key, now, "workflow.queued")


def restart(
    db: sqlite3.Connection, queue: FairQueue, row: InstanceRow, from_step: StepKey | None, now: int
) -> Happened:
    """Forget results, timers and events from `from_step` on (None: all) and queue again."""
    first = 0
    if from_step is not None:
        found = db.execute(
            "SELECT step FROM steps WHERE step BETWEEN ? AND ? AND kind = ? AND name = ? AND count = ?",
            (row.key << _BITS, row.key << _BITS | _MASK, *from_step),
        ).fetchone()
        if found is None:
            kind, name, count = from_step
            raise InvalidArgumentError(
                f"instance {row.id!r} has no step {name!r} (kind {kind}, count {count}) to restart from"
            )
        first = found[0] & _MASK
    low, high = row.key << _BITS | first, row.key << _BITS | _MASK
    db.execute("DELETE FROM attempts WHERE step BETWEEN ? AND ?", (low, high))
    db.execute("DELETE FROM steps WHERE step BETWEEN ? AND ?", (low, high))
    db.execute("DELETE FROM events WHERE instance = ?", (row.key,))
    db.execute(
        "UPDATE instances SET status = 'queued', rank = ?, wake_at = NULL, paused_at = NULL, ended_at = NULL, output = NULL,"
        " failure = NULL, epoch = epoch + 1 WHERE key = ?",
        (queue.rank_new(row.tenant), row.key),
    )
    return log(db, row.key, now, "workflow.queued")


def delete(db: sqlite3.Connection, key: int) -> None:
    """Remove an instance and all it has; its id is free."""
    low, high = key << _BITS, key << _BITS | _MASK
    db.execute("DELETE FROM attempts WHERE step BETWEEN ? AND ?", (low, high))
    db.execute("DELETE FROM steps WHERE step BETWEEN ? AND ?", (low, high))
    db.execute("DELETE FROM history WHERE event BETWEEN ? AND ?", (low, high))
    db.execute("DELETE FROM instances WHERE key = ?", (key,))


# --- steps ---------------------------------------------------------------------------------------


def _step_data(record: StepRecord) -> dict[str, Any]:
    data: dict[str, Any] = {"step": record.name, "count": record.count, "kind": record.kind}
    if record.kind == "do":
        data["attempt"] = record.attempt
    if record.event_type is not None:
        data["event_type"] = record.event_type
    return data


def _write_step(db: sqlite3.Connection, key: int, record: StepRecord) -> None:
    db.execute(
        "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            key << _BITS | record.seq, record.kind, record.name, record.count, record.state, record.attempt,
            None if record.config is None else encode(record.config),
            record.started_at, record.attempt_at, record.ended_at, record.output,
            None if record.failure is None else encode(record.failure),
            record.deadline, record.event_type,
        ),
    )  # fmt: skip


def begin_attempt(db: sqlite3.Connection, key: int, epoch: int, record: StepRecord) -> Happened:
    """Store that an attempt starts; a previous one without an end was cut off by a crash."""
    first = record.attempt == 1
    kinds = "step.started+attempt.started" if first else "attempt.started"
    happened = log(db, key, record.attempt_at, kinds, _step_data(record), epoch=epoch)
    if not first:
        db.execute(
            "INSERT OR IGNORE INTO attempts SELECT step, attempt, attempt_at, NULL, NULL, NULL FROM steps WHERE step = ?",
            (key << _BITS | record.seq,),
        )
    _write_step(db, key, record)
    return happened


def finish_step(db: sqlite3.Connection, key: int, epoch: int, record: StepRecord) -> Happened:
    """Store a step's final state."""
    ok = record.state == "complete"
    data = _step_data(record)
    if record.failure is not None and not ok:
        data["error"] = {"name": record.failure.name, "message": record.failure.message}
    kinds = "attempt.completed+step.completed" if ok else "attempt.errored+step.errored"
    happened = log(db, key, record.ended_at or record.attempt_at, kinds, data, epoch=epoch)
    db.execute(
        "UPDATE steps SET state = ?, output = ?, failure = ?, ended_at = ?, deadline = NULL WHERE step = ?",
        (
            record.state, record.output, None if record.failure is None else encode(record.failure),
            record.ended_at, key << _BITS | record.seq,
        ),
    )  # fmt: skip
    return happened


def delay_retry(db: sqlite3.Connection, key: int, epoch: int, record: StepRecord) -> Happened:
    """Store a failed attempt and when the next may start."""
    failure = record.failure
    data = _step_data(record)
    data["retry_at"] = record.deadline
    if failure is not None:
        data["error"] = {"name": failure.name, "message": failure.message}
    happened = log(db, key, record.ended_at or record.attempt_at, "attempt.errored", data, epoch=epoch)
    db.execute(
        "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?, ?)",
        (
            key << _BITS | record.seq, record.attempt, record.attempt_at, record.ended_at,
            None if failure is None else encode(failure), record.deadline,
        ),
    )  # fmt: skip
    _write_step(db, key, record)
    return happened


def begin_wait(db: sqlite3.Connection, key: int, epoch: int, record: StepRecord) -> list[Happened]:
    """Store a sleep or a wait; a buffered event of the type completes it here and now."""
    verb = "wait" if record.kind == "wait_for_event" else "sleep"
    data = _step_data(record) | {"deadline": record.deadline}
    happened = [log(db, key, record.started_at, f"{verb}.started", data, epoch=epoch)]
    buffered = None
    if record.event_type is not None:
        buffered = db.execute(
            "SELECT event, payload, sent_at FROM events WHERE instance = ? AND type = ? ORDER BY event LIMIT 1",
            (key, record.event_type),
        ).fetchone()
    if buffered is not None:
        event, payload, sent_at = buffered
        db.execute("DELETE FROM events WHERE event = ?", (event,))
        _complete_with_event(record, payload, sent_at, record.started_at)
        happened.append(log(db, key, record.started_at, "wait.completed", _step_data(record)))
    _write_step(db, key, record)
    return happened


def _complete_with_event(record: StepRecord, payload: bytes, sent_at: int, now: int) -> None:
    event = Event(record.event_type or "", decode(payload), to_datetime(sent_at))
    record.state, record.output, record.ended_at = "complete", encode(event), now


def end_wait(
    db: sqlite3.Connection, key: int, epoch: int, record: StepRecord, timed_out: Failure, now: int
) -> list[Happened]:
    """End a wait whose deadline has passed: a sleep is complete, an event wait has timed out, unless an event won."""
    stored = db.execute(
        "SELECT state, output, failure, ended_at, deadline FROM steps WHERE step = ?",
        (key << _BITS | record.seq,),
    ).fetchone()
    if stored is None:
        raise LeaseLostError("the step is gone: the instance was restarted")
    state, output, failure, ended_at, deadline = stored
    record.deadline = deadline
    if state != "waiting":
        record.state, record.output, record.ended_at = state, output, ended_at
        record.failure = None if failure is None else decode(failure)
        return []
    if deadline is not None and deadline > now:
        return []
    if record.kind == "wait_for_event":
        return [expire_wait(db, key, epoch, record, timed_out, now)]
    record.state, record.ended_at = "complete", now
    happened = log(db, key, now, "sleep.completed", _step_data(record), epoch=epoch)
    db.execute(
        "UPDATE steps SET state = 'complete', ended_at = ? WHERE step = ?", (now, key << _BITS | record.seq)
    )
    return [happened]


def expire_wait(
    db: sqlite3.Connection, key: int, epoch: int | None, record: StepRecord, timed_out: Failure, now: int
) -> Happened:
    """Time an event wait out."""
    record.state, record.failure, record.ended_at = "errored", timed_out, now
    happened = log(db, key, now, "wait.timed_out", _step_data(record), epoch=epoch)
    db.execute(
        "UPDATE steps SET state = 'errored', failure = ?, ended_at = ? WHERE step = ?",
        (encode(timed_out), now, key << _BITS | record.seq),
    )
    return happened


def send_event(
    db: sqlite3.Connection, row: InstanceRow, event_type: str, payload: bytes, now: int
) -> tuple[StepRecord | None, Happened | None]:
    """Give the event to the first waiter of its type whose time is not over, else buffer it.

    Events to a paused instance are buffered; `deliver_buffered` gives them out at the resume.
    """
    if row.status not in {"paused", "waiting_for_pause"}:
        # A waiter whose deadline has passed takes no event, even if nobody has timed it out yet.
        waiter = _first_waiter(db, row.key, event_type, now)
        if waiter is not None:
            _complete_with_event(waiter, payload, now, now)
            db.execute(
                "UPDATE steps SET state = 'complete', output = ?, ended_at = ? WHERE step = ?",
                (waiter.output, now, row.key << _BITS | waiter.seq),
            )
            return waiter, log(db, row.key, now, "wait.completed", _step_data(waiter))
    db.execute(
        "INSERT INTO events (instance, type, payload, sent_at) VALUES (?, ?, ?, ?)",
        (row.key, event_type, payload, now),
    )
    return None, None


def deliver_buffered(db: sqlite3.Connection, key: int, now: int) -> list[tuple[StepRecord, Happened]]:
    """Give buffered events to waits, as after a pause."""
    given = []
    for event, event_type, payload, sent_at in db.execute(
        "SELECT event, type, payload, sent_at FROM events WHERE instance = ? ORDER BY event", (key,)
    ).fetchall():
        waiter = _first_waiter(db, key, event_type, now)
        if waiter is None:
            continue
        db.execute("DELETE FROM events WHERE event = ?", (event,))
        _complete_with_event(waiter, payload, sent_at, now)
        db.execute(
            "UPDATE steps SET state = 'complete', output = ?, ended_at = ? WHERE step = ?",
            (waiter.output, now, key << _BITS | waiter.seq),
        )
        given.append((waiter, log(db, key, now, "wait.completed", _step_data(waiter))))
    return given


def _first_waiter(db: sqlite3.Connection, key: int, event_type: str, now: int) -> StepRecord | None:
    found = db.execute(
        "SELECT step, kind, name, count, state, attempt, config, started_at, attempt_at, ended_at, output, failure,"
        " deadline, event_type FROM steps WHERE event_type = ? AND step BETWEEN ? AND ? AND state = 'waiting'"
        " AND deadline > ? ORDER BY step LIMIT 1",
        (event_type, key << _BITS, key << _BITS | _MASK, now),
    ).fetchone()
    return None if found is None else _step_record(found)


# --- pinned code ---------------------------------------------------------------------------------


def pin(
    db: sqlite3.Connection, key: int, epoch: int, digest: str, modules: Mapping[str, str]
) -> dict[str, str]:
    """Return the modules that the instance is pinned to; pin it to these where it is to none."""
    row = db.execute("SELECT code FROM instances WHERE key = ? AND epoch = ?", (key, epoch)).fetchone()
    if row is None:
        raise LeaseLostError("the instance was taken over")
    if row[0] is None:
        db.execute("INSERT OR IGNORE INTO code VALUES (?, ?)", (digest, encode(dict(modules))))
        db.execute("UPDATE instances SET code = ? WHERE key = ?", (digest, key))
        return dict(modules)
    if row[0] == digest:
        return dict(modules)
    stored: dict[str, str] = decode(
        db.execute("SELECT modules FROM code WHERE digest = ?", (row[0],)).fetchone()[0]
    )
    return stored
