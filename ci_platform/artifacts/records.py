"""The rows of artifacts: one name once in a run, room in a run, and whose artifacts a run may have.

| A run of | may have the artifacts of |
|---|---|
| the repository itself | its own run; other runs that are no fork's pull requests and no what-ifs |
| a fork's pull request | its own run |
| a what-if | the same as the run that it comes from, and of that one those of the steps that it kept |

All of it follows from rows, never from what a pipeline says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ci_platform.caches.scopes import tenant_of
from ci_platform.capabilities import RunIdentity
from ci_platform.errors import (
    ConflictError,
    ForbiddenError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
)
from ci_platform.model import ArtifactRow, Repository, Run, RunFork
from ci_platform.stacks import LayerAuthor
from ci_platform.store import Store, Transaction, chosen, col
from dynflow.clock import Clock
from pipelines.contract import Artifact

MOST_OF_A_RUN = 500
"""Names of artifacts that a run may have at a time."""

_LIVE = col(ArtifactRow.deleted_at).is_(None)
_OLDEST, _NEWEST = col(ArtifactRow.seq), col(ArtifactRow.seq).desc()

REPEATED = "the step that uploaded it was taken back"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run's artifacts go. `run_attempt`: how often it was started. `size`, `files`: what it has already."""

    repo: str
    tenant: str
    run_attempt: int
    outside: bool
    size: int
    files: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which artifacts: of the run itself, of another `run`, or of the newest good runs of a `branch`."""

    name: str | None = None
    run: str | None = None
    branch: str | None = None


class Records:
    """Transactions over the rows. Errors are those of the tenant's asking."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    # --- uploads ---

    async def place(self, run_id: str, name: str, author: LayerAuthor, *, replace: bool) -> Place:
        """Return where a run's artifact goes. Raises ConflictError where the name is taken, NotFoundError."""

        def find(tx: Transaction) -> Place:
            run, repository = _run(tx, run_id)
            gone = self._in_the_way(tx, run, name, author, replace=replace)
            rows = [row for row in _of_run(tx, run_id) if row not in gone]
            if len(rows) >= MOST_OF_A_RUN:
                raise LimitExceededError(f"the run has {MOST_OF_A_RUN} artifacts already, which is the most")
            size, files = sum(row.size for row in rows), sum(row.files for row in rows)
            tenant = tenant_of(repository)
            return Place(run.repo, tenant, run.attempt, not run.trusted, size, files)

        return await self._store.read(find)

    async def add(self, row: ArtifactRow, *, replace: bool, room: int) -> list[ArtifactRow]:
        """Store a row; durable when this returns. Returns the rows that it takes the place of.

        `room` is how many bytes the run may have. Errors as of `place`: another step may have been faster.
        """
        author = LayerAuthor(row.step, row.count, row.attempt)

        def insert(tx: Transaction) -> list[ArtifactRow]:
            run = tx.lock(Run, col(Run.id) == row.run_id)
            if run is None:
                raise NotFoundError(f"there is no run {row.run_id:.100}")
            gone = self._in_the_way(tx, run, row.name, author, replace=replace)
            rest = [each for each in _of_run(tx, row.run_id) if each not in gone]
            if sum(each.size for each in rest) + row.size > room or len(rest) >= MOST_OF_A_RUN:
                raise LimitExceededError(
                    f"the artifact {row.name!r} does not fit beside the others of the run (setting max_artifacts)"
                )
            for each in gone:  # not only marked: a step may do this for ever
                tx.remove(ArtifactRow, col(ArtifactRow.seq) == each.seq)
            tx.add(row)
            return gone

        return await self._store.write(insert)

    def _in_the_way(
        self, tx: Transaction, run: Run, name: str, author: LayerAuthor, *, replace: bool
    ) -> list[ArtifactRow]:
        """Return the artifact that a new one of its name replaces: an earlier attempt's of the same step, or any."""
        found = tx.all(ArtifactRow, _LIVE, col(ArtifactRow.run_id) == run.id, col(ArtifactRow.name) == name)
        for row in found:
            is_earlier = (row.run_attempt, row.attempt) != (run.attempt, author.attempt)
            if not replace and not ((row.step, row.count) == (author.step, author.count) and is_earlier):
                raise ConflictError(
                    f"the run has an artifact {name!r} already, of the step {row.step!r:.100}: "
                    "choose another name, or say replace=True"
                )
        return list(found)

    # --- deleting ---

    async def forget(self, where: Collection[str], why: str) -> list[ArtifactRow]:
        """Mark artifacts (by id) as deleted; returns those that were not before."""

        def mark(tx: Transaction) -> list[ArtifactRow]:
            found = [tx.first(ArtifactRow, _LIVE, col(ArtifactRow.id) == each) for each in where]
            for row in (rows := [row for row in found if row is not None]):
                self._mark(tx, row, why)
            return rows

        return await self._store.write(mark)

    def _mark(self, tx: Transaction, row: ArtifactRow, why: str) -> None:
        gone = {"deleted_at": self._clock.now(), "why_deleted": why}
        tx.change(ArtifactRow, gone, col(ArtifactRow.seq) == row.seq)

    async def of_steps(self, run_id: str, steps: Collection[tuple[str, int]]) -> list[str]:
        """Return the artifacts (by id) that these (step, count) of a run uploaded."""
        rows = await self._store.read(lambda tx: _of_run(tx, run_id))
        return [row.id for row in rows if (row.step, row.count) in steps]

    async def live(self) -> list[ArtifactRow]:
        """Return all artifacts that are there, the oldest first."""
        return list(await self._store.read(lambda tx: tx.all(ArtifactRow, _LIVE, order=_OLDEST)))

    async def drop_run(self, run_id: str) -> list[ArtifactRow]:
        """Delete the rows of a run; returns those of artifacts that were there."""

        def drop(tx: Transaction) -> list[ArtifactRow]:
            rows = _of_run(tx, run_id)
            tx.remove(ArtifactRow, col(ArtifactRow.run_id) == run_id)
            return list(rows)

        return await self._store.write(drop)

    # --- finding ---

    async def of_run(self, run_id: str, *, deleted: bool = False) -> list[ArtifactRow]:
        """Return a run's artifacts, the oldest first; with `deleted` also those that are gone, which say why."""
        where = [col(ArtifactRow.run_id) == run_id, *([] if deleted else [_LIVE])]
        return list(await self._store.read(lambda tx: tx.all(ArtifactRow, *where, order=_OLDEST)))

    async def named(self, run_id: str, name: str) -> ArtifactRow:
        """Return a run's artifact. Raises NotFoundError, which says why one is gone."""

        def find(tx: Transaction) -> ArtifactRow:
            where = (col(ArtifactRow.run_id) == run_id, col(ArtifactRow.name) == name)
            row = tx.first(ArtifactRow, *where, order=_NEWEST)
            if row is None or row.deleted_at is not None:
                raise _missing(name, row)
            repository = tx.get(Repository, row.repo)
            if repository is None or repository.deleted_at is not None or tenant_of(repository) != row.tenant:
                raise NotFoundError(f"the artifact {name!r} was deleted with its repository")
            return row

        return await self._store.read(find)

    async def wanted(self, identity: RunIdentity, wanted: Wanted, limit: int) -> list[ArtifactRow]:
        """Return artifacts that a run may have, as many as `limit`; of a branch the newest first.

        Raises NotFoundError for a run that is not there, ForbiddenError, InvalidInputError.
        """
        if wanted.run is not None and wanted.branch is not None:
            raise InvalidInputError("either run= or branch=, not both")

        def find(tx: Transaction) -> list[ArtifactRow]:
            _, repository = _run(tx, identity.run_id)
            if wanted.branch is not None:
                _refuse_outside(identity)
                return _of_branch(tx, repository, wanted, limit)
            own = _own(tx, identity)
            run_id = wanted.run or identity.run_id
            if run_id != identity.run_id:
                own = [row for row in own if row.run_id == run_id]
                if not own or run_id not in identity.ancestors:
                    own = _of_other(tx, identity, repository, run_id)
            return [row for row in own if wanted.name in {None, row.name}][:limit]

        return await self._store.read(find)


