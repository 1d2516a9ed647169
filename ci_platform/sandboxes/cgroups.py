"""Control groups of isolate sandboxes: memory and number of processes, for v1 and v2. Stdlib only.

`find` runs once in the platform; a `Group` lives in a berth's supervisor. A platform's groups hang below one
folder named after its process, so that a later platform can tell whose are left over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "dynflow-"
_REMOVAL_TRIES = 500
_CONTROLLERS = ("memory", "pids")
_WELCOME = ("cpuacct", "cpu")
"""Of version 1, used where they are there. Version 2 counts time in every group."""


_PERIOD = 100_000
"""Microseconds in which a group may use its share of the processors; the kernel's own default."""


@dataclass(frozen=True, slots=True)
class Parents:
    """The folders that groups are made in: one of version 2, or one per controller of version 1."""

    version: int
    folders: tuple[str, ...]

    def remove(self) -> None:
        """Remove the folders and the empty groups in them, which killed supervisors have left."""
        for folder in map(Path, self.folders):
            for path in (*folder.glob("*/"), folder):
                with contextlib.suppress(OSError):
                    path.rmdir()


def platform_name() -> str:
    """Return a name of this process that no later one gets: its pid and when it began."""
    return f"{os.getpid()}-{_start_time(os.getpid())}"


def is_alive(name: str) -> bool:
    """Whether the process with that `platform_name` is still there."""
    pid, _, started = name.partition("-")
    return pid.isdecimal() and _start_time(int(pid)) == started


def find() -> Parents | None:
    """Make and return the folders for this process's groups; None where it may not limit anything."""
    name = _PREFIX + platform_name()
    for version, homes in ((2, _homes_v2()), (1, _homes_v1())):
        made: list[str] = []
        try:
            for home in homes:
                Path(home, name).mkdir(exist_ok=True)
                made.append(str(Path(home, name)))
            if version == 2 and made:
                Path(made[0], "cgroup.subtree_control").write_text("+memory +pids")
                with contextlib.suppress(OSError):
                    Path(made[0], "cgroup.subtree_control").write_text("+cpu")
        except OSError:
            Parents(version, tuple(made)).remove()
            continue
        if made:
            return Parents(version, tuple(made))
    return None


def sweep() -> int:
    """Kill what runs in groups of platforms that are dead, and remove them; returns how many groups."""
    swept = 0
    for home in (*_homes_v2(), *_homes_v1()):
        for folder in Path(home).glob(f"{_PREFIX}*-*"):
            if not is_alive(folder.name.removeprefix(_PREFIX)):
                swept += _remove_all(folder)
    return swept


def _remove_all(folder: Path) -> int:
    # The others' commands have survived their platform, or their supervisors are just removing them.
    groups = [group for group in folder.iterdir() if group.is_dir() and not is_alive(group.name)]
    for group in groups:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            group.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return len(groups)


def _start_time(pid: int) -> str:
    """Return when a process began, in ticks since boot: with the pid it names a process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _homes_v2() -> tuple[str, ...]:
    """Return where version 2 lets us make groups: as root below its root, else in a delegated group of ours."""
    for mount_point, root, kind, _ in _mounts():
        if kind != "cgroup2":
            continue
        own = _own_path("")
        candidates = [mount_point] if os.geteuid() == 0 else [_below(mount_point, root, own)]
        for home in candidates:
            with contextlib.suppress(OSError):
                enabled = Path(home, "cgroup.subtree_control").read_text().split()
                if set(_CONTROLLERS) <= set(enabled) and os.access(home, os.W_OK):
                    return (home,)
    return ()


def _homes_v1() -> tuple[str, ...]:
    homes: list[tuple[str, str]] = []
    for controller in (*_CONTROLLERS, *_WELCOME):
        for mount_point, root, kind, options in _mounts():
            if kind == "cgroup" and controller in options:
                home = _below(mount_point, root, _own_path(controller))
                if os.access(home, os.W_OK):
                    homes.append((controller, home))
    needed = sum(controller in _CONTROLLERS for controller, _ in homes)
    return tuple(dict.fromkeys(home for _, home in homes)) if needed == len(_CONTROLLERS) else ()


def _mounts() -> list[tuple[str, str, str, list[str]]]:
    """Return (mount point, root, type, options of the file system) of every control group mount."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind.startswith("cgroup"):
            found.append((left.split()[4], left.split()[3], kind, options.split(",")))
    return found


