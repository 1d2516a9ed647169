"""The engine's SQLite file: locked, checked, made or brought to today's schema. Everything here blocks.

`schema.sql` is the schema as it is now. `migrations/NNNN_what.sql` leads from version NNNN - 1 to NNNN; a change of
the schema changes `schema.sql`, adds a migration, and counts SCHEMA_VERSION up. A released migration stays as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from dynflow.engines.embedded import integrity
from dynflow.engines.embedded.connection import Connection
from dynflow.engines.embedded.integrity import LateCheck, damage_of, open_read_only
from dynflow.errors import StorageError

Synchronous = Literal["FULL", "NORMAL"]

# "dynf" as a number: tells our files from other SQLite files.
APPLICATION_ID = 0x64796E66
SCHEMA_VERSION = 3

_HERE = resources.files("dynflow.engines.embedded")


class Database:
    """The file while this process has it. `connection` is the only one for writing.

    A file of an older release is migrated, in one transaction. Raises StorageError where the file cannot be used,
    or another process has it; then the file is as it was. `migrations` is for tests: a folder of other ones.
    """

    connection: Connection

    def __init__(self, path: Path, synchronous: Synchronous, migrations: Traversable | None = None) -> None:
        self.path = path
        self._lock = _lock(path)
        try:
            self.connection = _open(path, synchronous, migrations or _HERE / "migrations")
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._late_check = None if is_checked_at_once(path) else LateCheck(path)
        except BaseException:
            self.connection.close()
            os.close(self._lock)
            raise

    def check(self) -> None:
        """Raise StorageError once a check of a large file has found damage: nothing is to be built upon it."""
        if self._late_check is not None and self._late_check.damage is not None:
            raise damaged(self.path, self._late_check.damage)

    def close(self) -> None:
        """Close the file, and let others have it."""
        if self._late_check is not None:
            self._late_check.close()
        self.connection.close()
        os.close(self._lock)


# What to do about what SQLite says, by its primary result codes.
_REMEDIES = {
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore it from a backup",
    sqlite3.SQLITE_NOTADB: "the file is damaged, or not a database: restore it from a backup",
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_READONLY: "make the file, its folder and their disk writable",
    sqlite3.SQLITE_CANTOPEN: "make the file and its folder writable",
    sqlite3.SQLITE_PERM: "make the file and its folder writable",
    sqlite3.SQLITE_IOERR: "look whether its disk is full, read-only or failing",
    sqlite3.SQLITE_BUSY: "another program holds it locked: end that",
}


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


def trouble(path: Path, error: sqlite3.Error | OSError) -> StorageError:
    """Return what says which file is in trouble, why, and what to do."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says where in SQLite it came up
    remedy = _REMEDIES.get(code)
    return StorageError(f"{path} cannot be used: {error}" + (f"; {remedy}" if remedy else ""))


def migrations_of(folder: Traversable) -> dict[int, str]:
    """Return a folder's migrations in order: the version that each leads to, and its SQL."""
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name
    )
    return {int(file.name[:4]): file.read_text("utf-8") for file in files}


def _lock(path: Path) -> int:
    """Take the lock beside the file: one engine process per file."""
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _cannot_open(Path(f"{path}.lock"), error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StorageError(f"{path} is in use by another process: one engine at a time can have it") from None
    return descriptor


def _open(path: Path, synchronous: Synchronous, migrations: Traversable) -> Connection:
    _make_private(path)
    try:
        version = _check(path)
        db = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, cached_statements=512, factory=Connection
        )
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {synchronous}")
            # 24 MiB of pages: more makes nothing faster at a million instances, and is memory of an idle engine.
            db.execute("PRAGMA cache_size = -24576")
            if version == 0:
                _create(db)
            elif version < SCHEMA_VERSION:
                _migrate(db, version, migrations_of(migrations))
            db.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise trouble(path, error) from None
    return db


def _cannot_open(path: Path, error: OSError) -> StorageError:
    remedy = "make room on its disk" if error.errno in _NO_ROOM else f"is {path.parent} there and writable?"
    return StorageError(f"cannot open {path}: {error.strerror}; {remedy}")


def _make_private(path: Path) -> None:
    """Make the file before SQLite does, for its owner alone; what SQLite puts beside it takes over the mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise _cannot_open(path, error) from None


def _check(path: Path) -> int:
    """Return the version of a whole file of ours, 0 for an empty one; refuse another without a change to it."""
    # A connection that could write would move the log into the file when it closes. What an interrupted
    # transaction without a log left can only be read once it is taken back.
    mode = "rw" if Path(f"{path}-journal").exists() else "ro"
    with closing(open_read_only(path, mode)) as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if application not in (APPLICATION_ID, 0) or (tables and application != APPLICATION_ID):
            raise StorageError(
                f"{path} is a SQLite file of another program: give the engine a file of its own"
            )
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"{path} was written by a newer release (schema {version}, this release knows {SCHEMA_VERSION}): "
                "upgrade dynflow, or restore a backup from before; the file was not changed"
            )
        if is_checked_at_once(path) or version < SCHEMA_VERSION:
            damage = damage_of(db)
            if damage is not None:
                raise damaged(path, damage, "; the file was not changed")
    return version


def is_checked_at_once(path: Path) -> bool:
    """Whether the file is small enough to be checked before anything else."""
    return path.stat().st_size <= integrity.CHECKED_AT_ONCE


def damaged(path: Path, damage: str, then: str = "") -> StorageError:
    """Return what says that a file is damaged."""
    return StorageError(f"{path} is damaged ({damage}): restore it from a backup{then}")


def _create(db: sqlite3.Connection) -> None:
    schema = (_HERE / "schema.sql").read_text("utf-8")
    db.executescript(
        f"BEGIN IMMEDIATE;\n{schema}\n"
        f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {SCHEMA_VERSION};\nCOMMIT;"
    )


def _migrate(db: sqlite3.Connection, version: int, migrations: Mapping[int, str]) -> None:
    """Bring a file to today's schema in one transaction: one that is cut off has not happened."""
    # A table that is made anew is dropped first: nothing may be deleted along with it. Foreign keys cannot be
    # switched off inside a transaction.
    db.execute("PRAGMA foreign_keys = OFF")
    steps = "\n".join(migrations[number] for number in range(version + 1, SCHEMA_VERSION + 1))
    try:
        db.executescript(f"BEGIN IMMEDIATE;\n{steps}\nPRAGMA user_version = {SCHEMA_VERSION};")
        broken = db.execute("PRAGMA foreign_key_check").fetchone()
        if broken is not None:
            raise sqlite3.IntegrityError(f"a row of {broken[0]} belongs to nothing in {broken[2]}")
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log is as large as what was rewritten
