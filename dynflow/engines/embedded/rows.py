"""Rows of the embedded engine's tables: keys, reading them back, and the history row that every change writes.

All functions take a connection inside a transaction. Those that change something change nothing before they
have checked everything, so that raising leaves the transaction as it was.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dynflow.engines import InstanceRef, StepKey, StepRecord
from dynflow.errors import (
    InstanceNotFoundError,
    InvalidArgumentError,
    LeaseLostError,
    WorkflowInternalError,
)
from dynflow.serialization import decode
from dynflow.step_config import StepConfig
from dynflow.types import Status

# Steps and history rows of an instance: its key, shifted by this, plus their number in it.
_BITS = 24
MASK = (1 << _BITS) - 1
# History numbers above this are for the end of an instance alone: it must always be possible to end one.
_LAST_NUMBER = MASK - 64
ENDS = frozenset({"workflow.completed", "workflow.errored", "workflow.terminated"})
# What a history row takes beside its data: about a page's share of row header, key, time and type.
_ROW_OVERHEAD = 64
_NO_LIMIT = 1 << 62


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
    started_at: int | None
    ended_at: int | None
    paused_at: int | None
    ending: str | None
    output: bytes | None
    failure: bytes | None
    rollback: bytes | None

    @property
    def ref(self) -> InstanceRef:
        """Its full reference."""
        return InstanceRef(self.workflow, self.id, self.tenant)


COLUMNS = (
    "key, workflow, tenant, id, status, epoch, created_at, started_at, ended_at, paused_at, ending, output,"
    " failure, rollback"
)
STEP_COLUMNS = (
    "step, kind, name, count, state, attempt, config, started_at, attempt_at, ended_at, output, failure,"
    " deadline, event_type"
)


def row_of(key: int, number: int) -> int:
    """Return the primary key of the step or history row `number` of the instance `key`."""
    return key << _BITS | number


def rows_of(key: int, first: int = 0) -> tuple[int, int]:
    """Return the lowest and the highest primary key of the instance's rows from number `first` on."""
    return key << _BITS | min(first, MASK), key << _BITS | MASK


# --- reading -------------------------------------------------------------------------------------


def find(db: sqlite3.Connection, ref: InstanceRef) -> InstanceRow:
    """Return the instance; without a tenant, the only one of that id. Raises InstanceNotFoundError."""
    sql = f"SELECT {COLUMNS} FROM instances WHERE workflow = ? AND id = ?"  # noqa: S608 - a constant
    if ref.tenant is None:
        found = db.execute(f"{sql} LIMIT 2", (ref.workflow, ref.id)).fetchall()
    else:
        found = db.execute(f"{sql} AND tenant = ?", (ref.workflow, ref.id, ref.tenant)).fetchall()
    if len(found) == 1:
        return InstanceRow(*found[0])
    if found:
        raise InvalidArgumentError(f"several tenants have an instance {ref.id!r}: name the tenant")
    raise InstanceNotFoundError(f"there is no instance {ref.id!r} of workflow {ref.workflow!r}")


def by_key(db: sqlite3.Connection, key: int) -> InstanceRow | None:
    """Return an instance by its key; None once it is deleted."""
    found = db.execute(f"SELECT {COLUMNS} FROM instances WHERE key = ?", (key,)).fetchone()  # noqa: S608 - a constant
    return None if found is None else InstanceRow(*found)


def status_of(db: sqlite3.Connection, key: int) -> Status | None:
    """Return an instance's status; None once it is deleted."""
    found = db.execute("SELECT status FROM instances WHERE key = ?", (key,)).fetchone()
    return None if found is None else found[0]


def load_steps(db: sqlite3.Connection, key: int) -> list[tuple[Any, ...]]:
    """Return all step rows of an instance, in the order of their starts, for `step_records`."""
    sql = f"SELECT {STEP_COLUMNS} FROM steps WHERE step BETWEEN ? AND ? ORDER BY step"  # noqa: S608 - a constant
    return db.execute(sql, rows_of(key)).fetchall()


