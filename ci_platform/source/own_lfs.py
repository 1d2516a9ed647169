"""Files that LFS keeps for a repository of our own, inside of its folder, where git's own tools keep them. Blocking.

A fork of the repository has hard links of them, a deletion takes them along, and runs find them as beside any other
repository on this machine. A file is pushed before the commit that names it: its time of modification is when it was
announced last, and garbage are those alone of which that is long ago and no commit has come.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ci_platform import layers
from ci_platform.errors import FailedError

OID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LEFT_BEHIND = 86_400.0
"""Seconds after which a part of an upload is of one that was killed."""

_PIECE = 1 << 20


def place_of(repository: Path, oid: str) -> Path:
    """Return where a file of a repository is kept."""
    return repository / "lfs" / "objects" / oid[:2] / oid[2:4] / oid


@dataclass(frozen=True, slots=True)
class Pushed:
    """A file that is here: its id, its bytes (0 where forks share it), when it was announced last."""

    oid: str
    size: int
    used_at: float


@dataclass(frozen=True, slots=True)
class OwnLfs:
    """The files of one repository, by the SHA-256 of their content in hexadecimal."""

    repository: Path

    def size(self, oid: str) -> int | None:
        """Return the bytes of a file, None where it is not here."""
        try:
            return place_of(self.repository, oid).stat().st_size
        except FileNotFoundError:
            return None

    def announced(self, oid: str) -> bool:
        """Note that a commit that names a file is about to come; false where the file is not here."""
        try:
            os.utime(place_of(self.repository, oid))
        except FileNotFoundError:
            return False
        return True

    def pushed(self) -> Iterator[Pushed]:
        """Yield what is here."""
        for path in files(self.repository):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield Pushed(path.name, found.st_size if found.st_nlink == 1 else 0, found.st_mtime)

    def remove(self, oid: str, announced_before: float) -> bool:
        """Remove a file, unless it was announced later."""
        place, aside = place_of(self.repository, oid), self.begin()
        try:
            if place.stat().st_mtime >= announced_before:
                return False
            place.rename(aside)  # who announces it from here on is told that it is not here, and sends it
            if aside.stat().st_mtime >= announced_before:
                aside.replace(place)
                return False
        except FileNotFoundError:
            return True
        aside.unlink(missing_ok=True)
        return True

    def taken(self) -> int:
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in files(self.repository))

    def begin(self) -> Path:
        """Return the name of a file, not there yet, for an upload: `keep` it, or `forget` it."""
        folder = self.repository / "lfs" / "incoming"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in folder.iterdir():
            with suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _LEFT_BEHIND:
                    left.unlink()
        return folder / secrets.token_hex(8)

    def forget(self, part: Path) -> None:
        """Remove what was not kept of an upload."""
        part.unlink(missing_ok=True)

    def keep(self, part: Path, oid: str) -> None:
        """Give an upload its name, flushed. FailedError where it is not what that says."""
        digest = hashlib.sha256()
        with part.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
            if digest.hexdigest() != oid:
                raise FailedError(f"what was sent as {oid} is {digest.hexdigest()}")
            os.fsync(file.fileno())
        part.chmod(0o444)
        place = place_of(self.repository, oid)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.replace(place)
        for folder in (place.parent, place.parent.parent):
            with layers.directory(folder) as descriptor:
                os.fsync(descriptor)


def files(repository: Path) -> Iterator[Path]:
    """Yield all files of a repository."""
    for path in (repository / "lfs" / "objects").glob("??/??/*"):
        if OID.fullmatch(path.name):
            yield path
