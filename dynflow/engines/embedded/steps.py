"""Steps, waits and events in SQL: what a segment records, and the events that its waits are given."""

from __future__ import annotations

from functools import lru_cache

from dynflow.clock import to_datetime, to_microseconds
from dynflow.engines import StepRecord, StepState
from dynflow.engines.embedded.connection import Connection, blob
from dynflow.engines.embedded.history import STEP_OVERHEAD, count, count_leased, log
from dynflow.engines.embedded.leases import Lease
from dynflow.engines.embedded.rows import STEP_COLUMNS, row_of, rows_of, status_of, step_record
from dynflow.engines.happened import Happened, error_data, step_data
from dynflow.engines.view import InstanceRow
from dynflow.errors import WorkflowInternalError
from dynflow.failure import Failure
from dynflow.serialization import decode, encode
from dynflow.step_config import StepConfig
from dynflow.types import Event

# What the history says of a cancelled step, by its kind and the state it had; else "step.cancelled".
_CANCELLED = {
    ("do", "running"): "attempt.cancelled+step.cancelled",
    ("sleep", "waiting"): "sleep.cancelled",
    ("sleep_until", "waiting"): "sleep.cancelled",
    ("wait_for_event", "waiting"): "wait.cancelled",
    ("wait_for_event", "complete"): "wait.cancelled",
}


def _stored(failure: Failure | None) -> bytes | None:
    return None if failure is None else encode(failure)


@lru_cache(maxsize=256)
def _stored_config(config: StepConfig) -> bytearray:
    return blob(encode(config.as_stored()))


# --- do ------------------------------------------------------------------------------------------


def begin_attempt(db: Connection, lease: Lease, record: StepRecord, state_limit: int) -> int:
    """Store that an attempt starts; a previous one without an end was cut off by a crash.

    Returns the number of what happened, see `history.attempt_started`.
    """
    lease.check()
    key, size = lease.key, STEP_OVERHEAD + len(record.name)
    if record.attempt == 1:
        number = count_leased(db, lease, 2, size, state_limit=state_limit)
        db.write(
            "INSERT INTO steps (step, kind, name, count, state, attempt, config, started_at, attempt_at, started_event)"
            " VALUES (?, ?, ?, ?, ?, 1, ?, ?, ?, ?)",
            (
                row_of(key, record.seq), record.kind, record.name, record.count, record.state,
                None if record.config is None else _stored_config(record.config),
                record.started_at, record.attempt_at, number,
            ),
        )  # fmt: skip
        return number
    happened = log(
        db, key, record.attempt_at, "attempt.started", step_data(record), stored=size, state_limit=state_limit
    )
    step = row_of(key, record.seq)
    db.execute(
        "INSERT OR IGNORE INTO attempts SELECT step, attempt, attempt_at, NULL, NULL, NULL FROM steps WHERE step = ?",
        (step,),
    )
    db.execute(
        "UPDATE steps SET state = 'running', attempt = ?, attempt_at = ?, ended_at = NULL, deadline = NULL"
        " WHERE step = ?",
        (record.attempt, record.attempt_at, step),
    )
    return happened.number


def finish_step(db: Connection, lease: Lease, record: StepRecord) -> int:
    """Store a step's final state; returns the number of what happened, see `history.step_ended`."""
    lease.check()
    step, ended_at = row_of(lease.key, record.seq), record.ended_at
    if record.state == "complete" and record.output is not None:
        number = count_leased(db, lease, 2, len(record.output))
        db.write(
            "UPDATE steps SET state = 'complete', output = ?, failure = NULL, ended_at = ?, deadline = NULL,"
            " ended_event = ? WHERE step = ?",
            (blob(record.output), ended_at, number, step),
        )
        return number
    failure = _stored(record.failure) if record.state == "errored" else None
    number = count_leased(db, lease, 2, len(failure or b""))
    db.execute(
        "UPDATE steps SET state = ?, output = NULL, failure = ?, ended_at = ?, deadline = NULL, ended_event = ?"
        " WHERE step = ?",
        (record.state, failure, ended_at, number, step),
    )
    return number


