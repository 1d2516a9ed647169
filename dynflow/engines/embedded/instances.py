"""The life of an instance in SQL: every function moves one from status to status, inside a transaction."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dynflow.clock import MICROSECOND
from dynflow.engines import (
    Blocked,
    Completed,
    Failed,
    Interrupted,
    NewInstance,
    Outcome,
    Paused,
    StepKey,
    Terminated,
)
from dynflow.engines.embedded.fair_queue import FairQueue
from dynflow.engines.embedded.rows import (
    COLUMNS,
    MASK,
    Happened,
    InstanceRow,
    fence,
    load_steps,
    log,
    row_of,
    rows_of,
    status_of,
)
from dynflow.errors import InvalidArgumentError, LeaseLostError, WorkflowInternalError
from dynflow.failure import Failure
from dynflow.serialization import decode, encode
from dynflow.types import RollbackStatus, Status

# How many a sweep or a wake-up takes at once: the writer's other callers wait no longer than these take.
_AT_ONCE = 500
# The longest retention: far enough, and its time still fits a 64-bit integer.
_LONGEST_RETENTION = timedelta(days=36_500)
# How many marks one statement gets; SQLite takes 32,766.
_MARKS = 10_000

_ENDED: dict[type[Outcome], tuple[Status, str]] = {
    Completed: ("complete", "workflow.completed"),
    Failed: ("errored", "workflow.errored"),
    Terminated: ("terminated", "workflow.terminated"),
}


@dataclass(frozen=True, slots=True)
class ClaimedRow:
    """An instance that was just claimed, as it is stored: `step_rows` is for `rows.step_records`."""

    row: InstanceRow
    params: bytes
    schedule: bytes | None
    step_rows: list[tuple[Any, ...]]
    happened: Happened


def create(
    db: sqlite3.Connection,
    queue: FairQueue,
    workflow: str,
    tenant: str,
    items: Sequence[NewInstance],
    now: int,
) -> list[Happened | None]:
    """Queue new instances; None for each whose id exists."""
    return [_create_one(db, queue, workflow, tenant, item, now) for item in items]


def _create_one(
    db: sqlite3.Connection, queue: FairQueue, workflow: str, tenant: str, item: NewInstance, now: int
) -> Happened | None:
    found = db.execute(
        "INSERT INTO instances (workflow, tenant, id, status, rank, created_at, events)"
        " VALUES (?, ?, ?, 'queued', ?, ?, 1) ON CONFLICT DO NOTHING RETURNING key",
        (workflow, tenant, item.id, queue.rank_new(tenant), now),
    ).fetchone()
    if found is None:
        return None
    key: int = found[0]
    retention = None if item.retention is None else encode(dict(item.retention))
    db.execute("INSERT INTO inputs VALUES (?, ?, ?, ?)", (key, item.params, item.schedule, retention))
    db.execute("INSERT INTO history VALUES (?, ?, 'workflow.queued', '{}')", (row_of(key, 1), now))
    return Happened(1, now, ("workflow.queued",), {})


def recover(db: sqlite3.Connection, queue: FairQueue, now: int) -> None:
    """Queue again what a process that is gone was running; this process holds the file's lock."""
    for key, status in db.execute(
        "SELECT key, status FROM instances WHERE status IN ('running', 'waiting_for_pause')"
    ).fetchall():
        if status == "waiting_for_pause":
            with contextlib.suppress(WorkflowInternalError):  # its history is full: it goes on, to its end
                paused(db, key, None, now)
                continue
        requeue(db, queue, key)


def requeue(db: sqlite3.Connection, queue: FairQueue, key: int) -> None:
    """Queue an instance that goes on; takes the lease from whoever has it."""
    db.execute(
        "UPDATE instances SET status = 'queued', rank = ?, wake_at = NULL, paused_at = NULL, epoch = epoch + 1"
        " WHERE key = ?",
        (queue.rank_woken(), key),
    )


