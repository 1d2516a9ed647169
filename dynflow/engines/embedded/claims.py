"""The queue in SQL: instances come in, are claimed in the order of their ranks, and come back when they wake."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dynflow.engines import InstanceRef, NewInstance
from dynflow.engines.embedded.connection import Connection, blob
from dynflow.engines.embedded.fair_queue import Lane
from dynflow.engines.embedded.history import count_leased, keep_counters, log, log_last, recount
from dynflow.engines.embedded.leases import Lease
from dynflow.engines.embedded.rows import MASK, load_steps
from dynflow.engines.happened import Happened, queued, started
from dynflow.engines.view import InstanceRow
from dynflow.errors import WorkflowInternalError
from dynflow.serialization import encode

_LAST_RANK = (1 << 63) - 1
# Params up to this many bytes are in the instance's row.
_SMALL = 512
# The events of an instance that is claimed as it is created are three: queued, started, running.
_CLAIMED = 3
_INSERT = "INSERT OR IGNORE INTO instances (key, workflow, id, tenant, created_at, params, status,"
_INSERT_CLAIMED = (
    f"{_INSERT} events, started_event, started_at) VALUES (?, ?, ?, ?, ?, ?, 'running', 3, 3, ?)"
)
_INSERT_QUEUED = f"{_INSERT} events, rank) VALUES (?, ?, ?, ?, ?, ?, 'queued', 1, ?)"


class Claim(NamedTuple):
    """An instance that was just claimed, as it is stored: `step_rows` is for `rows.step_records`."""

    lease: Lease
    ref: InstanceRef
    created_at: int
    ending: str | None
    params: bytes
    schedule: bytes | None
    step_rows: list[tuple[Any, ...]]
    happened: Happened


class Created(NamedTuple):
    """An instance that was just created; `claim` where it runs at once."""

    ref: InstanceRef
    happened: Happened
    claim: Claim | None


def create(
    db: Connection, workflow: str, tenant: str, items: Sequence[NewInstance], now: int, *, slots: int = 0
) -> list[Created | None]:
    """Queue new instances; None for each whose id exists.

    Where nobody is queued, the first `slots` of them are claimed at once.
    """
    if not db.queue.is_empty:
        slots = 0
    created: list[Created | None] = []
    for item in items:
        created.append(_create_one(db, workflow, tenant, item, now, is_claimed=slots > 0))
        slots -= created[-1] is not None
    return created


def _create_one(
    db: Connection, workflow: str, tenant: str, item: NewInstance, now: int, *, is_claimed: bool
) -> Created | None:
    key = db.last_key + 1
    is_small = item.schedule is None and len(item.params) <= _SMALL
    retention = None if item.retention is None else encode(dict(item.retention))
    rank = None if is_claimed else db.queue.rank_new(tenant)
    sql, place = (_INSERT_CLAIMED, now) if rank is None else (_INSERT_QUEUED, rank)
    params = blob(item.params) if is_small else None
    if not db.write(sql, (key, workflow, item.id, tenant, now, params, place)).rowcount:
        return None
    db.last_key = key
    if not is_small:
        db.execute("INSERT INTO inputs VALUES (?, ?, ?)", (key, item.params, item.schedule))
    if retention is not None:
        db.execute("UPDATE instances SET retention = ? WHERE key = ?", (retention, key))
    ref = InstanceRef(workflow, item.id, tenant)
    if rank is not None:
        db.queue.put_new(Lane(rank, workflow, tenant))
        return Created(ref, queued(now), None)
    lease = db.leases.grant(key, _CLAIMED, 0, retention)
    claim = Claim(lease, ref, now, None, item.params, item.schedule, [], started(now, _CLAIMED))
    return Created(ref, queued(now), claim)


def recover(db: Connection, now: int) -> list[tuple[InstanceRef, Happened]]:
    """Queue again what a process that is gone was running; this process holds the file's lock.

    Returns the pauses that have taken effect with it.
    """
    told = []
    for key, status, workflow, id_, tenant in db.execute(
        "SELECT key, status, workflow, id, tenant FROM instances WHERE status IN ('running', 'waiting_for_pause')"
    ).fetchall():
        recount(db, key)
        if status == "waiting_for_pause":
            with contextlib.suppress(WorkflowInternalError):  # its history is full: it goes on, to its end
                told.append((InstanceRef(workflow, id_, tenant), paused(db, key, now)))
                continue
        requeue(db, key)
    return told


def paused(db: Connection, key: int, now: int) -> Happened:
    """Note that a pause has taken effect."""
    happened, events, size = log_last(db, key, now, "workflow.paused")
    db.execute(
        "UPDATE instances SET status = 'paused', rank = NULL, wake_at = NULL, paused_at = ?, events = ?, size = ?"
        " WHERE key = ?",
        (now, events, size, key),
    )
    return happened


def requeue(db: Connection, key: int) -> None:
    """Queue an instance that goes on; takes the lease from whoever has it."""
    keep_counters(db, key)
    rank = db.queue.rank_woken()
    workflow, tenant = db.execute(
        "UPDATE instances SET status = 'queued', rank = ?, wake_at = NULL, paused_at = NULL WHERE key = ?"
        " RETURNING workflow, tenant",
        (rank, key),
    ).fetchone()
    db.queue.put(Lane(rank, workflow, tenant))


def queue_as_new(db: Connection, row: InstanceRow) -> None:
    """Give an instance that is queued the place of a new one."""
    rank = db.queue.rank_new(row.tenant)
    db.execute("UPDATE instances SET rank = ? WHERE key = ?", (rank, row.key))
    db.queue.put_new(Lane(rank, row.workflow, row.tenant))


@dataclass(slots=True)
class Room:
    """What may be claimed: slots in all, slots of each workflow, and of each tenant where `per_tenant` says so."""

    slots: int
    workflows: dict[str, int]
    running: Counter[str]
    per_tenant: int | None

    def of(self, workflow: str, tenant: str) -> int:
        """Return how many slots there are for instances of this workflow and tenant."""
        slots = min(self.slots, self.workflows[workflow])
        return slots if self.per_tenant is None else min(slots, self.per_tenant - self.running[tenant])

    def take(self, workflow: str, tenant: str) -> None:
        """Take a slot."""
        self.slots -= 1
        self.workflows[workflow] -= 1
        self.running[tenant] += 1


def claim(db: Connection, room: Room, now: int) -> list[Claim]:
    """Take queued instances in the order of their ranks, as many as there is room for."""
    claimed: list[Claim] = []
    full: list[Lane] = []
    while room.slots and (lane := db.queue.first({name for name, slots in room.workflows.items() if slots})):
        db.queue.take(lane)
        if room.of(lane.workflow, lane.tenant) <= 0:
            full.append(lane)
        else:
            claimed += _claim_from(db, lane, room, now)
    for lane in full:
        db.queue.put(lane)
    return claimed


def _claim_from(db: Connection, lane: Lane, room: Room, now: int) -> list[Claim]:
    """Take a lane's instances, up to the turn of another, and put back what is left of it."""
    _, workflow, tenant = lane
    other = db.queue.first({name for name, slots in room.workflows.items() if slots})
    found = db.execute(
        "SELECT key, rank, id, created_at, ending, params, events, size, retention"
        " FROM instances INDEXED BY instances_queue"
        " WHERE status = 'queued' AND workflow = ? AND tenant = ? AND rank <= ? ORDER BY rank LIMIT ?",
        (workflow, tenant, _LAST_RANK if other is None else other.rank, room.of(workflow, tenant)),
    ).fetchall()
    claimed = []
    for row in found:
        room.take(workflow, tenant)
        claimed.append(_claim_one(db, workflow, tenant, row, now))
    left = db.execute(
        "SELECT min(rank) FROM instances INDEXED BY instances_queue"
        " WHERE status = 'queued' AND workflow = ? AND tenant = ?",
        (workflow, tenant),
    ).fetchone()[0]
    if left is not None:
        db.queue.put(Lane(left, workflow, tenant))
    return claimed


def _claim_one(db: Connection, workflow: str, tenant: str, row: tuple[Any, ...], now: int) -> Claim:
    key, rank, id_, created_at, ending, params, events, size, retention = row
    db.queue.served(rank)
    lease = db.leases.grant(key, events, size, retention)
    if rank < 0:  # ranks of instances that have not been started are not negative
        happened = log(db, key, now, "workflow.running")
        db.write("UPDATE instances SET status = 'running', rank = NULL WHERE key = ?", (key,))
    else:
        happened = started(now, count_leased(db, lease, 2, 0, last=MASK))
        db.write(
            "UPDATE instances SET status = 'running', rank = NULL, started_at = ?, started_event = ? WHERE key = ?",
            (now, happened.number, key),
        )
    schedule = None
    if params is None:
        params, schedule = db.execute("SELECT params, schedule FROM inputs WHERE key = ?", (key,)).fetchone()
    steps = load_steps(db, key) if events > 1 else []  # 1: all that has happened to it is that it was queued
    ref = InstanceRef(workflow, id_, tenant)
    return Claim(lease, ref, created_at, ending, params, schedule, steps, happened)
