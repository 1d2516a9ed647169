"""Containers kept warm for the next command of the same run in the same image: `docker exec` instead of `docker run`.

A container serves one command at a time, of one run alone. What a command leaves running, or a limit or a
cancellation cuts short, takes its container with it; only one in which nothing else runs is used again, its private
folders emptied.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import docker
from docker.errors import APIError, NotFound
from docker.utils.socket import frames_iter

from ci_platform.sandboxes import Output, SandboxJob, SandboxLimits, SandboxOutcome, StopReason
from ci_platform.sandboxes.container import places, walls
from ci_platform.sandboxes.container.engine import Engine, remove
from ci_platform.sandboxes.container.places import OUTPUT, Pipe, Place

_KEEPER = ("sh", "-c", "exec sleep 2147483647")
"""What a warm container runs while it waits; an image that has no shell is not kept warm."""

_KEEPERS_PROCESSES = 2
"""docker-init and the sleep."""

_REDIRECT = '(exec "$@") 1<>"$0" 2>&1; exit $?'
"""The outer shell stays, and holds the streams by whose end the engine tells that the command is over. `exec` runs
programs alone, never what the shell has of the same name. The pipe is opened for both ways, so that it has a reader
though the platform is killed: the command then waits, once the pipe is full, for the next platform."""
_PIECE = 32 * 1024
_IDLE_OF_A_RUN = 4
_TRIES = 10


class ColdError(Exception):
    """This image cannot be kept warm; nothing has run."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What two commands must have in common to share a container, one after the other."""

    scope: str
    image: str
    networks: tuple[str, ...]
    limits: SandboxLimits


@dataclass(eq=False)
class _Warm:
    shape: Shape
    place: Place
    container: str
    pid: int
    commands: int = 0
    last: bool = False
    """Whether it has been let go of while a command runs in it: that is its last one."""


@dataclass
class WarmContainers:
    """The containers of all runs that wait for a command, and those that have one.

    `streams` bounds the threads that wait for commands.
    """

    engine: Engine
    streams: anyio.CapacityLimiter
    _idle: dict[Shape, list[_Warm]] = field(default_factory=dict)
    _busy: set[_Warm] = field(default_factory=set)
    _cold: set[str] = field(default_factory=set)

    async def run(
        self, image: str, job: SandboxJob, networks: Sequence[str], output: Output
    ) -> SandboxOutcome:
        """Run one command in a container of its run. Raises ColdError for an image that has no shell."""
        if image in self._cold:
            raise ColdError(image)
        # Time is the command's own matter, everything else the container's.
        limits = replace(job.limits, timeout=timedelta())
        shape = Shape(job.scope, image, tuple(networks), limits)
        warm = await self._take(shape, job)
        self._busy.add(warm)
        clean = False
        try:
            await self.engine.finish(lambda: warm.place.show(job.tree))
            walls.check_cwd(warm.place.tree, job.cwd)
            outcome = await self._run(warm, job, output)
            clean = outcome.reason == "exited"
        except ColdError:
            self._cold.add(image)
            raise
        else:
            return outcome
        finally:
            with anyio.CancelScope(shield=True):
                await self._put_back(warm, clean=clean)

    async def release(self, scope: str | None) -> None:
        """Remove what waits for commands of a run, or of any."""
        for shape in [shape for shape in self._idle if scope in (None, shape.scope)]:
            for warm in self._idle.pop(shape):
                await self._remove(warm)
        for warm in self._busy:
            warm.last = warm.last or scope in (None, warm.shape.scope)

    async def _take(self, shape: Shape, job: SandboxJob) -> _Warm:
        waiting = self._idle.get(shape)
        if waiting:
            warm = waiting.pop()
            if not waiting:
                del self._idle[shape]
            return warm
        place = await self.engine.finish(lambda: Place(shape.limits.output))
        try:
            container, pid = await self.engine.shielded(lambda client: _start(client, shape, job, place))
        except BaseException:
            await self.engine.finish(place.remove)
            raise
        return _Warm(shape, place, container, pid)

    async def _run(self, warm: _Warm, job: SandboxJob, output: Output) -> SandboxOutcome:
        warm.commands += 1
        name = str(warm.commands)
        killed = places.killed_for_memory(warm.container, warm.pid)
        pipe = Pipe(warm.place, name)
        try:
            started = time.monotonic()
            tail = _Tail(pipe, job.limits.output, output)
            execution = await self.engine.call(lambda client: _prepare(client, warm.container, job, name))
            code, reason = await self._follow(execution, tail, job.limits.timeout)
            duration = timedelta(seconds=time.monotonic() - started)
        finally:
            pipe.close()
        if reason == "exited" and code and places.killed_for_memory(warm.container, warm.pid) > killed:
            reason = "memory"
        return SandboxOutcome(code, reason, duration)

    async def _follow(self, execution: str, tail: _Tail, limit: timedelta) -> tuple[int, StopReason]:
        codes: list[int] = []

        async def wait() -> None:
            # The thread that is left behind ends with the container.
            codes.append(
                await anyio.to_thread.run_sync(
                    lambda: _exec(self.engine.opened(), execution),
                    abandon_on_cancel=True,
                    limiter=self.streams,
                )
            )
            tasks.cancel_scope.cancel()

        reason: StopReason = "timeout"
        with _unwrapped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                with anyio.move_on_after(limit.total_seconds()):
                    await tail.follow()
                    reason = "output"
                tasks.cancel_scope.cancel()
        within = await tail.rest()
        if not codes:
            return 128 + 9, reason
        return codes[0], "exited" if within else "output"

    async def _put_back(self, warm: _Warm, *, clean: bool) -> None:
        keep = clean and len(self._idle.get(warm.shape, ())) < _IDLE_OF_A_RUN
        keep = keep and await self.engine.finish(lambda: _is_clean(warm) and warm.place.hide())
        self._busy.discard(warm)
        if keep and not warm.last:
            self._idle.setdefault(warm.shape, []).append(warm)
        else:
            await self._remove(warm)

    async def _remove(self, warm: _Warm) -> None:
        await self.engine.shielded(lambda client: remove(client, warm.container))
        await self.engine.finish(warm.place.remove)


