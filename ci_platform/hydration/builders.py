"""Processes that write whole trees to disk while commands use them lazily: with lower priority, and alone.

A process of its own, because writing 80,000 files takes this one's interpreter for a quarter of a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from ci_platform.source.building import main; main()"
_PACKAGE_HOME = str(Path(__file__).resolve().parents[2])
_NICE = 10
_AGAIN_AFTER = 60.0
"""Seconds after which a tree that could not be written is tried again."""


@dataclass(slots=True)
class _Build:
    done: threading.Event = field(default_factory=threading.Event)
    process: subprocess.Popen[bytes] | None = None


@dataclass(slots=True)
class Builders:
    """What is being written, by repository and tree. Safe for threads; at most one process per tree."""

    _builds: dict[tuple[str, str], _Build] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _failed: dict[tuple[str, str], float] = field(default_factory=dict)
    _closed: bool = False

    def start(self, repo: str, tree: str, order: Mapping[str, Any], finished: Callable[[], None]) -> None:
        """Begin to write a tree, unless that is being done; `finished` is called at the end, in a thread."""
        with self._lock:
            failed = self._failed.pop((repo, tree), 0.0)
            if self._closed or (repo, tree) in self._builds:
                return
            if failed > time.monotonic() - _AGAIN_AFTER:
                self._failed[repo, tree] = failed
                return
            # One after the other: the second is a few changes to the first.
            before = [build for (name, _), build in self._builds.items() if name == repo]
            build = self._builds[repo, tree] = _Build()
        arguments = ((repo, tree), build, before, order, finished)
        threading.Thread(target=self._follow, args=arguments, daemon=True).start()

    def wait(self, repo: str) -> None:
        """Wait until nothing of a repository is being written any more, whether it could be or not. Blocks."""
        with self._lock:
            builds = [build for (name, _), build in self._builds.items() if name == repo]
        for build in builds:
            build.done.wait()

    def is_busy(self, repo: str) -> bool:
        """Whether anything of a repository is being written."""
        with self._lock:
            return any(name == repo for name, _ in self._builds)

    def close(self) -> None:
        """End all; what they have written is removed at the next start."""
        with self._lock:
            self._closed = True
            builds = list(self._builds.values())
            for build in builds:
                if build.process is not None:
                    build.process.kill()
        for build in builds:
            build.done.wait()

    def _follow(
        self,
        key: tuple[str, str],
        build: _Build,
        before: list[_Build],
        order: Mapping[str, Any],
        finished: Callable[[], None],
    ) -> None:
        try:
            for other in before:
                other.done.wait()
            if (process := self._spawn(build, str(order["root"]))) is not None:
                self._see_through(process, order)
                if process.returncode != 0:
                    self._failed[key] = time.monotonic()
        finally:
            with self._lock:
                del self._builds[key]
            finished()
            build.done.set()

    def _spawn(self, build: _Build, root: str) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._closed:
                return None
            command = [sys.executable, "-I", "-c", _CODE, _PACKAGE_HOME, root]
            with contextlib.suppress(OSError):
                build.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
                os.setpriority(os.PRIO_PROCESS, build.process.pid, _NICE)
            return build.process

    def _see_through(self, process: subprocess.Popen[bytes], order: Mapping[str, Any]) -> None:
        """Give the order and hold the line: the process ends with us."""
        with process:
            assert process.stdin is not None  # noqa: S101 - a pipe
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
                process.wait()
