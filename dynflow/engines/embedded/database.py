"""The engine's SQLite file: locked, checked, made where it is not there. Everything here blocks."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from importlib import resources
from pathlib import Path
from typing import Literal

from dynflow.errors import StorageError

Synchronous = Literal["FULL", "NORMAL"]

# "dynf" as a number: tells our files from other SQLite files.
APPLICATION_ID = 0x64796E66
SCHEMA_VERSION = 1


class Database:
    """The file while this process has it. `connection` is the only one for writing.

    Raises StorageError where the file cannot be used, or another process has it; then the file is as it was.
    """

    connection: sqlite3.Connection

    def __init__(self, path: Path, synchronous: Synchronous) -> None:
        self._lock = _lock(path)
        try:
            self.connection = _open(path, synchronous)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Close the file, and let others have it."""
        self.connection.close()
        os.close(self._lock)


def _lock(path: Path) -> int:
    """Take the lock beside the file: one engine process per file."""
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            f"cannot open {path}.lock: {error.strerror}; is {path.parent} there and writable?"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StorageError(f"{path} is in use by another process: one engine at a time can have it") from None
    return descriptor


def _open(path: Path, synchronous: Synchronous) -> sqlite3.Connection:
    _make_private(path)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
    try:
        _check(db, path)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA cache_size = -65536")  # 64 MiB of pages
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            _create(db)
    except sqlite3.DatabaseError as error:
        db.close()
        raise StorageError(f"{path} cannot be used: {error}; restore it from a backup") from None
    except BaseException:
        db.close()
        raise
    return db


def _make_private(path: Path) -> None:
    """Make the file before SQLite does, for its owner alone; what SQLite puts beside it takes over the mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from None


def _check(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application not in (APPLICATION_ID, 0) or (tables and application != APPLICATION_ID):
        raise StorageError(f"{path} is a SQLite file of another program: give the engine a file of its own")
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"{path} was written by a newer release (schema {version}, this release knows {SCHEMA_VERSION}): "
            "upgrade dynflow, or restore a backup from before; the file was not changed"
        )
    problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise StorageError(
            f"{path} is damaged ({problem}): restore it from a backup; the file was not changed"
        )


def _create(db: sqlite3.Connection) -> None:
    schema = resources.files("dynflow.engines.embedded").joinpath("schema.sql").read_text()
    db.executescript(
        f"BEGIN IMMEDIATE;\n{schema}\n"
        f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {SCHEMA_VERSION};\nCOMMIT;"
    )