class _Tail:
    """Passes on what a command prints, up to a limit."""

    def __init__(self, pipe: Pipe, limit: int, output: Output) -> None:
        self._pipe, self._left, self._output = pipe, limit, output

    async def follow(self) -> None:
        """Pass on until more was printed than the limit."""
        while True:
            await anyio.wait_readable(self._pipe.reader)
            if not self._pass_on():
                return

    async def rest(self) -> bool:
        """Pass on what is there; returns whether that is within the limit."""
        while self._pipe.pending():
            if not self._pass_on():
                return False
            await anyio.lowlevel.checkpoint()
        return True

    def _pass_on(self) -> bool:
        if not self._left:
            return not self._pipe.pending()
        piece = self._pipe.take(min(_PIECE, self._left))
        self._left -= len(piece)
        if piece:
            self._output(piece)
        return True


@contextlib.contextmanager
def _unwrapped() -> Any:
    """Let an error out of a task group as it is."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _start(client: docker.DockerClient, shape: Shape, job: SandboxJob, place: Place) -> tuple[str, int]:
    program = {"entrypoint": list(_KEEPER), "working_dir": walls.WORKSPACE}
    container = walls.create(
        client, shape.image, job, binds=place.binds, networks=shape.networks, program=program, keepers=1
    )
    try:
        client.api.start(container)
        # An image without a shell ends now or in a moment: `_prepare` meets that.
        pid = int(client.api.inspect_container(container)["State"]["Pid"])
    except BaseException:
        remove(client, container)
        raise
    return container, pid


def _prepare(client: docker.DockerClient, container: str, job: SandboxJob, name: str) -> str:
    command = ["sh", "-c", _REDIRECT, f"{OUTPUT}/{name}", *job.argv]
    try:
        made: dict[str, str] = client.api.exec_create(
            container,
            command,
            environment=walls.environment(job),
            user=walls.user(),
            workdir=walls.place(job.cwd),
        )
    except NotFound:
        raise ColdError(container) from None
    except APIError as error:
        if error.status_code == 409:  # its first process has ended: the image has no shell, or no sleep
            raise ColdError(container) from None
        raise
    return made["Id"]


def _exec(client: docker.DockerClient, execution: str) -> int:
    """Start a command, wait for its end, and return its exit code."""
    connection: Any = client.api.exec_start(execution, socket=True)
    try:
        # Commands are silent for longer than calls to the engine may take.
        connection._sock.settimeout(None)  # noqa: SLF001
        # What it prints goes elsewhere: here is only what the engine itself has to say.
        said = b"".join(itertools.islice((piece for _, piece in frames_iter(connection, tty=False)), 10))  # type: ignore[no-untyped-call]
    finally:
        connection._response.close()  # noqa: SLF001 - where the library hangs it to keep it
        connection.close()
    code = int(client.api.exec_inspect(execution)["ExitCode"] or 0)
    if said and code and b"OCI runtime exec failed" in said:
        raise ColdError(said.decode("utf-8", "replace"))
    return code


def _is_clean(warm: _Warm) -> bool:
    """Whether nothing runs in a container but what keeps it, whose private folders are then emptied."""
    for _ in range(_TRIES):
        if places.processes(warm.container, warm.pid) == _KEEPERS_PROCESSES:
            return places.empty_private(warm.container, warm.pid)
        time.sleep(0.002)  # the dead leave their group a moment after they were waited for
    return False
