"""Images that runs make: builds by a Dockerfile, and snapshots of what an install has left."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import anyio

from ci_platform.dockerfiles import checked
from ci_platform.errors import (
    FailedError,
    ImageNotFoundError,
    LimitExceededError,
    PlatformError,
    UnavailableError,
)
from ci_platform.images import PinnedImages
from ci_platform.logs import LogKey, Logs, LogWriter
from ci_platform.model import SnapshotImage
from ci_platform.sandboxes import ImageMaker, SandboxJob, SandboxLimits, SandboxOutcome, Tree
from ci_platform.store import Store, Transaction, col
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.clock import Clock
from pipelines.contract import BuiltImage, Command


@dataclass(frozen=True, slots=True)
class Maker:
    """For whom an image is made: a step of a run of a repository."""

    run_id: str
    repo: str
    author: LayerAuthor


class ImageMaking:
    """Makes images for runs.

    *Order of calls*: any. *Concurrency*: safe; of two equal snapshots the first one stays. *Idempotency*: a build is
    made again, a snapshot is found. *Cancellation*: what was being made is removed. *Errors*: FailedError and its
    kinds are the tenant's matter, UnavailableError is ours.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        workspaces: Workspaces,
        logs: Logs,
        images: PinnedImages,
        sandbox: ImageMaker,
        limits: SandboxLimits,
    ) -> None:
        self._store, self._clock, self._workspaces, self._logs = store, clock, workspaces, logs
        self._images, self._sandbox, self._limits = images, sandbox, limits

    async def build(
        self, maker: Maker, command: Command, dockerfile: str, references: list[str]
    ) -> BuiltImage:
        """Build the image of `dockerfile` in the command's workspace, and push it under `references`."""
        async with self._working(maker, command, f"build {dockerfile}") as (log, tree):

            async def pin(image: str) -> str:
                exact = await self._images.pin(self._sandbox, maker.run_id, image, _saying(log))
                await self._sandbox.refuse_triggers(exact)
                return exact

            job = self._job(maker, command, tree, log)
            image = await self._sandbox.build(job, dockerfile, lambda text: checked(text, pin), log.write)
            await self._hold(maker, image, log)
            pushed = await self._sandbox.push(image, references, log.write)
            log.note("result", f"built {image}")
            return BuiltImage(image, tuple(pushed))

    async def snapshot(self, maker: Maker, command: Command, key: str) -> str:
        """Return the image that the command leaves of a container, made once for each key of a repository."""
        found = await self._found(maker, key)
        if found is not None:
            return found
        async with self._working(maker, command, shlex.join(command.argv)) as (log, tree):
            image = await self._images.pin(self._sandbox, maker.run_id, command.image, _saying(log))
            outcome, made = await self._sandbox.install(
                image, self._job(maker, command, tree, log), log.write
            )
            if made is None:
                _raise(command, outcome, self._limits)
                raise AssertionError("an install without an image has failed")
            exact = await self._keep(maker, key, made)
            await self._hold(maker, exact, log)
            log.note("result", f"snapshot {key!r} is {exact}")
            return exact

    async def _hold(self, maker: Maker, image: str, log: LogWriter) -> None:
        """Keep what was made for its run; an engine may have taken it from an earlier one, which nothing held."""
        try:
            await self._images.hold(self._sandbox, maker.run_id, image, _saying(log))
        except ImageNotFoundError as error:
            raise UnavailableError(f"the image was collected as soon as it was made: {error}") from None

    async def _found(self, maker: Maker, key: str) -> str | None:
        """Return the snapshot of a key, which the run holds from then on; None where it has to be made."""
        row = await self._store.read(lambda tx: tx.get(SnapshotImage, (maker.repo, key)))
        if row is None:
            return None
        log = self._logs.writer(LogKey(maker.run_id, maker.author.step, maker.author.count))
        try:
            await self._images.hold(self._sandbox, maker.run_id, row.exact, _saying(log))
            log.note("notice", f"snapshot {key!r} is there: {row.exact}")
        except ImageNotFoundError:
            log.note("notice", f"snapshot {key!r} is gone from this machine, and made anew")
            where = (col(SnapshotImage.repo) == maker.repo, col(SnapshotImage.exact) == row.exact)
            await self._store.write(lambda tx: tx.remove(SnapshotImage, *where))
            return None
        finally:
            log.finish()
        return row.exact

    async def _keep(self, maker: Maker, key: str, made: str) -> str:
        row = SnapshotImage(repo=maker.repo, key=key, exact=made, made_at=self._clock.now())

        def first(tx: Transaction) -> str:
            if tx.add_once(row):
                return made
            found = tx.get(SnapshotImage, (maker.repo, key))
            return made if found is None else found.exact

        return await self._store.write(first)

    def _job(self, maker: Maker, command: Command, tree: Tree, log: LogWriter) -> SandboxJob:
        return SandboxJob(
            id=f"{maker.run_id}-image",
            argv=command.argv,
            tree=tree,
            env=command.env,
            cwd=command.cwd,
            network=command.network,
            limits=self._limits,
            scope=maker.run_id,
            say=_saying(log),
        )

    @asynccontextmanager
    async def _working(
        self, maker: Maker, command: Command, what: str
    ) -> AsyncIterator[tuple[LogWriter, Tree]]:
        """Give the step's log and a tree of the workspace's, of which nothing is kept."""
        log = self._logs.writer(LogKey(maker.run_id, maker.author.step, maker.author.count))
        try:
            log.note("command", f"{what:.4000}")
            tree = await self._workspaces.prepare(command.workspace.id, maker.author)
            try:
                yield log, tree
            finally:
                with anyio.CancelScope(shield=True):
                    await self._workspaces.drop(tree)
        except PlatformError as error:
            log.note("notice", str(error))
            raise
        finally:
            log.finish()


def _saying(log: LogWriter) -> Callable[[str], None]:
    return lambda line: log.note("notice", line)


def _raise(command: Command, outcome: SandboxOutcome, limits: SandboxLimits) -> None:
    what = f"{shlex.join(command.argv)!r:.200}"
    if outcome.reason == "timeout":
        raise LimitExceededError(
            f"{what} ran longer than its limit (timeout) of {limits.timeout / timedelta(seconds=1):g} s"
        )
    if outcome.reason == "output":
        raise LimitExceededError(f"{what} printed more than its limit (output) of {limits.output:,} bytes")
    raise FailedError(f"{what} exited with {outcome.exit_code}: there is no snapshot of that")
