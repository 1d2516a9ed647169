"""Containers kept warm for the next command of the same run in the same image.

An agent of ours in the container runs what it is handed over a socket, in milliseconds; where there can be none the
engine does (`docker exec`), in a fifth of the time of a `docker run`.

A container serves one command at a time, of one run alone. What a command leaves running, or a limit or a
cancellation cuts short, takes its container with it; only one in which nothing else runs is used again, its private
folders emptied.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import docker

from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import Output, SandboxJob, SandboxLimits, SandboxOutcome
from ci_platform.sandboxes.container import agent_kit, places, survivors, walls
from ci_platform.sandboxes.container.agent_kit import Kit
from ci_platform.sandboxes.container.agents import Agent, End, NoAgentError, environment_of, expect, welcome
from ci_platform.sandboxes.container.engine import Engine, remove
from ci_platform.sandboxes.container.executions import ColdError, execute, prepare
from ci_platform.sandboxes.container.places import OUTPUT, PIPE, Pipe, Place, make_place
from ci_platform.sandboxes.container.survivors import Survivor
from ci_platform.sandboxes.container.tails import KILLED, Tail

_KEEPER = ("sh", "-c", f"exec 9<>{OUTPUT}/{PIPE}; exec sleep 2147483647")
"""What a warm container without an agent runs while it waits; an image that has no shell is not kept warm then. It
holds the pipe open: what a command has printed is not lost when both that and the platform end."""

_KEEPERS_PROCESSES = 2
"""docker-init, and the agent or the sleep."""

_log = logging.getLogger(__name__)
_IDLE_OF_A_RUN = 4
_TRIES = 10


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
    agent: Agent | None = None
    commands: int = 0
    last: bool = False
    """Whether it has been let go of while a command runs in it: that is its last one."""


@dataclass
class WarmContainers:
    """The containers of all runs that wait for a command, and those that have one.

    `streams` bounds the threads that wait for commands of the engine's. Without `agents` all commands are.
    """

    engine: Engine
    streams: anyio.CapacityLimiter
    agents: bool = True
    kit: Kit = field(default_factory=Kit)
    _idle: dict[Shape, list[_Warm]] = field(default_factory=dict)
    leaving: bool = False
    """Whether this process ends: commands that may survive are then left alone where they are cancelled."""
    left: set[str] = field(default_factory=set)
    """Runs of which commands were left alone."""
    _unsettled: dict[Path, tuple[Survivor, Pipe]] = field(default_factory=dict)
    _busy: set[_Warm] = field(default_factory=set)
    _cold: set[str] = field(default_factory=set)
    _without_agent: set[str] = field(default_factory=set)

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
        warm.commands += 1
        try:
            execution = await self._furnish(warm, job)
            outcome = await self._run(warm, job, execution, output)
            clean, over = outcome.reason == "exited", True
        except ColdError:
            self._cold.add(image)
            raise
        else:
            return outcome
        finally:
            if self.leaving and job.survive is not None and not over:
                self._busy.discard(warm)  # the next process finds it
                if warm.agent is not None:
                    warm.agent.close()
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
        while waiting := self._idle.get(shape):
            warm = waiting.pop()
            if not waiting:
                del self._idle[shape]
            if warm.agent is None or warm.agent.is_well():
                return warm
            await self._remove(warm)
        trouble: Exception | None = None
        if self.agents and shape.image not in self._without_agent:
            try:
                return await self._make(
                    shape, lambda client, place: _start(client, shape, job, place, self.kit)
                )
            except (NoAgentError, UnavailableError) as error:
                trouble = error
        made = await self._make(shape, lambda client, place: _start(client, shape, job, place, None))
        if trouble is not None:
            # Said once for an image: what keeps the agent from starting in it will keep it the next time.
            self._without_agent.add(shape.image)
            _log.warning("commands in %s are run by the engine: %s", shape.image, trouble)
        return made

    async def _make(
        self,
        shape: Shape,
        start: Callable[[docker.DockerClient, Place], tuple[str, int, Agent | None]],
    ) -> _Warm:
        place = await self.engine.finish(lambda: make_place(shape.limits.output))
        try:
            container, pid, agent = await self.engine.shielded(lambda client: start(client, place))
        except BaseException:
            await self.engine.finish(place.remove)
            raise
        return _Warm(shape, place, container, pid, agent)

    async def _furnish(self, warm: _Warm, job: SandboxJob) -> str:
        """Show a command its workspace; returns its execution, made meanwhile, or "" where an agent runs it."""
        made: list[str] = []

        async def make() -> None:
            made.append(
                await self.engine.call(lambda client: prepare(client, warm.container, warm.commands, job))
            )

        try:
            async with anyio.create_task_group() as tasks:
                if warm.agent is None:
                    tasks.start_soon(make)
                await self.engine.finish(lambda: warm.place.show(job.tree, job.mounts, warm.pid))
                walls.check_cwd(warm.place.tree, job.cwd)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return made[0] if made else ""

    def settled(self, folder: Path) -> None:
        """Forget a command whose end is taken care of."""
        if (found := self._unsettled.pop(folder, None)) is not None:
            survivor, pipe = found
            survivors.forget(folder, survivor)
            pipe.forget()

    async def _run(self, warm: _Warm, job: SandboxJob, execution: str, output: Output) -> SandboxOutcome:
        killed = places.killed_for_memory(warm.container, warm.pid)
        pipe = Pipe(warm.place, warm.commands)
        try:
            pipe.drain()
            started = time.monotonic()
            tail = Tail(pipe, job.limits.output, output)
            survivor = Survivor(
                warm.container, warm.pid, str(warm.place.path), warm.commands, execution, time.time()
            )
            if job.survive is not None:
                survivors.write(job.survive, survivor)
            limit = job.limits.timeout.total_seconds()
            end, reason = await tail.until_over(lambda: self._wait(warm, execution, job), limit)
            end = end or End(KILLED)
            seconds = time.monotonic() - started
            if reason == "exited" and end.code and await self._was_killed_for_memory(warm, killed, end):
                reason = "memory"
            if job.survive is not None:
                folder, over = job.survive, replace(survivor, code=end.code, reason=reason, seconds=seconds)
                survivors.write(folder, over)
                self._unsettled[folder] = over, pipe
        finally:
            pipe.close()
            if job.survive is None:
                pipe.forget()
        ended = end.ended if reason == "exited" else ""
        return SandboxOutcome(end.code, reason, timedelta(seconds=seconds), ended=ended)

    async def _wait(self, warm: _Warm, execution: str, job: SandboxJob) -> End:
        if warm.agent is not None:
            return await warm.agent.run(warm.commands, job)
        # The thread that is left behind ends with the container.
        code = await anyio.to_thread.run_sync(
            lambda: execute(self.engine.opened(), execution, warm.place, warm.commands),
            abandon_on_cancel=True,
            limiter=self.streams,
        )
        return End(code)

    async def _was_killed_for_memory(self, warm: _Warm, before: int, end: End) -> bool:
        if end.lost:  # and its control group with it
            state = await self.engine.call(
                lambda client: client.api.inspect_container(warm.container)["State"]
            )
            return bool(state["OOMKilled"])
        return places.killed_for_memory(warm.container, warm.pid) > before

    async def _put_back(self, warm: _Warm, *, clean: bool) -> None:
        keep = clean and len(self._idle.get(warm.shape, ())) < _IDLE_OF_A_RUN
        keep = keep and await self.engine.finish(lambda: _is_clean(warm) and warm.place.hide())
        self._busy.discard(warm)
        if keep and not warm.last:
            self._idle.setdefault(warm.shape, []).append(warm)
        else:
            await self._remove(warm)

    async def _remove(self, warm: _Warm) -> None:
        if warm.agent is not None:
            warm.agent.close()
        await self.engine.shielded(lambda client: remove(client, warm.container))
        await self.engine.finish(warm.place.remove)


def _start(
    client: docker.DockerClient, shape: Shape, job: SandboxJob, place: Place, kit: Kit | None
) -> tuple[str, int, Agent | None]:
    """Start a container with an agent of a `kit`, without one with a sleep. NoAgentError where none comes."""
    binds, program = place.binds, {"entrypoint": list(_KEEPER), "working_dir": walls.WORKSPACE}
    env: dict[str, str] = {}
    if kit is not None:
        binds = [*binds, f"{kit.folder()}:{agent_kit.PLACE}:ro"]
        program |= {"entrypoint": agent_kit.command(OUTPUT), "environment": list(agent_kit.UNSET)}
        env = environment_of(client.api.inspect_image(shape.image)["Config"])  # type: ignore[no-untyped-call]
    container = walls.create(
        client, shape.image, job, binds=binds, networks=shape.networks, program=program, keepers=1
    )
    try:
        with contextlib.ExitStack() as stack:
            listener = None if kit is None else stack.enter_context(expect(place))
            client.api.start(container)
            # An image without a shell ends now or in a moment: `prepare` meets that.
            pid = int(client.api.inspect_container(container)["State"]["Pid"])
            agent = None if listener is None else welcome(listener, place, pid, env)
    except BaseException:
        remove(client, container)
        raise
    return container, pid, agent


def _is_clean(warm: _Warm) -> bool:
    """Whether nothing runs in a container but what keeps it, whose private folders are then emptied."""
    for _ in range(_TRIES):
        if places.processes(warm.container, warm.pid) == _KEEPERS_PROCESSES:
            # First: what is mounted in a private folder is the job's, and must not be emptied.
            return places.unmount_home(warm.pid) and places.empty_private(warm.container, warm.pid)
        time.sleep(0.002)  # the dead leave their group a moment after they were waited for
    return False
