"""From a commit in git to its files on disk: a whole tree, or a layer on top of a tree that is there."""

from __future__ import annotations

from pathlib import Path

import pygit2

from ci_platform import commit_trees
from ci_platform.errors import FailedError
from ci_platform.source import objects
from ci_platform.source.objects import Objects
from ci_platform.trees import TreeStore, TreeWriter

_DELTA_LIMIT = 1000
"""Paths above which a new base costs less than a delta (measured: 1,000 paths take about 250 ms)."""

_BASES_TRIED = 3


def materialise(trees: TreeStore, repo: str, sha: str, opened: pygit2.Repository) -> tuple[Path, ...]:
    """Return the commit's files: layers, topmost first, the last one a whole tree."""
    oid = objects.commit(opened, repo, sha).tree_id
    base = trees.find(repo, f"base-{oid}")
    if base is not None:
        return (base.path,)
    found = Objects(opened)
    return _delta(trees, repo, oid, found) or (_base(trees, repo, oid, found),)


def _base(trees: TreeStore, repo: str, oid: pygit2.Oid, found: Objects) -> Path:
    def fill(writer: TreeWriter) -> None:
        commit_trees.write_tree(found, oid.raw, writer)

    return trees.build(repo, f"base-{oid}", fill).path


def _delta(trees: TreeStore, repo: str, oid: pygit2.Oid, found: Objects) -> tuple[Path, ...]:
    bases = trees.bases(repo)[:_BASES_TRIED]
    for base in bases:
        if delta := trees.find(repo, f"delta-{base.key.removeprefix('base-')}-{oid}"):
            return delta.path, base.path
    for base in bases:
        old = base.key.removeprefix("base-")

        def fill(writer: TreeWriter, old: str = old) -> None:
            commit_trees.write_delta(found, bytes.fromhex(old), oid.raw, writer, limit=_DELTA_LIMIT)

        try:
            delta = trees.build(repo, f"delta-{old}-{oid}", fill, base=base.key)
        except (commit_trees.TooDifferentError, FailedError):
            # Not every base's objects need still be here; whether the commit is at fault, a base will tell.
            continue
        trees.find(repo, base.key)
        return delta.path, base.path
    return ()
