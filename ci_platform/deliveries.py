"""Deliveries: accept once, store, dispatch after the answer, pick up what was left, give up with a reason.

What is answered 202 is in the table; what is in the table is dispatched, also after a kill -9. A redelivery
(same forge and id) is counted and answered the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Protocol, cast

import anyio

from ci_platform.backoff import backoff
from ci_platform.errors import FailedError, NotFoundError, RejectedError, UnavailableError
from ci_platform.forges import Change, Delivery, Forge
from ci_platform.forges.payloads import clean, first_line
from ci_platform.model import DeliveryRow, Repository
from ci_platform.runs import Runs
from ci_platform.store import Store, Transaction, col, decode_cursor, encode_cursor
from ci_platform.triggers import RunRequest, Skipped, match
from ci_platform.waking import Waker
from dynflow.clock import Clock

_log = logging.getLogger(__name__)

# A remote that is down for longer than this has lost the push as far as its author is concerned.
_TRY_FOR = timedelta(days=1)
# A defect of ours is not cured by trying all day.
_TRIES_AFTER_A_DEFECT = 5
_MAX_TITLE = 300
# Fetches of different repositories at once; one repository's deliveries go one after the other.
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """What dispatch must know of a commit: its message, and its pipeline.

    `pipeline_digest` is None where it has no `.dynflow/ci.py`.
    """

    message: str
    pipeline_digest: str | None


class Commits(Protocol):
    """Where commits are looked up, fetching what is not here yet."""

    async def describe(
        self, change: Change, *, clone_url: str, credentials: tuple[str, str] | None
    ) -> CommitInfo:
        """Fetch `change.ref`, and describe `change.sha`.

        Raises UnavailableError for what may work later, FailedError where the commit is not there.
        """


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to a delivery. `state` is `received`, `dispatched`, `ignored` or `failed`; `reason` says why."""

    id: int
    state: str
    reason: str | None
    redelivered: bool


@dataclass(frozen=True, slots=True)
class DeliveryView:
    """A delivery as the API shows it."""

    id: int
    forge: str
    delivery_id: str
    event: str
    repo: str | None
    state: str
    reason: str | None
    run_ids: tuple[str, ...]
    received_at: datetime
    redeliveries: int
    attempts: int
    last_error: str | None


