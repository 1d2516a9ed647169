"""Containers kept warm for the next command of the same run in the same image: `docker exec` instead of `docker run`.

A container serves one command at a time, of one run alone. What a command leaves running, or a limit or a
cancellation cuts short, takes its container with it; only one in which nothing else runs is used again, its private
folders emptied.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import docker
from docker.errors import APIError, NotFound

from ci_platform.sandboxes import Output, SandboxJob, SandboxLimits, SandboxOutcome
from ci_platform.sandboxes.container import places, survivors, walls
from ci_platform.sandboxes.container.engine import Engine, remove
from ci_platform.sandboxes.container.executions import started
from ci_platform.sandboxes.container.places import CODE, OUTPUT, PIPE, Pipe, Place, make_place
from ci_platform.sandboxes.container.survivors import Survivor
from ci_platform.sandboxes.container.tails import KILLED, Tail

_KEEPER = ("sh", "-c", f"exec 9<>{OUTPUT}/{PIPE}; exec sleep 2147483647")
"""What a warm container runs while it waits; an image that has no shell is not kept warm. It holds the pipe open: what
a command has printed is not lost when both that and the platform end."""

_KEEPERS_PROCESSES = 2
"""docker-init and the sleep."""

_REDIRECT = f'(exec "$@") 1<>{OUTPUT}/{PIPE} 2>&1; code=$?; echo $code >{OUTPUT}/{CODE}; exit $code'
"""The outer shell stays, and holds the streams by whose end the engine tells that the command is over. `exec` runs
programs alone, never what the shell has of the same name. The pipe is opened for both ways, so that it has a reader
though the platform is killed: the command then waits, once the pipe is full, for the next platform."""
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
    leaving: bool = False
    """Whether this process ends: commands that may survive are then left alone where they are cancelled."""
    left: set[str] = field(default_factory=set)
    """Runs of which commands were left alone."""
    _unsettled: dict[Path, tuple[Survivor, Pipe]] = field(default_factory=dict)
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
        clean, over = False, False
        try:
            await self.engine.finish(lambda: warm.place.show(job.tree, job.mounts, warm.pid))
            walls.check_cwd(warm.place.tree, job.cwd)
            outcome = await self._run(warm, job, output)
            clean, over = outcome.reason == "exited", True
        except ColdError:
            self._cold.add(image)
            raise
        else:
            return outcome
        finally:
            if self.leaving and job.survive is not None and not over:
                self._busy.discard(warm)  # the next process finds it
                self.left.add(job.scope)
            else:
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
        place = await self.engine.finish(lambda: make_place(shape.limits.output))
        try:
            container, pid = await self.engine.shielded(lambda client: _start(client, shape, job, place))
        except BaseException:
            await self.engine.finish(place.remove)
            raise
        return _Warm(shape, place, container, pid)

    def settled(self, folder: Path) -> None:
        """Forget a command whose end is taken care of."""
        if (found := self._unsettled.pop(folder, None)) is not None:
            survivor, pipe = found
            survivors.forget(folder, survivor)
            pipe.forget()

    async def _run(self, warm: _Warm, job: SandboxJob, output: Output) -> SandboxOutcome:
        warm.commands += 1
        killed = places.killed_for_memory(warm.container, warm.pid)
        pipe = Pipe(warm.place, warm.commands)
        try:
            pipe.drain()
            started = time.monotonic()
            tail = Tail(pipe, job.limits.output, output)
            execution = await self.engine.call(lambda client: _prepare(client, warm.container, job))
            survivor = Survivor(
                warm.container, warm.pid, str(warm.place.path), warm.commands, execution, time.time()
            )
            if job.survive is not None:
                survivors.write(job.survive, survivor)
            limit = job.limits.timeout.total_seconds()
            code, reason = await tail.until_over(lambda: self._wait(execution), limit)
            code = KILLED if code is None else code
            seconds = time.monotonic() - started
            if reason == "exited" and code and places.killed_for_memory(warm.container, warm.pid) > killed:
                reason = "memory"
            if job.survive is not None:
                folder, over = job.survive, replace(survivor, code=code, reason=reason, seconds=seconds)
                survivors.write(folder, over)
                self._unsettled[folder] = over, pipe
        finally:
            pipe.close()
            if job.survive is None:
                pipe.forget()
        return SandboxOutcome(code, reason, timedelta(seconds=seconds))

    async def _wait(self, execution: str) -> int:
        # The thread that is left behind ends with the container.
        return await anyio.to_thread.run_sync(
            lambda: _exec(self.engine.opened(), execution), abandon_on_cancel=True, limiter=self.streams
        )

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


def _prepare(client: docker.DockerClient, container: str, job: SandboxJob) -> str:
    command = ["sh", "-c", _REDIRECT, "sh", *job.argv]
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
    with started(client, execution) as pieces:
        # What it prints goes elsewhere: here is only what the engine itself has to say.
        said = b"".join(itertools.islice(pieces, 10))
    code = int(client.api.exec_inspect(execution)["ExitCode"] or 0)
    if said and code and b"OCI runtime exec failed" in said:
        raise ColdError(said.decode("utf-8", "replace"))
    return code


def _is_clean(warm: _Warm) -> bool:
    """Whether nothing runs in a container but what keeps it, whose private folders are then emptied."""
    for _ in range(_TRIES):
        if places.processes(warm.container, warm.pid) == _KEEPERS_PROCESSES:
            # First: what is mounted in a private folder is the job's, and must not be emptied.
            return places.unmount_home(warm.pid) and places.empty_private(warm.container, warm.pid)
        time.sleep(0.002)  # the dead leave their group a moment after they were waited for
    return False