def _own_path(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _below(mount_point: str, root: str, own: str) -> str:
    """Return our own group's folder, or the mount point where a namespace hides the way to it."""
    relative = own.removeprefix(root.rstrip("/")).strip("/")
    folder = Path(mount_point, relative)
    return str(folder) if folder.is_dir() else mount_point


class Group:
    """The control group of one sandbox, held open so that it can be read after the host's tree is gone."""

    def __init__(self, parents: Parents, name: str) -> None:
        self._version, self._name = parents.version, name
        self._parents = [
            os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for folder in parents.folders
        ]
        self._homes = [Path(folder).name for folder in parents.folders]
        self._platform = _hold(self._homes[0])
        self._folders = []
        for parent in self._parents:
            os.mkdir(name, dir_fd=parent)
            self._folders.append(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent))

    def add(self, pid: int) -> None:
        """Move a process into the group; its children are born there."""
        for folder in self._folders:
            _write(folder, "cgroup.procs", str(pid))

    def limit(self, memory: int, processes: int, cpus: float | None) -> None:
        """Set the limits. The group's init counts as a process too."""
        limits: dict[str, int | str] = {"pids.max": processes + 1}
        if self._version == 2:
            limits |= {"memory.max": memory, "memory.swap.max": 0, "memory.oom.group": 1}
        else:
            limits |= {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory}
        if cpus is not None:
            quota = max(1000, round(cpus * _PERIOD))
            limits["cpu.max" if self._version == 2 else "cpu.cfs_quota_us"] = (
                f"{quota} {_PERIOD}" if self._version == 2 else quota
            )
        for file, value in limits.items():
            for folder in self._folders:
                # Each file is in one of the folders; those on swap only where the kernel accounts for it.
                with contextlib.suppress(FileNotFoundError):
                    _write(folder, file, str(value))

    def out_of_memory(self) -> bool:
        """Whether the kernel killed something in here for want of memory."""
        for folder in self._folders:
            for file in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(FileNotFoundError):
                    counts = dict(line.split() for line in _read(folder, file).splitlines())
                    if int(counts.get("oom_kill", 0)) > 0:
                        return True
        return False

    def out_of_processes(self) -> bool:
        """Whether the kernel refused a process in here."""
        for folder in self._folders:
            with contextlib.suppress(FileNotFoundError):
                return int(_read(folder, "pids.events").split()[1]) > 0
        return False

    def processor_seconds(self) -> float | None:
        """Return the processors' time of all that ran in here; None where it is not counted."""
        for folder in self._folders:
            with contextlib.suppress(FileNotFoundError):
                return int(_read(folder, "cpuacct.usage")) / 1e9
            with contextlib.suppress(FileNotFoundError):
                return int(dict(map(str.split, _read(folder, "cpu.stat").splitlines()))["usage_usec"]) / 1e6
        return None

    def remove_home(self) -> None:
        """Remove the folder of all groups of the platform, once it is gone and the last of them is empty."""
        if _is_there(self._platform):
            return
        for parent, name in zip(self._parents, self._homes, strict=True):
            with contextlib.suppress(OSError):
                above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
                try:
                    os.rmdir(name, dir_fd=above)
                finally:
                    os.close(above)

    def remove(self) -> None:
        """Remove the group; nothing may run in it any more."""
        for parent in self._parents:
            for _ in range(_REMOVAL_TRIES):
                try:
                    os.rmdir(self._name, dir_fd=parent)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        break
                    # The dead leave their group a moment after their parent has heard of it.
                    time.sleep(0.001)
                else:
                    break


def _hold(home: str) -> int | None:
    """Return a hold on the platform that a folder of groups is named after, None where it is gone."""
    try:
        return os.pidfd_open(int(home.removeprefix(_PREFIX).partition("-")[0]))
    except (OSError, ValueError):
        return None


def _is_there(platform: int | None) -> bool:
    """Whether a platform has not ended; the host's /proc is out of sight where this is asked."""
    if platform is None:
        return False
    poll = select.poll()
    poll.register(platform, select.POLLIN)
    return not poll.poll(0)


def _write(folder: int, file: str, text: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(folder: int, file: str) -> str:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)
