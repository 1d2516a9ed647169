"""Artifacts of runs: listed, looked into, downloaded, whole or file by file. Their bytes are a stranger's.

Whatever is in them is a download of bytes, never a page of ours: see `_harmless`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import quote

from litestar import Response, delete, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, HeaderParameter, QueryParameter
from litestar.response import Stream

from ci_platform.access import Actor
from ci_platform.api.ranges import NOT_SATISFIABLE, range_of
from ci_platform.artifacts import Artifacts, Opened
from ci_platform.artifacts.archives import size_of
from ci_platform.artifacts.contents import Entry, Listed, file_at, listing
from ci_platform.errors import InvalidInputError
from ci_platform.model import ArtifactRow
from ci_platform.runs import Runs

Form = Literal["file", "zip", "tar"]


@dataclass(frozen=True, slots=True)
class ArtifactView:
    """An artifact of a run. `size` in bytes of its `files`; `file` is the path of the one file where there is no other.

    `trusted` is false for those of a fork's pull request. One that is gone says when and `why_deleted`.
    """

    name: str
    digest: str
    files: int
    size: int
    file: str | None
    step: str
    count: int
    trusted: bool
    created_at: datetime
    expires_at: datetime
    deleted_at: datetime | None
    why_deleted: str | None


@dataclass(frozen=True, slots=True)
class ArtifactList:
    """The artifacts of a run, in the order of their uploads; of each name the newest."""

    items: tuple[ArtifactView, ...]


@dataclass(frozen=True, slots=True)
class ArtifactFiles:
    """What a folder of an artifact holds, sorted."""

    items: tuple[Listed, ...]


async def artifacts_of(artifacts: Artifacts, run_id: str) -> ArtifactList:
    """Return a run's artifacts, of each name the one that is there, or the last one that was."""
    found = dict[str, ArtifactRow]()
    for row in await artifacts.records.of_run(run_id, deleted=True):
        held = found.get(row.name)
        if held is None or held.deleted_at is not None:
            found[row.name] = row
    return ArtifactList(tuple(map(_view, sorted(found.values(), key=lambda row: row.seq or 0))))


def _view(row: ArtifactRow) -> ArtifactView:
    return ArtifactView(
        row.name,
        row.digest,
        row.files,
        row.size,
        row.only,
        row.step,
        row.count,
        not row.outside,
        row.created_at,
        row.expires_at,
        row.deleted_at,
        row.why_deleted,
    )


@get("/runs/{run_id:str}/artifacts", opt={"scope": "read"}, tags=["runs"], summary="List artifacts")
async def list_artifacts(
    run_id: FromPath[str], runs: NamedDependency[Runs], artifacts: NamedDependency[Artifacts]
) -> ArtifactList:
    """Return what the run has kept, also what is gone by now, with the reason."""
    await runs.summary(run_id)
    return await artifacts_of(artifacts, run_id)


@delete(
    "/runs/{run_id:str}/artifacts/{name:str}",
    opt={"scope": "write"},
    tags=["runs"],
    summary="Delete an artifact",
)
async def delete_artifact(
    run_id: FromPath[str],
    name: FromPath[str],
    artifacts: NamedDependency[Artifacts],
    actor: NamedDependency[Actor],
) -> None:
    """Delete an artifact before its time; the run goes on saying that there was one, and who deleted it."""
    await artifacts.delete(run_id, name, by=actor.name)


@get(
    "/runs/{run_id:str}/artifacts/{name:str}/files",
    opt={"scope": "read"},
    tags=["runs"],
    summary="List a folder of an artifact",
)
async def list_artifact_files(
    run_id: FromPath[str],
    name: FromPath[str],
    artifacts: NamedDependency[Artifacts],
    path: FromQuery[str] = "",
) -> ArtifactFiles:
    """Return what the folder `path` holds, up to 10,000 names, each file with its size and digest."""
    async with artifacts.opened(run_id, name) as opened:
        return ArtifactFiles(tuple(listing(opened.entries, path.strip("/"))))


