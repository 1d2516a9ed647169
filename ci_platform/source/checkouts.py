"""Commits on disk: the nearest tree that is here already and a delta, or a whole tree; and a `.git` for them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pygit2

from ci_platform import commit_trees, git_commands, workspace_git
from ci_platform.cones import Cone
from ci_platform.errors import FailedError
from ci_platform.git_index import Changes, Index, Recorder, WrittenIndex
from ci_platform.git_untracked import Untracked
from ci_platform.hydration import plan
from ci_platform.hydration.plan import Threshold
from ci_platform.hydration.table import Table
from ci_platform.source import objects
from ci_platform.source.objects import Objects
from ci_platform.tree_store import StoredTree, TreeStore, stands_for
from ci_platform.trees import Owner, TreeLimits, TreeWriter
from ci_platform.workspace_git import GitFolder

_DELTA_LIMIT = 1000
"""Paths above which a new base costs less than a delta (measured: 1,000 paths take about 250 ms)."""

_MOST_DELTAS = 4
"""Deltas upon each other: each costs a mount and a look into folders a little."""

_TRIED = 6
"""Trees, last used first, of which the nearest is taken."""

_NEAR = 100
"""Paths below which looking for a nearer tree costs more than it saves."""

BEFORE = 2_000_000_000
"""Nanoseconds by which a base's files are older than its index: git looks again at files that may be younger."""


_UNTRACKED = "untracked"
"""A base's file: what its index says of untracked files, for the indexes of deltas."""

_STAND_INS_INDEX = "indexed"
"""A delta's file: its index was made from that of a stand-in, and knows no inodes of files on disk."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A commit on disk: layers, topmost first. `git` is the key of the one with its `.git`.

    `lazy` is the folder of the last one where that has no files, but is to be mounted; `tree` is its tree's id.
    `modules` is the key of the one with the files of submodules.
    """

    lowers: tuple[Path, ...]
    git: str
    lazy: Path | None = None
    tree: str = ""
    modules: str | None = None


