"""What happens to a command's changes before they become a layer: owner, flush, harmless to parallel layers."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ci_platform import layers
from ci_platform.trees import Owner

_ONE_BY_ONE = 64
"""Files up to which they are flushed one by one; above, the file system is flushed as a whole."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """How much a layer holds."""

    paths: int
    size: int


def seal(upper: Path, owner: Owner, *, durable: bool) -> Sealed:
    """Give every path to `owner` (a container's root may have made some) and flush all to disk."""
    paths = size = 0
    for entry in layers.walk(upper):
        paths += 1
        size += entry.stat.st_size if entry.kind == "file" else 0
        if os.geteuid() == 0 and entry.kind != "whiteout":
            _give(entry, owner)
    if durable and paths:
        flush_tree(upper, paths)
    return Sealed(paths, size)


def _give(entry: layers.Entry, owner: Owner) -> None:
    if (entry.stat.st_uid, entry.stat.st_gid) != (owner.uid, owner.gid):
        os.chown(entry.name, owner.uid, owner.gid, dir_fd=entry.parent, follow_symlinks=False)


def flush_tree(upper: Path, paths: int) -> None:
    """Write a tree of so many paths to disk: one by one, or the file system as a whole."""
    if paths > _ONE_BY_ONE:
        _flush_file_system(upper)
        return
    for entry in layers.walk(upper):
        if entry.kind == "file" or stat.S_ISDIR(entry.stat.st_mode):
            try:
                descriptor = os.open(
                    entry.name,
                    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                    dir_fd=entry.parent,
                )
            except PermissionError:
                _flush_file_system(upper)
                return
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    with layers.directory(upper) as root:
        os.fsync(root)


def _flush_file_system(upper: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with layers.directory(upper) as descriptor:
        if libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs", str(upper))


def let_siblings_through(upper: Path, lowers: Sequence[Path]) -> None:
    """Make directories opaque no more that hide nothing this command saw.

    Overlayfs may mark a new directory opaque to save look-ups. Stacked upon a parallel layer that made the
    same directory, it would hide that one's files.
    """
    for entry in layers.walk(upper):
        if entry.kind == "opaque" and layers.locate(lowers, entry.path) is None:
            with layers.directory(entry.name, entry.parent) as descriptor:
                layers.clear_opaque(descriptor)
