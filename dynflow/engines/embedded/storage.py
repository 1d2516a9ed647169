"""The engine's file while it is open."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TypeVar

from dynflow.engines.embedded.database import Synchronous
from dynflow.engines.embedded.writer import CLOSED, Job, Operation, Told, Writer
from dynflow.errors import EngineClosedError

T = TypeVar("T")


class Storage:
    """Opens and closes the file, and takes operations in between."""

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
        loop = asyncio.get_running_loop()
        opening = asyncio.ensure_future(asyncio.to_thread(Writer, self._path, self._synchronous, loop))
        try:
            self._writer = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread goes on: the file must not stay open and locked
            await (await opening).close()
            raise

    def submit(self, operation: Operation[T], told: Told[T] | None = None) -> asyncio.Future[T]:
        """Run an operation in a transaction; done when durable. Raises EngineClosedError, StorageError.

        `told` is called with the result or the error before that, whatever becomes of whoever awaits it.
        """
        if self._writer is None:
            raise EngineClosedError(CLOSED)
        return self._writer.submit(operation, told)

    def put(self, job: Job) -> None:
        """Have a job done; every error, too, comes to its `tell`."""
        if self._writer is None:
            job.error = EngineClosedError(CLOSED)
            job.tell()
        else:
            self._writer.put(job)

    def refuse(self) -> Writer | None:
        """Take no more operations; returns the writer, to be closed."""
        writer, self._writer = self._writer, None
        return writer
