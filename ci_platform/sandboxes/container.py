"""Commands as Docker containers: any image, at the price of some 300 ms for each. The door to the docker library.

stdout and stderr pass through the engine apart, so lines of the two may change places in the log.

Of the 300 ms `docker create` takes 10 and the start the rest; a container kept warm would take a command by
`exec` in 55 ms, but two commands in one container see each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig
from docker.utils.socket import frames_iter

from ci_platform.errors import FailedError, UnavailableError
from ci_platform.sandboxes import (
    SANDBOX_UID,
    Output,
    Sandbox,
    SandboxJob,
    SandboxOutcome,
    StopReason,
    cgroups,
    merged,
)

T = TypeVar("T")

_JOB, _PLATFORM = "dynflow.job", "dynflow.platform"
_WORKSPACE, _HOME = "/workspace", "/home/ci"
_SOCKET = "unix:///var/run/docker.sock"
_CALLS = 16
"""Calls to the engine at a time: it serialises most of its work anyway."""


class ContainerSandbox(Sandbox):
    """Runs each command in a fresh container without privileges, over the job's tree.

    `image` is taken where a job names none; `pull` allows fetching images that are not there. `network` is the
    engine's network of jobs that ask for one, None where they may not. `url` None: as the docker command finds
    the engine. `commands` bounds how many run at a time: each holds a thread for its output.
    """

    def __init__(
        self,
        *,
        image: str = "dynflow/python:latest",
        pull: bool = False,
        network: str | None = None,
        url: str | None = None,
        commands: int = 64,
    ) -> None:
        self._image, self._pull, self._network, self._url = image, pull, network, url
        self._calls = anyio.CapacityLimiter(_CALLS)
        self._streams = anyio.CapacityLimiter(commands)
        self._opened: docker.DockerClient | None = None

    async def run(self, job: SandboxJob, output: Output) -> SandboxOutcome:
        """Run one command to its end."""
        if job.network and self._network is None:
            raise FailedError(f"{job.argv[0]!r} asks for network=True, which containers have not here")
        engine = await self._engine()
        stack = contextlib.ExitStack()
        folder = await self._shielded(lambda: stack.enter_context(merged.merged(job.tree)))
        try:
            _check_cwd(folder, job.cwd)
            container = await self._create(engine, job, folder)
            try:
                return await self._run(engine, container, job, output)
            finally:
                await self._shielded(lambda: _remove(engine, container))
        finally:
            await self._shielded(stack.close)

    async def sweep(self) -> int:
        """Remove containers and mounts of platforms on this host that are dead."""
        swept = await self._shielded(merged.sweep)
        try:
            engine = await self._engine()
            # Not waited for when the platform stops: an engine may hang, and what is left is swept next time.
            return swept + await self._call(lambda: _sweep(engine), abandon=True)
        except UnavailableError:
            return swept

    async def close(self) -> None:
        """Close the connections to the engine."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await self._shielded(opened.close)

    def describe(self) -> Mapping[str, str]:
        """Return the engine that answers, or why none does; asks it, so it takes a moment."""
        try:
            with contextlib.closing(self._connect()) as engine:
                version = engine.version()
                have = {tag for image in engine.images.list() for tag in image.tags}
        except (DockerException, OSError) as error:
            return {"engine": f"none answers ({error}); scripts/docker_engine starts one"}
        return {
            "engine": f"Docker {version['Version']}",
            "walls": "namespaces, no capabilities, no new privileges, seccomp (engine's profile), read-only root",
            "user": f"uid {_user()}",
            "limits": "memory and processes, by control groups",
            "network": self._network or "none",
            "image": self._image
            + ("" if self._image in have else ", which is missing; scripts/build_images makes it"),
        }

    def _connect(self) -> docker.DockerClient:
        url = self._url or os.environ.get("DOCKER_HOST", _SOCKET)
        if url.startswith("unix://"):
            # The library leaks a socket for each failed try, and its message does not name the place.
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(url.removeprefix("unix://"))
                except OSError as error:
                    raise DockerException(f"no engine at {url}: {error.strerror}") from None
        return docker.DockerClient(self._url) if self._url else docker.from_env()

    async def _engine(self) -> docker.DockerClient:
        if self._opened is None:
            self._opened = await self._call(self._connect, abandon=True)
        return self._opened

    async def _call(self, function: Callable[[], T], *, abandon: bool = False) -> T:
        """Make a blocking call to the engine in a thread: to its end once it has begun, or with `abandon` not.

        OSError covers what the HTTP library below docker raises.
        """
        try:
            return await anyio.to_thread.run_sync(function, abandon_on_cancel=abandon, limiter=self._calls)
        except (NotFound, ImageNotFound):
            raise
        except (DockerException, OSError) as error:
            raise UnavailableError(f"container sandbox: Docker does not do its part: {error}") from error

    async def _shielded(self, function: Callable[[], T]) -> T:
        with anyio.CancelScope(shield=True):
            return await self._call(function)
        raise AssertionError("a shielded scope swallows nothing")

    async def _create(self, engine: docker.DockerClient, job: SandboxJob, folder: Path) -> str:
        image = job.image or self._image
        options = self._options(engine, job, folder)
        try:
            return await self._shielded(lambda: _create(engine, image, options))
        except ImageNotFound:
            if not self._pull:
                raise FailedError(_missing(image)) from None
        try:
            await self._call(lambda: engine.images.pull(image))
            return await self._shielded(lambda: _create(engine, image, options))
        except (NotFound, UnavailableError) as error:
            raise FailedError(f"{_missing(image)}, and it cannot be pulled: {error}") from None

    def _options(self, engine: docker.DockerClient, job: SandboxJob, folder: Path) -> dict[str, Any]:
        """Return the arguments of `create_container`, every wall among them."""
        limits = job.limits
        private = f"size={limits.memory},mode=1777,nosuid,nodev,exec"
        host = engine.api.create_host_config(
            binds=[f"{folder}:{_WORKSPACE}:rw"],
            cap_drop=["ALL"],
            # Collects orphans, lets signals end the command, and exits with 127 where there is no such program.
            init=True,
            ipc_mode="private",
            log_config=LogConfig(type=LogConfig.types.NONE),
            mem_limit=limits.memory,
            memswap_limit=limits.memory,
            network_mode=self._network if job.network else "none",
            # docker-init is one more.
            pids_limit=limits.processes + 1,
            read_only=True,
            security_opt=["no-new-privileges"],
            shm_size=limits.memory,
            tmpfs={"/tmp": private, "/var/tmp": private, _HOME: private},  # noqa: S108 - the container's own
        )
        return {
            "entrypoint": [job.argv[0]],
            "command": list(job.argv[1:]),
            "environment": {"HOME": _HOME, "USER": "ci", "LANG": "C.UTF-8", "CI": "true", "DYNFLOW": "true"}
            | dict(job.env),
            "host_config": host,
            "labels": {_JOB: job.id, _PLATFORM: cgroups.platform_name()},
            "user": _user(),
            "working_dir": str(PurePosixPath(_WORKSPACE, job.cwd)),
            "hostname": "sandbox",
        }

    async def _run(
        self, engine: docker.DockerClient, container: str, job: SandboxJob, output: Output
    ) -> SandboxOutcome:
        reader = await self._shielded(lambda: _Reader(engine, container, job.limits.output, output))
        started = time.monotonic()
        try:
            await self._call(lambda: engine.api.start(container))
            reason = await self._follow(reader, job.limits.timeout)
        finally:
            reader.stop()
            await self._shielded(lambda: _kill(engine, container))
            await self._shielded(reader.close)
        code, out_of_memory = await self._call(lambda: _state(engine, container))
        duration = timedelta(seconds=time.monotonic() - started)
        return SandboxOutcome(
            code, "memory" if out_of_memory and reason == "exited" and code else reason, duration
        )

    async def _follow(self, reader: _Reader, limit: timedelta) -> StopReason:
        with anyio.move_on_after(limit.total_seconds()):
            # The thread that is left behind ends with the container.
            whole = await anyio.to_thread.run_sync(reader.read, abandon_on_cancel=True, limiter=self._streams)
            return "exited" if whole else "output"
        return "timeout"


