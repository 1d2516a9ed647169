"""Commands that go on while the platform is away: what is written down of each, and how it is found again.

A command that may survive has a folder. `about.json` says which command of which step it is and what tree it has open;
`progress` how much of its output is in the log. The rest of the folder is its sandbox's. An attempt of a step that
was cut off by the platform's end goes on: the next attempt asks for the same command, and gets the one that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ci_platform import layers
from ci_platform.stacks import LayerAuthor
from pipelines.contract import Command, SandboxKind

_NUMBERS = struct.Struct("<4q")


class Progress:
    """How many bytes of a command's (redacted) output are in its log, and how many of its connections are told.

    A kill may fall between the line in the log and the number here. So what will be is written first, with the log's
    size, by which a later process sees whether it has come to be.
    """

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.connections = 0
        self._written = 0
        if not os.fstat(self._file).st_size:
            # Takes its room now: later writes are over this one, and need none.
            os.pwrite(self._file, _NUMBERS.pack(0, 0, 0, 0), 0)

    def will_write(self, log_size: int, written: int) -> None:
        """Say that the log, so large now, is to have `written` bytes of output after what comes next."""
        os.pwrite(self._file, _NUMBERS.pack(log_size, self._written, written, self.connections), 0)
        self._written = written

    def told(self, log_size: int) -> None:
        """Say that another connection has been told."""
        self.connections += 1
        self.will_write(log_size, self._written)

    def recover(self, log_size: int) -> int:
        """Read what an earlier process has left; returns the bytes of output that are in the log."""
        data = os.pread(self._file, _NUMBERS.size, 0)
        if len(data) == _NUMBERS.size:
            size, before, after, self.connections = _NUMBERS.unpack(data)
            self._written = after if log_size > size else before
        return self._written

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class Survivor:
    """A command that an earlier process has left. `tree` is what `Workspaces.describe_open` said of its tree.

    `logged` is how many bytes of its output are in the log.
    """

    folder: Path
    run_id: str
    step: str
    count: int
    digest: str
    kind: SandboxKind
    tree: dict[str, Any]
    logged: int = 0

    def is_of(self, run_id: str, author: LayerAuthor) -> bool:
        """Whether it is a command of this step."""
        return (self.run_id, self.step, self.count) == (run_id, author.step, author.count)


class Survival:
    """The folders of all commands that may survive, below `root`.

    *Order of calls*: `load` once at start; then any. *Concurrency*: one event loop. *Errors*: none; what cannot be
    read is removed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._left: list[Survivor] = []

    @property
    def has_any(self) -> bool:
        """Whether something is left that nobody has asked for."""
        return bool(self._left)

    def load(self, log_size: Callable[[str, str, int], int]) -> list[Survivor]:
        """Return what an earlier process has left. `log_size` is asked for a run, step and count."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in self._root.iterdir():
            try:
                about = json.loads((folder / "about.json").read_text())
                found = Survivor(folder, **about)
                progress = Progress(folder / "progress")
                logged = progress.recover(log_size(found.run_id, found.step, found.count))
                progress.close()
                self._left.append(Survivor(folder, **about, logged=logged))
            except (OSError, ValueError, TypeError):
                # It was killed before its command began.
                layers.remove_tree(folder)
        return list(self._left)

    def trees(self) -> list[dict[str, Any]]:
        """Return what commands have open that an earlier process has left. Changes nothing."""
        found = list[dict[str, Any]]()
        for about in self._root.glob("*/about.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.append(dict(json.loads(about.read_text())["tree"]))
        return found

    def claim(
        self, command: Command, run_id: str, author: LayerAuthor
    ) -> tuple[Survivor | None, list[Survivor]]:
        """Return the command of an earlier process that this one asks for, and those that are of no use then.

        A command that nobody left begins anew, and then what else is left of the step stands on files that are not
        those of this attempt, or will not be asked for: the attempt does something else than the one before.
        """
        own = [each for each in self._left if each.is_of(run_id, author)]
        wanted = digest_of(command)
        found = next((each for each in own if each.digest == wanted), None)
        gone = [found] if found is not None else own
        self._left = [each for each in self._left if each not in gone]
        return found, [] if found is not None else own

    def drop(self, which: Callable[[Survivor], bool]) -> list[Survivor]:
        """Return those that are of no use, and forget them."""
        gone = [each for each in self._left if which(each)]
        self._left = [each for each in self._left if each not in gone]
        return gone

    def create(self, command: Command, run_id: str, author: LayerAuthor, tree: dict[str, Any]) -> Path:
        """Make the folder of a command that is about to begin."""
        folder = self._root / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        about = asdict(
            Survivor(folder, run_id, author.step, author.count, digest_of(command), command.sandbox, tree)
        )
        del about["folder"], about["logged"]
        (folder / "about.json").write_text(json.dumps(about))
        return folder

    def remove(self, folder: Path) -> None:
        """Remove the folder of a command that is over."""
        with contextlib.suppress(OSError):
            layers.remove_tree(folder)


def digest_of(command: Command) -> str:
    """Return what tells commands apart; it gives no secret of their environment away."""
    sides = (
        command.workspace.id,
        command.argv,
        sorted(command.env.items()),
        command.cwd,
        command.sandbox,
        command.image,
        command.network,
        str(command.timeout),
        command.cache,
    )
    return hashlib.sha256(repr(sides).encode("utf-8", "surrogatepass")).hexdigest()
