"""The format of layers on disk, which is overlayfs's own: walk, look up, remove; links are not followed.

A layer is a directory tree. A character device 0:0 (or, where mknod is refused, an empty file with the xattr
`user.overlay.whiteout`) hides what lower layers have under its path; a directory with the xattr
`trusted.overlay.opaque` (as root) or `user.overlay.opaque` hides what they have below it. What is in a layer
was made by tenants: trees without permissions, deeper than PATH_MAX, full of links to everywhere. Everything
here goes through directory descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ci_platform.errors import LimitExceededError, UnavailableError

Kind = Literal["file", "directory", "opaque", "symlink", "whiteout", "other"]

MAX_DEPTH = 128
"""Directories below each other. Each level costs a walk an open descriptor; real trees stay below 60."""

MAX_PATHS = 1_000_000
"""Paths of one layer, as many as a commit may have: whoever looks through a layer holds some 300 bytes of each."""

_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")
_WHITEOUT = "user.overlay.whiteout"
_AT_ONCE = 10_000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of a layer, relative; `parent` is its directory's descriptor, open until the next entry."""

    path: str
    name: str
    parent: int
    kind: Kind
    stat: os.stat_result


def open_directory(name: str | Path, parent: int | None = None) -> int:
    """Open a directory that may have been left without permissions; its owner gets them back."""
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    except PermissionError:
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            reference = f"/proc/self/fd/{handle}"
            os.chmod(reference, stat.S_IMODE(os.fstat(handle).st_mode) | 0o700)  # noqa: PTH101
            return os.open(reference, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(handle)
    if os.geteuid() != 0 and (mode := stat.S_IMODE(os.fstat(descriptor).st_mode)) & 0o700 != 0o700:
        os.fchmod(descriptor, mode | 0o700)
    return descriptor


@contextlib.contextmanager
def directory(name: str | Path, parent: int | None = None) -> Iterator[int]:
    """`open_directory` that closes."""
    descriptor = open_directory(name, parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def walk(root: Path) -> Iterator[Entry]:
    """Yield every path of a tree, parents before children. LimitExceededError beyond MAX_DEPTH and MAX_PATHS."""
    left = MAX_PATHS
    stack: list[tuple[str, int, Iterator[os.DirEntry[str]]]] = []
    try:
        descriptor = open_directory(root)
        stack.append(("", descriptor, iter(_listing(descriptor, left))))
        while stack:
            prefix, parent, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                os.close(stack.pop()[1])
                continue
            left -= 1
            path, found = prefix + entry.name, entry.stat(follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                yield Entry(path, entry.name, parent, _kind(parent, entry.name, found), found)
                continue
            if len(stack) > MAX_DEPTH:
                raise LimitExceededError(f"directories are nested deeper than {MAX_DEPTH}: {path[:60]!r}…")
            descriptor = open_directory(entry.name, parent)
            stack.append((path + "/", descriptor, iter(_listing(descriptor, left))))
            kind: Kind = "opaque" if is_opaque(descriptor) else "directory"
            yield Entry(path, entry.name, parent, kind, found)
    finally:
        for _, descriptor, _ in stack:
            os.close(descriptor)


def _listing(descriptor: int, most: int) -> list[os.DirEntry[str]]:
    with os.scandir(descriptor) as entries:
        found = list(itertools.islice(entries, max(most, 0) + 1))
    if len(found) > most:
        raise LimitExceededError(f"a command left more than {MAX_PATHS:,} files")
    return sorted(found, key=lambda entry: entry.name)


def _kind(parent: int, name: str, found: os.stat_result) -> Kind:
    if is_whiteout(parent, name, found):
        return "whiteout"
    if stat.S_ISREG(found.st_mode):
        return "file"
    return "symlink" if stat.S_ISLNK(found.st_mode) else "other"


def is_opaque(descriptor: int) -> bool:
    """Whether a directory hides what lower layers have below its path."""
    return any(_attribute(descriptor, name) == b"y" for name in _OPAQUE)


def is_whiteout(parent: int, name: str, found: os.stat_result) -> bool:
    """Whether a path stands for "deleted"."""
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == 0
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        return False
    return _attribute(f"/proc/self/fd/{parent}/{name}", _WHITEOUT) is not None


def _attribute(target: int | str, name: str) -> bytes | None:
    try:
        return (
            os.getxattr(target, name)
            if isinstance(target, int)
            else os.getxattr(target, name, follow_symlinks=False)
        )
    except OSError:
        return None


def make_whiteout(parent: int, name: str) -> None:
    """Hide what lower layers have under a name. UnavailableError where the file system offers no way."""
    try:
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
    except PermissionError:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent))
        try:
            os.setxattr(f"/proc/self/fd/{parent}/{name}", _WHITEOUT, b"y", follow_symlinks=False)
        except OSError as error:
            os.unlink(name, dir_fd=parent)
            message = f"this file system can record no deletion: no whiteout device, no xattr ({error})"
            raise UnavailableError(message) from error


def make_opaque(descriptor: int) -> None:
    """Hide what lower layers have below a directory."""
    try:
        os.setxattr(descriptor, _OPAQUE[0], b"y")
    except PermissionError:
        os.setxattr(descriptor, _OPAQUE[1], b"y")


def clear_opaque(descriptor: int) -> None:
    """Let a directory show what lower layers have below it."""
    for name in _OPAQUE:
        with contextlib.suppress(OSError):
            os.removexattr(descriptor, name)


def taken(path: Path) -> tuple[int, int]:
    """Return the bytes and the inodes that a folder takes on disk; what vanishes meanwhile does not count."""
    size, files, folders = 0, 0, [str(path)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    size, files = size + entry.stat(follow_symlinks=False).st_blocks * 512, files + 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue
    return size, files


def remove_tree(path: Path) -> None:
    """Remove a tree of any depth and any permissions; nothing where there is nothing.

    Subdirectories are lifted to the top before they are emptied, so neither depth nor path length matters.
    """
    try:
        root = open_directory(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
            raise
        path.unlink(missing_ok=True)
        return
    try:
        _empty(root)
    finally:
        os.close(root)
    path.rmdir()


def _empty(root: int) -> None:
    names = (f".{token}.{number}" for token in [secrets.token_hex(8)] for number in itertools.count())
    lifted = _drain(root, root, names)
    while lifted:
        name = lifted.pop()
        with directory(name, root) as descriptor:
            lifted += _drain(descriptor, root, names)
        os.rmdir(name, dir_fd=root)


def _drain(descriptor: int, root: int, names: Iterator[str]) -> list[str]:
    lifted: list[str] = []
    while found := _some(descriptor, known=set(lifted) if descriptor == root else set()):
        _drain_some(found, descriptor, root, names, lifted)
    return lifted


def _some(descriptor: int, known: set[str]) -> list[os.DirEntry[str]]:
    """Return some entries of a directory, none when it has no others than `known`: a tenant may leave millions."""
    with os.scandir(descriptor) as entries:
        return list(itertools.islice((entry for entry in entries if entry.name not in known), _AT_ONCE))


def _drain_some(
    found: list[os.DirEntry[str]], descriptor: int, root: int, names: Iterator[str], lifted: list[str]
) -> None:
    for entry in found:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=descriptor)
        elif descriptor == root:
            lifted.append(entry.name)
        else:
            # Moving a directory changes its "..": that takes the right to write into it.
            os.close(open_directory(entry.name, descriptor))
            lifted.append(next(names))
            os.rename(entry.name, lifted[-1], src_dir_fd=descriptor, dst_dir_fd=root)


def remove_at(parent: int, name: str) -> bool:
    """Remove what a directory has under a name, whatever it is; returns whether there was something."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(found.st_mode):
        with directory(name, parent) as descriptor:
            _empty(descriptor)
        os.rmdir(name, dir_fd=parent)
    else:
        os.unlink(name, dir_fd=parent)
    return True


def locate(lowers: Sequence[Path], path: str) -> Path | None:
    """Find what the merged view of layers (topmost first) has at a relative path, which may be a link."""
    parts = Path(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        return None
    for layer in lowers:
        found, lower_hidden = _locate_in(layer, parts)
        if found is not None or lower_hidden:
            return found
    return None


def _locate_in(layer: Path, parts: Sequence[str]) -> tuple[Path | None, bool]:
    """Return the path in this layer, and whether layers below are hidden from it."""
    hidden, parent = False, open_directory(layer)
    try:
        for depth, name in enumerate(parts, start=1):
            try:
                found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                return None, hidden
            if is_whiteout(parent, name, found):
                return None, True
            if depth == len(parts):
                return layer.joinpath(*parts), True
            if not stat.S_ISDIR(found.st_mode):
                return None, True
            inner = open_directory(name, parent)
            os.close(parent)
            parent = inner
            hidden = hidden or is_opaque(parent)
        return None, hidden
    finally:
        os.close(parent)


def open_readable(name: str, parent: int) -> tuple[int, int]:
    """Open for reading even what its owner made unreadable; returns the descriptor and the mode it had."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        reader = os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent)
    except PermissionError:
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            reference, mode = f"/proc/self/fd/{handle}", stat.S_IMODE(os.fstat(handle).st_mode)
            os.chmod(reference, mode | 0o400)  # noqa: PTH101
            try:
                return os.open(reference, flags), mode
            finally:
                os.chmod(reference, mode)  # noqa: PTH101
        finally:
            os.close(handle)
    return reader, stat.S_IMODE(os.fstat(reader).st_mode)


@contextlib.contextmanager
def open_file(root: Path, path: str) -> Iterator[IO[bytes]]:
    """Open a regular file of a tree by its relative path, through real directories only. OSError otherwise."""
    *folders, name = path.split("/")
    descriptor = open_directory(root)
    try:
        for folder in folders:
            inner = open_directory(folder, descriptor)
            os.close(descriptor)
            descriptor = inner
        reader, _ = open_readable(name, descriptor)
    finally:
        os.close(descriptor)
    with os.fdopen(reader, "rb") as file:
        if not stat.S_ISREG(os.fstat(reader).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        yield file
