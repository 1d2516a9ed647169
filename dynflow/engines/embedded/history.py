"""The history of an instance: numbered events, written with the change that they tell of.

An instance's event 1 is that it was queued. Its start and its end are in its row, a first attempt's start and a step's
end in the step's, which have their numbers; the rest is in `history`. Functions that change something change nothing
before they have checked everything, so that raising leaves the transaction as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dynflow.engines import StepRecord
from dynflow.engines.embedded.connection import Connection
from dynflow.engines.embedded.leases import Lease
from dynflow.engines.embedded.rows import MASK, row_of, rows_of
from dynflow.engines.happened import Happened, ended, first_started, queued, started, step_ended
from dynflow.errors import LeaseLostError, WorkflowInternalError
from dynflow.serialization import decode

# Numbers above this are for the end of an instance alone: it must always be possible to end one.
_LAST_NUMBER = MASK - 64
# What may have the kept numbers: an instance has to be claimed to find that its history is full, and to end.
_KEPT = frozenset({"workflow.running"})
# What a history row takes beside its data: about a page's share of row header, key, time and type.
_ROW_OVERHEAD = 64
# What a row of `steps` or `events` takes beside its payload.
STEP_OVERHEAD = 100
NO_LIMIT = 1 << 62


# --- writing -------------------------------------------------------------------------------------


def log(
    db: Connection,
    key: int,
    at: int,
    kinds: str,
    data: Mapping[str, Any] | None = None,
    *,
    stored: int = 0,
    state_limit: int = NO_LIMIT,
) -> Happened:
    """Write a history row (`"a+b"`: two events), and count it and `stored` bytes.

    Raises WorkflowInternalError where the instance's state has reached `state_limit`, or its history has no
    number left; LeaseLostError where there is no such instance.
    """
    types = tuple(kinds.split("+"))
    text = json.dumps(data) if data else "{}"
    last = MASK if kinds in _KEPT else _LAST_NUMBER
    size = len(text) + _ROW_OVERHEAD + stored
    number = count(db, key, len(types), size, state_limit=state_limit, last=last)
    _insert(db, key, number, at, kinds, text)
    return Happened(number, at, types, data or {})


def log_last(db: Connection, key: int, at: int, kind: str) -> tuple[Happened, int, int]:
    """Write an event and end the instance's lease; returns the counters too, for the instance's row."""
    events, size = count_last(db, key, last=_LAST_NUMBER)
    _insert(db, key, events, at, kind, "{}")
    return Happened(events, at, (kind,), {}), events, size + len("{}") + _ROW_OVERHEAD


def count_last(db: Connection, key: int, *, last: int = MASK) -> tuple[int, int]:
    """Count an event and end the instance's lease, if it has one; returns the counters for the instance's row."""
    lease = db.leases.of(key)
    events, size = (lease.events, lease.size) if lease is not None else _stored(db, key)
    if events >= last:
        raise _full()
    db.leases.end(key)
    return events + 1, size


def count(
    db: Connection,
    key: int,
    events: int,
    size: int,
    *,
    state_limit: int = NO_LIMIT,
    last: int = _LAST_NUMBER,
) -> int:
    """Count events and bytes into the instance, with its lease or in its row; returns the last event's number.

    Raises as `log` does.
    """
    lease = db.leases.of(key)
    if lease is not None:
        return count_leased(db, lease, events, size, state_limit=state_limit, last=last)
    had, bytes_ = _stored(db, key)
    _check_room(had if events else 0, bytes_, state_limit, last)
    db.execute("UPDATE instances SET events = ?, size = ? WHERE key = ?", (had + events, bytes_ + size, key))
    return had + events


def count_leased(
    db: Connection,
    lease: Lease,
    events: int,
    size: int,
    *,
    state_limit: int = NO_LIMIT,
    last: int = _LAST_NUMBER,
) -> int:
    """Do as `count` does, for whoever has the instance's lease at hand."""
    if lease.size >= state_limit or lease.events >= last:
        _check_room(lease.events if events else 0, lease.size, state_limit, last)
    return db.leases.count(lease, events, size)


def _check_room(had: int, size: int, state_limit: int, last: int) -> None:
    if size >= state_limit:
        raise WorkflowInternalError(
            f"the instance's state is {size:,} bytes; the limit is {state_limit:,} bytes"
        )
    if had >= last:
        raise _full()


def keep_counters(db: Connection, key: int) -> None:
    """End the instance's lease, if it has one, and store what it counted."""
    lease = db.leases.end(key)
    if lease is not None:
        db.execute("UPDATE instances SET events = ?, size = ? WHERE key = ?", (lease.events, lease.size, key))


