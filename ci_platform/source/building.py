"""The program that writes one tree to disk: a `Checkouts` in a process of its own, for `hydration.builders`."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from pathlib import Path

import pygit2

from ci_platform.cones import Cone
from ci_platform.errors import PlatformError
from ci_platform.source import objects
from ci_platform.source.checkouts import Checkouts
from ci_platform.tree_store import TreeStore, join_builders
from ci_platform.trees import Owner, TreeLimits


def main() -> None:
    """Take the order, a line on stdin; end when it is carried out, or with who gave it."""
    # Before anything is known to be wanted: a platform that starts waits for those that an earlier one has left.
    joined = join_builders(Path(sys.argv[2]))
    order = json.loads(sys.stdin.readline())
    if has_ended(sys.stdin.fileno()):
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    objects.isolate_libgit2()
    owner, limits = Owner(*order["owner"]), TreeLimits(*order["limits"])
    checkouts = Checkouts(TreeStore(Path(order["root"]), owner), owner, limits)
    cone = None if order["cone"] is None else Cone(tuple(order["cone"]))
    try:
        opened = pygit2.Repository(order["repository"], pygit2.enums.RepositoryOpenFlag.NO_SEARCH)
        checkouts.tree(order["repo"], opened, pygit2.Oid(hex=order["tree"]), cone)
    except (PlatformError, pygit2.GitError):
        # Who needs the tree on disk finds out for itself, and says so.
        sys.exit(1)
    finally:
        os.close(joined)


def has_ended(pipe: int) -> bool:
    """Whether nobody is left who could write to a pipe."""
    waiting = select.poll()
    waiting.register(pipe, 0)
    return bool(waiting.poll(0))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)