class Checkouts:
    """What is on disk of all repositories' commits. One caller at a time for each repository; blocks.

    A tree above the `threshold` need not be on disk at first, for who takes lazy ones.
    """

    def __init__(
        self, store: TreeStore, owner: Owner, limits: TreeLimits, threshold: Threshold | None = None
    ) -> None:
        self._store, self._owner, self._limits, self._threshold = store, owner, limits, threshold

    def materialise(self, repo: str, opened: pygit2.Repository, sha: str) -> tuple[Path, ...]:
        """Return the commit's files: layers, topmost first, the last one a whole tree."""
        oid = objects.commit(opened, repo, sha).tree_id
        return tuple(tree.path for tree in self.tree(repo, opened, oid, None))

    def with_git(
        self,
        repo: str,
        opened: pygit2.Repository,
        folder: GitFolder,
        key: str | None = None,
        *,
        lazy: bool = False,
    ) -> Checkout:
        """Return a commit's tree with a `.git`: that of an earlier checkout by its key, while it is here."""
        commit = objects.commit(opened, repo, folder.sha)
        trees = self.tree(repo, opened, commit.tree_id, folder.cone, lazy=lazy)
        git = self._store.find(repo, key) if key else None
        git = git or self._git(repo, opened, _as_indexed(folder, trees[0]), trees[0])
        lowers = (git.path, *(tree.path for tree in trees))
        if not trees[-1].is_stand_in:
            return Checkout(lowers, git.key)
        return Checkout(lowers, git.key, trees[-1].folder, _oid(trees[-1]).hex())

    def _git(self, repo: str, opened: pygit2.Repository, folder: GitFolder, top: StoredTree) -> StoredTree:
        repository = Path(opened.path)
        key = folder.key(repository)

        def fill(scratch: Path) -> int:
            tree = scratch / "tree"
            # Refs first: what is pushed meanwhile is among the objects then, and what refs lead to always is.
            refs = {} if folder.alone else objects.named_refs(opened)
            folder.write(tree, repository, top.folder / "index", refs, objects.head(opened))
            if folder.alone:
                workspace_git.pack_objects(repository, tree, self._parts(opened, repo, folder.sha))
            else:
                workspace_git.link_objects(repository, tree)
            workspace_git.hand_over(tree, self._owner)
            return sum(path.stat().st_size for path in tree.rglob("*") if path.stat().st_nlink == 1)

        return self._store.find(repo, key) or self._store.build(repo, key, fill, cheap=not folder.alone)

    def _parts(self, opened: pygit2.Repository, repo: str, sha: str) -> Iterator[bytes]:
        commit = objects.commit(opened, repo, sha)
        yield commit.id.raw
        yield from commit_trees.parts(Objects(opened), commit.tree_id.raw, self._limits.files)

    def tree(
        self, repo: str, opened: pygit2.Repository, oid: pygit2.Oid, cone: Cone | None, *, lazy: bool = False
    ) -> list[StoredTree]:
        """Return a tree's files, topmost layer first. With `lazy`, the last one may be a stand-in."""
        view = "" if cone is None else f".{cone.name}"
        if found := self._here(repo, str(oid), view, lazy=lazy):
            return self._store.use(found)
        nearest = self._nearest(repo, Objects(opened), oid, view, lazy=lazy)
        if nearest is not None:
            return self._delta(repo, Objects(opened), oid, cone, view, nearest)
        if lazy and (stand_in := self._stand_in(repo, opened, oid, cone, view)) is not None:
            return [stand_in]
        return [self._base(repo, Objects(opened), oid, cone, view)]

    def _stand_in(
        self, repo: str, opened: pygit2.Repository, oid: pygit2.Oid, cone: Cone | None, view: str
    ) -> StoredTree | None:
        """Return what can be used as the tree before it is written; None where it is soon written, or odd."""
        if self._threshold is None:
            return None
        found = plan.plan(
            Objects(opened),
            oid.raw,
            Path(opened.path),
            git_commands.environment(),
            cone=cone,
            limits=self._limits,
            threshold=self._threshold,
        )
        if found is None:
            return None

        def fill(scratch: Path) -> int:
            size = found.write(scratch, time.time_ns() - BEFORE, self._owner)
            self._give_index(scratch)
            return size

        return self._store.build(repo, f"lazy{view}-{oid}", fill, cheap=True)

    def _here(self, repo: str, oid: str, view: str, *, lazy: bool) -> list[StoredTree]:
        if found := self._store.chain(repo, f"base{view}-{oid}", stand_ins=lazy):
            return found
        for key in self._store.keys(repo):
            if (
                key.startswith(f"delta{view}-")
                and key.endswith(f"-{oid}")
                and (found := self._store.chain(repo, key, stand_ins=lazy))
            ):
                return found
        return []

    def _nearest(
        self, repo: str, found: Objects, oid: pygit2.Oid, view: str, *, lazy: bool
    ) -> list[StoredTree] | None:
        """Return the tree from which the fewest paths change, with those below it."""
        best, limit, tried = list[StoredTree](), _DELTA_LIMIT, 0
        for key in self._store.keys(repo):
            if not key.startswith((f"base{view}-", f"delta{view}-", f"lazy{view}-")):
                continue
            if not (chain := self._store.chain(repo, stands_for(key), stand_ins=lazy)):
                continue
            paths, tried = _distance(found, chain[0], oid, limit), tried + 1
            if paths is not None:
                best, limit = chain, paths - 1
            if tried == _TRIED or limit < _NEAR:
                break
        if len(best) > _MOST_DELTAS:
            # One delta for all of them, on which the next ones stand; or a whole tree, where it is too large.
            best = best[-1:] if _distance(found, best[-1], oid, _DELTA_LIMIT) is not None else []
        return self._store.use(best) or None

    def _base(self, repo: str, found: Objects, oid: pygit2.Oid, cone: Cone | None, view: str) -> StoredTree:
        def fill(scratch: Path) -> int:
            recorder, tree = Recorder(oid.raw), scratch / "tree"
            stand_in = self._store.stand_in(repo, f"base{view}-{oid}")
            modified_at = time.time_ns() - BEFORE if stand_in is None else _modified_at(stand_in)
            with TreeWriter(tree, self._owner, self._limits, recorder, cone, modified_at) as writer:
                commit_trees.write_tree(found, oid.raw, writer)
            index, offsets = recorder.finish()
            (scratch / "offsets").write_bytes(offsets.tobytes())
            if (untracked := recorder.untracked()) is not None:
                (scratch / _UNTRACKED).write_bytes(untracked.as_bytes())
                index = replace(index, untracked=untracked.encoded())
            return writer.size + self._write_index(index, scratch)

        return self._store.build(repo, f"base{view}-{oid}", fill)

    def _delta(
        self,
        repo: str,
        found: Objects,
        oid: pygit2.Oid,
        cone: Cone | None,
        view: str,
        below: list[StoredTree],
    ) -> list[StoredTree]:
        old, base = _oid(below[0]), below[-1]

        def fill(scratch: Path) -> int:
            changes = Changes()
            with TreeWriter(scratch / "tree", self._owner, self._limits, changes, cone) as writer:
                commit_trees.write_delta(found, old, oid.raw, writer)
            if len(below) > 1:
                changes = changes.after(_changes(below[0]))
            (scratch / "changes.json").write_text(json.dumps(changes.as_json()), encoding="ascii")
            if base.is_stand_in:
                (scratch / _STAND_INS_INDEX).write_text(_index_name(base), encoding="ascii")
            index = _written_index(base)
            return writer.size + self._write_index(index.changed(changes), scratch)

        key = f"delta{view}-{old.hex()}-{oid}"
        return [self._store.build(repo, key, fill, base=below[0].stands_for), *below]

    def _write_index(self, index: Index, scratch: Path) -> int:
        size = index.write(scratch / "index")
        self._give_index(scratch)
        return size

    def _give_index(self, scratch: Path) -> None:
        if os.geteuid() == 0:
            os.chown(scratch / "index", self._owner.uid, self._owner.gid)
        (scratch / "index").chmod(0o644)


