"""How much room there is, on a real disk: bytes and inodes, each file system once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ci_platform.garbage.planning import NOTHING
from ci_platform.garbage.room import Room
from tests.dynflow.disks import Disk, memory_disk

MEBIBYTE = 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "disk", 32)


def test_there_is_room_then_little_then_too_little_and_it_is_said_what_is_missing(disk: Disk) -> None:
    (disk.folder / "folder").mkdir()
    room = Room([disk.folder, disk.folder / "folder", disk.folder / "missing"], min_free=8 * MEBIBYTE)
    assert len(list(room.spaces())) == 1
    assert (room.shortage(), room.is_little(), room.wanted()) == (None, False, NOTHING)
    disk.fill(leave=10 * MEBIBYTE)
    assert (room.shortage(), room.is_little()) == (None, True)
    assert 5 * MEBIBYTE < room.wanted().size <= 6 * MEBIBYTE, "twice what new runs need"
    disk.fill(leave=4 * MEBIBYTE)
    assert room.shortage() == "room on the disk: less than 8.0 MiB are free (setting min_free)"


def test_inodes_run_out_too(disk: Disk) -> None:
    room = Room([disk.folder], min_free=0, min_files=100)
    assert room.shortage() is None
    disk.take_inodes()
    assert room.shortage() == "room on the disk: fewer than 100 files can be made (setting min_free_files)"
    assert room.wanted().files == 200


def test_by_default_a_share_must_be_free_of_a_small_disk_and_a_gibibyte_of_a_large_one(disk: Disk) -> None:
    (small,) = Room([disk.folder]).spaces()
    assert small.must == 32 * MEBIBYTE // 20
    assert 0 < small.must_files <= 100_000
    (large,) = Room([Path("/")]).spaces()
    found = os.statvfs("/")
    assert large.must == min(1024**3, found.f_blocks * found.f_frsize // 20)
