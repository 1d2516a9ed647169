"""The connection that operations get, and what they keep in memory beside the file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from dynflow.engines.embedded.fair_queue import FairQueue
from dynflow.engines.embedded.leases import Leases


def blob(data: bytes) -> bytearray:
    """Return `data` as a parameter that is quick to bind.

    Of parameters, sqlite3 takes numbers, text and bytearrays as they are. Whatever else there is, None and bytes
    too, it looks up among its adapters first, which takes longer than storing it: statements that run often are
    given none of these.
    """
    return bytearray(data)


class Connection(sqlite3.Connection):
    """The engine's file inside a transaction. All of it is for the writer's thread alone."""

    write: Callable[[str, tuple[Any, ...]], sqlite3.Cursor]
    """Runs a statement that returns no rows, on one cursor for all; `execute` makes one at each call."""
    queue: FairQueue
    leases: Leases
    last_key: int
    """The key of the newest instance. Keys are not reused while a process lives, nor ever in its rows."""

    def remember(self) -> None:
        """Read what is kept in memory; once, before the first operation."""
        self.write = self.cursor().execute
        self.queue, self.leases = FairQueue(self), Leases()
        self.last_key = self.execute("SELECT ifnull(max(key), 0) FROM instances").fetchone()[0]

    def begin(self) -> None:
        """Start a transaction."""
        self.execute("BEGIN IMMEDIATE")
        if self.queue.is_stale:
            self.queue = FairQueue(self)

    def changes(self) -> int:
        """Return what is another number once an operation has changed something, in the file or in memory."""
        return self.total_changes + len(self.leases.undo)

    def end(self) -> None:
        """Commit; what is in memory stays."""
        self.execute("COMMIT")
        self.leases.committed()

    def undo(self) -> None:
        """Roll back, in the file and in memory."""
        if self.in_transaction:
            self.execute("ROLLBACK")
        self.leases.rolled_back()
        self.queue.is_stale = True
