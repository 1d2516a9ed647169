"""The life of an instance in SQL, from its first claim on: how it ends, waits, is paused, restarted, deleted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

from dynflow.clock import MICROSECOND
from dynflow.engines import (
    WITHIN,
    Blocked,
    Completed,
    Failed,
    InstanceRef,
    Interrupted,
    Outcome,
    Paused,
    StepKey,
    Terminated,
)
from dynflow.engines.embedded.claims import paused, queue_as_new, requeue
from dynflow.engines.embedded.connection import Connection, blob
from dynflow.engines.embedded.history import count_last, keep_counters, log, log_last, write_out
from dynflow.engines.embedded.leases import Lease
from dynflow.engines.embedded.rows import MASK, find, row_of, rows_of, status_of
from dynflow.engines.embedded.steps import deliver_buffered
from dynflow.engines.happened import Happened, ended
from dynflow.engines.view import InstanceRow
from dynflow.errors import InstanceNotFoundError, InvalidArgumentError
from dynflow.failure import Failure
from dynflow.serialization import decode, encode
from dynflow.types import RollbackStatus, Status

# How many a sweep or a wake-up takes at once: the writer's other callers wait no longer than these take.
_AT_ONCE = 500
# The longest retention: far enough, and its time still fits a 64-bit integer.
_LONGEST_RETENTION = timedelta(days=36_500)
# How many marks one statement gets; SQLite takes 32,766.
_MARKS = 10_000

_ENDED: dict[type[Outcome], Status] = {Completed: "complete", Failed: "errored", Terminated: "terminated"}


# --- how segments end ----------------------------------------------------------------------------


def settle(
    db: Connection, lease: Lease, outcome: Outcome, keep: timedelta, now: int
) -> tuple[Happened | None, int | None]:
    """Store how a segment ended; returns what happened, and when the instance wants to be looked at again."""
    lease.check()
    key = lease.key
    if isinstance(outcome, (Completed, Failed, Terminated)):
        return finish(db, key, outcome, keep, now)
    if status_of(db, key) == "waiting_for_pause":
        return paused(db, key, now), None
    match outcome:
        case Blocked(waits, wake_at) if not _any_ended(db, key, waits):
            return _park(db, key, wake_at, now), wake_at
        case Blocked() | Interrupted() | Paused():  # Paused: the pause was taken back meanwhile
            requeue(db, key)
    return None, None


def finish(
    db: Connection, key: int, outcome: Completed | Failed | Terminated, keep: timedelta, now: int
) -> tuple[Happened, int]:
    """End an instance; returns when it expires too. Events that nobody waited for go when it is deleted."""
    status = _ENDED[type(outcome)]
    failure = outcome.failure if isinstance(outcome, Failed) else None
    expires_at = now + _retention(db, key, status, keep) // MICROSECOND
    number, size = count_last(db, key)
    values: tuple[bytes | bytearray | None, ...]
    if isinstance(outcome, Completed):
        columns, values = "output = ?, failure = NULL, rollback = NULL", (blob(outcome.output),)
    else:
        columns = "output = NULL, failure = ?, rollback = ?"
        values = (_stored(failure), _stored(outcome.rollback))
    db.write(
        f"UPDATE instances SET {columns}, status = ?, rank = NULL, wake_at = NULL, paused_at = NULL, ending = NULL,"  # noqa: S608 - constants
        " ended_at = ?, ended_event = ?, expires_at = ?, events = ?, size = ? WHERE key = ?",
        (*values, status, now, number, expires_at, number, size, key),
    )
    return ended(now, number, status, failure), expires_at


def _stored(value: Failure | RollbackStatus | None) -> bytes | None:
    return None if value is None else encode(value)


def _retention(db: Connection, key: int, status: Status, keep: timedelta) -> timedelta:
    lease = db.leases.of(key)
    if lease is not None:
        stored = lease.retention
    else:
        stored = db.execute("SELECT retention FROM instances WHERE key = ?", (key,)).fetchone()[0]
    given: timedelta = keep if stored is None else decode(stored).get(status, keep)
    return min(given, _LONGEST_RETENTION)


def _any_ended(db: Connection, key: int, waits: Sequence[int]) -> bool:
    for first in range(0, len(waits), _MARKS):
        part = [row_of(key, seq) for seq in waits[first : first + _MARKS]]
        sql = (
            f"SELECT 1 FROM steps WHERE step IN ({','.join('?' * len(part))}) AND state != 'waiting' LIMIT 1"  # noqa: S608 - only marks
        )
        if db.execute(sql, part).fetchone():
            return True
    return False


def _park(db: Connection, key: int, wake_at: int | None, now: int) -> Happened:
    happened, events, size = log_last(db, key, now, "workflow.waiting")
    db.execute(
        "UPDATE instances SET status = 'waiting', wake_at = ?, events = ?, size = ? WHERE key = ?",
        (wake_at, events, size, key),
    )
    return happened


# --- control -------------------------------------------------------------------------------------


def pause(db: Connection, key: int, now: int, *, live: bool) -> Happened | None:
    """Pause: at once where nothing runs, else ask the segment (`waiting_for_pause`)."""
    if live:
        db.execute("UPDATE instances SET status = 'waiting_for_pause' WHERE key = ?", (key,))
        return None
    return paused(db, key, now)


def begin_rollback(db: Connection, row: InstanceRow, now: int) -> Happened:
    """Take the instance from its segment and queue it for the rollback after which it is terminated."""
    happened = log(db, row.key, now, "workflow.queued")
    requeue(db, row.key)
    db.execute("UPDATE instances SET ending = 'terminated' WHERE key = ?", (row.key,))
    return happened


def resume(db: Connection, row: InstanceRow, now: int) -> Happened | None:
    """Go on: shift every stored deadline by the time paused. Takes a pause back that had no effect yet."""
    if row.status == "waiting_for_pause":
        db.execute("UPDATE instances SET status = 'running' WHERE key = ?", (row.key,))
        return None
    happened = log(db, row.key, now, "workflow.queued")
    _shift_deadlines(db, row, now)
    requeue(db, row.key)
    if row.started_at is None:
        queue_as_new(db, row)
    return happened


def _shift_deadlines(db: Connection, row: InstanceRow, now: int) -> None:
    """Make every wait later by the time paused."""
    db.execute(
        "UPDATE steps SET deadline = deadline + ? WHERE step BETWEEN ? AND ? AND state = 'waiting'",
        (max(now - (row.paused_at or now), 0), *rows_of(row.key)),
    )


def restart(db: Connection, row: InstanceRow, from_step: StepKey | None, now: int) -> list[Happened]:
    """Forget results, timers and events from `from_step` on (None: all) and queue again.

    Waits that began before get what came for them during a pause: it is theirs, though nobody has resumed it.
    """
    first = 0 if from_step is None else started_as(db, row, from_step)
    happened = [log(db, row.key, now, "workflow.queued")]
    keep_counters(db, row.key)
    write_out(db, row.key, first)
    low_high = rows_of(row.key, first)
    db.execute("DELETE FROM attempts WHERE step BETWEEN ? AND ?", low_high)
    db.execute("DELETE FROM steps WHERE step BETWEEN ? AND ?", low_high)
    _shift_deadlines(db, row, now)
    happened += [completed for _, completed in deliver_buffered(db, row.key, now)]
    db.execute("DELETE FROM events WHERE instance = ?", (row.key,))
    db.execute(
        "UPDATE instances SET status = 'queued', wake_at = NULL, paused_at = NULL, started_at = NULL,"
        " started_event = NULL, ended_at = NULL, ended_event = NULL, expires_at = NULL, ending = NULL,"
        " output = NULL, failure = NULL, rollback = NULL WHERE key = ?",
        (row.key,),
    )
    queue_as_new(db, row)
    if from_step is None:  # what is counted from here on is what a new instance has
        db.execute("UPDATE instances SET size = 0 WHERE key = ?", (row.key,))
    return happened


def started_as(db: Connection, row: InstanceRow, step: StepKey) -> int:
    """Return which of its instance's steps it was, counted by their starts. Raises InvalidArgumentError."""
    kind, name, count = step
    sql = "SELECT step FROM steps WHERE step BETWEEN ? AND ? AND kind = ? AND count = ? AND"
    found = db.execute(f"{sql} name = ? LIMIT 1", (*rows_of(row.key), kind, count, name)).fetchall()
    if not found:  # maybe a step within another one
        found = db.execute(
            f"{sql} substr(name, -length(?)) = ? LIMIT 2",
            (*rows_of(row.key), kind, count, WITHIN + name, WITHIN + name),
        ).fetchall()
    if len(found) != 1:
        which = f"step {name!r:.300} (kind {kind}, count {count}) to begin at"
        raise InvalidArgumentError(
            f"instance {row.id!r} has no {which}"
            if not found
            else f"instance {row.id!r} has more than one {which}: begin at the step that it is within"
        )
    number: int = found[0][0] & MASK
    return number