def _run(tx: Transaction, run_id: str) -> tuple[Run, Repository]:
    run = tx.first(Run, col(Run.id) == run_id)
    repository = None if run is None else tx.get(Repository, run.repo)
    if run is None or repository is None:
        raise NotFoundError(f"there is no run {run_id:.100}")
    return run, repository


def _of_run(tx: Transaction, run_id: str) -> Sequence[ArtifactRow]:
    return tx.all(ArtifactRow, _LIVE, col(ArtifactRow.run_id) == run_id, order=_OLDEST)


def _own(tx: Transaction, identity: RunIdentity) -> list[ArtifactRow]:
    """Return what a run has uploaded, and what its kept steps have where they were performed, one of each name."""
    found = {row.name: row for row in _of_run(tx, identity.run_id)}
    fork = tx.get(RunFork, identity.run_id) if identity.ancestors else None
    kept = set() if fork is None else {(name, count) for name, count, _ in fork.kept}
    for ancestor in identity.ancestors:
        for row in _of_run(tx, ancestor):
            if (row.step, row.count) in kept:
                found.setdefault(row.name, row)
    return sorted(found.values(), key=lambda row: row.seq or 0)


def _refuse_outside(identity: RunIdentity) -> None:
    if not identity.trusted:
        raise ForbiddenError("a pull request from a fork may have its own artifacts only")


