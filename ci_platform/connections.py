"""Which connections the commands of a step have made or were refused: a line of JSON each, beside the step's log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from ci_platform.egress import Connection

MOST = 100_000
"""Of one step: its commands have 10,000 each at most, but there may be any number of commands."""


def _append(file: FileIO, line: bytes) -> None:
    size = file.tell()
    try:
        written = file.write(line)
    except OSError:
        written = 0
    if written < len(line):
        file.truncate(size)


class ConnectionLog:
    """The connections of one step. One process appends; a line that was cut in two by a crash is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = -1

    def append(self, connection: Connection) -> None:
        """Add one; dropped where there are `MOST` already, or the disk is full."""
        if self._count < 0:
            self._count = sum(1 for _ in self.read())
        if self._count < MOST:
            self._count += 1
            with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
                _append(file, connection.as_line())

    def read(self) -> Iterator[Connection]:
        """Yield all, in the order in which they were over."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                try:
                    yield Connection.from_line(line)
                except (ValueError, TypeError):
                    continue