def _distance(found: Objects, tree: StoredTree, oid: pygit2.Oid, limit: int) -> int | None:
    try:
        return commit_trees.distance(found, _oid(tree), oid.raw, limit=limit)
    except (commit_trees.TooDifferentError, FailedError):
        # Not every tree's objects need still be here; whether the commit is at fault, a base will tell.
        return None


def _as_indexed(folder: GitFolder, top: StoredTree) -> GitFolder:
    """Return what is to be the `.git` of a tree: where its index knows no inodes, git is told to mind none."""
    if top.is_stand_in:
        return replace(folder, copied=True, index=_index_name(top))
    try:
        return replace(folder, copied=True, index=(top.folder / _STAND_INS_INDEX).read_text(encoding="ascii"))
    except FileNotFoundError:
        return folder


def _modified_at(stand_in: StoredTree) -> int:
    return Table(stand_in.folder / plan.TABLE).modified_at


def _index_name(stand_in: StoredTree) -> str:
    return f".{_modified_at(stand_in):x}"


def _written_index(base: StoredTree) -> WrittenIndex:
    untracked = None
    with suppress(FileNotFoundError):  # a stand-in, a sparse tree, one of an earlier version
        untracked = Untracked.from_bytes((base.folder / _UNTRACKED).read_bytes())
    content, offsets = (base.folder / "index").read_bytes(), (base.folder / "offsets").read_bytes()
    return WrittenIndex(content, offsets, untracked)


def _oid(tree: StoredTree) -> bytes:
    return bytes.fromhex(tree.key.rpartition("-")[2])


def _changes(tree: StoredTree) -> Changes:
    """Return all that differs from the whole tree at the bottom."""
    return Changes.from_json(**json.loads((tree.folder / "changes.json").read_bytes()))