def _of_other(
    tx: Transaction, identity: RunIdentity, repository: Repository, run_id: str
) -> list[ArtifactRow]:
    _refuse_outside(identity)
    run = tx.first(Run, col(Run.id) == run_id)
    if run is None or run.repo != identity.repo:
        raise NotFoundError(f"{identity.repo!r} has no run {run_id!r:.100}")
    if not run.trusted:
        raise ForbiddenError(
            f"run {run_id} is of a pull request from a fork: what it uploads is for its own steps alone"
        )
    if run.forked_from is not None:
        raise ForbiddenError(f"run {run_id} is a what-if: what it uploads is for its own steps alone")
    tenant = tenant_of(repository)
    return [row for row in _of_run(tx, run_id) if row.tenant == tenant and not row.outside]


def _of_branch(tx: Transaction, repository: Repository, wanted: Wanted, limit: int) -> list[ArtifactRow]:
    """Return the artifacts of runs of a branch that succeeded: no pull request's, no what-if's; the newest first."""
    named: list[Any] = [] if wanted.name is None else [col(ArtifactRow.name) == wanted.name]
    candidates = tx.all(
        ArtifactRow,
        _LIVE,
        *named,
        col(ArtifactRow.repo) == repository.name,
        col(ArtifactRow.tenant) == tenant_of(repository),
        col(ArtifactRow.outside).is_(False),
        col(ArtifactRow.run_id).in_(
            chosen(
                col(Run.id),
                col(Run.repo) == repository.name,
                col(Run.ref) == f"refs/heads/{wanted.branch}",
                col(Run.conclusion) == "success",
                col(Run.event) != "pull_request",
                col(Run.trusted).is_(True),
                col(Run.pr).is_(None),
                col(Run.forked_from).is_(None),
            )
        ),
        order=_NEWEST,
        limit=limit,
    )
    return list(candidates)


def _missing(name: str, row: ArtifactRow | None) -> NotFoundError:
    if row is None or row.deleted_at is None:
        return NotFoundError(f"the run has no artifact {name!r:.150}")
    return NotFoundError(
        f"the artifact {name!r:.150} was deleted at {row.deleted_at:%Y-%m-%d %H:%M} UTC: {row.why_deleted}"
    )


def shown(row: ArtifactRow) -> Artifact:
    """Return an artifact as pipelines see it."""
    return Artifact(row.name, row.run_id, row.digest, row.files, row.size, row.created_at, row.expires_at)
