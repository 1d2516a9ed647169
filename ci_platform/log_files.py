"""The file of one log: how records are written and read.

A record is one line of the file: `<number> <microseconds> <kind><text>`. The kind is one character, see `_KINDS`;
a line that is printed in pieces (a progress bar, a prompt) is several records of one number. A record is written
in one call, so a killed platform leaves whole records but for a torn last one, which the next writer cuts off.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Literal

from ci_platform.patient_file import PatientFile
from dynflow.clock import Clock, to_datetime

MEBIBYTE = 1024 * 1024
LONGEST_LINE = 16 * 1024
"""Characters of one record; a longer line is several."""

_LONGEST_READ = 2 * MEBIBYTE
_FOR_THE_PLATFORM = MEBIBYTE
"""Bytes beyond a log's limit for the platform's own lines: a step may run commands without end."""

LineKind = Literal["output", "command", "result", "notice"]
"""`command` and `result` frame what one command printed; a UI folds between them. `notice`: the platform speaks."""

_KINDS: dict[LineKind, str] = {"output": "o", "command": "$", "result": "=", "notice": "!"}
_KIND_OF = {character: kind for kind, character in _KINDS.items()}
_GOES_ON = "p"
"""The kind of a piece of output whose line is not over."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line, or a piece of one. `goes_on`: the next LogLine has the same number and continues the text."""

    number: int
    at: datetime
    text: str
    kind: LineKind = "output"
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class LogChunk:
    """Lines from one offset on. Read on from `next_offset`; `complete`: the log is closed and this is its end."""

    lines: list[LogLine]
    next_offset: int
    complete: bool


