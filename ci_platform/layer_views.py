"""Layers looked at as one tree, without a mount: folders listed, files read, all of it as a tar; links not followed.

What is in a layer was made by tenants: everything goes through directory descriptors, and what is neither a file,
a folder nor a link is left out.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ci_platform import layers
from ci_platform.errors import InvalidInputError, LimitExceededError, NotFoundError

MOST_LISTED = 10_000
"""Entries of one folder that are listed."""

_OWNED_BY = "ci"


@dataclass(frozen=True, slots=True)
class ViewEntry:
    """One name in a folder. `size` in bytes of a file; `target` of a link; `layer` holds it."""

    path: str
    kind: Literal["file", "script", "folder", "symlink"]
    size: int
    modified_at: float
    target: str | None
    layer: Path

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


def listing(lowers: Sequence[Path], folder: str = "", *, most: int = MOST_LISTED) -> list[ViewEntry]:
    """Return what layers (topmost first) show in a folder, sorted by name.

    NotFoundError where there is no such folder, LimitExceededError where it has more than `most` entries.
    """
    found, hidden, is_there = dict[str, ViewEntry | None](), set[str](), False
    for layer in lowers:
        descriptor, covers = _descend(layer, _parts(folder))
        if descriptor is not None:
            is_there = True
            try:
                _scan(descriptor, layer, folder, found, hidden, most)
            finally:
                os.close(descriptor)
        if covers:
            break
    if not is_there:
        raise NotFoundError(f"there is no folder {folder[:200]!r} in this snapshot")
    return [entry for _, entry in sorted(found.items()) if entry is not None]


def _parts(path: str) -> list[str]:
    parts = path.split("/") if path else []
    if any(part in {"", ".", ".."} or "\0" in part for part in parts) or len(parts) > layers.MAX_DEPTH:
        raise InvalidInputError(f"a path in a snapshot is relative and plain, not {path[:200]!r}")
    return parts


def _scan(
    descriptor: int,
    layer: Path,
    folder: str,
    found: dict[str, ViewEntry | None],
    hidden: set[str],
    most: int,
) -> None:
    with os.scandir(descriptor) as entries:
        for entry in entries:
            if entry.name in found or entry.name in hidden:
                continue
            status = entry.stat(follow_symlinks=False)
            if layers.is_whiteout(descriptor, entry.name, status):
                hidden.add(entry.name)
                continue
            found[entry.name] = _entry(descriptor, layer, folder, entry.name, status)
            if len(found) > most:
                raise LimitExceededError(f"the folder {folder[:200]!r} has more than {most:,} entries")


def _entry(parent: int, layer: Path, folder: str, name: str, status: os.stat_result) -> ViewEntry | None:
    path, mode = f"{folder}/{name}" if folder else name, status.st_mode
    if stat.S_ISREG(mode):
        kind: Literal["file", "script"] = "script" if mode & stat.S_IXUSR else "file"
        return ViewEntry(path, kind, status.st_size, status.st_mtime, None, layer)
    if stat.S_ISLNK(mode):
        target = os.readlink(name, dir_fd=parent)
        return ViewEntry(path, "symlink", 0, status.st_mtime, target, layer)
    if stat.S_ISDIR(mode):
        return ViewEntry(path, "folder", 0, status.st_mtime, None, layer)
    return None


def _descend(layer: Path, parts: Sequence[str]) -> tuple[int | None, bool]:
    """Return a folder of one layer, opened, if it has it; and whether it hides what layers below have there."""
    covers, descriptor = False, layers.open_directory(layer)
    for name in parts:
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            inner = layers.open_directory(name, descriptor) if stat.S_ISDIR(status.st_mode) else None
        except FileNotFoundError:
            os.close(descriptor)
            return None, covers
        os.close(descriptor)
        if inner is None:  # a file, a link, a mark of deletion
            return None, True
        descriptor, covers = inner, covers or layers.is_opaque(inner)
    return descriptor, covers


def read(lowers: Sequence[Path], path: str, limit: int) -> bytes | None:
    """Return a regular file, None where there is none or it is a link; LimitExceededError above `limit` bytes."""
    if layers.locate(lowers, path) is None:
        return None
    layer = next((lower for lower in lowers if layers.locate([lower], path) is not None), None)
    return None if layer is None else _content(layer, path, limit)


def _content(layer: Path, path: str, limit: int) -> bytes | None:
    try:
        with layers.open_file(layer, path) as file:
            content = file.read(limit + 1)
    except OSError:
        return None
    if len(content) > limit:
        raise LimitExceededError(f"{path} has more than {limit} bytes")
    return content


def walk(lowers: Sequence[Path], folder: str = "") -> Iterator[ViewEntry]:
    """Yield everything that layers show, parents before what is in them, without the `.git` at the top."""
    for entry in listing(lowers, folder, most=layers.MAX_PATHS):
        if not folder and entry.name == ".git":
            continue
        yield entry
        if entry.kind == "folder":
            yield from walk(lowers, entry.path)


def write_tar(lowers: Sequence[Path], output: IO[bytes]) -> None:
    """Write everything that layers show as a tar, without the `.git` at the top."""
    with tarfile.open(fileobj=output, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for entry in walk(lowers):
            member = tarfile.TarInfo(entry.path)
            member.mtime, member.uname, member.gname = int(entry.modified_at), _OWNED_BY, _OWNED_BY
            if entry.kind == "folder":
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
            elif entry.target is not None:
                member.type, member.mode, member.linkname = tarfile.SYMTYPE, 0o777, entry.target
                archive.addfile(member)
            else:
                member.mode = 0o755 if entry.kind == "script" else 0o644
                with suppress(FileNotFoundError), layers.open_file(entry.layer, entry.path) as file:
                    member.size = os.fstat(file.fileno()).st_size
                    archive.addfile(member, file)