@dataclass(slots=True)
class Room:
    """What may be claimed: slots in all, slots of each workflow, and of each tenant where `per_tenant` says so."""

    slots: int
    workflows: dict[str, int]
    running: Counter[str]
    per_tenant: int | None

    def take(self, workflow: str, tenant: str) -> bool:
        """Take a slot if there is one."""
        if not self.workflows[workflow] or self.is_full(tenant):
            return False
        self.workflows[workflow] -= 1
        self.running[tenant] += 1
        return True

    def is_full(self, tenant: str) -> bool:
        """Whether the tenant has no slot left."""
        return self.per_tenant is not None and self.running[tenant] >= self.per_tenant


def claim(db: sqlite3.Connection, queue: FairQueue, room: Room, now: int) -> list[ClaimedRow]:
    """Take queued instances in the order of their ranks, as many as there is room for.

    One that finds its workflow or tenant full stays; then something else was claimed, and the next call leaves
    that workflow or tenant out from the start.
    """
    workflows = [name for name, slots in room.workflows.items() if slots]
    if not workflows:
        return []
    full = [tenant for tenant in room.running if room.is_full(tenant)]
    which = (
        f"status = 'queued' AND workflow IN ({_marks(workflows)}) AND tenant NOT IN ({_marks(full)})"
        if full
        else f"status = 'queued' AND workflow IN ({_marks(workflows)})"
    )
    # Named, since SQLite would rather look among all instances of the workflow that there ever were.
    source = "instances INDEXED BY instances_queue"
    queued = db.execute(
        f"SELECT key, rank, workflow, tenant FROM {source} WHERE {which} ORDER BY rank LIMIT ?",  # noqa: S608 - only marks
        (*workflows, *full, room.slots),
    ).fetchall()
    return [
        _claim_one(db, queue, key, rank, now)
        for key, rank, workflow, tenant in queued
        if room.take(workflow, tenant)
    ]


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _claim_one(db: sqlite3.Connection, queue: FairQueue, key: int, rank: int, now: int) -> ClaimedRow:
    queue.served(rank)
    # Ranks of never started instances are not negative: woken ones need not say that they started.
    types = ("workflow.running",) if rank < 0 else ("workflow.started", "workflow.running")
    changes = (
        "status = 'running', rank = NULL, epoch = epoch + 1, started_at = ifnull(started_at, ?),"
        " events = events + ?, size = size + 64"
    )
    *columns, number = db.execute(
        f"UPDATE instances SET {changes} WHERE key = ? RETURNING {COLUMNS}, events",  # noqa: S608 - constants
        (now, len(types), key),
    ).fetchone()
    db.execute("INSERT INTO history VALUES (?, ?, ?, '{}')", (row_of(key, number), now, "+".join(types)))
    params, schedule = db.execute("SELECT params, schedule FROM inputs WHERE key = ?", (key,)).fetchone()
    is_new = number == len(types) + 1  # all that has happened to it is that it was queued
    steps = [] if is_new else load_steps(db, key)
    return ClaimedRow(InstanceRow(*columns), params, schedule, steps, Happened(number, now, types, {}))


def wake_due(db: sqlite3.Connection, queue: FairQueue, now: int) -> int | None:
    """Queue waiting instances whose time has come, delete ended ones that expired; return when to look again."""
    due = db.execute(
        "SELECT key FROM instances WHERE wake_at <= ? ORDER BY wake_at LIMIT ?", (now, _AT_ONCE)
    ).fetchall()
    for (key,) in due:
        requeue(db, queue, key)
    expired = db.execute(
        "SELECT key FROM instances WHERE expires_at <= ? LIMIT ?", (now, _AT_ONCE)
    ).fetchall()
    for (key,) in expired:
        delete(db, key)
    return next_wake(db)


def next_wake(db: sqlite3.Connection) -> int | None:
    """Return when the next waiting instance is due or the next ended one expires."""
    wake = db.execute("SELECT min(wake_at) FROM instances WHERE wake_at IS NOT NULL").fetchone()[0]
    expiry = db.execute("SELECT min(expires_at) FROM instances WHERE expires_at IS NOT NULL").fetchone()[0]
    return min((at for at in (wake, expiry) if at is not None), default=None)


