"""What commands printed: one append-only file per step of a run, read by byte offset while it grows.

A record is one line of the file: `<number> <microseconds> <kind><text>`. The kind is one character, see `_KINDS`;
a line that is printed in pieces (a progress bar, a prompt) is several records of one number. A record is written
in one call, so a killed platform leaves whole records but for a torn last one, which the next writer cuts off.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import re
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Literal
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from ci_platform.errors import InvalidInputError
from dynflow.clock import Clock, SystemClock, TimerHandle, to_datetime, to_microseconds

MEBIBYTE = 1024 * 1024

LineKind = Literal["output", "command", "result", "notice"]
"""`command` and `result` frame what one command printed; a UI folds between them. `notice`: the platform speaks."""

_KINDS: dict[LineKind, str] = {"output": "o", "command": "$", "result": "=", "notice": "!"}
_KIND_OF = {character: kind for kind, character in _KINDS.items()}
_GOES_ON = "p"
"""The kind of a piece of output whose line is not over."""

_PARTIAL_AFTER_US = 300_000
"""How long half a line waits for the rest: long enough not to cut lines of a busy program, short for a prompt."""

_LONGEST_LINE = 16 * 1024
_LONGEST_READ = 2 * MEBIBYTE
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


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


@dataclass(frozen=True, slots=True)
class LogKey:
    """The log of the `count`th step named `step` in a run. Its attempts and commands share it."""

    run_id: str
    step: str
    count: int = 1


class Logs:
    """All logs below `root`. One process writes; followers in that process wake at each append.

    `largest` is the size of one log in bytes: what comes later is dropped, and a last line says so.
    """

    def __init__(self, root: Path, *, clock: Clock | None = None, largest: int = 64 * MEBIBYTE) -> None:
        self._root, self._clock, self._largest = root, clock or SystemClock(), largest
        self._changed: defaultdict[Path, anyio.Event] = defaultdict(anyio.Event)
        self._files: WeakValueDictionary[Path, _File] = WeakValueDictionary()

    def writer(self, key: LogKey) -> LogWriter:
        """Open a log for appending, made if need be, opened again if it was closed."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _closed_mark(path).unlink(missing_ok=True)
        file = self._files.get(path)
        if file is None or file.users == 0:
            file = self._files[path] = _File(path, self._clock, self._largest, lambda: self._wake(path))
        file.users += 1
        return LogWriter(file, self._clock)

    def close(self, key: LogKey) -> None:
        """Say that the step is over: followers come to their end."""
        path = self._path(key)
        # Also where nothing was printed: a follower may be waiting for it.
        path.parent.mkdir(parents=True, exist_ok=True)
        _closed_mark(path).touch()
        self._wake(path)

    def close_run(self, run_id: str) -> None:
        """Say that the run is over: no log of it grows any more."""
        folder = self._folder(run_id)
        for path in folder.glob("*.log"):
            _closed_mark(path).touch()
        for path in [path for path in self._changed if path.parent == folder]:
            folder.mkdir(parents=True, exist_ok=True)
            _closed_mark(path).touch()
            self._wake(path)

    async def read(self, key: LogKey, offset: int = 0, limit: int = 1000) -> LogChunk:
        """Return up to `limit` records from `offset` on, a `next_offset` of an earlier chunk.

        A log that does not exist (yet) is empty.
        """
        path = self._path(key)
        return await anyio.to_thread.run_sync(_read, path, offset, limit)

    async def follow(self, key: LogKey, offset: int = 0) -> AsyncIterator[LogChunk]:
        """Yield chunks from `offset` on as they are written, until the log is closed."""
        path = self._path(key)
        while True:
            changed = self._changed[path]
            chunk = await self.read(key, offset)
            if chunk.lines or chunk.complete:
                yield chunk
            if chunk.complete:
                return
            if not chunk.lines:
                await changed.wait()
            offset = chunk.next_offset

    async def locate(self, key: LogKey, number: int) -> int:
        """Return the offset of line `number`, or of the end, in a few reads whatever the size."""
        return await anyio.to_thread.run_sync(_locate, self._path(key), number)

    async def search(self, key: LogKey, text: str, limit: int = 100) -> list[LogLine]:
        """Return the first `limit` lines that contain `text`, upper and lower case alike."""
        return await anyio.to_thread.run_sync(_search, self._path(key), text, limit)

    def delete(self, run_id: str) -> None:
        """Delete all logs of a run."""
        folder = self._folder(run_id)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        for path in [path for path in self._changed if path.parent == folder]:
            self._wake(path)

    async def expire(self, age: timedelta) -> int:
        """Delete the logs of runs that nothing was written to for `age`; returns how many runs."""
        oldest = (to_microseconds(self._clock.now()) - age / timedelta(microseconds=1)) / 1e6
        return await anyio.to_thread.run_sync(_expire, self._root, oldest)

    def _folder(self, run_id: str) -> Path:
        if not _RUN_ID.fullmatch(run_id):
            raise InvalidInputError(f"{run_id!r} is not the id of a run")
        return self._root / run_id

    def _path(self, key: LogKey) -> Path:
        return self._folder(key.run_id) / f"{_slug(key.step)}-{key.count}.log"

    def _wake(self, path: Path) -> None:
        if (changed := self._changed.pop(path, None)) is not None:
            changed.set()


