"""Files that LFS keeps, on disk: once for each repository, verified before they have their name. Blocking."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ci_platform.errors import FailedError
from ci_platform.lfs_pointers import Pointer
from ci_platform.source.names import module_mirrors
from ci_platform.trees import Owner

_BEFORE = 2.0
"""Seconds by which files are older than any index that names them: git looks again at files that may be younger."""

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Held:
    """A file on disk: `name` is its path in the store, `linked` says that a tree has it too."""

    name: str
    size: int
    used_at: float
    linked: bool


@dataclass(frozen=True, slots=True)
class LfsStore:
    """Below `root`: a folder for each repository's trusted runs, and one for its forks' pull requests.

    Workspaces have hard links of them, so that they belong to the tenants; they are below layers and never changed.
    """

    root: Path
    owner: Owner

    def path(self, repo: str, pointer: Pointer, *, trusted: bool) -> Path:
        """Return where a file is, or is to be."""
        folder = self.root / module_mirrors(repo)[not trusted]
        return folder / pointer.oid[:2] / pointer.oid[2:4] / pointer.oid

    def missing(self, repo: str, wanted: Iterable[Pointer], *, trusted: bool) -> list[Pointer]:
        """Return those of some files that are not here, each once."""
        return [each for each in dict.fromkeys(wanted) if not self._has(repo, each, trusted=trusted)]

    def _has(self, repo: str, pointer: Pointer, *, trusted: bool) -> bool:
        path = self.path(repo, pointer, trusted=trusted)
        try:
            found = path.stat()
            # Its time of change is when it was used last; that of its content is in indexes and stays.
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        except FileNotFoundError:
            return False
        return found.st_size == pointer.size

    def held(self) -> Iterator[Held]:
        """Yield what is here."""
        for path in self.root.glob("_*/*/*/*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                name = str(path.relative_to(self.root))
                yield Held(name, found.st_size, found.st_ctime, found.st_nlink > 1)

    def remove(self, name: str, used_before: float) -> bool:
        """Remove a file, unless it was used later."""
        path = self.root / name
        try:
            if path.stat().st_ctime > used_before:
                return False
        except FileNotFoundError:
            return True
        path.unlink(missing_ok=True)
        return True

    def put(self, repo: str, pointer: Pointer, write: Callable[[IO[bytes]], None], *, trusted: bool) -> None:
        """Keep what `write` writes, which has to be what the pointer says. FailedError where it is not."""
        incoming, path = self.root / ".incoming", self.path(repo, pointer, trusted=trusted)
        incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = incoming / secrets.token_hex(8)
        try:
            with part.open("xb") as file:
                write(file)
            check(part, pointer)
            if os.geteuid() == 0:
                os.chown(part, self.owner.uid, self.owner.gid)
            part.chmod(0o644)
            os.utime(part, (time.time() - _BEFORE,) * 2)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process left half fetched."""
        for path in self.root.glob(".incoming/*"):
            path.unlink(missing_ok=True)


def check(path: Path, pointer: Pointer) -> None:
    """Raise FailedError where a file is not what a pointer names."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
        size = file.tell()
    if (digest.hexdigest(), size) != (pointer.oid, pointer.size):
        raise FailedError(f"the LFS file {pointer.oid} of {pointer.size:,} bytes came as something else")
