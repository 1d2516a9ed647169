"""What can be asked about runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError
from ci_platform.gates import gates_of_run
from ci_platform.instances import InstanceHandle, WorkflowsBinding
from ci_platform.model import ArtifactRow, DeliveryRow, Gate, OutboxRow, Run, RunCache, RunFork, RunImage
from ci_platform.run_views import RunView, run_view
from ci_platform.store import Store, Transaction, chosen, col, decode_cursor, encode_cursor, or_
from dynflow.clock import Clock
from dynflow.errors import InstanceNotFoundError
from dynflow.types import HistoryEvent

_PHASES = frozenset({"queued", "running", "waiting", "paused", "finished"})
_CONCLUSIONS = frozenset({"success", "failure", "error", "cancelled", "timed_out"})


@dataclass(frozen=True, slots=True)
class RunPage:
    """Some runs, the newest first; `cursor` leads to the next ones, None where there are none."""

    runs: tuple[RunView, ...]
    cursor: str | None


_MOST_FORKS = 100
_MOST_CACHES = 200
"""Of a run, that are shown: the newest."""

_OWNERS = (col(Run.id), col(Run.repo))

Caches = Sequence[RunCache]


class RunQueries:
    """Finds runs. What is alive is asked of the engine, the rest of the database."""

    def __init__(self, store: Store, clock: Clock, workflows: WorkflowsBinding) -> None:
        self._store, self._clock, self._workflows = store, clock, workflows

    async def get(self, run_id: str) -> RunView:
        """Return a run with its steps, gates and cause. Raises NotFoundError."""

        def find(tx: Transaction) -> tuple[Run, dict[str, Any]]:
            run = existing_run(tx, run_id)
            newest = col(RunCache.id).desc()
            caches = tx.all(RunCache, col(RunCache.run_id) == run_id, order=newest, limit=_MOST_CACHES)
            return run, {
                "gates": gates_of_run(tx, run_id),
                "delivery": None if run.delivery is None else tx.get(DeliveryRow, run.delivery),
                "images": tx.all(RunImage, col(RunImage.run_id) == run_id, order=col(RunImage.pinned_at)),
                "caches": caches[::-1],
                "fork": None if run.forked_from is None else tx.get(RunFork, run_id),
                "forks": tx.all(Run, col(Run.forked_from) == run_id, order=col(Run.seq), limit=_MOST_FORKS),
                "source": None if run.forked_from is None else tx.first(Run, col(Run.id) == run.forked_from),
            }

        run, found = await self._store.read(find)
        try:
            status = await (await self._workflows.get(run_id)).status()
        except InstanceNotFoundError:
            status = None
        return run_view(run, status=status, **found)

    async def summary(self, run_id: str) -> RunView:
        """Return a run as the database knows it, without asking the engine. Raises NotFoundError."""
        return run_view(await self._store.read(lambda tx: existing_run(tx, run_id)))

    async def list(
        self,
        *,
        repo: str | None = None,
        ref: str | None = None,
        status: str | None = None,
        sha: str | None = None,
        pr: int | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> RunPage:
        """Return runs, the newest first.

        `ref` is a full ref or a branch's name; `status` a status or a conclusion. Raises InvalidInputError.
        """
        if not 1 <= limit <= 200:
            raise InvalidInputError(f"limit is 1 to 200, not {limit}")
        if pr is not None and not 0 < pr < 2**31:
            raise InvalidInputError("pr is the number of a pull request")
        where = _conditions(repo=repo, ref=ref, status=status, sha=sha, pr=pr)
        if cursor is not None:
            where.append(col(Run.seq) < decode_cursor(cursor))
        rows = await self._store.read(
            lambda tx: tx.all(Run, *where, order=col(Run.seq).desc(), limit=limit + 1)
        )
        more = encode_cursor(cast("int", rows[limit - 1].seq)) if len(rows) > limit else None
        return RunPage(tuple(run_view(row) for row in rows[:limit]), more)

    async def events(self, run_id: str, cursor: int | None = None) -> AsyncIterator[HistoryEvent]:
        """Yield the run's history after `cursor`, then what happens, until it has ended. Raises NotFoundError."""
        try:
            handle: InstanceHandle = await self._workflows.get(run_id)
        except InstanceNotFoundError:
            raise NotFoundError(f"there is no run {run_id[:100]}, or its history is gone") from None
        async for event in handle.subscribe(cursor):
            yield event

    async def kept_ids(self) -> set[str]:
        """Return the ids of all runs that are kept, ended ones too: their workspaces and logs are kept with them."""
        return {run_id for run_id, _ in await self._store.read(lambda tx: tx.values(_OWNERS))}

    async def open_ids(self) -> set[str]:
        """Return the ids of the runs that have not ended, and of those that one is still to be forked from.

        Only their commands may go on, and their files are not collected.
        """
        columns = (col(Run.id), col(Run.forked_from), col(Run.fork_pending))
        rows = await self._store.read(lambda tx: tx.values(columns, col(Run.conclusion).is_(None)))
        needed = {source for _, source, pending in rows if pending and source is not None}
        return needed.union(run_id for run_id, _, _ in rows)

    async def repos(self, *, still_open: bool = False) -> dict[str, str]:
        """Return the repositories of all runs that are kept, or of those that have not ended, by run."""
        where = [col(Run.conclusion).is_(None)] if still_open else []
        return dict(await self._store.read(lambda tx: tx.values(_OWNERS, *where)))

    async def expired(self, retention: timedelta, *, limit: int = 100) -> Sequence[str]:
        """Return runs that ended longer ago than `retention`, the oldest first; none whose artifacts are kept."""
        before = self._clock.now() - retention
        kept = chosen(col(ArtifactRow.run_id), col(ArtifactRow.deleted_at).is_(None))
        rows = await self._store.read(
            lambda tx: tx.all(
                Run,
                col(Run.conclusion).is_not(None),
                col(Run.ended_at) < before,
                col(Run.id).not_in(kept),
                order=col(Run.seq),
                limit=limit,
            )
        )
        return [row.id for row in rows]

    async def forget(self, run_id: str) -> None:
        """Delete a run that has ended from the database: the last thing, after its files and instance."""

        def delete(tx: Transaction) -> None:
            if existing_run(tx, run_id).conclusion is None:
                raise ConflictError("the run has not ended")
            for table in (ArtifactRow, Gate, OutboxRow, RunCache, RunFork, RunImage):
                tx.remove(table, col(table.run_id) == run_id)
            tx.remove(Run, col(Run.id) == run_id)

        await self._store.write(delete)


