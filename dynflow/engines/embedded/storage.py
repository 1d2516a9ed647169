"""The engine's file while it is open: the writer's thread, and the queue that lives in it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TypeVar

from dynflow.engines.embedded.database import Synchronous
from dynflow.engines.embedded.fair_queue import FairQueue
from dynflow.engines.embedded.writer import Operation, Writer
from dynflow.errors import EngineClosedError

T = TypeVar("T")


class Storage:
    """Opens and closes the file, and takes operations in between. `queue` is for operations alone."""

    queue: FairQueue

    def __init__(self, path: Path, synchronous: Synchronous) -> None:
        self._path, self._synchronous = path, synchronous
        self._writer: Writer | None = None

    @property
    def is_open(self) -> bool:
        """Whether operations are taken."""
        return self._writer is not None

    async def open(self) -> None:
        """Open the file. Raises StorageError where it cannot be used, EngineClosedError if it is open."""
        if self._writer is not None:
            raise EngineClosedError("the engine is open already")
        writer = await asyncio.to_thread(Writer, self._path, self._synchronous, asyncio.get_running_loop())
        try:
            self.queue = await writer.submit(FairQueue)
        except BaseException:
            await writer.close()
            raise
        self._writer = writer

    def submit(self, operation: Operation[T]) -> asyncio.Future[T]:
        """Run an operation in a transaction; done when durable. Raises EngineClosedError, StorageError."""
        if self._writer is None:
            raise EngineClosedError("the engine is closed: use it inside `async with engine`")
        return self._writer.submit(operation)

    def refuse(self) -> Writer | None:
        """Take no more operations; returns the writer, to be closed."""
        writer, self._writer = self._writer, None
        return writer
