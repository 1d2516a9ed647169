"""Whose caches a run reads, and whose it writes. It follows from the run's row, never from what its pipeline says.

| A run of | writes | reads, in this order |
|---|---|---|
| a branch or a tag | its own | its own, the default branch's |
| a pull request | its own | its own, its base branch's, the default branch's |
| a what-if | its own | its own, and what the run reads that it was forked from |

A fork's pull request has a scope that no trusted run reads, also of the same number.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ci_platform.errors import NotFoundError
from ci_platform.model import Repository, Run
from ci_platform.store import Store, Transaction, col

_DIGITS = 32


@dataclass(frozen=True, slots=True)
class Scope:
    """What a run may do with caches. `tenant` is the folder of its repository; one made anew has another.

    `own` is the first of `readable`. `outside`: it is a fork's.
    """

    repo: str
    tenant: str
    readable: tuple[str, ...]
    outside: bool = False

    @property
    def own(self) -> str:
        """The scope that it writes."""
        return self.readable[0]


class RunScopes:
    """The scopes of runs, from their rows. Errors: NotFoundError."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def of(self, run_id: str) -> Scope:
        """Return what a run may read and write."""

        def find(tx: Transaction) -> Scope:
            run = tx.first(Run, col(Run.id) == run_id)
            repository = None if run is None else tx.get(Repository, run.repo)
            if run is None or repository is None:
                raise NotFoundError(f"there is no run {run_id:.100}")
            return scope_of(run, repository)

        return await self._store.read(find)

    async def tenants(self) -> set[str]:
        """Return the folders of all repositories that there are."""
        there = col(Repository.deleted_at).is_(None)
        return {tenant_of(row) for row in await self._store.read(lambda tx: tx.all(Repository, there))}


def tenant_of(repository: Repository) -> str:
    """Return the name of a repository's folder: not that of an earlier one which was called the same."""
    known = f"{repository.name}\x1f{repository.created_at.isoformat()}"
    return hashlib.sha256(known.encode()).hexdigest()[:_DIGITS]


def scope_of(run: Run, repository: Repository) -> Scope:
    """Return what a run of a repository may read and write."""
    outside = not run.trusted
    default = _branch(repository.default_branch)
    if run.event != "pull_request" and run.pr is None and not outside:
        readable = [run.ref, default]
    else:
        base = [] if run.base_branch is None else [_branch(run.base_branch)]
        number = f"pull request {run.pr}" if run.pr is not None else f"run {run.id}"
        readable = [f"{number} (fork)" if outside else number, *base, default]
    if run.forked_from is not None:  # what it leaves is of files and code that no commit has
        readable.insert(0, f"what-if {run.id}")
    return Scope(run.repo, tenant_of(repository), tuple(dict.fromkeys(readable)), outside)


def _branch(name: str) -> str:
    return f"refs/heads/{name}"
