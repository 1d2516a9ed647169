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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dynflow.engines.embedded.connection import Connection
from dynflow.engines.embedded.database import Database, Synchronous, trouble
from dynflow.errors import EngineClosedError, StorageError

T = TypeVar("T")
Operation = Callable[[Connection], T]

# Of more than this, one group takes a half at most: to go on with so many takes their callers as long as a flush.
_ENOUGH = 64

Told = Callable[[T | None, BaseException | None], None]
"""What is called on the loop with an operation's result or its error, whatever becomes of whoever awaits it."""

_Promise = tuple[asyncio.Future[Any] | None, Told[Any] | None]
_Item = tuple[Operation[Any], _Promise]
_Outcome = tuple[_Promise, Any, BaseException | None]


class Writer:
    """The file's only connection for writing. `submit` from `loop`; opening blocks."""

    def __init__(self, path: Path, synchronous: Synchronous, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._database = Database(path, synchronous)
        self._db = self._database.connection
        try:
            self._db.remember()
        except sqlite3.Error as error:
            self._database.close()
            raise trouble(path, error) from None
        self._closed = False
        self._durable: list[_Outcome] = []  # the last group's outcomes, not told yet
        self._thread = threading.Thread(target=self._run, name="dynflow-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[T], told: Told[T] | None = None) -> asyncio.Future[T]:
        """Run `operation(connection)` in a transaction; the future is done when that is durable.

        An operation raises before it has changed anything; what it raises is the future's. When storage fails,
        StorageError: nothing of the operation was stored. `told` is called before whoever awaits the future goes on.
        """
        if self._closed:
            raise EngineClosedError("the engine is closed: use it inside `async with engine`")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put((operation, (future, told)))
        return future

    def tell(self, operation: Operation[T], told: Told[T]) -> None:
        """Do as `submit` does, with nobody who awaits it: every error, too, comes to `told`."""
        if self._closed:
            told(None, EngineClosedError("the engine is closed: use it inside `async with engine`"))
        else:
            self._queue.put((operation, (None, told)))

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
                outcomes = self._commit(group)
                self._tell()
                self._durable = outcomes
        self._tell()

    def _tell(self) -> None:
        """Resolve the futures of the last group."""
        if self._durable:
            self._loop.call_soon_threadsafe(_resolve_all, self._durable)
            self._durable = []

    def _next_group(self) -> tuple[list[_Item], bool]:
        if self._queue.empty():
            self._tell()  # nobody is left to wait for
        group: list[_Item] = []
        item = self._queue.get()
        most = max(_ENOUGH, (self._queue.qsize() + 1) // 2)
        while item is not None:
            group.append(item)
            if len(group) == most:
                return group, True
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _commit(self, group: list[_Item]) -> list[_Outcome]:
        try:
            self._database.check()
            return self._transaction(group)
        except StorageError as damage:
            return [(promise, None, damage) for _, promise in group]
        except (sqlite3.Error, OSError, _CutOffError) as error:
            if len(group) == 1:
                reason = (
                    error.reason if isinstance(error, _CutOffError) else trouble(self._database.path, error)
                )
                return [(group[0][1], None, reason)]
            # One at a time, so that only what cannot be stored fails.
            return [outcome for item in group for outcome in self._commit([item])]

    def _transaction(self, group: list[_Item]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        db = self._db
        db.begin()
        try:
            for operation, promise in group:
                before = db.changes()
                try:
                    outcomes.append((promise, operation(db), None))
                except (sqlite3.Error, OSError):
                    raise
                except Exception as error:
                    if db.changes() != before:  # half of it must not be stored
                        raise _CutOffError(error) from error
                    outcomes.append((promise, None, error))
            self._tell()
            db.end()
        except BaseException:
            db.undo()
            raise
        return outcomes


class _CutOffError(Exception):
    """An operation raised after it had changed something."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _resolve_all(outcomes: Iterable[_Outcome]) -> None:
    left = iter(outcomes)
    try:
        for (future, told), result, error in left:
            if future is None or future.done():  # nobody awaits it, or was cancelled
                pass
            elif error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
            if told is not None:
                told(result, error)
    finally:
        rest = list(left)
        if rest:  # `told` raised, which the loop will hear of
            asyncio.get_running_loop().call_soon(_resolve_all, rest)