class Deliveries:
    """Takes deliveries in and turns them into runs. `serve` runs beside the server, in the same event loop."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        forges: Mapping[str, Forge],
        runs: Runs,
        commits: Commits,
        allow_forks: bool = True,
    ) -> None:
        self._store, self._clock, self._runs, self._allow_forks = store, clock, runs, allow_forks
        self._forges, self._commits = forges, commits
        self._waker = Waker(clock)
        self._busy: set[str] = set()

    # --- in ------------------------------------------------------------------------------------

    async def accept(self, delivery: Delivery) -> Accepted:
        """Store a verified delivery, once. What it starts is started after this returned."""
        accepted = await self._store.write(lambda tx: self.insert(tx, delivery))
        self._waker.wake()
        return accepted

    def insert(self, tx: Transaction, delivery: Delivery) -> Accepted:
        """Store a delivery within a transaction; call `wake` after it."""
        row = self._row(tx, delivery)
        if tx.add_once(row):
            return _answer(row, redelivered=False)
        where = (
            col(DeliveryRow.forge) == delivery.forge,
            col(DeliveryRow.delivery_id) == delivery.delivery_id,
        )
        tx.change(DeliveryRow, {"redeliveries": DeliveryRow.redeliveries + 1}, *where)
        return _answer(cast("DeliveryRow", tx.first(DeliveryRow, *where)), redelivered=True)

    def wake(self) -> None:
        """Look for deliveries to dispatch, now."""
        self._waker.wake()

    async def count_refused(self, reason: str) -> None:
        """Count a delivery that was refused before it could be stored, such as `signature`."""
        await self._store.write(lambda tx: tx.count(f"deliveries_refused_{reason}"))

    def _row(self, tx: Transaction, delivery: Delivery) -> DeliveryRow:
        now = self._clock.now()
        reason = delivery.ignored or self._refusal(tx, delivery)
        return DeliveryRow(
            forge=delivery.forge,
            delivery_id=delivery.delivery_id,
            event=delivery.event,
            repo=(delivery.repo or "")[:200] or None,
            state="received" if reason is None else "ignored",
            reason=reason,
            change=asdict(delivery.change) if delivery.change else None,
            summary=dict(delivery.summary),
            received_at=now,
            next_at=now,
        )

    def _refusal(self, tx: Transaction, delivery: Delivery) -> str | None:
        """Return why a delivery starts nothing, as far as that can be told without looking at its commit."""
        change = delivery.change
        if change is None:
            return "it says nothing that could start a run"
        repository = tx.get(Repository, change.repo)
        if repository is None:
            return f"repository {change.repo!r} is not registered here"
        if repository.forge != delivery.forge:
            return f"repository {change.repo!r} is registered at forge {repository.forge!r}"
        if not (change.trusted or self._allow_forks):
            return "pull requests from forks start nothing here (setting allow_forks)"
        if not repository.enabled:
            return f"repository {change.repo!r} is disabled"
        matched = match(delivery.forge, change, str(delivery.summary.get("message") or ""))
        return matched.reason if isinstance(matched, Skipped) else None

    # --- out -----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Dispatch what is due, for ever; deliveries of different repositories at the same time."""
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as group:
            while True:
                for row in await self._due():
                    lane = row.repo or ""
                    if lane not in self._busy:
                        self._busy.add(lane)
                        group.start_soon(self._dispatch_in_lane, row, lane, limiter)
                await self._waker.wait(await self._next_due())

    async def sweep(self) -> int:
        """Dispatch all that is due, one after the other, and return how many there were."""
        rows = await self._due()
        for row in rows:
            await self.dispatch(row)
        return len(rows)

    async def _dispatch_in_lane(self, row: DeliveryRow, lane: str, limiter: anyio.CapacityLimiter) -> None:
        try:
            async with limiter:
                # It may have been dispatched between the query that found it and this lane's turn.
                if (await self.get(cast("int", row.id))).state == "received":
                    await self.dispatch(row)
        finally:
            self._busy.discard(lane)
            self._waker.wake()

    async def dispatch(self, row: DeliveryRow) -> None:
        """Start the runs of one delivery, or store why not. Never raises but on cancellation."""
        try:
            run_ids, reason = await self._start(row)
        except UnavailableError as error:
            await self._try_later(row, str(error), error.retry_after, limit=None)
        except (FailedError, RejectedError) as error:
            await self._conclude(row, "ignored", str(error), ())
        except Exception as error:  # noqa: BLE001 - the door around a delivery: its defects must not stop others
            _log.exception("delivery %s of %s could not be dispatched", row.delivery_id, row.forge)
            await self._try_later(
                row, f"internal error: {type(error).__name__}", None, limit=_TRIES_AFTER_A_DEFECT
            )
        else:
            await self._conclude(row, "dispatched" if run_ids else "ignored", reason, run_ids)

    async def _start(self, row: DeliveryRow) -> tuple[tuple[str, ...], str | None]:
        change = Change(**(row.change or {}))
        repository = await self._store.read(lambda tx: tx.get(Repository, change.repo))
        if repository is None or not repository.enabled:
            return (), f"repository {change.repo!r} is not registered here, or disabled"
        forge = self._forges[row.forge]
        commit = await self._commits.describe(
            change,
            clone_url=repository.clone_url or forge.clone_url(change.repo),
            credentials=forge.credentials(change.repo),
        )
        if commit.pipeline_digest is None:
            return (), f"there is no .dynflow/ci.py at {change.sha[:12]}"
        change = replace(change, title=change.title or clean(first_line(commit.message), _MAX_TITLE))
        matched = match(row.forge, change, commit.message)
        if isinstance(matched, Skipped):
            return (), matched.reason
        return await self._start_all(matched, row, commit.pipeline_digest), None

    async def _start_all(
        self, requests: Sequence[RunRequest], row: DeliveryRow, digest: str
    ) -> tuple[str, ...]:
        for request in requests:
            await self._runs.start(request, delivery=row.id, pipeline_digest=digest)
        return tuple(request.run_id for request in requests)

    async def _conclude(
        self, row: DeliveryRow, state: str, reason: str | None, run_ids: Sequence[str]
    ) -> None:
        values = {"state": state, "reason": reason, "run_ids": list(run_ids), "attempts": row.attempts + 1}
        await self._store.write(lambda tx: tx.change(DeliveryRow, values, col(DeliveryRow.id) == row.id))

    async def _try_later(
        self, row: DeliveryRow, error: str, retry_after: float | None, limit: int | None
    ) -> None:
        now, attempts = self._clock.now(), row.attempts + 1
        given_up = attempts >= limit if limit is not None else now - row.received_at > _TRY_FOR
        values: dict[str, Any] = {
            "attempts": attempts,
            "last_error": error[:1000],
            "next_at": now + backoff(attempts, retry_after),
        }
        if given_up:
            values |= {"state": "failed", "reason": f"given up after {attempts} attempts: {error[:900]}"}
        await self._store.write(lambda tx: tx.change(DeliveryRow, values, col(DeliveryRow.id) == row.id))

    async def _due(self) -> Sequence[DeliveryRow]:
        now = self._clock.now()
        return await self._store.read(
            lambda tx: tx.all(
                DeliveryRow,
                col(DeliveryRow.state) == "received",
                col(DeliveryRow.next_at) <= now,
                order=col(DeliveryRow.id),
                limit=1000,
            )
        )

    async def _next_due(self) -> datetime | None:
        now = self._clock.now()
        row = await self._store.read(
            lambda tx: tx.first(
                DeliveryRow,
                col(DeliveryRow.state) == "received",
                col(DeliveryRow.next_at) > now,
                order=col(DeliveryRow.next_at),
            )
        )
        return row.next_at if row else None

    # --- views ---------------------------------------------------------------------------------

    async def get(self, delivery: int) -> DeliveryView:
        """Return one delivery. Raises NotFoundError."""
        row = await self._store.read(lambda tx: tx.get(DeliveryRow, delivery) if delivery < 2**31 else None)
        if row is None:
            raise NotFoundError(f"there is no delivery {delivery}")
        return _view(row)

    async def list(
        self, *, repo: str | None = None, cursor: str | None = None, limit: int = 50
    ) -> tuple[list[DeliveryView], str | None]:
        """Return deliveries, the newest first, and the cursor of the next page (None on the last)."""
        where = [] if repo is None else [col(DeliveryRow.repo) == repo]
        if cursor is not None:
            where.append(col(DeliveryRow.id) < decode_cursor(cursor))
        rows = await self._store.read(
            lambda tx: tx.all(DeliveryRow, *where, order=col(DeliveryRow.id).desc(), limit=limit + 1)
        )
        more = encode_cursor(cast("int", rows[limit - 1].id)) if len(rows) > limit else None
        return [_view(row) for row in rows[:limit]], more


def _answer(row: DeliveryRow, *, redelivered: bool) -> Accepted:
    return Accepted(cast("int", row.id), row.state, row.reason, redelivered)


def _view(row: DeliveryRow) -> DeliveryView:
    return DeliveryView(
        id=cast("int", row.id),
        forge=row.forge,
        delivery_id=row.delivery_id,
        event=row.event,
        repo=row.repo,
        state=row.state,
        reason=row.reason,
        run_ids=tuple(row.run_ids),
        received_at=row.received_at,
        redeliveries=row.redeliveries,
        attempts=row.attempts,
        last_error=row.last_error,
    )
