"""Where a warm container meets the host: a folder that its workspaces come and go in, and what its commands print.

A place is a small file system in memory, whose mounts reach the container (`rslave`): an overlay that is mounted at
`tree` on the host is the container's /workspace a moment later. Output comes through a named pipe, which commands may
open by name, and is kept beside it until the command is over: it outlives a platform that is killed, touches no disk,
and has an end. As root only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci_platform import layers
from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import MEBIBYTE, SANDBOX_UID, Mount, Tree, linux, merged
from ci_platform.sandboxes.container.walls import HOME, PRIVATE, WORKSPACE

OUTPUT, PIPE, CODE = "/.dynflow", "out", "code"
"""Where commands print to, inside: a pipe, and the file for the number and the exit code of the last one."""

_PIECE = 32 * 1024
_END = re.compile(rb"(\d{1,9})(?: (\d{1,3})\n)?")
_LONGEST_END, _MOST_CODE = 32, 255

_SHARED = 1 << 20
_SPLICE_F_NONBLOCK = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.splice.restype = ctypes.c_ssize_t
_SLACK = MEBIBYTE
_SLACK_FOR_END = 64 * 1024
_EMPTIED = (*PRIVATE, "/dev/shm")  # noqa: S108 - the container's own


class Place:
    """One such folder, as `make_place` has made it. Every method blocks for about a millisecond."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree, self.output = path / merged.TREE, path / "output"

    @property
    def binds(self) -> list[str]:
        """What a container has to be given of it."""
        return [f"{self.tree}:{WORKSPACE}:rw,rslave", f"{self.output}:{OUTPUT}:rw"]

    def show(self, tree: Tree, mounts: Sequence[Mount] = (), pid: int = 0) -> None:
        """Mount a job's tree as the workspace, and in it and in the home folder of process `pid` what comes with it."""
        merged.mount(tree, self.tree)
        for each in mounts:
            if each.place == "workspace":
                merged.mount_below(each.tree, self.tree, each.path)
            else:
                self._show_at_home(each, pid)

    def _show_at_home(self, mount: Mount, pid: int) -> None:
        """Mount in a container that runs: here first, since its names mean nothing in there, and then it moves."""
        stage = self.path / "stage"
        stage.mkdir(exist_ok=True)
        merged.mount(mount.tree, stage)
        try:

            def work() -> None:
                fd = linux.detached(str(stage), linux.ATTR_NOSUID | linux.ATTR_NODEV)
                try:
                    linux.enter_mounts(pid)
                    linux.move_mount(fd, _way_home(mount.path))
                finally:
                    os.close(fd)

            merged.apart(work, "cannot mount in the home folder")
        finally:
            merged.unmount(stage)

    def hide(self) -> bool:
        """Take the workspace away; returns False where something is still open in it, and it goes when that does."""
        names = [os.path.relpath(target, self.tree) for target in merged.mounts_below(str(self.tree))]
        below = [merged.unmount_below(self.tree, name) for name in names]
        return merged.unmount(self.tree) and all(below)

    def written(self, number: int) -> tuple[bool, int | None]:
        """Return whether a command has begun, and its exit code once it is over, as is written in there.

        Tenants may write that, too.
        """
        try:
            with layers.directory(self.output) as folder:
                file = os.open(
                    CODE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
                )
        except OSError:
            return False, None
        try:
            found = _END.match(os.read(file, _LONGEST_END))
        finally:
            os.close(file)
        if found is None or int(found[1]) != number:
            return False, None
        return True, None if found[2] is None or int(found[2]) > _MOST_CODE else int(found[2])

    def written_end(self, number: int) -> int | None:
        """Return the exit code of a command that is over, as it is written there; None where it is not."""
        return self.written(number)[1]

    def remove(self) -> None:
        """Unmount and remove it, with what is in it."""
        merged.remove_place(self.path)


def make_place(output: int) -> Place:
    """Make a place for commands that print so many bytes at most. Raises UnavailableError."""
    place = Place(merged.make_place())
    try:
        linux.mount("dynflow", str(place.path), "tmpfs", 0, f"mode=700,size={output + _SLACK}")
        linux.mount("none", str(place.path), None, _SHARED)
        place.tree.mkdir()
        place.output.mkdir()
        # Of its own: what a command writes into the file for its end leaves no less room for what it prints.
        linux.mount("dynflow", str(place.output), "tmpfs", 0, f"mode=711,size={_SLACK_FOR_END}")
        os.mkfifo(place.output / PIPE, 0o600)
        (place.output / CODE).touch(0o600)
        for name in (PIPE, CODE):
            os.chown(place.output / name, SANDBOX_UID, SANDBOX_UID)
    except OSError as error:
        place.remove()
        raise UnavailableError(f"container sandbox: cannot prepare a place: {error}") from error
    return place


