"""Disks that can be filled, made read-only and broken: mounted where the machine lets us."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest


def run(*command: str | Path) -> str:
    """Run a command; returns its output, raises CalledProcessError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout.strip()


class Disk:
    """A disk of its own at `folder`."""

    def __init__(self, folder: Path, *mounting: str | Path) -> None:
        self.folder, self._mounting = folder, mounting
        folder.mkdir()
        self.mount()

    def mount(self) -> None:
        """Mount it, read and write."""
        run("mount", *self._mounting, self.folder)

    def unmount(self) -> None:
        """Take it away; whoever still has files open keeps them."""
        run("umount", "--lazy", self.folder)

    def remount(self, mode: str) -> None:
        """Make it `ro` or `rw`: no file may be open for writing."""
        run("mount", "-o", f"remount,{mode}", self.folder)

    def fill(self, leave: int = 0) -> None:
        """Leave no room, but for what is in part of the last block, and some bytes."""
        found = os.statvfs(self.folder)
        most = found.f_bavail * found.f_frsize - leave if leave else sys.maxsize
        with (self.folder / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while most > 0 and (written := filler.write(b"\0" * 4096)):
                most -= written

    def take_inodes(self) -> None:
        """Leave no room for another file; for a disk of memory alone."""
        found = os.statvfs(self.folder)
        run("mount", "-o", f"remount,nr_inodes={found.f_files - found.f_ffree}", self.folder)

    def empty(self) -> None:
        """Make room."""
        (self.folder / "filler").unlink()


class BlockDisk(Disk):
    """A file system on a block device, which can fail under those that have files open."""

    def __init__(self, folder: Path) -> None:
        self.image = folder.with_suffix(".img")
        with self.image.open("wb") as image:
            image.truncate(16 << 20)
        run("mkfs.ext4", "-q", "-F", self.image)
        super().__init__(folder, "-o", "loop,errors=remount-ro", self.image)

    def lock_files(self) -> None:
        """Let nobody write its files, not even who has them open, until `unlock_files`.

        But for the index of SQLite's log: that is mapped memory, and refusing a write to that is a signal.
        """
        run("chattr", "+i", *self._files())

    def unlock_files(self) -> None:
        """Take `lock_files` back."""
        run("chattr", "-i", *self._files())

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_file() and path.suffix != ".db-shm"]

    def fail(self) -> None:
        """Do what a kernel does that cannot write its journal: the file system is read-only at once."""
        device = Path(run("findmnt", "--noheadings", "--output", "SOURCE", self.folder)).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        """Do what an administrator does after `fail`: go on with a copy of what has reached the device.

        A copy, since whoever made a mount namespace meanwhile may still hold the failed file system.
        """
        self.unmount()
        copy = self.image.with_suffix(".copy")
        shutil.copy(self.image, copy)
        # 1 and 2: errors were found and mended.
        done = subprocess.run(["e2fsck", "-f", "-y", copy], capture_output=True, text=True, check=False)
        assert done.returncode in {0, 1, 2}, done.stdout + done.stderr
        self._mounting = (*self._mounting[:-1], copy)
        self.mount()


D = TypeVar("D", bound=Disk)


def memory_disk(folder: Path, mebibytes: int = 2) -> Iterator[Disk]:
    """Mount some memory, or skip the test."""
    yield from _mounted(partial(Disk, folder, "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=700", "none"))


def block_disk(folder: Path) -> Iterator[BlockDisk]:
    """Mount a file as a disk of 16 MiB, or skip the test."""
    yield from _mounted(partial(BlockDisk, folder))


def _mounted(make: Callable[[], D]) -> Iterator[D]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    try:
        disk = make()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {getattr(error, 'stderr', '') or error}")
    yield disk
    disk.unmount()