def recount(db: Connection, key: int) -> None:
    """Store the counters of an instance whose lease went with its process."""
    low_high = rows_of(key)
    events, size = db.execute(
        f"SELECT max(event), total(length(data) + {_ROW_OVERHEAD}) FROM history WHERE event BETWEEN ? AND ?",  # noqa: S608 - a constant
        low_high,
    ).fetchone()
    first, last, stored = db.execute(
        "SELECT max(started_event), max(ended_event),"  # noqa: S608 - a constant
        f" total(length(name) + ifnull(length(output), 0) + ifnull(length(failure), 0) + {STEP_OVERHEAD})"
        " FROM steps WHERE step BETWEEN ? AND ?",
        low_high,
    ).fetchone()
    buffered = db.execute(
        f"SELECT total(length(payload) + {STEP_OVERHEAD}) FROM events WHERE instance = ?",  # noqa: S608 - a constant
        (key,),
    ).fetchone()[0]
    db.execute(
        "UPDATE instances SET events = max(?, ifnull(started_event, 0)), size = ? WHERE key = ?",
        (
            max((events or 0) & MASK, first or 0, last or 0, 1),
            int(size + stored + buffered),
            key,
        ),
    )


def write_out(db: Connection, key: int, first: int) -> None:
    """Write into `history` what only the instance's row and its steps from number `first` on say.

    The steps are to be deleted, and the instance to start again.
    """
    for happened in (*_of_instance(db, key, 1), *_of_steps(db, key, 0, first)):
        _insert(db, key, happened.number, happened.at, "+".join(happened.types), json.dumps(happened.data))


def _insert(db: Connection, key: int, number: int, at: int, kinds: str, text: str) -> None:
    db.write("INSERT INTO history VALUES (?, ?, ?, ?)", (row_of(key, number), at, kinds, text))


def _stored(db: Connection, key: int) -> tuple[int, int]:
    found: tuple[int, int] | None = db.execute(
        "SELECT events, size FROM instances WHERE key = ?", (key,)
    ).fetchone()
    if found is None:
        raise LeaseLostError("the instance was deleted")
    return found


def _full() -> WorkflowInternalError:
    return WorkflowInternalError(f"the instance's history has its {_LAST_NUMBER:,} events already")


# --- reading -------------------------------------------------------------------------------------


def load_history(db: Connection, key: int, cursor: int, limit: int) -> list[Happened]:
    """Return what happened after the event `cursor`, at most `limit` rows of it."""
    if cursor >= MASK:
        return []
    rows = db.execute(
        "SELECT event, at, type, data FROM history WHERE event BETWEEN ? AND ? ORDER BY event LIMIT ?",
        (*rows_of(key, max(cursor + 1, 0)), limit),
    )
    found = [
        Happened(event & MASK, at, tuple(kinds.split("+")), json.loads(data))
        for event, at, kinds, data in rows
    ]
    found += _of_instance(db, key, cursor)
    found += _of_steps(db, key, cursor, 0)
    return sorted(found)[:limit]


def _of_instance(db: Connection, key: int, cursor: int) -> Iterator[Happened]:
    row = db.execute(
        "SELECT created_at, started_at, started_event, ended_at, ended_event, status, failure FROM instances"
        " WHERE key = ?",
        (key,),
    ).fetchone()
    if row is None:
        return
    created_at, started_at, started_event, ended_at, ended_event, status, failure = row
    if cursor < 1:
        yield queued(created_at)
    if started_event is not None and started_event > cursor:
        yield started(started_at, started_event)
    if ended_event is not None and ended_event > cursor:
        yield ended(ended_at, ended_event, status, None if failure is None else decode(failure))


def _of_steps(db: Connection, key: int, cursor: int, first: int) -> Iterator[Happened]:
    rows = db.execute(
        "SELECT kind, name, count, state, attempt, started_at, attempt_at, ended_at, event_type, failure,"
        " started_event, ended_event FROM steps WHERE step BETWEEN ? AND ?"
        " AND (started_event > ? OR ended_event > ?)",
        (*rows_of(key, first), cursor, cursor),
    )
    for (
        kind,
        name,
        number,
        state,
        attempt,
        started_at,
        attempt_at,
        ended_at,
        event_type,
        failure,
        began_as,
        ended_as,
    ) in rows:
        record = StepRecord(
            kind, name, number, 0, state, attempt,
            started_at=started_at, attempt_at=attempt_at, ended_at=ended_at, event_type=event_type,
            failure=None if failure is None else decode(failure),
        )  # fmt: skip
        if began_as is not None and began_as > cursor:
            yield first_started(record, began_as)
        if ended_as is not None and ended_as > cursor:
            yield step_ended(record, ended_as)
