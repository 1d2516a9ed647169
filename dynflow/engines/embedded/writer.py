"""The thread that writes the engine's file, and commits in groups.

What callers submit while a commit is under way goes into the next transactions. With `synchronous=FULL` a future is
resolved only when its transaction has reached the disk.

Python runs in one thread at a time, but a flush needs none of it. So the callers of one group are told when the next
group only has to be flushed: they go on while the disk works, and there are two groups where there are many callers.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from dynflow.engines.embedded.connection import Connection
from dynflow.engines.embedded.database import Database, Synchronous, trouble
from dynflow.errors import EngineClosedError, StorageError

CLOSED = "the engine is closed: use it inside `async with engine`"

T = TypeVar("T")
Operation = Callable[[Connection], T]

# Of more than this, one group takes a half at most: to go on with so many takes their callers as long as a flush.
_ENOUGH = 64

Told = Callable[[T | None, BaseException | None], None]
"""What is called on the loop with an operation's result or its error, whatever becomes of whoever awaits it."""


class Job(ABC):
    """Something to be done in a transaction: `run` in the writer's thread, then `tell` on the loop.

    One object for all that is kept of it on its way: there are as many of them as callers, and Python's collector
    looks at each. `result` is there where `error` is None.
    """

    __slots__ = ("error", "result")

    result: Any
    error: BaseException | None

    @abstractmethod
    def run(self, db: Connection) -> Any:
        """Do it, once again where the transaction was rolled back; returns the result."""

    @abstractmethod
    def tell(self) -> None:
        """Say how it ended, once that is durable."""


class _Submitted(Job, Generic[T]):
    __slots__ = ("_future", "_operation", "_told")

    def __init__(self, operation: Operation[T], future: asyncio.Future[T], told: Told[T] | None) -> None:
        self._operation, self._future, self._told = operation, future, told
        self.error = None

    def run(self, db: Connection) -> T:
        return self._operation(db)

    def tell(self) -> None:
        future, error = self._future, self.error
        result: Any = self.result if error is None else None
        if future.done():  # whoever awaited it was cancelled
            pass
        elif error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        if self._told is not None:
            self._told(result, error)


class Writer:
    """The file's only connection for writing. `submit` from `loop`; opening blocks."""

    def __init__(self, path: Path, synchronous: Synchronous, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._database = Database(path, synchronous)
        self._db = self._database.connection
        try:
            self._db.remember()
        except sqlite3.Error as error:
            self._database.close()
            raise trouble(path, error) from None
        self._closed = False
        self._durable: list[Job] = []  # the last group, not told yet
        self._thread = threading.Thread(target=self._run, name="dynflow-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[T], told: Told[T] | None = None) -> asyncio.Future[T]:
        """Run `operation(connection)` in a transaction; the future is done when that is durable.

        An operation raises before it has changed anything; what it raises is the future's. When storage fails,
        StorageError: nothing of the operation was stored. `told` is called before whoever awaits the future goes on.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self.put(_Submitted(operation, future, told))
        return future

    def put(self, job: Job) -> None:
        """Have a job done as `submit` does. Raises EngineClosedError."""
        if self._closed:
            raise EngineClosedError(CLOSED)
        self._queue.put(job)

    async def close(self) -> None:
        """Commit what was submitted, then close the file."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            await asyncio.to_thread(self._end)

    def _end(self) -> None:
        self._thread.join()
        self._database.close()

    def _run(self) -> None:
        open_ = True
        while open_:
            group, open_ = self._next_group()
            if group:
                self._commit(group)
                self._tell()
                self._durable = group
        self._tell()

    def _tell(self) -> None:
        """Tell the last group."""
        if self._durable:
            self._loop.call_soon_threadsafe(_tell_all, self._durable)
            self._durable = []

    def _next_group(self) -> tuple[list[Job], bool]:
        if self._queue.empty():
            self._tell()  # nobody is left to wait for
        group: list[Job] = []
        job = self._queue.get()
        most = max(_ENOUGH, (self._queue.qsize() + 1) // 2)
        while job is not None:
            group.append(job)
            if len(group) == most:
                return group, True
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, group: list[Job]) -> None:
        try:
            self._database.check()
            self._transaction(group)
        except StorageError as damage:
            for job in group:
                job.error = damage
        except (sqlite3.Error, OSError, _CutOffError) as error:
            if len(group) == 1:
                group[0].error = (
                    error.reason if isinstance(error, _CutOffError) else trouble(self._database.path, error)
                )
                return
            for job in group:  # one at a time, so that only what cannot be stored fails
                self._commit([job])

    def _transaction(self, group: list[Job]) -> None:
        db = self._db
        db.begin()
        try:
            for job in group:
                before, job.error = db.changes(), None
                try:
                    job.result = job.run(db)
                except (sqlite3.Error, OSError):
                    raise
                except Exception as error:
                    if db.changes() != before:  # half of it must not be stored
                        raise _CutOffError(error) from error
                    job.error = error
            self._tell()
            db.end()
        except BaseException:
            db.undo()
            raise


class _CutOffError(Exception):
    """An operation raised after it had changed something."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _tell_all(jobs: Iterable[Job]) -> None:
    left = iter(jobs)
    try:
        for job in left:
            job.tell()
    finally:
        rest = list(left)
        if rest:  # `tell` raised, which the loop will hear of
            asyncio.get_running_loop().call_soon(_tell_all, rest)