def step_records(rows: Iterable[tuple[Any, ...]]) -> dict[StepKey, StepRecord]:
    """Return step rows as records. Raises ValueError where one holds a dataclass nobody has registered."""
    records = (step_record(row) for row in rows)
    return {record.key: record for record in records}


def step_record(row: tuple[Any, ...]) -> StepRecord:
    """Return one row of `STEP_COLUMNS` as a record."""
    (step, kind, name, count, state, attempt, config, started_at, attempt_at, ended_at, output, failure,
     deadline, event_type) = row  # fmt: skip
    return StepRecord(
        kind, name, count, step & MASK, state, attempt,
        None if config is None else _config(config),
        started_at, attempt_at, ended_at, output,
        None if failure is None else decode(failure),
        deadline, event_type,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _config(stored: bytes) -> StepConfig:
    return StepConfig.from_stored(decode(stored))


def load_attempts(db: sqlite3.Connection, key: int) -> dict[int, list[tuple[Any, ...]]]:
    """Return the unsuccessful attempts by step seq: (number, started_at, ended_at, failure, retry_at)."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    rows = db.execute(
        "SELECT step, number, started_at, ended_at, failure, retry_at FROM attempts WHERE step BETWEEN ? AND ?"
        " ORDER BY step, number",
        rows_of(key),
    )
    for step, *attempt in rows:
        found.setdefault(step & MASK, []).append(tuple(attempt))
    return found


def load_history(db: sqlite3.Connection, key: int, cursor: int, limit: int) -> list[Happened]:
    """Return up to `limit` history rows whose last event is after `cursor`."""
    if cursor >= MASK:
        return []
    rows = db.execute(
        "SELECT event, at, type, data FROM history WHERE event BETWEEN ? AND ? ORDER BY event LIMIT ?",
        (*rows_of(key, max(cursor + 1, 0)), limit),
    )
    return [
        Happened(event & MASK, at, tuple(kinds.split("+")), json.loads(data))
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
    stored: int = 0,
    state_limit: int = _NO_LIMIT,
) -> Happened:
    """Write a history row (`"a+b"`: two events), and count it and `stored` bytes into the instance's size.

    With `epoch` it is also the fence: raises LeaseLostError. Raises WorkflowInternalError where the instance's
    state has reached `state_limit`, or its history has no number left.
    """
    types = tuple(kinds.split("+"))
    text = json.dumps(data) if data else "{}"
    last = MASK if kinds in ENDS else _LAST_NUMBER
    row = db.execute(
        "UPDATE instances SET events = events + ?, size = size + ? WHERE key = ? AND epoch = ifnull(?, epoch)"
        " AND size < ? AND events < ? RETURNING events",
        (len(types), len(text) + _ROW_OVERHEAD + stored, key, epoch, state_limit, last),
    ).fetchone()
    if row is None:
        raise _why_not(db, key, epoch, state_limit)
    number: int = row[0]
    db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (row_of(key, number), at, kinds, text))
    return Happened(number, at, types, data or {})


def _why_not(
    db: sqlite3.Connection, key: int, epoch: int | None, state_limit: int
) -> LeaseLostError | WorkflowInternalError:
    found = db.execute("SELECT epoch, size FROM instances WHERE key = ?", (key,)).fetchone()
    if found is None or (epoch is not None and found[0] != epoch):
        return LeaseLostError("the instance was terminated, restarted, deleted or taken over")
    if found[1] >= state_limit:
        return WorkflowInternalError(
            f"the instance's state is {found[1]:,} bytes; the limit is {state_limit:,} bytes"
        )
    return WorkflowInternalError(f"the instance's history has its {_LAST_NUMBER:,} events already")


def fence(db: sqlite3.Connection, key: int, epoch: int) -> None:
    """Raise LeaseLostError unless the segment of `epoch` has the instance."""
    if not db.execute("SELECT 1 FROM instances WHERE key = ? AND epoch = ?", (key, epoch)).fetchone():
        raise LeaseLostError("the instance was terminated, restarted, deleted or taken over")
