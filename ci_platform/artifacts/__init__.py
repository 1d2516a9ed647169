"""Artifacts: files that runs keep under a name, for people, for later steps and for other runs of their repository.

`asking` what a pipeline may ask for · `picking` which files that names · `copying`, `contents`, `shelf` what is on
disk · `records` whose they are and who may have them · `archives` all of one as a file · `unpacking` into a workspace ·
`capability` what pipelines call.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread

from ci_platform import full_disk
from ci_platform.artifacts.archives import Format, archive, gathered
from ci_platform.artifacts.asking import Retentions, Upload
from ci_platform.artifacts.contents import Entry
from ci_platform.artifacts.picking import Picking
from ci_platform.artifacts.records import REPEATED, Place, Records, Wanted, shown
from ci_platform.artifacts.shelf import Draft, Shelf
from ci_platform.artifacts.unpacking import unpack
from ci_platform.capabilities import RunIdentity
from ci_platform.errors import FailedError, NotFoundError
from ci_platform.model import ArtifactRow
from ci_platform.named_locks import NamedLocks
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.settings import Settings
from ci_platform.stacks import LayerAuthor
from ci_platform.store import Store
from ci_platform.trees import Owner
from ci_platform.workspaces import Workspaces
from dynflow.clock import Clock
from pipelines.contract import Artifact

__all__ = ["Artifacts", "Limits", "Opened", "Wanted"]

_COPYING, _READING = 2, 4
"""Threads. Copying may take long, for an artifact may have gigabytes; who reads one does not wait for that."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the artifacts of one run may be together, in bytes, and how many files one of them may have."""

    size: int = 10 << 30
    files: int = 100_000
    retentions: Retentions = field(default_factory=Retentions)


@dataclass(frozen=True, slots=True)
class Opened:
    """An artifact that somebody reads, and that stays as long. Reading blocks."""

    row: ArtifactRow
    entries: tuple[Entry, ...]
    _shelf: Shelf

    def pieces(self, entry: Entry) -> Iterator[bytes]:
        """Yield a file's bytes, verified: what is damaged ends with UnavailableError before its last piece."""
        return self._shelf.pieces(self.row.tenant, self.row.id, entry)

    def part(self, entry: Entry, start: int, end: int) -> Iterator[bytes]:
        """Yield a file's bytes from `start` up to `end`, which are not compared with its digest."""
        descriptor = self.open(entry)
        try:
            while start < end and (piece := os.pread(descriptor, min(1 << 20, end - start), start)):
                yield piece
                start += len(piece)
        finally:
            os.close(descriptor)

    def open(self, entry: Entry) -> int:
        """Open a file; returns its descriptor."""
        return self._shelf.open(self.row.tenant, self.row.id, entry)

    def archive(self, form: Format) -> Iterator[bytes]:
        """Yield all of it as one file."""
        return gathered(archive(form, self.entries, self.pieces))


