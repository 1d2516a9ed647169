"""The platform's end of the programs that serve lazy trees: started, found again, asked for mounts. Blocks."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci_platform import layers
from ci_platform.errors import UnavailableError
from ci_platform.hydration import control
from ci_platform.hydration.plan import TABLE
from ci_platform.hydration.table import TableWriter
from ci_platform.sandboxes import messages

_ANSWER_WITHIN = 20.0
"""Seconds for a program to start, or to answer: it has a thread for that."""

_WORD_KEPT = 86_400.0
"""Seconds for which a program's last word waits for a platform."""

_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from ci_platform.hydration.server import main; main(int(sys.argv[2]))"
)
_PACKAGE_HOME = str(Path(__file__).resolve().parents[2])
_CHANNEL = 3
"""The program's end of its first connection."""


def refusal() -> str | None:
    """Return why trees cannot be lazy on this machine, None where they can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


class LazyLower:
    """A lazy tree in use by one command: as long as it is open, its program has a mount to give.

    `ended` is the program's last word, where the command outlived an earlier platform and both have ended.
    """

    def __init__(
        self, folder: Path, channel: socket.socket | None, ended: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self._channel, self._ended = folder, channel, ended
        self._lock = threading.Lock()

    def mount(self) -> int:
        """Return a mount of it as an open file. UnavailableError where its program is gone."""
        answer, files = self._ask({"mount": True})
        if not files:
            raise UnavailableError(f"a lazy tree cannot be mounted: {answer.get('error', 'no answer')}")
        return files[0]

    def check(self) -> None:
        """Raise UnavailableError if anything that was read of it may have failed."""
        answer, _ = self._ask({})
        if answer["trouble"] is not None:
            raise UnavailableError(f"files of a lazy tree could not be read: {answer['trouble']}")

    def close(self) -> None:
        """Let go of it; commands that have it mounted keep it. Who forgets it does the same."""
        if self._channel is not None:
            self._channel.close()
        if self._ended is not None:
            layers.remove_tree(self.folder)

    def __del__(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def _ask(self, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        if self._channel is None or self._ended is not None:
            return dict(self._ended or {}), []
        try:
            with self._lock:
                messages.send(self._channel, dict(wanted))
                received = messages.receive(self._channel)
            why = "has ended"
        except OSError as error:
            received, why = None, f"does not answer: {error}"
        if received is not None:
            return received
        # It may have come to its end, with its last command, while we were connecting: then it has left its word.
        self._ended = control.last_word(self.folder)
        if self._ended is None:
            raise UnavailableError(f"the program of a lazy tree {why}")
        return dict(self._ended), []


@dataclass(slots=True)
class _Program:
    folder: Path
    channel: socket.socket


@dataclass(slots=True)
class Mounts:
    """The programs of this platform, below `root`, by the folder of their tree. Safe for threads.

    `stuck_after` is how many seconds one answer to the kernel may take: then all fail.
    """

    root: Path
    stuck_after: float = 60
    _programs: dict[Path, _Program] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, tree: Path, repository: Path, env: Mapping[str, str]) -> LazyLower:
        """Return a lazy tree for a command; its program is started where none runs. UnavailableError."""
        with self._lock:
            program = self._programs.get(tree)
            if program is not None:
                try:
                    return LazyLower(program.folder, control.connect(program.folder))
                except OSError:
                    self._forget(tree)
            program = self._programs[tree] = self._start(tree, repository, env)
            try:
                return LazyLower(program.folder, control.connect(program.folder))
            except OSError as error:
                self._forget(tree)
                raise UnavailableError(f"the program of a lazy tree has ended: {error}") from error

    def release(self, tree: Path) -> None:
        """Let go of a tree that is on disk now; commands that use it keep it."""
        with self._lock:
            self._forget(tree)

    def close(self) -> None:
        """Let go of all."""
        with self._lock:
            for tree in list(self._programs):
                self._forget(tree)

    def _forget(self, tree: Path) -> None:
        program = self._programs.pop(tree, None)
        if program is not None:
            program.channel.close()

    def _start(self, tree: Path, repository: Path, env: Mapping[str, str]) -> _Program:
        folder = self.root / secrets.token_hex(8)
        folder.mkdir(parents=True, mode=0o700)
        order = {
            "folder": str(folder),
            "table": str(tree / TABLE),
            "repository": str(repository),
            "env": dict(env),
            "stuck_after": self.stuck_after,
        }
        channel = _spawn(folder)
        try:
            messages.send(channel, order)
            answer, _ = messages.receive(channel) or ({"error": "its program has ended"}, [])
        except OSError as error:
            answer = {"error": str(error)}
        if "error" in answer:
            channel.close()
            layers.remove_tree(folder)
            raise UnavailableError(f"a lazy tree cannot be mounted: {answer['error']}")
        return _Program(folder, channel)

    def sweep(self) -> None:
        """Remove what programs have left that were killed. Call once at start."""
        with contextlib.suppress(FileNotFoundError):
            for folder in self.root.iterdir():
                try:
                    control.connect(folder).close()
                except OSError:
                    if control.last_word_at(folder) < time.time() - _WORD_KEPT:
                        layers.remove_tree(folder)


def find(folder: Path) -> LazyLower | None:
    """Return the lazy tree whose program an earlier platform has started in `folder`; None where it was killed."""
    try:
        return LazyLower(folder, control.connect(folder))
    except OSError:
        word = control.last_word(folder)
        return None if word is None else LazyLower(folder, None, word)


def trial() -> str | None:
    """Mount an empty tree; return why that cannot be, None where it can."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        TableWriter().write(folder / TABLE, modified_at=0, uid=0, gid=0)
        mounts = Mounts(folder / "programs")
        try:
            hold = mounts.hold(folder, folder, {})
        except UnavailableError as error:
            return str(error)
        try:
            os.close(hold.mount())
        except UnavailableError as error:
            return str(error)
        finally:
            mounts.close()
            hold.close()
            _await_end(hold.folder)
    return None


def _await_end(folder: Path) -> None:
    """Wait until a program that nobody uses has removed its folder."""
    for _ in range(100):
        if not folder.exists():
            return
        time.sleep(0.01)


def _spawn(folder: Path) -> socket.socket:
    """Start a program; returns our end of its first connection."""
    ours, theirs = socket.socketpair()
    ours.settimeout(_ANSWER_WITHIN)
    with theirs:
        # -I and -S: nothing of the environment, of site-packages or of the current folder gets in.
        # The folder is for people who look at a list of processes.
        command = [sys.executable, "-I", "-S", "-c", _CODE, _PACKAGE_HOME, str(_CHANNEL), str(folder)]
        actions: list[Any] = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in range(3)]
        actions.append((os.POSIX_SPAWN_DUP2, theirs.fileno(), _CHANNEL))
        try:
            pid = os.posix_spawn(command[0], command, {}, file_actions=actions)
        except OSError as error:
            ours.close()
            raise UnavailableError(f"the program of a lazy tree cannot be started: {error}") from error
    threading.Thread(target=_reap, args=(pid, folder), daemon=True).start()
    return ours


def _reap(pid: int, folder: Path) -> None:
    """Wait for a program, which may outlive us, and remove what it left if it was killed."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        layers.remove_tree(folder)
