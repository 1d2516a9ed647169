"""What a command has used, as its supervisor sees it: memory, time of processors, disk. Stdlib only.

The kernel counts memory and time in a control group where there is one. It counts disk nowhere that commands run (no
file system of ours has project quotas everywhere), so that is looked at: cheaply five times a second, and thoroughly
where the cheap look leaves room for doubt.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci_platform.sandboxes import cgroups, rootfs

_DEEPEST = 500
"""Folders below each other that are looked through; one descriptor each. Real trees have some twenty."""

_THOROUGH_EVERY = 30.0
"""Seconds between two thorough looks without a reason."""

_SHARE = 0.05
"""Of the supervisor's time that thorough looks may take."""

_TICKS = os.sysconf("SC_CLK_TCK")


class Disk:
    """Bytes and files below the folders of a command's changes, all of them on one file system.

    `limit` and `most` are those that may come to what is there at first: nothing in an overlay's upper folder, the
    whole tree where it is a copy.
    """

    def __init__(self, folders: Sequence[int], limit: int, most: int, *, fresh: bool) -> None:
        self._folders, self._limit, self._most = folders, limit, most
        self._before = (0, 0) if fresh else self._count()[:2]
        self._known = (0, 0)
        self._total = self._on_disk()
        self._next_look = 0.0

    def over(self) -> tuple[str, int] | None:
        """Return the limit that is exceeded, and the value; None where none is."""
        now = time.monotonic()
        # Others may have removed as much as this command wrote, so now and then it is counted all the same.
        if now < self._next_look or (self._fits() and now < self._next_look + _THOROUGH_EVERY):
            return None
        return self._look()

    def over_at_the_end(self) -> tuple[str, int] | None:
        """Return as `over`, for what was written since the last look."""
        return None if self._fits() else self._look()

    def _fits(self) -> bool:
        """Whether what everybody has written to the file system since the last thorough look would fit."""
        grown = [max(0, now - then) for now, then in zip(self._on_disk(), self._total, strict=True)]
        return self._known[0] + grown[0] <= self._limit and self._known[1] + grown[1] <= self._most

    def _look(self) -> tuple[str, int] | None:
        started = time.monotonic()
        self._total = self._on_disk()
        size, files, deepest = self._count()
        self._known = (size - self._before[0], files - self._before[1])
        self._next_look = started + (time.monotonic() - started) / _SHARE
        if deepest > _DEEPEST:
            return "depth", deepest
        if self._known[0] > self._limit:
            return "disk", self._known[0]
        return ("files", self._known[1]) if self._known[1] > self._most else None

    def _on_disk(self) -> tuple[int, int]:
        found = os.fstatvfs(self._folders[0])
        return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree

    def _count(self) -> tuple[int, int, int]:
        """Return bytes, files, and the depth at which it was given up."""
        size = files = 0
        seen = set[int]()
        for folder in self._folders:
            below, inside, deepest = _count_in(folder, seen)
            size, files = size + below, files + inside
            if deepest:
                return size, files, deepest
        return size + self._without_a_name(), files, 0

    def _without_a_name(self) -> int:
        """Return the bytes of deleted files that processes still have open."""
        sizes: dict[int, int] = {}
        for descriptor in _descriptors():
            with contextlib.suppress(OSError):
                found = descriptor.stat()
                if found.st_nlink == 0 and stat.S_ISREG(found.st_mode) and not _is_private(found.st_dev):
                    sizes[found.st_ino] = found.st_blocks * 512
        return sum(sizes.values())


def _count_in(folder: int, seen: set[int]) -> tuple[int, int, int]:
    """Return bytes, files, and the depth at which it was given up. `seen` are inodes with several names."""
    size = files = 0
    with contextlib.ExitStack() as stack:
        try:
            top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return 0, 0, 0
        open_folders = [(top, stack.enter_context(os.scandir(top)))]
        try:
            while open_folders:
                fd, entries = open_folders[-1]
                entry = next(entries, None)
                if entry is None:
                    entries.close()
                    os.close(fd)
                    open_folders.pop()
                    continue
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    files += 1
                    linked = found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode)
                    if not linked or found.st_ino not in seen:
                        size += found.st_blocks * 512
                    if linked:
                        seen.add(found.st_ino)
                    if stat.S_ISDIR(found.st_mode):
                        if len(open_folders) > _DEEPEST:
                            return size, files, len(open_folders)
                        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                        below = os.open(entry.name, flags, dir_fd=fd)
                        open_folders.append((below, stack.enter_context(os.scandir(below))))
        finally:
            for fd, _ in open_folders:
                os.close(fd)
    return size, files, 0


def _descriptors() -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield from (process / "fd").iterdir()


def _is_private(device: int) -> bool:
    """Whether a device is the memory file system of /tmp and the like, which has a size of its own."""
    with contextlib.suppress(OSError):
        return Path(rootfs.SCRATCH).stat().st_dev == device
    return False


def memory_used() -> int:
    """Return the bytes that all processes of this sandbox hold, its private files included."""
    private = os.statvfs(rootfs.SCRATCH)
    used = (private.f_blocks - private.f_bfree) * private.f_frsize
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used += _proportional_size(process)
    return used


def _proportional_size(process: Path) -> int:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def processor_seconds(group: cgroups.Group | None) -> float:
    """Return the time of processors that all processes of this sandbox have taken, the ended ones included.

    Without a control group a process that does not wait for its children hides what they took.
    """
    if group is not None and (counted := group.processor_seconds()) is not None:
        return counted
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / _TICKS
