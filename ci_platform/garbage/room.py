"""How much room the disk has: enough, little enough to collect garbage, too little for new runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci_platform.garbage.planning import Need, in_bytes

_MOST_BYTES, _SHARE_OF_BYTES = 1024**3, 20
_MOST_FILES, _SHARE_OF_FILES = 100_000, 50
_ENOUGH = 2
"""Times what new runs need: there is no more to be made than this."""
_LITTLE = 1.5
"""Times what new runs need: garbage is collected before one has to wait."""


@dataclass(frozen=True, slots=True)
class Space:
    """A file system: what is free of it, and what must be for new runs. `files` 0: it does not count them."""

    folder: Path
    free: int
    must: int
    files: int
    must_files: int

    def lacks(self, times: float = 1) -> Need:
        """Return what is missing to so many times what must be free."""
        return Need(
            max(0, int(self.must * times) - self.free), max(0, int(self.must_files * times) - self.files)
        )


class Room:
    """The file systems below some folders. `min_free` and `min_files` None: a share of each.

    Asks the kernel each time, which takes microseconds. *Errors*: none; what cannot be asked has room.
    """

    def __init__(
        self, folders: Sequence[Path], *, min_free: int | None = None, min_files: int | None = None
    ) -> None:
        self._folders, self._min_free, self._min_files = folders, min_free, min_files

    def spaces(self) -> Iterator[Space]:
        """Yield each file system once."""
        seen = set[int]()
        for folder in self._folders:
            try:
                device, found = folder.stat().st_dev, os.statvfs(folder)
            except OSError:
                continue
            if device not in seen:
                seen.add(device)
                yield self._space(folder, found)

    def _space(self, folder: Path, found: os.statvfs_result) -> Space:
        size, files = found.f_blocks * found.f_frsize, found.f_files
        must = self._min_free
        if must is None:
            must = min(_MOST_BYTES, size // _SHARE_OF_BYTES)
        must_files = self._min_files if files else 0
        if must_files is None:
            must_files = min(_MOST_FILES, files // _SHARE_OF_FILES)
        return Space(folder, found.f_bavail * found.f_frsize, must, found.f_favail, must_files)

    def shortage(self) -> str | None:
        """Return what there is too little of for new runs, None where there is enough."""
        for space in self.spaces():
            lack = space.lacks()
            if lack.size:
                return f"room on the disk: less than {in_bytes(space.must)} are free (setting min_free)"
            if lack.files:
                return f"room on the disk: fewer than {space.must_files:,} files can be made (setting min_free_files)"
        return None

    def is_little(self) -> bool:
        """Whether there is so little room that garbage should be collected."""
        return any(space.lacks(_LITTLE) != Need() for space in self.spaces())

    def wanted(self) -> Need:
        """Return what is missing to have enough."""
        lacks = [space.lacks(_ENOUGH) for space in self.spaces()]
        return Need(
            max((lack.size for lack in lacks), default=0), max((lack.files for lack in lacks), default=0)
        )