class Pipe:
    """The output of one command: `reader` becomes readable when there is more.

    What an earlier process of the platform has taken of it is `kept`.
    """

    def __init__(self, place: Place, number: int) -> None:
        self._kept = place.path / f"{number}.out"
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self.reader = os.open(place.output / PIPE, flags | os.O_NONBLOCK)
        self._file = os.open(self._kept, flags | os.O_CREAT, 0o600)
        self._size = os.fstat(self._file).st_size

    def kept(self) -> Iterator[bytes]:
        """Yield what was taken before this pipe was opened."""
        end, at = self._size, 0
        while piece := os.pread(self._file, min(_PIECE, end - at), at):
            at += len(piece)
            yield piece

    def pending(self) -> bool:
        """Whether there is something to take."""
        return bool(int.from_bytes(fcntl.ioctl(self.reader, termios.FIONREAD, bytes(4)), sys.byteorder))

    def take(self, most: int) -> bytes:
        """Return what has come, at most so many bytes; b"" if nothing has. What is returned is kept, too.

        The kernel moves it from pipe to file in one call: a platform that is killed has done so or has not.
        """
        moved = _libc.splice(
            self.reader,
            None,
            self._file,
            ctypes.byref(ctypes.c_int64(self._size)),
            ctypes.c_size_t(most),
            _SPLICE_F_NONBLOCK,
        )
        if moved < 0:
            if ctypes.get_errno() in {errno.EAGAIN, errno.EINTR}:
                return b""
            raise OSError(ctypes.get_errno(), f"splice: {os.strerror(ctypes.get_errno())}")
        piece = os.pread(self._file, moved, self._size)
        self._size += moved
        return piece

    def drain(self) -> None:
        """Drop what the command before this one has left in the pipe."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.reader, _PIECE):
                pass

    def close(self) -> None:
        """Close it. What was taken stays until `forget`."""
        for descriptor in (self.reader, self._file):
            os.close(descriptor)

    def forget(self) -> None:
        """Remove what was taken."""
        self._kept.unlink(missing_ok=True)


def empty_private(container: str, pid: int) -> bool:
    """Empty the private folders of a container in which nothing else runs; returns whether that was possible."""
    if not processes(container, pid):  # this process is another one by now
        return False
    try:
        with contextlib.ExitStack() as opened:
            root = _open(opened, f"/proc/{pid}/root", None)
            for name in _EMPTIED:
                folder = root
                # Step by step and never through a link, which may be the image's: it would lead about the host.
                for part in name.strip("/").split("/"):
                    folder = _open(opened, part, folder)
                for entry in os.listdir(folder):  # noqa: PTH208 - there is no path that may be followed
                    layers.remove_at(folder, entry)
    except OSError:
        return False
    return True


def _way_home(path: str) -> str:
    """Make the folders to a place in the home folder of the container that this thread is in; nothing runs there."""
    target = Path(HOME)
    for name in path.split("/"):
        target /= name
        if not target.exists():
            target.mkdir()
            os.chown(target, SANDBOX_UID, SANDBOX_UID, follow_symlinks=False)
        if target.is_symlink() or not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "the image has something else there", str(target))
    return str(target)


def unmount_home(pid: int) -> bool:
    """Unmount what is in the home folder of a container in which nothing else runs; returns whether it could be."""

    def work() -> None:
        linux.enter_mounts(pid)
        for target in targets:
            linux.unmount(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    try:
        if targets := merged.mounts_below(HOME, str(pid)):
            merged.apart(work, "cannot unmount in the home folder")
    except (OSError, UnavailableError):
        return False
    return True


def processes(container: str, pid: int) -> int:
    """Return how many processes a container has, by the control group of its first one."""
    return len(_read(pid, "pids", "cgroup.procs", container).split())


def killed_for_memory(container: str, pid: int) -> int:
    """Return how many processes of the container the kernel has killed for want of memory so far."""
    counts = _read(pid, "memory", "memory.oom_control", container) or _read(
        pid, "", "memory.events", container
    )
    return sum(int(line.split()[1]) for line in counts.splitlines() if line.startswith("oom_kill "))


def _open(opened: contextlib.ExitStack, name: str, folder: int | None) -> int:
    # The root itself is a link, of the kernel's.
    follow = 0 if folder is None else os.O_NOFOLLOW
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | follow, dir_fd=folder)
    opened.callback(os.close, descriptor)
    return descriptor


def _read(pid: int, controller: str, file: str, container: str) -> str:
    """Return a file of a process's control group, "" where there is none or the process is another one by now."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if container in path and (not names or controller in names.split(",")):
                for home in (names, controller) if names else ("", "unified"):
                    with contextlib.suppress(OSError):
                        return Path("/sys/fs/cgroup", home, path.lstrip("/"), file).read_text()
    return ""