def delay_retry(db: Connection, lease: Lease, record: StepRecord) -> Happened:
    """Store a failed attempt and when the next may start."""
    lease.check()
    data, failure, step = step_data(record), _stored(record.failure), row_of(lease.key, record.seq)
    data["retry_at"] = record.deadline
    if record.failure is not None:
        data["error"] = error_data(record.failure)
    ended_at = record.ended_at or record.attempt_at
    happened = log(db, lease.key, ended_at, "attempt.errored", data, stored=2 * len(failure or b""))
    db.execute(
        "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?, ?)",
        (step, record.attempt, record.attempt_at, record.ended_at, failure, record.deadline),
    )
    db.execute(
        "UPDATE steps SET state = 'waiting', failure = ?, ended_at = ?, deadline = ? WHERE step = ?",
        (failure, record.ended_at, record.deadline, step),
    )
    return happened


# --- sleeps and waits ----------------------------------------------------------------------------


def begin_wait(db: Connection, lease: Lease, record: StepRecord, state_limit: int) -> list[Happened]:
    """Store a sleep or a wait; a buffered event of the type completes it here and now."""
    lease.check()
    key = lease.key
    # Anew at each try: an operation whose transaction was rolled back is done again.
    record.state, record.output, record.ended_at = "waiting", None, None
    verb = "wait" if record.kind == "wait_for_event" else "sleep"
    data = step_data(record) | {"deadline": record.deadline}
    happened = [
        log(
            db,
            key,
            record.started_at,
            f"{verb}.started",
            data,
            stored=STEP_OVERHEAD + len(record.name),
            state_limit=state_limit,
        )
    ]
    if record.event_type is not None and (event := _take_event(db, key, record.event_type)) is not None:
        record.state, record.output, record.ended_at = "complete", encode(event), record.started_at
        happened.append(log(db, key, record.started_at, "wait.completed", step_data(record)))
    db.execute(
        "INSERT INTO steps (step, kind, name, count, state, attempt, started_at, attempt_at, ended_at, deadline,"
        " event_type, output) VALUES (?, ?, ?, ?, ?, 0, ?, 0, ?, ?, ?, ?)",
        (
            row_of(key, record.seq), record.kind, record.name, record.count, record.state, record.started_at,
            record.ended_at, record.deadline, record.event_type, record.output,
        ),
    )  # fmt: skip
    return happened


def end_wait(
    db: Connection, lease: Lease, record: StepRecord, timed_out: Failure, now: int
) -> list[Happened]:
    """End a wait whose deadline has passed: a sleep is complete, an event wait has timed out, unless an event won."""
    lease.check()
    step = row_of(lease.key, record.seq)
    stored = db.execute(
        "SELECT state, output, failure, ended_at, deadline FROM steps WHERE step = ?", (step,)
    ).fetchone()
    state, output, failure, ended_at, deadline = stored
    record.state, record.output, record.ended_at, record.deadline = state, output, ended_at, deadline
    record.failure = None if failure is None else decode(failure)
    if state != "waiting" or (deadline is not None and deadline > now):
        return []
    is_event = record.kind == "wait_for_event"
    happened = log(db, lease.key, now, "wait.timed_out" if is_event else "sleep.completed", step_data(record))
    record.ended_at = now
    record.state, record.failure = ("errored", timed_out) if is_event else ("complete", None)
    db.execute(
        "UPDATE steps SET state = ?, failure = ?, ended_at = ? WHERE step = ?",
        (record.state, _stored(record.failure), now, step),
    )
    return [happened]


Cancelled = tuple[StepState, list[Happened], list[StepRecord]]


def cancel(db: Connection, lease: Lease, record: StepRecord, now: int) -> Cancelled:
    """Store that the workflow cancelled a step; returns its state, what happened, and the waits that this ended.

    A step that has ended stays as it is, except a wait: the workflow was not given its event, which goes to the
    next waiter or back to the head of the buffer.
    """
    lease.check()
    key, step = lease.key, row_of(lease.key, record.seq)
    stored = db.execute("SELECT state, output FROM steps WHERE step = ?", (step,)).fetchone()
    if stored is None:  # cancelled before it was stored
        return "cancelled", [], []
    state, output = stored
    took_event = record.kind == "wait_for_event" and state == "complete"
    if state not in {"running", "waiting"} and not took_event:
        return state, [], []
    happened = [
        log(
            db,
            key,
            now,
            _CANCELLED.get((record.kind, state), "step.cancelled"),
            step_data(record),
        )
    ]
    db.execute(
        "UPDATE steps SET state = 'cancelled', output = NULL, ended_at = ?, deadline = NULL WHERE step = ?",
        (now, step),
    )
    given: list[tuple[StepRecord, Happened]] = []
    if took_event:
        _give_back(db, key, decode(output))
        if status_of(db, key) == "running":
            given = deliver_buffered(db, key, now)
    return "cancelled", [*happened, *(event for _, event in given)], [waiter for waiter, _ in given]


