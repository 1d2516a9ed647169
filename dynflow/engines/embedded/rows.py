"""Rows of the embedded engine's tables: their keys, and reading them back. All take a connection in a transaction."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from dynflow.engines import InstanceRef, StepKey, StepRecord
from dynflow.engines.embedded.connection import Connection
from dynflow.engines.view import InstanceRow
from dynflow.errors import InstanceNotFoundError, InvalidArgumentError
from dynflow.serialization import decode
from dynflow.step_config import StepConfig
from dynflow.types import Status

# Steps and history rows of an instance: its key, shifted by this, plus their number in it.
_BITS = 24
MASK = (1 << _BITS) - 1


COLUMNS = (
    "key, workflow, tenant, id, status, created_at, started_at, ended_at, paused_at, ending, output,"
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


def find(db: Connection, ref: InstanceRef) -> InstanceRow:
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


def by_key(db: Connection, key: int) -> InstanceRow | None:
    """Return an instance by its key; None once it is deleted."""
    found = db.execute(f"SELECT {COLUMNS} FROM instances WHERE key = ?", (key,)).fetchone()  # noqa: S608 - a constant
    return None if found is None else InstanceRow(*found)


def status_of(db: Connection, key: int) -> Status | None:
    """Return an instance's status; None once it is deleted."""
    found = db.execute("SELECT status FROM instances WHERE key = ?", (key,)).fetchone()
    return None if found is None else found[0]


def load_steps(db: Connection, key: int) -> list[tuple[Any, ...]]:
    """Return all step rows of an instance, in the order of their starts, for `step_records`."""
    sql = f"SELECT {STEP_COLUMNS} FROM steps WHERE step BETWEEN ? AND ? ORDER BY step"  # noqa: S608 - a constant
    return db.execute(sql, rows_of(key)).fetchall()


def step_records(rows: Iterable[tuple[Any, ...]]) -> dict[StepKey, StepRecord]:
    """Return step rows as records. Raises ValueError where one holds a dataclass nobody has registered."""
    return {record.key: record for record in map(step_record, rows)}


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


def load_attempts(db: Connection, key: int) -> dict[int, list[tuple[Any, ...]]]:
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