def delete(db: Connection, key: int) -> None:
    """Remove an instance and all it has; its id is free. Code that no other instance is pinned to goes too."""
    code = db.execute("SELECT code FROM instances WHERE key = ?", (key,)).fetchone()
    db.leases.end(key)
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


def delete_found(db: Connection, ref: InstanceRef) -> InstanceRow | None:
    """Delete an instance and return what it was; None where there is none."""
    try:
        row = find(db, ref)
    except InstanceNotFoundError:
        return None
    delete(db, row.key)
    return row


# --- what time does ------------------------------------------------------------------------------


def wake_due(db: Connection, now: int) -> int | None:
    """Queue waiting instances whose time has come, delete ended ones that expired; return when to look again."""
    due = db.execute(
        "SELECT key FROM instances WHERE wake_at <= ? ORDER BY wake_at LIMIT ?", (now, _AT_ONCE)
    ).fetchall()
    for (key,) in due:
        requeue(db, key)
    expired = db.execute(
        "SELECT key FROM instances WHERE expires_at <= ? LIMIT ?", (now, _AT_ONCE)
    ).fetchall()
    for (key,) in expired:
        delete(db, key)
    return next_wake(db)


def next_wake(db: Connection) -> int | None:
    """Return when the next waiting instance is due or the next ended one expires."""
    wake = db.execute("SELECT min(wake_at) FROM instances WHERE wake_at IS NOT NULL").fetchone()[0]
    expiry = db.execute("SELECT min(expires_at) FROM instances WHERE expires_at IS NOT NULL").fetchone()[0]
    return min((at for at in (wake, expiry) if at is not None), default=None)


# --- pinned code ---------------------------------------------------------------------------------


def pin(db: Connection, lease: Lease, digest: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Return the modules that the instance is pinned to; pin it to these where it is to none."""
    lease.check()
    pinned = db.execute("SELECT code FROM instances WHERE key = ?", (lease.key,)).fetchone()[0]
    if pinned is None:
        db.execute("INSERT OR IGNORE INTO code VALUES (?, ?)", (digest, encode(dict(modules))))
        db.execute("UPDATE instances SET code = ? WHERE key = ?", (digest, lease.key))
        return dict(modules)
    if pinned == digest:
        return dict(modules)
    stored: dict[str, str] = decode(
        db.execute("SELECT modules FROM code WHERE digest = ?", (pinned,)).fetchone()[0]
    )
    return stored