class Artifacts:
    """All artifacts of a platform.

    *Order of calls*: `sweep` once at start; then any. *Concurrency*: one event loop, one process. *Idempotency*: a step
    that is repeated replaces what its earlier attempts uploaded; `forget`, `delete_run`, `rewind_run`. *Cancellation*:
    an upload or a download that is cancelled leaves nothing. *Errors*: those of asking, of which the tenant hears;
    UnavailableError is ours.
    """

    def __init__(
        self,
        shelf: Shelf,
        store: Store,
        clock: Clock,
        workspaces: Workspaces,
        *,
        limits: Limits | None = None,
    ) -> None:
        self._shelf, self._workspaces, self._clock = shelf, workspaces, clock
        self.records, self.limits = Records(store, clock), limits or Limits()
        self._copying, self._reading = anyio.CapacityLimiter(_COPYING), anyio.CapacityLimiter(_READING)
        self._runs = NamedLocks()
        self._readers, self._doomed = Counter[str](), dict[str, ArtifactRow]()
        self._owner = Owner.of_sandboxes(SANDBOX_UID)

    @classmethod
    def of(cls, settings: Settings, store: Store, clock: Clock, workspaces: Workspaces) -> Artifacts:
        """Return the artifacts of a data folder, with the limits that are set."""
        retentions = Retentions(settings.artifact_retention, settings.artifact_retention_max)
        limits = Limits(settings.max_artifacts, settings.max_artifact_files, retentions)
        return cls(Shelf(settings.artifacts_path), store, clock, workspaces, limits=limits)

    async def _thread(self, function: Callable[[], T], *, long: bool = False) -> T:
        limiter = self._copying if long else self._reading
        return await anyio.to_thread.run_sync(full_disk.told(function), limiter=limiter)

    # --- for the platform ------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Remove what a killed process left half done, or half deleted."""
        live = {(row.tenant, row.id) for row in await self.records.live()}
        await self._thread(lambda: self._shelf.sweep(live), long=True)

    async def forget(self, where: Collection[str], why: str) -> int:
        """Delete artifacts, by id; returns how many were there. Those that somebody reads go when that ends."""
        rows = await self.records.forget(where, why)
        await self._remove(rows)
        return len(rows)

    async def delete(self, run_id: str, name: str, *, by: str) -> None:
        """Delete an artifact of a run because somebody says so. Raises NotFoundError."""
        row = await self.records.named(run_id, name)
        await self.forget([row.id], f"{by[:100]} deleted it")

    def is_read(self, artifact_id: str) -> bool:
        """Whether somebody reads an artifact now."""
        return artifact_id in self._readers

    async def rewind_run(self, run_id: str, steps: Collection[tuple[str, int]]) -> None:
        """Delete what these (step, count) of a run uploaded: they are done again, or not at all."""
        await self.forget(await self.records.of_steps(run_id, steps), REPEATED)

    async def delete_run(self, run_id: str) -> None:
        """Delete all artifacts of a run, and what is known of them."""
        await self._remove(await self.records.drop_run(run_id))

    async def _remove(self, rows: Collection[ArtifactRow]) -> None:
        """Remove the files of artifacts that have no live row any more; a kill in between leaves them to `sweep`."""
        for row in rows:
            if row.id in self._readers:
                self._doomed[row.id] = row
            else:
                with anyio.CancelScope(shield=True):
                    await self._thread(lambda row=row: self._shelf.remove(row.tenant, row.id))  # type: ignore[misc]

    # --- for pipelines ---------------------------------------------------------------------------

    async def upload(
        self, identity: RunIdentity, author: LayerAuthor, workspace_id: str, upload: Upload
    ) -> Artifact | None:
        """Keep files of a workspace as it stands. None where nothing matches and that is allowed.

        One of a run at a time: those of others have their turns in between, and what one may have is counted once.
        """
        async with self._runs(identity.run_id):
            return await self._upload(identity, author, workspace_id, upload)

    async def _upload(
        self, identity: RunIdentity, author: LayerAuthor, workspace_id: str, upload: Upload
    ) -> Artifact | None:
        place = await self.records.place(identity.run_id, upload.name, author, replace=upload.replace)
        async with self._looked_at(workspace_id, author, upload.failed) as lowers:
            draft = await self._thread(lambda: self._draft(place, upload, lowers), long=True)
        if draft is None:
            return None
        with anyio.CancelScope(shield=True):
            row = await self._publish(identity, author, place, upload, draft)
        return shown(row)

    @asynccontextmanager
    async def _looked_at(
        self, workspace_id: str, author: LayerAuthor, failed: str | None
    ) -> AsyncIterator[tuple[Path, ...]]:
        """Show a workspace's layers, topmost first: as it stands, or as the newest failed command of a step left it."""
        if failed is None:
            tree = await self._workspaces.prepare(workspace_id, author)
            try:
                yield tree.lowers or (tree.upper,)
            finally:
                with anyio.CancelScope(shield=True):
                    await self._workspaces.drop(tree)
            return
        found = await self._workspaces.snapshots(workspace_id)
        names = [each.name for each in found if each.outcome == "failed" and each.step == failed]
        if not names:
            raise NotFoundError(
                f"no command of the step {failed[:100]!r} that failed has left files here (any more)"
            )
        async with self._workspaces.view(workspace_id, names[-1]) as view:
            yield view.lowers

    def _draft(self, place: Place, upload: Upload, lowers: Sequence[Path]) -> Draft | None:
        alive = anyio.from_thread.check_cancelled
        most = self.limits.files - place.files
        picking = Picking(lowers, upload, most, alive)
        found = picking.entries()
        if (unused := picking.unused()) and not upload.missing_ok:
            raise FailedError(
                f"the artifact {upload.name!r}: nothing matches {', '.join(map(repr, unused))[:300]}; "
                "missing_ok=True lets that be"
            )
        if not found:
            return None
        draft = self._shelf.draft(place.tenant, self.limits.size - place.size)
        try:
            self._shelf.fill(draft, found, alive)
        except BaseException:
            self._shelf.discard(draft)
            raise
        return draft

    async def _publish(
        self, identity: RunIdentity, author: LayerAuthor, place: Place, upload: Upload, draft: Draft
    ) -> ArtifactRow:
        files = [entry for entry in draft.entries if entry.kind == "file"]
        now = self._clock.now()
        row = ArtifactRow(
            id=secrets.token_hex(16),
            run_id=identity.run_id,
            repo=place.repo,
            tenant=place.tenant,
            name=upload.name,
            step=author.step,
            count=author.count,
            attempt=author.attempt,
            run_attempt=place.run_attempt,
            outside=place.outside,
            digest=draft.digest,
            files=len(draft.entries),
            size=draft.size,
            taken=draft.taken,
            only=files[0].path if len(files) == len(draft.entries) == 1 else None,
            created_at=now,
            expires_at=now + upload.retention,
        )
        try:
            await self._thread(lambda: self._shelf.publish(draft, row.id), long=True)
            replaced = await self.records.add(row, replace=upload.replace, room=self.limits.size)
        except BaseException:
            await self._thread(lambda: self._shelf.discard(draft))
            await self._thread(lambda: self._shelf.remove(row.tenant, row.id))
            raise
        await self._remove(replaced)
        return row

    async def find(self, identity: RunIdentity, wanted: Wanted, limit: int) -> list[Artifact]:
        """Return artifacts that a run may have."""
        return [shown(row) for row in await self.records.wanted(identity, wanted, limit)]

    async def download(
        self,
        identity: RunIdentity,
        author: LayerAuthor,
        workspace_id: str,
        wanted: Wanted,
        folder: tuple[str, ...],
    ) -> Artifact:
        """Put the files of an artifact into a folder of a workspace, in a layer of the step's own."""
        rows = await self.records.wanted(identity, wanted, 1)
        if not rows:
            if wanted.branch is None and wanted.name is not None:  # which says why, where it is gone
                await self.records.named(wanted.run or identity.run_id, wanted.name)
            raise NotFoundError(f"{_whose(wanted)} has no artifact {wanted.name!r}")
        async with self._runs(identity.run_id), self.reading(rows[0]) as opened:
            tree = await self._workspaces.prepare(workspace_id, author)
            try:
                alive = anyio.from_thread.check_cancelled
                await self._thread(lambda: unpack(opened, tree, folder, self._owner, alive), long=True)
                await self._workspaces.commit(tree)
            finally:
                with anyio.CancelScope(shield=True):
                    await self._workspaces.drop(tree)
        return shown(rows[0])

    # --- for people ------------------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self, run_id: str, name: str) -> AsyncIterator[Opened]:
        """Open an artifact of a run for the time of the block. Raises NotFoundError, which says why one is gone."""
        async with self.reading(await self.records.named(run_id, name)) as opened:
            yield opened

    @asynccontextmanager
    async def reading(self, row: ArtifactRow) -> AsyncIterator[Opened]:
        """Open an artifact that was found, for the time of the block. UnavailableError where it is gone since."""
        self._readers[row.id] += 1
        try:
            entries = await self._thread(lambda: self._shelf.entries(row.tenant, row.id, row.digest))
            yield Opened(row, tuple(entries), self._shelf)
        finally:
            self._readers[row.id] -= 1
            if not self._readers[row.id]:
                del self._readers[row.id]
                if (doomed := self._doomed.pop(row.id, None)) is not None:
                    with anyio.CancelScope(shield=True):
                        await self._remove([doomed])

    async def steps(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        """Yield what blocks to be read, piece by piece, each in a thread."""
        try:
            while piece := await self._thread(lambda: next(pieces, b"")):
                yield piece
        finally:
            if isinstance(pieces, Generator):
                pieces.close()


def _whose(wanted: Wanted) -> str:
    if wanted.branch is not None:
        return f"no run of the branch {wanted.branch!r:.100} that succeeded"
    return "the run" if wanted.run is None else f"run {wanted.run:.100}"
