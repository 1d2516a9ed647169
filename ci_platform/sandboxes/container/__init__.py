"""Commands as Docker containers: any image, any service beside it. The door to the docker library."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio
from docker.errors import DockerException, ImageNotFound

from ci_platform import layers
from ci_platform.errors import FailedError, ImageNotFoundError, UnavailableError
from ci_platform.sandboxes import ImageMaker, MadeImage, Output, SandboxJob, SandboxOutcome, Say, Tree, merged
from ci_platform.sandboxes.container import agent_kit, making, survivors, walls
from ci_platform.sandboxes.container.engine import Engine
from ci_platform.sandboxes.container.executions import ColdError
from ci_platform.sandboxes.container.images import Images, missing
from ci_platform.sandboxes.container.leftovers import scopes_of, sweep_engine
from ci_platform.sandboxes.container.plain import run_fresh
from ci_platform.sandboxes.container.resuming import Resuming
from ci_platform.sandboxes.container.services import Services
from ci_platform.sandboxes.container.warm import WarmContainers

Warm = Literal["agent", "engine"]


class ContainerSandbox(ImageMaker):
    """Runs each command in a fresh container without privileges, over the job's tree.

    `image` is taken where a job names none; `named` are short names of images and what they stand for; `pull`
    allows fetching images that are not there. `network` is the engine's network of jobs that ask for one, None
    where they may not. `url` None: as the docker command finds the engine. `commands` bounds how many run at a
    time: each holds a thread for its output. `warm` keeps containers for the next command of the same run (as root:
    a workspace is mounted into a container that runs) and says who starts commands in them: an agent of ours, where
    one can be, or the engine. `home` tells this platform's images from those of others.
    """

    outlives = True

    def __init__(
        self,
        *,
        image: str = "dynflow/python:latest",
        named: Mapping[str, str] | None = None,
        pull: bool = False,
        network: str | None = None,
        url: str | None = None,
        commands: int = 64,
        warm: Warm | None = "agent",
        home: str = "local",
    ) -> None:
        self._image, self._named, self._network = image, named or {}, network
        self._engine, self._home = Engine(url), home
        self._images = Images(self._engine, pull=pull)
        self._services = Services(self._engine)
        self._warm = warm if os.geteuid() == 0 else None
        self._streams = anyio.CapacityLimiter(commands)
        self._waiting = WarmContainers(self._engine, self._streams, agents=warm == "agent")
        self._resuming = Resuming(self._engine)

    async def run(self, job: SandboxJob, output: Output) -> SandboxOutcome:
        """Run one command to its end."""
        if job.network and self._network is None:
            raise FailedError(f"{job.argv[0]!r} asks for network=True, which containers have not here")
        async with self._services.beside(job) as network:
            return await self._run_over(job, network, output)

    async def _run_over(self, job: SandboxJob, network: str | None, output: Output) -> SandboxOutcome:
        networks = [name for name in (network, self._network if job.network else None) if name]
        if self._warm is not None and job.scope and job.tree.lowers:
            _, image = await self.resolve(job.image, job.say)
            try:
                return await self._waiting.run(image, job, networks, output)
            except ImageNotFound:
                raise self._gone(image) from None
            except ColdError:
                # Nothing has run. An overlay that was mounted `volatile` is mounted again without its marks alone.
                for tree in (job.tree, *(mount.tree for mount in job.mounts)):
                    await self._engine.finish(lambda tree=tree: layers.remove_tree(tree.work / "work"))  # type: ignore[misc]
        async with self._shown(job.tree) as folder:
            walls.check_cwd(folder, job.cwd)
            return await self._run_in(job, folder, networks, output)

    async def _run_in(
        self, job: SandboxJob, folder: Path, networks: Sequence[str], output: Output
    ) -> SandboxOutcome:
        _, image = await self.resolve(job.image, job.say)
        try:
            async with contextlib.AsyncExitStack() as stack:
                shown = [await stack.enter_async_context(self._shown(each.tree)) for each in job.mounts]
                folders = [folder, *shown]
                return await run_fresh(
                    self._engine, image, job, folders, output, networks=networks, streams=self._streams
                )
        except ImageNotFound:
            raise self._gone(image) from None

    def _gone(self, image: str) -> ImageNotFoundError:
        self._images.forget(image)
        return ImageNotFoundError(missing(image))

    async def resolve(self, image: str | None, say: Say) -> tuple[str, str]:
        """Return the name of an image as it was asked for (None: this sandbox's own) and its exact name."""
        name = self._image if image is None else image
        return name, await self._images.resolve(self._named.get(name, name), say)

    async def sweep(self) -> int:
        """Remove containers and mounts of platforms on this host that are dead, but of commands that go on."""
        spared: set[str] = set()

        def spare(place: Path) -> bool:
            found = survivors.of_place(place)
            spared.update(each.container for each in found)
            return bool(found)

        swept = await self._engine.finish(lambda: merged.sweep(spare))
        try:
            # Not waited for when the platform stops: an engine may hang, and what is left is swept next time.
            scopes = await self._engine.call(lambda client: scopes_of(client, spared), abandon=True)
            for scope in scopes:
                self._services.inherit(scope)
            return swept + await self._engine.call(lambda client: sweep_engine(client, scopes), abandon=True)
        except UnavailableError:
            return swept

    async def resume(self, job: SandboxJob, output: Output) -> SandboxOutcome | None:
        """Go on with a command that an earlier process has left in `job.survive`, from its first byte on."""
        self._services.inherit(job.scope)  # should this come before the sweep
        return await self._resuming.resume(job, output)

    async def abandon(self, folder: Path) -> None:
        """Kill the command that an earlier process has left in `folder`; an absent engine's is swept later."""
        with contextlib.suppress(UnavailableError):
            await self._resuming.abandon(folder)

    def settled(self, folder: Path) -> None:
        """Forget a command whose end is taken care of."""
        self._waiting.settled(folder)
        self._resuming.settled(folder)

    def detach(self) -> None:
        """From now on leave commands that may survive to themselves, where others are cancelled."""
        self._waiting.leaving = self._resuming.leaving = True

    async def install(self, image: str, job: SandboxJob, output: Output) -> tuple[SandboxOutcome, str | None]:
        """Run a command as root of a container of its own; its file system is an image if it exits with 0."""
        if job.network and self._network is None:
            raise FailedError(f"{job.argv[0]!r} asks for network=True, which containers have not here")
        networks = [self._network] if job.network and self._network else []
        async with self._shown(job.tree) as folder:
            walls.check_cwd(folder, job.cwd)
            return await making.install(self._engine, image, job, folder, networks, output, self._home)

    async def build(
        self, job: SandboxJob, dockerfile: str, check: Callable[[str], Awaitable[str]], output: Output
    ) -> str:
        """Build an image of the job's tree by a Dockerfile in it, whose text `check` makes harmless."""
        network = self._network if job.network and self._network else "none"
        async with self._shown(job.tree) as folder:
            text = await self._engine.finish(lambda: making.read_dockerfile(folder, dockerfile))
            text = await check(text)
            return await making.build(self._engine, folder, text, job, network, output, self._home)

    async def refuse_triggers(self, image: str) -> None:
        """Raise FailedError for an image that would have the engine do things of its own in a build."""
        await making.refuse_triggers(self._engine, image)

    async def push(self, image: str, references: list[str], output: Output) -> list[str]:
        """Push an image under some references; returns each with its digest."""
        return await making.push(self._engine, image, references, output)

    async def made(self) -> list[MadeImage]:
        """Return the images that runs have made."""
        return await self._engine.call(lambda client: making.made(client, self._home), abandon=True)

    async def remove_made(self, exact: str) -> bool:
        """Remove an image that a run has made; False while something uses it."""
        self._images.forget(exact)
        try:
            return await self._engine.shielded(lambda client: making.remove_made(client, self._home, exact))
        finally:
            self._images.forget(exact)  # who looked meanwhile has seen it

    @asynccontextmanager
    async def _shown(self, tree: Tree) -> AsyncIterator[Path]:
        stack = contextlib.ExitStack()
        folder = await self._engine.finish(lambda: stack.enter_context(merged.merged(tree)))
        try:
            yield folder
        finally:
            await self._engine.finish(stack.close)

    async def release(self, scope: str) -> None:
        """Remove the warm containers and the services of a run that no command uses now."""
        await self._waiting.release(scope)
        await self._services.release(scope)

    async def close(self) -> None:
        """Remove warm containers and services that nobody uses, and close the connections to the engine."""
        with contextlib.suppress(UnavailableError):
            await self._waiting.release(None)
            await self._services.close(but=self._waiting.left)
        await self._engine.finish(self._waiting.kit.close)
        await self._engine.close()

    def describe(self) -> Mapping[str, str]:
        """Return the engine that answers, or why none does; asks it, so it takes a moment."""
        try:
            with contextlib.closing(self._engine.connect()) as engine:
                version = engine.version()
                have = {tag for image in engine.images.list() for tag in image.tags}
        except (DockerException, OSError) as error:
            return {"engine": f"none answers ({error}); scripts/docker_engine starts one"}
        return {
            "engine": f"Docker {version['Version']}",
            "walls": "namespaces, no capabilities, no new privileges, seccomp (engine's profile), read-only root",
            "user": f"uid {walls.user()}",
            "containers": self._how_warm(),
            "limits": "memory, processors and processes, by control groups",
            "network": self._network or "none",
            "image": self._image
            + ("" if self._image in have else ", which is missing; scripts/build_images makes it"),
        }

    def _how_warm(self) -> str:
        if self._warm is None:
            return "a fresh one for each command"
        trouble = agent_kit.trouble() if self._warm == "agent" else "as it is set"
        return (
            "commands are run by our agent"
            if trouble is None
            else f"commands are run by the engine: {trouble}"
        )
