"""Copies of SQLite files while they are written, and back. These functions block: call them from a thread.

A copy is one consistent moment of its source. It is checked before it gets its name, so that a file under that
name is whole.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from dynflow.engines.embedded.database import APPLICATION_ID, SCHEMA_VERSION
from dynflow.errors import StorageError

# What SQLite puts beside a file. One that is left of another file would be taken for a part of the new one.
_BESIDE = ("", "-wal", "-shm", "-journal")


def back_up(source: Path, target: Path) -> None:
    """Copy an engine's file to `target`, which must not exist. The engine may be running meanwhile.

    Raises StorageError where `source` is not an engine's file, or damaged, or `target` cannot be written; then
    there is no `target`.
    """
    _copy_checked(source, target, _check_engine)


def restore(backup: Path, target: Path) -> None:
    """Copy a backup of an engine's file to `target`, which must not exist. Raises StorageError as `back_up` does."""
    _copy_checked(backup, target, _check_engine)


def copy_database(source: Path, target: Path) -> None:
    """Copy any SQLite file, one that a program is writing too, to `target`, which must not exist.

    Raises StorageError as `back_up` does.
    """
    _copy_checked(source, target, _check_any)


def _copy_checked(source: Path, target: Path, check: Callable[[sqlite3.Connection], str | None]) -> None:
    for name in _BESIDE:
        if os.path.lexists(f"{target}{name}"):
            raise StorageError(f"{target}{name} exists: move it away first, nothing is overwritten")
    if not source.is_file():
        raise StorageError(f"there is no file {source}")
    partial = Path(f"{target}.partial")
    try:
        # For its owner alone: it holds what tenants stored.
        os.close(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        )
        problem = _copy(source, partial, check)
        if problem is not None:
            raise StorageError(f"{source} {problem}")
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"{source} could not be copied to {target}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _copy(source: Path, target: Path, check: Callable[[sqlite3.Connection], str | None]) -> str | None:
    with (
        contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as reading,
        contextlib.closing(sqlite3.connect(target)) as writing,
    ):
        # All pages in one step: in several, each write to the source would start the copy again from its first page.
        reading.backup(writing, pages=-1)
        writing.execute("PRAGMA journal_mode = DELETE")  # a file by itself, nothing beside it
        return check(writing)


def _check_any(db: sqlite3.Connection) -> str | None:
    problem = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    return None if problem == "ok" else f"is damaged: {problem}"


def _check_engine(db: sqlite3.Connection) -> str | None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        return "is not the file of an engine"
    if version > SCHEMA_VERSION:
        return (
            f"was written by a newer release (schema {version}, this release knows {SCHEMA_VERSION}): "
            "use that one's dynflow"
        )
    return _check_any(db)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
