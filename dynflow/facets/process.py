"""The host's hold on a worker: start it, ask it, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import dynflow
from dynflow.errors import FacetUnavailableError
from dynflow.serialization import decode, encode

_START = (
    "import json, sys\n"
    "sys.path.append(json.loads(sys.argv[1])['path'])\n"
    "from dynflow.facets import worker\n"
    "worker.main()\n"
)
# Seconds for a worker to come up: 0.1 on an idle machine; a loaded CI host may take long.
_START_TIMEOUT = 60
_HEADER = 4


class WorkerProcess:
    """One worker. It is asked one thing at a time."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self.pid = process.pid
        self.walls: list[str] = []
        self.is_ending = False

    @staticmethod
    async def start(folder: Path, limits: dict[str, Any], also: Path | None = None) -> WorkerProcess:
        """Start one over `folder`, which may write in the folder `also`, too. Raises FacetUnavailableError."""
        ours, theirs = socket.socketpair()
        path = str(Path(vars(dynflow)["__file__"]).parents[1])
        writable = [str(each) for each in (folder, also) if each is not None]
        options = json.dumps({"folder": str(folder), "limits": limits, "path": path, "writable": writable})
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a spawn takes a millisecond
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START, options],
                env={},
                cwd="/",
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            ours.close()
            raise FacetUnavailableError(f"no process for SQL could be started: {error.strerror}") from None
        finally:
            theirs.close()
        worker = WorkerProcess(process, *await asyncio.open_connection(sock=ours))
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                worker.walls = decode(await worker._receive())["ok"]
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return its answer. Raises FacetUnavailableError where it ended; cancelled, it must be ended."""
        data = encode(request)
        try:
            self._writer.write(len(data).to_bytes(_HEADER, "big") + data)
            await self._writer.drain()
        except ConnectionError:
            raise self._ended() from None
        answer: dict[str, Any] = decode(await self._receive())
        return answer

    async def _receive(self) -> bytes:
        try:
            size = int.from_bytes(await self._reader.readexactly(_HEADER), "big")
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise self._ended() from None

    def _ended(self) -> FacetUnavailableError:
        return FacetUnavailableError("the process that performs SQL has ended by itself")

    def kill(self) -> None:
        """Kill it; whatever it was at is rolled back when the file is opened next."""
        self.is_ending = True
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._writer.close()

    async def end(self) -> None:
        """Kill it and wait for its end."""
        self.kill()
        await asyncio.to_thread(self._process.wait)
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
