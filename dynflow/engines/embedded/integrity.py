"""Whether the engine's file is whole.

The check reads all of it: a small file is checked before the engine starts, a large one beside it, since it would
keep a million instances waiting for seconds.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

# About a tenth of a second, where the file is in the page cache.
CHECKED_AT_ONCE = 64 * 1024 * 1024


def open_read_only(path: Path, mode: str = "ro") -> sqlite3.Connection:
    """Open a file without a way to change it. `mode` "rw": but to take an interrupted transaction back."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False)


def damage_of(db: sqlite3.Connection) -> str | None:
    """Return what is wrong with a file, None where nothing is."""
    try:
        found: str = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            return str(error)
        raise
    return None if found == "ok" else " ".join(found.split())


class LateCheck:
    """A check in a thread of its own. `damage` says what it has found so far."""

    def __init__(self, path: Path) -> None:
        self.damage: str | None = None
        self._db = open_read_only(path)
        self._thread = threading.Thread(target=self._run, name="dynflow-check", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # An error: it is interrupted, or the disk fails, which whoever reads that page next is told.
        with closing(self._db) as db, suppress(sqlite3.Error):
            self.damage = damage_of(db)

    def close(self) -> None:
        """End it, done or not."""
        with suppress(sqlite3.ProgrammingError):  # it is closed: the check is done
            self._db.interrupt()
        self._thread.join()
