"""Forks in SQL: an instance that has the steps of another one, up to a step."""

from __future__ import annotations

from typing import NamedTuple

from dynflow.engines import WITHIN, InstanceRef, NewFork, NewInstance, StepKey, shown_name
from dynflow.engines.embedded import claims, instances
from dynflow.engines.embedded.connection import Connection
from dynflow.engines.embedded.history import STEP_OVERHEAD, log
from dynflow.engines.embedded.rows import MASK, find, row_of, rows_of
from dynflow.engines.happened import Happened
from dynflow.engines.view import InstanceRow

# What a fork takes over. Events were sent to the other instance: whoever sent them did not mean this one.
_TAKEN = "kind IN ('do', 'sleep', 'sleep_until') AND state IN ('complete', 'errored', 'cancelled')"


class Forked(NamedTuple):
    """An instance that was just forked."""

    ref: InstanceRef
    happened: tuple[Happened, Happened]


def fork(db: Connection, ref: InstanceRef, before: StepKey, new: NewFork, now: int) -> Forked | None:
    """Queue an instance with what `ref` had ended of the steps before `before`; None where the id exists."""
    source = find(db, ref)
    first = instances.started_as(db, source, before)
    params, schedule = _input(db, source)
    item = NewInstance(new.id, params if new.params is None else new.params, schedule, new.retention)
    created = claims.create(db, source.workflow, source.tenant, [item], now)[0]
    if created is None:
        return None
    size, count = _copy(db, source, first, db.last_key)
    kind, name, number = before
    data = {"from": source.id, "step": shown_name(name), "count": number, "kind": kind, "kept": count}
    return Forked(
        created.ref, (created.happened, log(db, db.last_key, now, "workflow.forked", data, stored=size))
    )


def _input(db: Connection, row: InstanceRow) -> tuple[bytes, bytes | None]:
    (params,) = db.execute("SELECT params FROM instances WHERE key = ?", (row.key,)).fetchone()
    if params is not None:
        return params, None
    found: tuple[bytes, bytes | None] = db.execute(
        "SELECT params, schedule FROM inputs WHERE key = ?", (row.key,)
    ).fetchone()
    return found


def _copy(db: Connection, source: InstanceRow, first: int, key: int) -> tuple[int, int]:
    """Copy the steps before number `first`; return the bytes that they count for, and how many they are.

    A step that `first` is within did not end before it: its result came after, and it is performed again.
    """
    low, _ = rows_of(source.key)
    at = row_of(source.key, first)
    (name,) = db.execute("SELECT name FROM steps WHERE step = ?", (at,)).fetchone()
    within = f"name || '{WITHIN}' || count || '{WITHIN}'"
    which = f"step >= ? AND step < ? AND {_TAKEN} AND substr(?, 1, length({within})) != {within}"
    to = row_of(key, 0)
    db.execute(
        f"INSERT INTO steps SELECT ? | (step & {MASK}), kind, name, count, state, attempt, config, started_at,"  # noqa: S608
        " attempt_at, ended_at, NULL, event_type, NULL, NULL, failure, output FROM steps"
        f" WHERE {which}",
        (to, low, at, name),
    )
    db.execute(
        f"INSERT INTO attempts SELECT ? | (step & {MASK}), number, started_at, ended_at, failure, retry_at"  # noqa: S608
        f" FROM attempts WHERE step IN (SELECT step FROM steps WHERE {which})",
        (to, low, at, name),
    )
    size, count = db.execute(
        f"SELECT total(length(name) + ifnull(length(output), 0) + ifnull(length(failure), 0) + {STEP_OVERHEAD}),"  # noqa: S608
        " count(*) FROM steps WHERE step BETWEEN ? AND ?",
        rows_of(key),
    ).fetchone()
    return int(size), count
