"""The least that a durable three-step run can cost here: SQLite, a writer's thread, group commit, and nothing else.

What the engine's contract adds (attempts that are durable before they run, history, leases, limits, fairness,
retries, waits, values with types) is missing, so this is no engine. It is the measure of one: in the same minute on
the same machine, how much of this speed is left?
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_SCHEMA = """
CREATE TABLE instances (key INTEGER PRIMARY KEY, id TEXT UNIQUE, status TEXT, params TEXT, output TEXT);
CREATE TABLE steps (instance INTEGER, name TEXT, output TEXT, UNIQUE (instance, name));
"""
_MOST = 512

_Operation = tuple[str, tuple[Any, ...]]
_Item = tuple[_Operation, asyncio.Future[int]]


class BareJournal:
    """A file with instances and the outputs of their steps. A call returns when its commit has reached the disk."""

    def __init__(self, path: Path, synchronous: str) -> None:
        self._path, self._synchronous = path, synchronous
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    async def create(self, status: str = "queued") -> int:
        """Store an instance with a random id; returns its key."""
        sql = "INSERT INTO instances (id, status, params) VALUES (?, ?, ?)"
        return await self._submit(sql, str(uuid.uuid4()), status, "{}")

    async def run(self) -> Any:
        """Create an instance and run three steps in it; each is one commit, and so is the end."""
        key = await self.create("running")
        first = await self._step(key, "one", lambda: 1)
        second = await self._step(key, "two", lambda: first + 1)
        third = await self._step(key, "three", lambda: second + 1)
        await self._submit(
            "UPDATE instances SET status = 'complete', output = ? WHERE key = ?", json.dumps(third), key
        )
        return third

    async def _step(self, key: int, name: str, callback: Callable[[], Any]) -> Any:
        result = callback()
        await self._submit("INSERT INTO steps VALUES (?, ?, ?)", key, name, json.dumps(result))
        return result

    def _submit(self, sql: str, *values: Any) -> asyncio.Future[int]:
        future: asyncio.Future[int] = self._loop.create_future()
        self._queue.put(((sql, values), future))
        return future

    def _write(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        db.executescript(_SCHEMA)
        open_ = True
        while open_:
            group, open_ = self._group()
            db.execute("BEGIN IMMEDIATE")
            done = [(future, db.execute(*operation).lastrowid or 0) for operation, future in group]
            db.execute("COMMIT")
            self._loop.call_soon_threadsafe(_resolve, done)
        db.close()

    def _group(self) -> tuple[list[_Item], bool]:
        group: list[_Item] = []
        item = self._queue.get()
        while item is not None:
            group.append(item)
            if len(group) == _MOST or self._queue.empty():
                return group, True
            item = self._queue.get()
        return group, False


def _resolve(done: list[tuple[asyncio.Future[int], int]]) -> None:
    for future, key in done:
        future.set_result(key)
