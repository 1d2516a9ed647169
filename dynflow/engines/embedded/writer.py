"""One SQLite file: opened, checked, and written by one thread that commits in groups.

Everything that callers submit while a commit is under way goes into the next transaction. With
`synchronous=FULL` a future is resolved only when its transaction has reached the disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from dynflow.errors import EngineClosedError, StorageError

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]
Synchronous = Literal["FULL", "NORMAL"]

# "dynf" as a number: tells our files from other SQLite files.
APPLICATION_ID = 0x64796E66
SCHEMA_VERSION = 1
# A transaction larger than this gains no throughput and delays the callers at its head.
_LARGEST_GROUP = 512

_Item = tuple[Operation[Any], asyncio.Future[Any]]


class Writer:
    """The file's only connection for writing. `submit` from `loop`; opening blocks."""

    def __init__(self, path: Path, synchronous: Synchronous, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock = _lock(path)
        try:
            self._db = _open(path, synchronous)
        except BaseException:
            os.close(self._lock)
            raise
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dynflow-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[T]) -> asyncio.Future[T]:
        """Run `operation(connection)` in a transaction; the future is done when that is durable.

        An operation raises before it has changed anything; what it raises is the future's. When storage fails,
        StorageError: nothing of the operation was stored.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed: use it inside `async with engine`")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put((operation, future))
        return future

    async def close(self) -> None:
        """Commit what was submitted, then close the file."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)
            self._db.close()
            os.close(self._lock)

    def _run(self) -> None:
        open_ = True
        while open_:
            group, open_ = self._next_group()
            if group:
                outcomes = self._commit(group)
                self._loop.call_soon_threadsafe(_resolve_all, outcomes)

    def _next_group(self) -> tuple[list[_Item], bool]:
        group: list[_Item] = []
        item = self._queue.get()
        while item is not None:
            group.append(item)
            if len(group) == _LARGEST_GROUP:
                return group, True
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, group: list[_Item]) -> list[tuple[asyncio.Future[Any], Any, BaseException | None]]:
        try:
            return self._transaction(group)
        except (sqlite3.Error, OSError) as error:
            if len(group) == 1:
                failure = StorageError(f"the engine's file could not be written: {error}")
                return [(group[0][1], None, failure)]
            # One at a time, so that only what cannot be stored fails.
            return [outcome for item in group for outcome in self._commit([item])]

    def _transaction(self, group: list[_Item]) -> list[tuple[asyncio.Future[Any], Any, BaseException | None]]:
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            for operation, future in group:
                try:
                    outcomes.append((future, operation(db), None))
                except (sqlite3.Error, OSError):
                    raise
                except Exception as error:  # noqa: BLE001 - handed to whoever submitted it
                    outcomes.append((future, None, error))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return outcomes


def _resolve_all(outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, result, error in outcomes:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


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