class _Reader:
    """Passes a container's output to the event loop, piece by piece, until a limit. Made before the start."""

    def __init__(self, engine: docker.DockerClient, container: str, limit: int, output: Output) -> None:
        self._left, self._output = limit, output
        self._stopped = False
        self._socket: Any = engine.api.attach_socket(container, {"stdout": 1, "stderr": 1, "stream": 1})
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


def _user() -> str:
    if os.geteuid() == 0:
        return f"{SANDBOX_UID}:{SANDBOX_UID}"
    return f"{os.geteuid()}:{os.getegid()}"


def _check_cwd(folder: Path, cwd: str) -> None:
    if PurePosixPath(cwd).is_absolute() or ".." in PurePosixPath(cwd).parts:
        raise FailedError(f"cwd {cwd!r} leaves the workspace")
    place = (folder / cwd).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise FailedError(f"cwd {cwd!r} leaves the workspace")
    if not place.is_dir():
        # The engine would make it, as root.
        raise FailedError(f"cwd {cwd!r}: no such directory")


def _missing(image: str) -> str:
    how = (
        f"build it with scripts/build_images {image}"
        if image.startswith("dynflow/")
        else f"docker pull {image}"
    )
    return f"the image {image!r} is not on this machine ({how})"


def _create(engine: docker.DockerClient, image: str, options: dict[str, Any]) -> str:
    made: dict[str, str] = engine.api.create_container(image, **options)
    return made["Id"]


def _kill(engine: docker.DockerClient, container: str) -> None:
    # APIError: it is not running (any more).
    with contextlib.suppress(APIError):
        engine.api.kill(container)


def _state(engine: docker.DockerClient, container: str) -> tuple[int, bool]:
    """Wait for its end; returns exit code and whether the kernel killed something in it for want of memory."""
    code = int(engine.api.wait(container)["StatusCode"])
    return code, bool(engine.api.inspect_container(container)["State"]["OOMKilled"])


def _remove(engine: docker.DockerClient, container: str) -> None:
    with contextlib.suppress(NotFound):
        engine.api.remove_container(container, force=True, v=True)


def _sweep(engine: docker.DockerClient) -> int:
    swept = 0
    for container in engine.containers.list(all=True, filters={"label": _PLATFORM}):
        if not cgroups.is_alive(container.labels[_PLATFORM]):
            _remove(engine, str(container.id))
            swept += 1
    return swept