@get(
    "/runs/{run_id:str}/artifacts/{name:str}/download",
    opt={"scope": "read"},
    tags=["runs"],
    summary="Download an artifact",
)
async def download_artifact(
    *,
    run_id: FromPath[str],
    name: FromPath[str],
    artifacts: NamedDependency[Artifacts],
    form: Annotated[Form | None, QueryParameter(name="format")] = None,
    path: FromQuery[str | None] = None,
    known: Annotated[str | None, HeaderParameter(name="If-None-Match")] = None,
    wanted: Annotated[str | None, HeaderParameter(name="Range")] = None,
    unless: Annotated[str | None, HeaderParameter(name="If-Range")] = None,
) -> Response[Any]:
    """Return the one file of an artifact as it is, or all of several as a `zip` or `tar`; with `path` one of them.

    Files are served in parts (`Range`), archives as a whole. The `ETag` follows from the contents: an archive of the
    same files is the same bytes.
    """
    async with artifacts.opened(run_id, name) as opened:
        row = opened.row
        if path is not None or (form in {None, "file"} and row.only is not None):
            if form not in {None, "file"}:
                raise InvalidInputError("path= is one file, which is in no archive")
            answer = _file(file_at(opened.entries, path or row.only or ""), known, wanted, unless)
        elif form == "file":
            raise InvalidInputError(
                f"the artifact {name!r} has more than one file: ask for zip or tar, or name a path="
            )
        else:
            answer = _archive(opened, form or "zip", known)
    if answer.pieces is None:
        return Response(None, status_code=answer.status, headers=answer.headers)
    sent, media = _sent(artifacts, row, answer.pieces), "application/octet-stream"
    return Stream(sent, status_code=answer.status, headers=answer.headers, media_type=media)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What to send: no pieces where there is nothing to send."""

    status: int
    headers: dict[str, str]
    pieces: Callable[[Opened], Iterator[bytes]] | None = None


def _file(entry: Entry, known: str | None, wanted: str | None, unless: str | None) -> _Answer:
    tag = f'"{entry.content}"'
    headers = _harmless(entry.path.rpartition("/")[2], tag) | {"accept-ranges": "bytes"}
    if _is_known(known, tag):
        return _Answer(304, headers)
    part = range_of(wanted, entry.size) if unless in {None, tag} else None
    if part is NOT_SATISFIABLE:
        return _Answer(416, headers | {"content-range": f"bytes */{entry.size}"})
    if part is None:
        return _Answer(
            200, headers | {"content-length": str(entry.size)}, lambda opened: opened.pieces(entry)
        )
    start, end = part
    headers |= {"content-range": f"bytes {start}-{end - 1}/{entry.size}", "content-length": str(end - start)}
    return _Answer(206, headers, lambda opened: opened.part(entry, start, end))


def _archive(opened: Opened, form: Literal["zip", "tar"], known: str | None) -> _Answer:
    tag = f'"{opened.row.digest.removeprefix("sha256:")}-{form}"'
    headers = _harmless(f"{opened.row.name}.{form}", tag)
    if _is_known(known, tag):
        return _Answer(304, headers)
    size = size_of(form, opened.entries)
    return _Answer(200, headers | {"content-length": str(size)}, lambda opened: opened.archive(form))


def _is_known(known: str | None, tag: str) -> bool:
    return known is not None and (
        known == "*" or tag in [each.strip().removeprefix("W/") for each in known.split(",")]
    )


def _harmless(name: str, tag: str) -> dict[str, str]:
    """Return headers with which the bytes are a file to be saved, and even opened as a page could do nothing."""
    plain = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-+ ") else "_" for sign in name)
    return {
        "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}",
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
        "cache-control": "private, no-cache",
        "etag": tag,
    }


async def _sent(
    artifacts: Artifacts, row: ArtifactRow, pieces: Callable[[Opened], Iterator[bytes]]
) -> AsyncIterator[bytes]:
    """Yield the bytes. The artifact is opened again: nobody may ever begin to read an answer."""
    async with artifacts.reading(row) as opened:
        async for piece in artifacts.steps(pieces(opened)):
            yield piece