# --- how segments end ----------------------------------------------------------------------------


def settle(
    db: sqlite3.Connection, queue: FairQueue, row: InstanceRow, outcome: Outcome, keep: timedelta, now: int
) -> tuple[Happened | None, int | None]:
    """Store how a segment ended; returns what happened, and when the instance wants to be looked at again."""
    key, epoch = row.key, row.epoch
    if isinstance(outcome, (Completed, Failed, Terminated)):
        return finish(db, key, epoch, outcome, keep, now)
    fence(db, key, epoch)
    if status_of(db, key) == "waiting_for_pause":
        return paused(db, key, epoch, now), None
    match outcome:
        case Blocked(waits, wake_at) if not _any_ended(db, key, waits):
            return park(db, key, epoch, wake_at, now), wake_at
        case Blocked() | Interrupted() | Paused():  # Paused: the pause was taken back meanwhile
            requeue(db, queue, key)
    return None, None


def finish(
    db: sqlite3.Connection,
    key: int,
    epoch: int | None,
    outcome: Completed | Failed | Terminated,
    keep: timedelta,
    now: int,
) -> tuple[Happened, int]:
    """End an instance; returns when it expires too. Buffered events go with it."""
    status, kind = _ENDED[type(outcome)]
    output = outcome.output if isinstance(outcome, Completed) else None
    failure = outcome.failure if isinstance(outcome, Failed) else None
    rollback = None if isinstance(outcome, Completed) else outcome.rollback
    data = {} if failure is None else {"error": {"name": failure.name, "message": failure.message}}
    happened = log(db, key, now, kind, data, epoch=epoch)
    expires_at = now + _retention(db, key, status, keep) // MICROSECOND
    db.execute(
        "UPDATE instances SET status = ?, rank = NULL, wake_at = NULL, paused_at = NULL, epoch = epoch + 1,"
        " ending = NULL, ended_at = ?, expires_at = ?, output = ?, failure = ?, rollback = ? WHERE key = ?",
        (status, now, expires_at, output, _stored(failure), _stored(rollback), key),
    )
    db.execute("DELETE FROM events WHERE instance = ?", (key,))
    return happened, expires_at


def _stored(value: Failure | RollbackStatus | None) -> bytes | None:
    return None if value is None else encode(value)


def begin_rollback(db: sqlite3.Connection, queue: FairQueue, row: InstanceRow, now: int) -> Happened:
    """Take the instance from its segment and queue it for the rollback after which it is terminated."""
    happened = log(db, row.key, now, "workflow.queued")
    requeue(db, queue, row.key)
    db.execute("UPDATE instances SET ending = 'terminated' WHERE key = ?", (row.key,))
    return happened


def _retention(db: sqlite3.Connection, key: int, status: Status, keep: timedelta) -> timedelta:
    stored = db.execute("SELECT retention FROM inputs WHERE key = ?", (key,)).fetchone()[0]
    given: timedelta = keep if stored is None else decode(stored).get(status, keep)
    return min(given, _LONGEST_RETENTION)


def _any_ended(db: sqlite3.Connection, key: int, waits: Sequence[int]) -> bool:
    for first in range(0, len(waits), _MARKS):
        part = [row_of(key, seq) for seq in waits[first : first + _MARKS]]
        sql = f"SELECT 1 FROM steps WHERE step IN ({_marks(part)}) AND state != 'waiting' LIMIT 1"  # noqa: S608 - only marks
        if db.execute(sql, part).fetchone():
            return True
    return False


def park(db: sqlite3.Connection, key: int, epoch: int, wake_at: int | None, now: int) -> Happened:
    """Leave the instance waiting."""
    happened = log(db, key, now, "workflow.waiting", epoch=epoch)
    db.execute(
        "UPDATE instances SET status = 'waiting', wake_at = ?, epoch = epoch + 1 WHERE key = ?",
        (wake_at, key),
    )
    return happened


# --- control -------------------------------------------------------------------------------------


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
        "UPDATE instances SET status = 'paused', rank = NULL, wake_at = NULL, paused_at = ?, epoch = epoch + 1"
        " WHERE key = ?",
        (now, key),
    )
    return happened


