"""Snapshots of runs' workspaces: listed, looked at, downloaded. Their files may hold what logs never show."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from litestar.response import Stream

from ci_platform import layer_views
from ci_platform.errors import NotFoundError
from ci_platform.layer_views import ViewEntry
from ci_platform.runs import Runs
from ci_platform.snapshots import Snapshot
from ci_platform.workspaces import Workspaces

_PIECE = 1 << 18
_LARGEST_FILE = 64 << 20
"""Bytes of a file that is shown by itself: it is in memory as a whole. Larger ones come in the tar."""


@dataclass(frozen=True, slots=True)
class SnapshotList:
    """What of a run's workspaces can be looked at, workspace by workspace, oldest first."""

    items: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True)
class FileView:
    """One name in a folder of a snapshot. `size` in bytes of a file; `target` of a link."""

    name: str
    kind: str
    size: int
    target: str | None


@dataclass(frozen=True, slots=True)
class FileList:
    """What a folder of a snapshot holds, sorted."""

    items: tuple[FileView, ...]


@get("/runs/{run_id:str}/snapshots", opt={"scope": "read"}, tags=["runs"], summary="List snapshots")
async def list_snapshots(
    run_id: FromPath[str], runs: NamedDependency[Runs], workspaces: NamedDependency[Workspaces]
) -> SnapshotList:
    """Return the moments of the run's workspaces: each fork, each layer with its conflicts, failed commands."""
    await runs.summary(run_id)
    found = [await workspaces.snapshots(workspace) for workspace in await workspaces.of_run(run_id)]
    return SnapshotList(tuple(snapshot for each in found for snapshot in each))


@get(
    "/runs/{run_id:str}/snapshots/{workspace:str}/{name:str}/files",
    opt={"scope": "write"},
    tags=["runs"],
    summary="List a folder of a snapshot",
)
async def list_snapshot_files(
    run_id: FromPath[str],
    workspace: FromPath[str],
    name: FromPath[str],
    workspaces: NamedDependency[Workspaces],
    path: FromQuery[str] = "",
) -> FileList:
    """Return what the folder `path` holds, up to 10,000 names. Nothing can be changed."""
    async with workspaces.view(_of_run(run_id, workspace), name) as view:
        found = await anyio.to_thread.run_sync(lambda: layer_views.listing(view.lowers, path.strip("/")))
    return FileList(tuple(_shown(entry) for entry in found))


@get(
    "/runs/{run_id:str}/snapshots/{workspace:str}/{name:str}/file",
    opt={"scope": "write"},
    tags=["runs"],
    summary="Read a file of a snapshot",
)
async def read_snapshot_file(
    run_id: FromPath[str],
    workspace: FromPath[str],
    name: FromPath[str],
    path: FromQuery[str],
    workspaces: NamedDependency[Workspaces],
) -> Response[bytes]:
    """Return the bytes of the regular file `path`, up to 64 MiB."""
    async with workspaces.view(_of_run(run_id, workspace), name) as view:
        read = anyio.to_thread.run_sync(lambda: layer_views.read(view.lowers, path, _LARGEST_FILE))
        content = await read
    if content is None:
        raise NotFoundError(f"there is no file {path[:200]!r} in this snapshot")
    return Response(content, media_type="application/octet-stream", headers=_attachment("file"))


@get(
    "/runs/{run_id:str}/snapshots/{workspace:str}/{name:str}/tar",
    opt={"scope": "write"},
    tags=["runs"],
    summary="Download a snapshot",
)
async def download_snapshot(
    run_id: FromPath[str],
    workspace: FromPath[str],
    name: FromPath[str],
    workspaces: NamedDependency[Workspaces],
) -> Stream:
    """Return all files as a tar, without the `.git` at the top."""
    workspace_id = _of_run(run_id, workspace)
    async with workspaces.view(workspace_id, name):
        pass  # what is not there is said before the answer begins
    media, headers = "application/x-tar", _attachment(f"{workspace_id}-{name}.tar")
    return Stream(_tar(workspaces, workspace_id, name), media_type=media, headers=headers)


def _of_run(run_id: str, workspace: str) -> str:
    if not workspace.startswith(f"{run_id}."):
        raise NotFoundError(f"the run has no workspace {workspace[:140]!r}")
    return workspace


def _attachment(name: str) -> dict[str, Any]:
    # Never shown as a page of ours, whatever is in it.
    return {"content-disposition": f'attachment; filename="{name}"'}


def _shown(entry: ViewEntry) -> FileView:
    """Return an entry whose names are text: the bytes of others are replaced."""

    def text(name: str) -> str:
        return os.fsencode(name).decode(errors="replace")

    target = None if entry.target is None else text(entry.target)
    return FileView(text(entry.name), entry.kind, entry.size, target)


async def _tar(workspaces: Workspaces, workspace_id: str, name: str) -> AsyncIterator[bytes]:
    async with workspaces.view(workspace_id, name) as view:
        writer = _Writer(view.lowers)
        try:
            while piece := await writer.read():
                yield piece
        finally:
            writer.close()


class _Writer:
    """Writes a tar in a thread of its own: one that nobody reads any more ends at its next write."""

    def __init__(self, lowers: Sequence[Path]) -> None:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        self._lowers = lowers
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="snapshot tar", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            with os.fdopen(self._writing, "wb") as output:
                layer_views.write_tar(self._lowers, output)
        except BrokenPipeError:
            pass
        except Exception as error:  # noqa: BLE001 - raised again where the answer is written
            self._problem = error

    async def read(self) -> bytes:
        """Return the next piece, empty at the end. Raises what the writing raised: the answer breaks off."""
        await anyio.wait_readable(self._reading)
        piece = os.read(self._reading, _PIECE)
        if not piece:
            self._thread.join()
            if self._problem is not None:
                raise self._problem
        return piece

    def close(self) -> None:
        """End the thread, soon."""
        os.close(self._reading)