def existing_run(tx: Transaction, run_id: str) -> Run:
    """Return the row of a run. Raises NotFoundError."""
    run = tx.first(Run, col(Run.id) == run_id)
    if run is None:
        raise NotFoundError(f"there is no run {run_id[:100]}")
    return run


def params_of(run: Run) -> dict[str, Any]:
    """Return what the pipeline gets as `event.payload`."""
    return {
        "repo": run.repo,
        "sha": run.sha,
        "ref": run.ref,
        "branch": run.branch,
        "base_branch": run.base_branch,
        "before": run.before,
        "pr": run.pr,
        "event": run.event,
        "action": run.action,
        "actor": run.actor,
        "title": run.title,
        "trusted": run.trusted,
        "number": run.number,
    }


def _conditions(
    *, repo: str | None, ref: str | None, status: str | None, sha: str | None, pr: int | None
) -> list[Any]:
    where: list[Any] = []
    if repo is not None:
        where.append(col(Run.repo) == repo)
    if ref is not None:
        where.append(or_(col(Run.ref) == ref, col(Run.branch) == ref))
    if sha is not None:
        where.append(col(Run.sha) == sha)
    if pr is not None:
        where.append(col(Run.pr) == pr)
    if status in _CONCLUSIONS:
        where.append(col(Run.conclusion) == status)
    elif status in _PHASES:
        where.append(col(Run.phase) == status)
    elif status is not None:
        known = ", ".join(sorted(_PHASES | _CONCLUSIONS))
        raise InvalidInputError(f"there is no status {status[:50]!r}: {known}")
    return where
