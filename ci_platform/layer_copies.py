"""Put layers onto a tree, or onto each other: by copying, by reference (reflink), by hard links."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ci_platform import layers
from ci_platform.errors import LimitExceededError

FICLONE = 0x40049409
"""The ioctl that lets two files share their blocks until one is written to."""

_CHUNK = 1 << 30


@dataclass(frozen=True, slots=True)
class Apply:
    """How `apply` puts a layer onto a tree.

    `link` shares files with the layer (only for targets that nobody writes to), `clone` copies them by
    reference (reflink). `merge` makes a layer out of layers: whiteouts and opaque directories stay in force.
    """

    link: bool = False
    clone: bool = False
    merge: bool = False

    def __call__(self, layer: Path, target: Path) -> None:
        """Put a layer, or a whole tree, onto `target`, which exists."""
        with layers.directory(layer) as source, layers.directory(target) as onto:
            self._apply_directory(source, onto, 0)
            _copy_metadata(os.fstat(source), onto)

    def _apply_directory(self, source: int, onto: int, depth: int) -> None:
        if depth > layers.MAX_DEPTH:
            raise LimitExceededError(f"directories are nested deeper than {layers.MAX_DEPTH}")
        with os.scandir(source) as listing:
            entries = list(listing)
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                self._apply_subdirectory(entry.name, source, onto, depth)
            elif layers.is_whiteout(source, entry.name, found):
                layers.remove_at(onto, entry.name)
                if self.merge:
                    layers.make_whiteout(onto, entry.name)
            else:
                layers.remove_at(onto, entry.name)
                self._place(entry.name, found, source, onto)

    def _apply_subdirectory(self, name: str, source: int, onto: int, depth: int) -> None:
        with layers.directory(name, source) as inner:
            opaque, hides = layers.is_opaque(inner), False
            if opaque or not _is_directory(onto, name):
                # A directory over a file or over a whiteout shows nothing from further down either.
                hides = layers.remove_at(onto, name) or opaque
                os.mkdir(name, 0o700, dir_fd=onto)
            with layers.directory(name, onto) as into:
                if hides and self.merge:
                    layers.make_opaque(into)
                self._apply_directory(inner, into, depth + 1)
                _copy_metadata(os.fstat(inner), into)

    def _place(self, name: str, found: os.stat_result, source: int, onto: int) -> None:
        if self.link:
            os.link(name, name, src_dir_fd=source, dst_dir_fd=onto, follow_symlinks=False)
        elif stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=onto)
            _copy_owner(found, name, onto)
            os.utime(name, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=onto, follow_symlinks=False)
        elif stat.S_ISREG(found.st_mode):
            copy_file(name, source, onto, clone=self.clone)
        # Sockets and pipes mean nothing without the process that made them.


def _is_directory(parent: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def copy_file(name: str, source: int, onto: int, *, clone: bool = False) -> None:
    """Copy a regular file between directories with mode, owner and mtime, without setuid and setgid."""
    reader, mode = layers.open_readable(name, source)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        writer = os.open(name, flags, 0o600, dir_fd=onto)
        try:
            if not (clone and _clone(writer, reader)):
                while os.sendfile(writer, reader, None, _CHUNK):
                    pass
            _copy_metadata(os.fstat(reader), writer)
            os.fchmod(writer, mode & 0o1777)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _clone(writer: int, reader: int) -> bool:
    """Share the blocks of a file; false where the two lie on different file systems."""
    try:
        fcntl.ioctl(writer, FICLONE, reader)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.ENOTSUP}:
            return False
        raise
    return True


def _copy_owner(found: os.stat_result, name: str, onto: int) -> None:
    if os.geteuid() == 0:
        os.chown(name, found.st_uid, found.st_gid, dir_fd=onto, follow_symlinks=False)


def _copy_metadata(found: os.stat_result, descriptor: int) -> None:
    if os.geteuid() == 0:
        os.fchown(descriptor, found.st_uid, found.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & 0o1777)
    os.utime(descriptor, ns=(found.st_atime_ns, found.st_mtime_ns))