class LogWriter:
    """Appends what one command prints. Text comes in any pieces; `finish` writes what is left of the last line.

    Commands that run side by side in one step have a writer each. A line that one has left open ends where
    another one writes.
    """

    def __init__(self, file: _File, clock: Clock) -> None:
        self._file, self._clock = file, clock
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._timer: TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """Append output: whole lines now, half a line in a moment."""
        *lines, self._line = (self._line + self._decoder.decode(data)).split("\n")
        if lines:
            self._file.append(self, "output", lines)
        if len(self._line) > _LONGEST_LINE:
            self._show_partial()
        if self._line and self._timer is None:
            self._timer = self._clock.call_at(self._clock.now_us() + _PARTIAL_AFTER_US, self._due)

    def note(self, kind: LineKind, text: str) -> None:
        """Append lines of the platform's own, after the end of a line that is open."""
        self._end_line()
        self._file.append(self, kind, text.split("\n"))

    def finish(self) -> None:
        """Write what is left and let go of the file."""
        self._end_line()
        if self._timer is not None:
            self._timer.cancel()
        self._file.release()

    def _end_line(self) -> None:
        self._line += self._decoder.decode(b"", final=True)
        if self._line or self._file.open_by is self:
            line, self._line = self._line, ""
            self._file.append(self, "output", [line])

    def _due(self) -> None:
        self._timer = None
        if self._line:
            self._show_partial()

    def _show_partial(self) -> None:
        line, self._line = self._line, ""
        self._file.append(self, "output", [line], goes_on=True)


class _File:
    """One log open for appending, by one or more writers. `open_by` is whose line the next piece continues."""

    def __init__(self, path: Path, clock: Clock, largest: int, on_change: Callable[[], None]) -> None:
        self._clock, self._largest, self._on_change = clock, largest, on_change
        self._log = path.open("ab", buffering=0)
        self._size, self._number, goes_on = _mend(path)
        self._full = False
        self.users = 0
        self.open_by: LogWriter | None = None
        if goes_on:
            # A platform that was killed left half a line.
            self._number -= 1
            self._write(self._record("o", ""))

    def append(self, writer: LogWriter, kind: LineKind, lines: list[str], *, goes_on: bool = False) -> None:
        """Write lines in one call. Output over the limit is dropped; what the platform says is not.

        With `goes_on` the last line stays open.
        """
        data = b""
        if self.open_by not in (None, writer):
            self._number -= 1
            data = self._record("o", "")
            self.open_by = None
        number = self._number
        if self.open_by is writer:
            self._number -= 1
        data += b"".join(record for line in lines[:-1] for record in self._line(kind, line))
        data += b"".join(self._line(kind, lines[-1], goes_on=goes_on))
        if kind == "output" and self._size + len(data) > self._largest:
            self._number = number
            self._truncate()
            return
        self.open_by = writer if goes_on else None
        self._write(data)

    def release(self) -> None:
        """Close the file after its last writer."""
        self.users -= 1
        if self.users == 0:
            self._log.close()

    def _truncate(self) -> None:
        self.open_by = None
        if not self._full:
            self._full = True
            text = f"truncated: this log has reached its limit of {self._largest} bytes; the rest is not kept"
            self._write(self._record(_KINDS["notice"], text))

    def _line(self, kind: LineKind, text: str, *, goes_on: bool = False) -> Iterator[bytes]:
        """Yield the records of one line: more than one where it is very long."""
        pieces = [text[at : at + _LONGEST_LINE] for at in range(0, len(text), _LONGEST_LINE)] or [""]
        for index, piece in enumerate(pieces):
            if index:
                self._number -= 1
            last = index == len(pieces) - 1 and not goes_on
            yield self._record(
                _KINDS[kind] if last else _GOES_ON, piece.removesuffix("\r") if last else piece
            )

    def _record(self, mark: str, text: str) -> bytes:
        self._number += 1
        clean = text.replace("\0", "\ufffd")
        return f"{self._number} {self._clock.now_us()} {mark}{clean}\n".encode("utf-8", "replace")

    def _write(self, data: bytes) -> None:
        self._log.write(data)
        self._size += len(data)
        self._on_change()


_RECORD = re.compile(rb"(\d+) (\d+) (.)(.*)")
_TAIL = 5 * _LONGEST_LINE
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


def _read(path: Path, offset: int, limit: int) -> LogChunk:
    # Before the bytes: once it is there nothing is written any more.
    closed = _closed_mark(path).exists()
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


def _locate(path: Path, number: int) -> int:
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


def _search(path: Path, text: str, limit: int) -> list[LogLine]:
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


def _expire(root: Path, oldest: float) -> int:
    expired = 0
    for folder in [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []:
        if max((file.stat().st_mtime for file in folder.iterdir()), default=0.0) < oldest:
            shutil.rmtree(folder)
            expired += 1
    return expired


def _closed_mark(path: Path) -> Path:
    return path.with_suffix(".closed")


def _slug(step: str) -> str:
    """Return a file name for a step: readable, and different for different steps."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", step)[:48].strip("-")
    return slug if slug == step else f"{slug}-{hashlib.sha256(step.encode()).hexdigest()[:8]}"
