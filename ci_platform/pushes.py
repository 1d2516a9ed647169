"""Pushes to our own git server: into deliveries, each exactly once, also those that a crash cut short.

What was last heard of each ref is stored in the transaction that stores the delivery. A push that reached the
repository before a crash and not this table is found at start, by comparing the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ci_platform.deliveries import Accepted, Deliveries
from ci_platform.errors import NotFoundError
from ci_platform.forges import Change, Delivery
from ci_platform.forges.payloads import short_name
from ci_platform.model import RefState, Repository
from ci_platform.store import Store, Transaction, col

_FORGE = "local"
_ZERO = frozenset({"0" * 40, "0" * 64})


@dataclass(frozen=True, slots=True)
class RefUpdate:
    """A ref that moved. `before` is None where it is new, `after` None where it is gone."""

    ref: str
    before: str | None
    after: str | None


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[RefUpdate]:
    """Return what differs between two snapshots of refs, by name."""
    names = sorted(before.keys() | after.keys())
    updates = [RefUpdate(name, before.get(name), after.get(name)) for name in names]
    return [update for update in updates if update.before != update.after]


class Refs(Protocol):
    """The repositories of our git server."""

    async def ref_snapshot(self, repo: str) -> Mapping[str, str]:
        """Return branch and tag refs by full name, with what they point at."""


class Pushes:
    """Takes pushes in."""

    def __init__(self, store: Store, deliveries: Deliveries, refs: Refs) -> None:
        self._store, self._deliveries, self._refs = store, deliveries, refs

    async def accept(self, repo: str, updates: Iterable[RefUpdate], *, actor: str) -> list[Accepted]:
        """Store what a push changed; runs start after this returned. What is known already is left out.

        Call it when the refs have moved, before the pusher is answered.
        """
        moved = [RefUpdate(update.ref, _commit(update.before), _commit(update.after)) for update in updates]
        accepted = await self._store.write(lambda tx: self._accept(tx, repo, moved, actor))
        if accepted:
            self._deliveries.wake()
        return accepted

    async def reconcile(self, touched: Collection[str]) -> int:
        """Accept what moved in these repositories without our hearing of it; return how many refs those are.

        For the start, before new pushes are let in.
        """
        if not touched:
            return 0
        names = await self._store.read(
            lambda tx: [row.name for row in tx.all(Repository, col(Repository.forge) == _FORGE)]
        )
        return sum([await self._reconcile(name) for name in names if name in touched])

    async def _reconcile(self, repo: str) -> int:
        now = await self._refs.ref_snapshot(repo)
        rows = await self._store.read(lambda tx: tx.all(RefState, col(RefState.repo) == repo))
        moved = changes({row.ref: row.sha for row in rows if row.sha is not None}, now)
        return len(await self.accept(repo, moved, actor="")) if moved else 0

    async def adopt(self, repo: str, refs: Mapping[str, str]) -> None:
        """Take refs as they are for heard of: what they lead to now starts nothing.

        For a repository that is filled from elsewhere, before anybody can see it.
        """

        def note(tx: Transaction) -> None:
            if tx.lock(Repository, col(Repository.name) == repo) is None:
                raise NotFoundError(f"repository {repo[:200]!r} is not registered here")
            known = {row.ref for row in tx.all(RefState, col(RefState.repo) == repo)}
            for ref in known | refs.keys():
                if ref in known:
                    where = (col(RefState.repo) == repo, col(RefState.ref) == ref)
                    tx.change(RefState, {"sha": refs.get(ref), "pushes": RefState.pushes + 1}, *where)
                else:
                    tx.add(RefState(repo=repo, ref=ref, sha=refs[ref], pushes=1))

        await self._store.write(note)

    def _accept(self, tx: Transaction, repo: str, updates: Iterable[RefUpdate], actor: str) -> list[Accepted]:
        if tx.lock(Repository, col(Repository.name) == repo) is None:
            raise NotFoundError(f"repository {repo[:200]!r} is not registered here")
        accepted = []
        for update in updates:
            state = tx.get(RefState, (repo, update.ref))
            if (None if state is None else state.sha) == update.after:
                continue
            pushes = 1 if state is None else state.pushes + 1
            if state is None:
                tx.add(RefState(repo=repo, ref=update.ref, sha=update.after, pushes=pushes))
            else:
                where = (col(RefState.repo) == repo, col(RefState.ref) == update.ref)
                tx.change(RefState, {"sha": update.after, "pushes": pushes}, *where)
            accepted.append(self._deliveries.insert(tx, _delivery(repo, update, actor, pushes)))
        return accepted


def change_of_push(repo: str, update: RefUpdate, actor: str) -> Change:
    """Return what a push to our git server changed. Its title is looked up at dispatch."""
    before, after = _commit(update.before), _commit(update.after)
    return Change(
        event="push",
        action="push",
        repo=repo,
        sha=after or before or "",
        ref=update.ref,
        branch=short_name(update.ref),
        before=before,
        actor=actor,
        deleted=after is None,
    )


def _delivery(repo: str, update: RefUpdate, actor: str, pushes: int) -> Delivery:
    # The counter makes a push that goes back and forth a new delivery each time.
    identity = f"{repo}\x1f{update.ref}\x1f{update.after}\x1f{pushes}"
    return Delivery(
        forge=_FORGE,
        delivery_id=hashlib.sha256(identity.encode()).hexdigest()[:40],
        event="push",
        repo=repo,
        change=change_of_push(repo, update, actor),
        summary={"ref": update.ref, "before": update.before, "after": update.after},
    )


def _commit(sha: str | None) -> str | None:
    return None if not sha or sha in _ZERO else sha