def _give_back(db: Connection, key: int, event: Event) -> None:
    """Buffer an event before all that are buffered: numbers below zero are for these."""
    db.execute(
        "INSERT INTO events SELECT min(0, ifnull(min(event), 0)) - 1, ?, ?, ?, ? FROM events",
        (key, event.type, encode(event.payload), to_microseconds(event.timestamp)),
    )


# --- events --------------------------------------------------------------------------------------


def send_event(
    db: Connection, row: InstanceRow, event_type: str, payload: bytes, now: int, state_limit: int
) -> tuple[StepRecord | None, Happened | None]:
    """Give the event to the first waiter of its type whose time is not over, else buffer it.

    Events to a paused instance are buffered; `deliver_buffered` gives them out at the resume.
    """
    if row.status not in {"paused", "waiting_for_pause"}:
        # A waiter whose deadline has passed takes no event, even if nobody has timed it out yet.
        waiter = next(iter(_waiters(db, row.key, now, event_type, limit=1)), None)
        if waiter is not None:
            event = Event(event_type, decode(payload), to_datetime(now))
            return waiter, _complete_with(db, row.key, waiter, event, now)
    try:
        count(db, row.key, 0, len(payload) + STEP_OVERHEAD, state_limit=state_limit)
    except WorkflowInternalError:
        raise WorkflowInternalError(
            f"instance {row.id!r} takes no more events: its state has reached the limit of {state_limit:,} bytes"
        ) from None
    db.execute(
        "INSERT INTO events (instance, type, payload, sent_at) VALUES (?, ?, ?, ?)",
        (row.key, event_type, payload, now),
    )
    return None, None


def deliver_buffered(db: Connection, key: int, now: int) -> list[tuple[StepRecord, Happened]]:
    """Give buffered events to waits, as after a pause."""
    given = []
    for waiter in _waiters(db, key, now):
        event = _take_event(db, key, waiter.event_type or "")
        if event is not None:
            given.append((waiter, _complete_with(db, key, waiter, event, now)))
    return given


def _take_event(db: Connection, key: int, event_type: str) -> Event | None:
    found = db.execute(
        "DELETE FROM events WHERE event ="
        " (SELECT event FROM events WHERE instance = ? AND type = ? ORDER BY event LIMIT 1)"
        " RETURNING payload, sent_at",
        (key, event_type),
    ).fetchone()
    return None if found is None else Event(event_type, decode(found[0]), to_datetime(found[1]))


def _waiters(
    db: Connection, key: int, now: int, event_type: str | None = None, *, limit: int = -1
) -> list[StepRecord]:
    """Return the event waits that can still take an event, in the order of their calls."""
    which, values = ("event_type = ?", [event_type]) if event_type else ("event_type IS NOT NULL", [])
    found = db.execute(
        f"SELECT {STEP_COLUMNS} FROM steps WHERE {which} AND step BETWEEN ? AND ? AND state = 'waiting'"  # noqa: S608 - constants
        " AND deadline > ? ORDER BY step LIMIT ?",
        (*values, *rows_of(key), now, limit),
    ).fetchall()
    return [step_record(row) for row in found]


def _complete_with(db: Connection, key: int, waiter: StepRecord, event: Event, now: int) -> Happened:
    happened = log(db, key, now, "wait.completed", step_data(waiter))
    waiter.state, waiter.output, waiter.ended_at = "complete", encode(event), now
    db.execute(
        "UPDATE steps SET state = 'complete', output = ?, ended_at = ? WHERE step = ?",
        (waiter.output, now, row_of(key, waiter.seq)),
    )
    return happened