class LogFile:
    """One log open for appending, by one or more writers. `open_by` is whose line the next piece continues.

    `ending`: the log is over with its last writer.
    """

    def __init__(
        self,
        path: Path,
        clock: Clock,
        largest: int,
        *,
        on_change: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._clock, self._largest, self._on_change, self._on_end = clock, largest, on_change, on_end
        self._log = PatientFile(path)
        self._size, self._number, goes_on = _mend(path)
        self._full_mark = path.with_suffix(".full")
        self._full = self._full_mark.exists()
        self.users = 0
        self.ending = False
        self.open_by: object | None = None
        if goes_on:
            # A platform that was killed left half a line.
            self.open_by = self
            self._end_open_line()

    def append(self, writer: object, kind: LineKind, lines: list[str], *, goes_on: bool = False) -> None:
        """Write lines in one call. Output over the limit is dropped; what the platform says only far beyond it.

        With `goes_on` the last line stays open.
        """
        if (kind == "output" and self._full) or self._size > self._largest + _FOR_THE_PLATFORM:
            return
        if self._log.lost and self._log.flush():
            self._tell_lost()
        if self.open_by not in (None, writer):
            self._end_open_line()
        first = self._number + (self.open_by is None)
        data = "".join(self._records(kind, lines, first, goes_on=goes_on)).encode("utf-8", "replace")
        if kind == "output" and self._size + len(data) > self._largest:
            self._truncate()
            return
        self.open_by = writer if goes_on else None
        self._number = first + len(lines) - 1
        self._write(data)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size - self._log.waiting

    def release(self) -> None:
        """Close the file after its last writer, and the log too if it is `ending`."""
        self.users -= 1
        if self.users == 0:
            if self._log.lost and self._log.flush():
                self._tell_lost()
            self._log.close()
            if self.ending:
                self._on_end()

    def _records(self, kind: LineKind, lines: list[str], first: int, *, goes_on: bool) -> Iterator[str]:
        """Yield the records of lines: more than one for a line that is very long. Hot: a build prints a lot."""
        now, mark = self._clock.now_us(), _KINDS[kind]
        last = first + len(lines) - 1
        for number, line in enumerate(lines, first):
            text = line
            while len(text) > LONGEST_LINE:
                yield f"{number} {now} {_GOES_ON}{text[:LONGEST_LINE]}\n"
                text = text[LONGEST_LINE:]
            yield f"{number} {now} {_GOES_ON if goes_on and number == last else mark}{text}\n"

    def _end_open_line(self) -> None:
        if self.open_by is not None:
            self.open_by = None
            self._write(f"{self._number} {self._clock.now_us()} {_KINDS['output']}\n".encode())

    def _truncate(self) -> None:
        self._full = True
        with contextlib.suppress(OSError):  # a full disk: what a later process writes to it is little
            self._full_mark.touch()
        self._end_open_line()
        text = f"truncated: this log has reached its limit of {self._largest} bytes; the rest is not kept"
        self.append(self, "notice", [text])

    def _tell_lost(self) -> None:
        """Say, now that there is room again, what there was none for."""
        lost, self._log.lost = self._log.lost, 0
        self._end_open_line()
        self._number += 1
        text = f"{lost} bytes are missing here: the disk was full"
        self._write("".join(self._records("notice", [text], self._number, goes_on=False)).encode())

    def _write(self, data: bytes) -> None:
        if self._log.write(data):
            self._size += len(data)
        self._on_change()


_RECORD = re.compile(rb"(\d+) (\d+) (.)(.*)")
_TAIL = 5 * LONGEST_LINE
"""Bytes that surely hold the last whole record: four per character and some for its head."""


def _mend(file: Path) -> tuple[int, int, bool]:
    """Cut off a torn last record; return the size, the last line's number and whether that line is open."""
    with file.open("rb+") as log:
        size = log.seek(0, 2)
        log.seek(max(0, size - _TAIL))
        tail = log.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        size -= len(tail) - len(whole)
        log.truncate(size)
    record = _RECORD.fullmatch(whole.removesuffix(b"\n").rpartition(b"\n")[2])
    return (size, int(record[1]), record[3] == _GOES_ON.encode()) if record else (size, 0, False)


def read(path: Path, offset: int, limit: int, *, closed: bool) -> LogChunk:
    """Return up to `limit` records from `offset` on; none where there is no file.

    `closed`: nothing is written any more, and nothing was when that was asked.
    """
    try:
        log = path.open("rb")
    except FileNotFoundError:
        return LogChunk([], 0, closed)
    with log:
        size = log.seek(0, 2)
        offset = _at_record(log, min(max(offset, 0), size))
        data = log.read(_LONGEST_READ)
    lines: list[LogLine] = []
    for record in _records(data, limit):
        offset += len(record)
        if (line := _line(record)) is not None:
            lines.append(line)
    return LogChunk(lines, offset, closed and offset >= size)


def _records(data: bytes, limit: int) -> Iterator[bytes]:
    r"""Yield up to `limit` whole records. Not `splitlines`: that cuts at `\r` too."""
    at = 0
    for _ in range(limit):
        end = data.find(b"\n", at) + 1
        if end == 0:
            return
        yield data[at:end]
        at = end


def _line(record: bytes) -> LogLine | None:
    found = _RECORD.fullmatch(record.removesuffix(b"\n"))
    if found is None:
        return None
    number, at, mark, text = found.groups()
    kind = _KIND_OF.get(mark.decode("latin-1"), "output")
    goes_on = mark == _GOES_ON.encode()
    return LogLine(int(number), to_datetime(int(at)), text.decode("utf-8", "replace"), kind, goes_on)


def _at_record(log: BinaryIO, offset: int) -> int:
    """Go to the beginning of the first record at or after `offset`, and return where that is."""
    if offset:
        log.seek(offset - 1)
        log.readline()
    else:
        log.seek(0)
    return log.tell()


def locate(path: Path, number: int) -> int:
    """Return the offset of the first record of line `number` or later, by bisection."""
    try:
        log = path.open("rb")
    except FileNotFoundError:
        return 0
    with log:
        low, high = 0, log.seek(0, 2)
        while low < high:
            middle = (low + high) // 2
            start = _at_record(log, middle)
            line = _line(log.readline())
            if line is None or line.number >= number:
                high = middle
            else:
                low = start + 1
        return _at_record(log, low)


def search(path: Path, text: str, limit: int) -> list[LogLine]:
    """Return the first `limit` lines that contain `text` in any case."""
    wanted = text.casefold()
    found: list[LogLine] = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as log:
        for record in log:
            line = _line(record)
            if line is not None and wanted in line.text.casefold():
                found.append(line)
                if len(found) >= limit:
                    break
    return found


def closed_mark(path: Path) -> Path:
    """Return the file whose presence says that a log is closed."""
    return path.with_suffix(".closed")
