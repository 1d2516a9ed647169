"""Write the files of a commit below one folder, whatever the commit says, and take down git's index of them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ci_platform import layers
from ci_platform.cones import Cone
from ci_platform.errors import FailedError, LimitExceededError
from ci_platform.git_index import GITLINK, GITLINK_OUTSIDE, Changes, Recorder

_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Owner:
    """Who the files of tenants belong to."""

    uid: int
    gid: int

    @classmethod
    def of_sandboxes(cls, uid: int) -> Owner:
        """Return `uid` where the platform is root and may give files away, else who the platform is."""
        return cls(uid, uid) if os.geteuid() == 0 else cls(os.geteuid(), os.getegid())


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """The largest commit that is written to disk: a few kilobytes of git can name billions of files."""

    files: int = 1_000_000
    size: int = 16 * 1024**3


@dataclass(slots=True)
class TreeWriter:
    """Writes one tree depth first. Refuses names and duplicates by which a commit could leave its tree.

    What it writes is taken down in `index`. Of a folder outside of `cone` it takes down the entries alone. Files
    and folders get the time `modified_at` (in ns), where it is given.
    """

    root: Path
    owner: Owner
    limits: TreeLimits
    index: Recorder | Changes
    cone: Cone | None = None
    modified_at: int | None = None
    files: int = 0
    size: int = 0
    _stack: list[int] = field(default_factory=list)
    _path: list[bytes] = field(default_factory=list)
    _outside: int = 0

    def __enter__(self) -> Self:
        self._stack.append(layers.open_directory(self.root))
        self._give(self._stack[-1], 0o755)
        return self

    def __exit__(self, *_: object) -> None:
        while self._stack:
            self._finish_folder()

    @property
    def is_outside(self) -> bool:
        """Whether the folder that is being written is not to be on disk."""
        return self._outside > 0

    def enter(self, name: bytes, oid: bytes) -> None:
        """Make a directory and go into it."""
        path = _checked(name)
        if len(self._path) >= layers.MAX_DEPTH:
            raise LimitExceededError(f"directories of the commit are nested deeper than {layers.MAX_DEPTH}")
        self._count(0)
        self.index.enter(name, oid)
        self._path.append(name)
        if self.is_outside or (self.cone is not None and not self.cone.holds(b"/".join(self._path))):
            self._outside += 1
        else:
            self._make(path)

    def _make(self, path: str) -> None:
        parent = self._stack[-1]
        with _naming(path):
            os.mkdir(path, dir_fd=parent)
        self._stack.append(layers.open_directory(path, parent))
        self._give(self._stack[-1], 0o755)

    def leave(self) -> None:
        """Go back to the parent directory."""
        self._path.pop()
        if self.is_outside:
            self._outside -= 1
            self.index.leave(None)
        else:
            self.index.leave(self._finish_folder())

    def _finish_folder(self) -> os.stat_result:
        if self.modified_at is not None:
            os.utime(self._stack[-1], ns=(self.modified_at, self.modified_at))
        found = os.fstat(self._stack[-1])
        os.close(self._stack.pop())
        return found

    def file(self, name: bytes, content: bytes, oid: bytes, *, executable: bool) -> None:
        """Write a regular file."""
        path = _checked(name)
        self._count(len(content))
        mode = 0o755 if executable else 0o644
        with _naming(path):
            descriptor = os.open(path, _FILE, 0o600, dir_fd=self._stack[-1])
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            self._give(descriptor, mode)
            if self.modified_at is not None:
                os.utime(descriptor, ns=(self.modified_at, self.modified_at))
            self._record(name, stat.S_IFREG | mode, oid, os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def symlink(self, name: bytes, target: bytes, oid: bytes) -> None:
        """Write a symbolic link, to wherever it says: only tenants follow it."""
        path, parent = _checked(name), self._stack[-1]
        self._count(len(target))
        if not target or b"\0" in target:
            raise FailedError(f"the commit has a symbolic link without a target: {path!r}")
        with _naming(path):
            os.symlink(target, path, dir_fd=parent)
        if os.geteuid() == 0:
            os.chown(path, self.owner.uid, self.owner.gid, dir_fd=parent, follow_symlinks=False)
        if self.modified_at is not None:
            times = (self.modified_at, self.modified_at)
            os.utime(path, ns=times, dir_fd=parent, follow_symlinks=False)
        self._record(name, stat.S_IFLNK, oid, os.stat(path, dir_fd=parent, follow_symlinks=False))

    def submodule(self, name: bytes, oid: bytes) -> None:
        """Make the empty folder of a submodule."""
        path = _checked(name)
        self._count(0)
        if not self.is_outside:
            self._make(path)
            self._finish_folder()
        self._record(name, GITLINK_OUTSIDE if self.is_outside else GITLINK, oid, None)

    def leave_out(self, name: bytes, mode: int, oid: bytes) -> None:
        """Take a file down that is outside of the cone."""
        _checked(name)
        self._count(0)
        self._record(name, mode, oid, None)

    def hide(self, name: bytes) -> None:
        """Record in a delta that the base's path is gone."""
        path = _checked(name)
        self._count(0)
        self.index.remove(self._full(name))
        if not self.is_outside:
            with _naming(path):
                layers.make_whiteout(self._stack[-1], path)

    def replace(self, name: bytes) -> None:
        """Record in a delta that what comes next under a name has nothing of what the base has there."""
        self.index.remove(self._full(name))

    def _full(self, name: bytes) -> bytes:
        return b"/".join([*self._path, name])

    def _record(self, name: bytes, mode: int, oid: bytes, found: os.stat_result | None) -> None:
        self.index.add(self._full(name), mode, oid, found)

    def _count(self, size: int) -> None:
        self.files += 1
        self.size += size
        if self.files > self.limits.files:
            raise LimitExceededError(f"the commit has more than {self.limits.files:,} files and folders")
        if self.size > self.limits.size:
            raise LimitExceededError(f"the commit has more than {self.limits.size:,} bytes in its files")

    def _give(self, descriptor: int, mode: int) -> None:
        if os.geteuid() == 0:
            os.fchown(descriptor, self.owner.uid, self.owner.gid)
        os.fchmod(descriptor, mode)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise FailedError(f"the commit has two entries named {path!r}") from None
    except OSError as error:
        if error.errno in {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}:
            raise FailedError(f"the commit has a name that no file can have: {path[:80]!r}") from error
        raise


def _checked(name: bytes) -> str:
    if name in {b"", b".", b".."} or b"/" in name or b"\0" in name or name.lower() == b".git":
        raise FailedError(f"the commit has an entry named {name!r}, which no tree may have")
    return os.fsdecode(name)