def resume(db: sqlite3.Connection, queue: FairQueue, row: InstanceRow, now: int) -> Happened | None:
    """Go on: shift every stored deadline by the time paused. Takes a pause back that had no effect yet."""
    if row.status == "waiting_for_pause":
        db.execute("UPDATE instances SET status = 'running' WHERE key = ?", (row.key,))
        return None
    happened = log(db, row.key, now, "workflow.queued")
    shift = max(now - (row.paused_at or now), 0)
    db.execute(
        "UPDATE steps SET deadline = deadline + ? WHERE step BETWEEN ? AND ? AND state = 'waiting'",
        (shift, *rows_of(row.key)),
    )
    requeue(db, queue, row.key)
    if row.started_at is None:
        db.execute("UPDATE instances SET rank = ? WHERE key = ?", (queue.rank_new(row.tenant), row.key))
    return happened


def restart(
    db: sqlite3.Connection, queue: FairQueue, row: InstanceRow, from_step: StepKey | None, now: int
) -> Happened:
    """Forget results, timers and events from `from_step` on (None: all) and queue again."""
    first = 0 if from_step is None else _started_as(db, row, from_step)
    happened = log(db, row.key, now, "workflow.queued")
    low_high = rows_of(row.key, first)
    db.execute("DELETE FROM attempts WHERE step BETWEEN ? AND ?", low_high)
    db.execute("DELETE FROM steps WHERE step BETWEEN ? AND ?", low_high)
    db.execute("DELETE FROM events WHERE instance = ?", (row.key,))
    db.execute(
        "UPDATE instances SET status = 'queued', rank = ?, wake_at = NULL, paused_at = NULL, started_at = NULL,"
        " ended_at = NULL, expires_at = NULL, ending = NULL, output = NULL, failure = NULL, rollback = NULL,"
        " epoch = epoch + 1 WHERE key = ?",
        (queue.rank_new(row.tenant), row.key),
    )
    if from_step is None:  # what is counted from here on is what a new instance has
        db.execute("UPDATE instances SET size = 0 WHERE key = ?", (row.key,))
    return happened


def _started_as(db: sqlite3.Connection, row: InstanceRow, step: StepKey) -> int:
    found = db.execute(
        "SELECT step FROM steps WHERE step BETWEEN ? AND ? AND kind = ? AND name = ? AND count = ?",
        (*rows_of(row.key), *step),
    ).fetchone()
    if found is None:
        kind, name, count = step
        raise InvalidArgumentError(
            f"instance {row.id!r} has no step {name!r:.300} (kind {kind}, count {count}) to restart from"
        )
    number: int = found[0] & MASK
    return number


def delete(db: sqlite3.Connection, key: int) -> None:
    """Remove an instance and all it has; its id is free. Code that no other instance is pinned to goes too."""
    code = db.execute("SELECT code FROM instances WHERE key = ?", (key,)).fetchone()
    low_high = rows_of(key)
    db.execute("DELETE FROM attempts WHERE step BETWEEN ? AND ?", low_high)
    db.execute("DELETE FROM steps WHERE step BETWEEN ? AND ?", low_high)
    db.execute("DELETE FROM history WHERE event BETWEEN ? AND ?", low_high)
    db.execute("DELETE FROM instances WHERE key = ?", (key,))
    if code is not None and code[0] is not None:
        db.execute(
            "DELETE FROM code WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM instances WHERE code = digest)",
            code,
        )


# --- pinned code ---------------------------------------------------------------------------------


def pin(
    db: sqlite3.Connection, key: int, epoch: int, digest: str, modules: Mapping[str, str]
) -> dict[str, str]:
    """Return the modules that the instance is pinned to; pin it to these where it is to none."""
    row = db.execute("SELECT code FROM instances WHERE key = ? AND epoch = ?", (key, epoch)).fetchone()
    if row is None:
        raise LeaseLostError("the instance was terminated, restarted, deleted or taken over")
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
