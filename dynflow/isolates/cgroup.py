"""A control group for all isolates of one zygote together: memory, tasks, CPU. Version 1 and 2. Host side.

Each isolate has limits of its own from its first instruction (see confinement.py); this is the end of what they can
take from the machine together. The zygote joins before it does anything else, so nothing is ever outside, and nothing
is attached on the way of a request. A group is named after the process that made it: a later one removes what a
killed one has left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

_PREFIX = "isolates-"
_numbers = itertools.count(1)

# Files of the controllers, by version; those that a kernel does not have are left out, but the first is essential.
_MEMORY = {1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), 2: ("memory.max",)}
_TASKS = "pids.max"
# Half of what an ordinary group gets where there is not enough for all: the host answers before its tenants compute.
_CPU = {1: ("cpu.shares", 512), 2: ("cpu.weight", 50)}
_CONTROLLERS = ("memory", "pids", "cpu")


class IsolateGroup:
    """One group: a folder of version 2, or one for each controller of version 1."""

    def __init__(self, version: int, folders: tuple[Path, ...]) -> None:
        self._version, self.folders = version, folders

    @staticmethod
    def create(memory: int, tasks: int) -> IsolateGroup | None:
        """Make a group with these limits; None where this process may not, or the kernel counts no memory."""
        name = f"{_PREFIX}{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        for version, homes in ((2, _homes_v2()), (1, _homes_v1())):
            if not homes:
                continue
            _sweep(homes)
            group = IsolateGroup(version, tuple(home / name for home in homes))
            try:
                group._make(memory, tasks)
            except OSError:
                group.close()
                continue
            return group
        return None

    def _make(self, memory: int, tasks: int) -> None:
        for folder in self.folders:
            folder.mkdir()
        essential, *others = _MEMORY[self._version]
        if not self._write(essential, memory):
            raise FileNotFoundError(essential)
        for file in others:
            with contextlib.suppress(OSError):
                self._write(file, memory)
        self._write(_TASKS, tasks)
        self._write(*_CPU[self._version])

    def _write(self, file: str, value: int) -> bool:
        for folder in self.folders:
            if (folder / file).exists():
                (folder / file).write_text(str(value))
                return True
        return False

    def close(self) -> bool:
        """Remove it; return whether it is gone: not as long as a killed process in it is still ending."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return not any(folder.exists() for folder in self.folders)


def machine_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sweep(homes: tuple[Path, ...]) -> None:
    for home in homes:
        for folder in home.glob(f"{_PREFIX}*-*-*"):
            pid, started, _ = folder.name.removeprefix(_PREFIX).split("-", 2)
            if not pid.isdecimal() or _start_time(int(pid)) != started:
                with contextlib.suppress(OSError):  # something in it is still ending: the next one will do
                    folder.rmdir()


def _start_time(pid: int) -> str:
    """Return when a process began, in ticks since boot: with the pid it names a process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _homes_v2() -> tuple[Path, ...]:
    """Return where version 2 lets us make groups: as root below its root, else in a delegated group of ours."""
    for mount_point, _, kind, _ in _mounts():
        if kind != "cgroup2":
            continue
        home = mount_point if os.geteuid() == 0 else mount_point / _own_path("").strip("/")
        with contextlib.suppress(OSError):
            enabled = (home / "cgroup.subtree_control").read_text().split()
            if {"memory", "pids"} <= set(enabled) and os.access(home, os.W_OK):
                return (home,)
    return ()


def _homes_v1() -> tuple[Path, ...]:
    homes = {}
    for mount_point, root, kind, options in _mounts():
        for controller in _CONTROLLERS:
            if kind == "cgroup" and controller in options:
                below = _own_path(controller).removeprefix(root.rstrip("/")).strip("/")
                home = mount_point / below
                homes[controller] = home if home.is_dir() else mount_point
    usable = {controller: home for controller, home in homes.items() if os.access(home, os.W_OK)}
    return tuple(dict.fromkeys(usable.values())) if "memory" in usable else ()


def _mounts() -> list[tuple[Path, str, str, list[str]]]:
    """Return (mount point, root, type, options of the file system) of every control group mount."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind.startswith("cgroup"):
            found.append((Path(left.split()[4]), left.split()[3], kind, options.split(",")))
    return found


def _own_path(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"
