"""Reports: what forges show, projected from runs through an outbox. In order, once in effect, for a day.

A report is a row, written in the transaction that changed what it says. Per key (a commit's context, a pull
request's comment) only the newest waiting row is delivered, and one at a time. A delivery that a crash
interrupts is repeated, which forges take as the same status or the same comment again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, cast

import anyio

from ci_platform.backoff import backoff
from ci_platform.errors import FailedError, InvalidInputError, NotFoundError, UnavailableError
from ci_platform.forges import Comment, CommitStatus, Forge, StatusState
from ci_platform.model import OutboxRow, Repository, Run
from ci_platform.store import Store, Transaction, col
from ci_platform.waking import Waker
from dynflow.clock import Clock

_log = logging.getLogger(__name__)

_AT_ONCE = 8
# More than a forge shows, less than a row may be: the forge cuts, and says so.
_MAX_BODY = 1_000_000
_MAX_DESCRIPTION = 1000


@dataclass(frozen=True, slots=True)
class ReportView:
    """A report as the API shows it. `state` is `waiting`, `delivered`, `superseded`, `dead` or `withheld`."""

    kind: str
    state: str
    payload: Mapping[str, Any]
    attempts: int
    created_at: datetime
    ended_at: datetime | None
    last_error: str | None


class Reports:
    """Writes reports and delivers them. `serve` runs beside the server, in the same event loop."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        forges: Mapping[str, Forge],
        public_url: str,
        context: str = "dynflow",
        give_up_after: timedelta = timedelta(days=1),
    ) -> None:
        self._store, self._clock, self._forges = store, clock, forges
        self._public_url, self._context, self._give_up_after = public_url, context, give_up_after
        self._waker = Waker(clock)
        self._busy: set[str] = set()
        # A forge that asks for a pause asks it of all our calls; going on may get us banned.
        self._paused: dict[str, datetime] = {}

    # --- in ------------------------------------------------------------------------------------

    def put_status(self, tx: Transaction, run: Run, state: StatusState, description: str) -> None:
        """Have this shown on the run's commit, as part of `tx`; call `wake` after it.

        The same as the last report of this context changes nothing. A what-if run says nothing about its commit.
        """
        if run.forked_from is not None:
            return
        status = CommitStatus(
            repo=run.repo,
            sha=run.sha,
            context=f"{self._context}/{run.event}",
            state=state,
            description=description[:_MAX_DESCRIPTION],
            target_url=f"{self._public_url}/runs/{run.id}",
        )
        self._put(tx, run, "status", (status.sha, status.context.lower()), asdict(status))

    async def comment(self, run_id: str, pr: int, body: str, *, name: str = "ci") -> None:
        """Have `body` shown as the one comment that the pull request has under `name`.

        Returns once stored. Raises InvalidInputError if the run is not of that pull request.
        """
        if len(body) > _MAX_BODY:
            raise InvalidInputError(f"a comment is text of at most {_MAX_BODY:,} characters")

        def put(tx: Transaction) -> None:
            run = tx.first(Run, col(Run.id) == run_id)
            if run is None:
                raise NotFoundError(f"there is no run {run_id}")
            if run.pr is None or run.pr != pr:
                raise InvalidInputError(f"this run is not of pull request {pr!r}: it may not comment there")
            comment = Comment(run.repo, run.pr, f"<!-- {self._context}:{name} -->", body)
            self._put(tx, run, "comment", (str(comment.pr), comment.marker), asdict(comment))

        await self._store.write(put)
        self.wake()

    def _put(
        self, tx: Transaction, run: Run, kind: str, identity: tuple[str, str], payload: dict[str, Any]
    ) -> None:
        repository = cast("Repository", tx.get(Repository, run.repo))
        if run.forked_from is not None:
            self._withhold(tx, run, kind, repository.forge, payload)
            return
        key = _key(repository.forge, kind, run.repo, *identity)
        last = tx.first(OutboxRow, col(OutboxRow.key) == key, order=col(OutboxRow.id).desc())
        if last is not None:
            if last.payload == payload and last.state != "dead":
                return
            if last.run_id != run.id and _is_older(tx, run, last.run_id):
                return  # a newer run speaks for this commit or pull request
        now = self._clock.now()
        gone = {"state": "superseded", "ended_at": now}
        tx.change(OutboxRow, gone, col(OutboxRow.key) == key, col(OutboxRow.state) == "waiting")
        if kind == "comment":
            # As long as a pipeline likes and as often as it likes: what it said before is not kept.
            tx.remove(OutboxRow, col(OutboxRow.key) == key)
        tx.add(
            OutboxRow(
                run_id=run.id,
                forge=repository.forge,
                kind=kind,
                key=key,
                payload=payload,
                created_at=now,
                next_at=now,
            )
        )

    def _withhold(self, tx: Transaction, run: Run, kind: str, forge: str, payload: dict[str, Any]) -> None:
        """Keep what a what-if run would have said, for who looks at the run; the newest alone."""
        key, now = _key(forge, kind, run.repo, run.id), self._clock.now()
        tx.remove(OutboxRow, col(OutboxRow.key) == key)
        row = OutboxRow(
            run_id=run.id, forge=forge, kind=kind, key=key, payload=payload, created_at=now, next_at=now
        )
        row.state, row.ended_at = "withheld", now
        tx.add(row)

    def wake(self) -> None:
        """Look for reports to deliver, now."""
        self._waker.wake()

    # --- out -----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Deliver what is due, for ever."""
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        async with anyio.create_task_group() as group:
            while True:
                for row in await self._due():
                    if row.key not in self._busy:
                        self._busy.add(row.key)
                        group.start_soon(self._deliver_in_lane, row, limiter)
                await self._waker.wait(await self._next_due())

    async def deliver_due(self) -> int:
        """Deliver all that is due, one after the other, and return how many there were."""
        rows = await self._due()
        for row in rows:
            await self._deliver(row)
        return len(rows)

    async def _deliver_in_lane(self, row: OutboxRow, limiter: anyio.CapacityLimiter) -> None:
        try:
            async with limiter:
                await self._deliver(row)
        finally:
            self._busy.discard(row.key)
            self.wake()

    async def _deliver(self, row: OutboxRow) -> None:
        current = await self._store.read(lambda tx: tx.get(OutboxRow, row.id))
        if current is None or current.state != "waiting" or self._is_paused(row.forge):
            return
        try:
            await self._show(row)
        except UnavailableError as error:
            await self._try_later(row, str(error), error.retry_after)
        except FailedError as error:
            await self._end(row, "dead", str(error))
        except Exception as error:  # noqa: BLE001 - one report's defect must not keep the others from their forges
            _log.exception("report %s of run %s could not be delivered", row.id, row.run_id)
            await self._try_later(row, f"internal error: {type(error).__name__}", None)
        else:
            await self._end(row, "delivered", None)

    async def _show(self, row: OutboxRow) -> None:
        forge = self._forges[row.forge]
        if row.kind == "status":
            await forge.set_status(CommitStatus(**row.payload))
        else:
            await forge.put_comment(Comment(**row.payload))

    async def _end(self, row: OutboxRow, state: str, error: str | None) -> None:
        values = {
            "state": state,
            "ended_at": self._clock.now(),
            "attempts": row.attempts + 1,
            "last_error": error and error[:1000],
        }
        await self._store.write(lambda tx: _change_waiting(tx, row, values))

    async def _try_later(self, row: OutboxRow, error: str, retry_after: float | None) -> None:
        now = self._clock.now()
        next_at = now + backoff(row.attempts + 1, retry_after)
        if retry_after:
            self._paused[row.forge] = next_at
        if now - row.created_at > self._give_up_after:
            await self._end(row, "dead", f"given up after {row.attempts + 1} attempts: {error}")
            return
        values = {"attempts": row.attempts + 1, "next_at": next_at, "last_error": error[:1000]}
        await self._store.write(lambda tx: _change_waiting(tx, row, values))

    def _is_paused(self, forge: str) -> bool:
        until = self._paused.get(forge)
        return until is not None and until > self._clock.now()

    async def _due(self) -> Sequence[OutboxRow]:
        now = self._clock.now()
        rows = await self._store.read(
            lambda tx: tx.all(
                OutboxRow,
                col(OutboxRow.state) == "waiting",
                col(OutboxRow.next_at) <= now,
                order=col(OutboxRow.id),
                limit=1000,
            )
        )
        return [row for row in rows if not self._is_paused(row.forge)]

    async def _next_due(self) -> datetime | None:
        now = self._clock.now()
        row = await self._store.read(
            lambda tx: tx.first(
                OutboxRow,
                col(OutboxRow.state) == "waiting",
                col(OutboxRow.next_at) > now,
                order=col(OutboxRow.next_at),
            )
        )
        pauses = [until for until in self._paused.values() if until > now]
        return min([*pauses, row.next_at] if row else pauses, default=None)

    async def of_run(self, run_id: str) -> list[ReportView]:
        """Return the run's reports, the oldest first."""
        rows = await self._store.read(
            lambda tx: tx.all(OutboxRow, col(OutboxRow.run_id) == run_id, order=col(OutboxRow.id))
        )
        return [
            ReportView(
                kind=row.kind,
                state=row.state,
                payload=row.payload,
                attempts=row.attempts,
                created_at=row.created_at,
                ended_at=row.ended_at,
                last_error=row.last_error,
            )
            for row in rows
        ]


def _key(*parts: str) -> str:
    return f"{parts[1]}:{hashlib.sha256(chr(0x1F).join(parts).encode()).hexdigest()[:40]}"


def _is_older(tx: Transaction, run: Run, other_id: str) -> bool:
    other = tx.first(Run, col(Run.id) == other_id)
    return other is not None and (run.seq or 0) < (other.seq or 0)


def _change_waiting(tx: Transaction, row: OutboxRow, values: Mapping[str, Any]) -> None:
    # Superseded meanwhile: then it stays so.
    tx.change(OutboxRow, values, col(OutboxRow.id) == row.id, col(OutboxRow.state) == "waiting")
