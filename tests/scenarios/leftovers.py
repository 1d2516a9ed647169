"""What a platform must not leave behind: processes, mounts, control groups, layers, temporary files."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

from ci_platform.sandboxes import cgroups


def below(pid: int) -> set[psutil.Process]:
    """Return the processes below one, none where it is gone."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


class Leftovers:
    """What a platform with this data folder and this folder for temporary files may leave: nothing.

    `pids` are those of the processes that it was.
    """

    def __init__(self, data: Path, temporary: Path, pids: Collection[int]) -> None:
        self._data, self._temporary, self._pids = data, temporary, pids

    @staticmethod
    def wait_for_end_of(processes: Iterable[psutil.Process]) -> None:
        """Fail unless all of them end within seconds."""
        _, alive = psutil.wait_procs(list(processes), timeout=10)
        assert alive == [], [(process.pid, process.cmdline()) for process in alive]

    def check(self) -> None:
        """Fail on anything that is left of the platform, once its process has ended."""
        assert mounts_below(self._data) == []
        assert dead_groups(self._pids) == []
        assert list(self._temporary.iterdir()) == []
        for pattern in ("workspaces/*/pending/*", "workspaces/.new/*", "workspaces/.trash/*"):
            assert list(self._data.glob(pattern)) == [], pattern
        assert list(self._data.glob("*.tmp")) == []
        assert list(self._data.glob("source/*/*/.new-*")) == []


def mounts_below(folder: Path) -> list[str]:
    """Return the mounts of any process that are at or of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            found += [line for line in path.read_text().splitlines() if str(folder) in line]
    return found


def group_homes() -> list[Path]:
    """Return the folders that platforms make their control groups in."""
    return [Path(home) for home in (*cgroups._homes_v2(), *cgroups._homes_v1())]


def dead_groups(pids: Collection[int]) -> list[str]:
    """Return the control groups of platforms that are no more, of those that had these pids."""
    return [
        str(folder)
        for home in group_homes()
        for pid in pids
        for folder in home.glob(f"dynflow-{pid}-*")
        if not cgroups.is_alive(folder.name.removeprefix("dynflow-"))
    ]
