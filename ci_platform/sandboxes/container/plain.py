"""A fresh container for one command: any image, at the price of some 300 ms.

Of those `docker create` takes 10 and the start the rest. stdout and stderr pass through the engine apart, so lines
of the two may change places in the log.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import docker
from docker.utils.socket import frames_iter

from ci_platform.sandboxes import Output, SandboxJob, SandboxOutcome, StopReason
from ci_platform.sandboxes.container import walls
from ci_platform.sandboxes.container.engine import Engine, kill, remove


async def run_fresh(
    engine: Engine,
    image: str,
    job: SandboxJob,
    folders: Sequence[Path],
    output: Output,
    *,
    networks: Sequence[str],
    streams: anyio.CapacityLimiter,
) -> SandboxOutcome:
    """Run one command in a container that ends with it. `streams` bounds the threads that read.

    The first of `folders` is the workspace, the others are those of the job's mounts.
    """
    program = {
        "entrypoint": [job.argv[0]],
        "command": list(job.argv[1:]),
        "environment": walls.environment(job),
        "working_dir": walls.place(job.cwd),
    }
    targets = [walls.WORKSPACE, *(walls.mount_point(mount) for mount in job.mounts)]
    binds = [f"{folder}:{target}:rw" for folder, target in zip(folders, targets, strict=True)]
    container = await engine.shielded(
        lambda client: walls.create(client, image, job, binds=binds, networks=networks, program=program)
    )
    try:
        return await _run(engine, container, job, output, streams)
    finally:
        await engine.shielded(lambda client: remove(client, container))


async def _run(
    engine: Engine, container: str, job: SandboxJob, output: Output, streams: anyio.CapacityLimiter
) -> SandboxOutcome:
    reader = await engine.shielded(lambda client: _Reader(client, container, job.limits.output, output))
    started = time.monotonic()
    try:
        await engine.call(lambda client: client.api.start(container))
        reason = await _follow(reader, job.limits.timeout, streams)
    finally:
        reader.stop()
        await engine.shielded(lambda client: kill(client, container))
        await engine.finish(reader.close)
    code, out_of_memory = await engine.call(lambda client: _state(client, container))
    duration = timedelta(seconds=time.monotonic() - started)
    return SandboxOutcome(
        code, "memory" if out_of_memory and reason == "exited" and code else reason, duration
    )


async def _follow(reader: _Reader, limit: timedelta, streams: anyio.CapacityLimiter) -> StopReason:
    with anyio.move_on_after(limit.total_seconds()):
        # The thread that is left behind ends with the container.
        whole = await anyio.to_thread.run_sync(reader.read, abandon_on_cancel=True, limiter=streams)
        return "exited" if whole else "output"
    return "timeout"


class _Reader:
    """Passes a container's output to the event loop, piece by piece, until a limit. Made before the start."""

    def __init__(self, client: docker.DockerClient, container: str, limit: int, output: Output) -> None:
        self._left, self._output = limit, output
        self._stopped = False
        self._socket: Any = client.api.attach_socket(container, {"stdout": 1, "stderr": 1, "stream": 1})
        self._connection: socket.socket = self._socket._sock  # noqa: SLF001
        # Commands are silent for longer than calls to the engine may take.
        self._connection.settimeout(None)
        self._ended = threading.Event()
        self._ended.set()

    def read(self) -> bool:
        """Read to the end, in a thread of anyio's; returns False where that is over the limit."""
        self._ended.clear()
        try:
            for _, piece in frames_iter(self._socket, tty=False):  # type: ignore[no-untyped-call]
                if not anyio.from_thread.run_sync(self._take, piece):
                    return False
            return True
        finally:
            self._ended.set()

    def stop(self) -> None:
        """Pass on nothing more, and end the reading thread.

        Shut down before the container is killed: the engine waits for a reader that does not read.
        """
        self._stopped = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Wait for the reading thread, and close the connection."""
        self._ended.wait()
        # What docker returns is a file of the response's connection; it hangs the response there to keep it.
        self._socket._response.close()  # noqa: SLF001
        self._socket.close()
        self._connection.close()

    def _take(self, piece: bytes) -> bool:
        if not self._stopped and self._left > 0:
            self._output(piece[: self._left])
        self._left -= len(piece)
        return self._left >= 0


def _state(client: docker.DockerClient, container: str) -> tuple[int, bool]:
    """Wait for its end; returns exit code and whether the kernel killed something in it for want of memory."""
    code = int(client.api.wait(container)["StatusCode"])
    return code, bool(client.api.inspect_container(container)["State"]["OOMKilled"])
