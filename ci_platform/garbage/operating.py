"""What operators ask for: collect now, or say what would be collected, and how much room there is."""

from __future__ import annotations

from dataclasses import dataclass

from ci_platform.garbage.collector import Collected, Collector, Kind
from ci_platform.garbage.planning import NOTHING
from ci_platform.garbage.room import Room


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system below `folder`: what is free and what must be for new runs, in bytes, and in files and folders."""

    folder: str
    free: int
    min_free: int
    free_files: int
    min_free_files: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """What was collected and why, in sums what stays and why, and the room there is then.

    With `dry_run` nothing was: it is what would be. `shortage` says what new runs wait for, None where they do not.
    """

    dry_run: bool
    items: tuple[Collected, ...]
    kinds: tuple[Kind, ...]
    disks: tuple[Disk, ...]
    shortage: str | None


async def collect_now(collector: Collector, room: Room, *, dry_run: bool) -> Garbage:
    """Collect what is above its budget, and more where the disk is short of room."""
    little = room.is_little()
    if dry_run:
        report = await collector.look(room.wanted() if little else NOTHING)
    else:
        report = await collector.collect(room.wanted if little else lambda: NOTHING)
    disks = tuple(
        Disk(str(each.folder), each.free, each.must, each.files, each.must_files) for each in room.spaces()
    )
    return Garbage(dry_run, report.items, report.kinds, disks, room.shortage())
