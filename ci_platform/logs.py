"""What commands printed: one append-only file per step of a run, read by byte offset while it grows."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from ci_platform import full_disk, log_files
from ci_platform.connections import ConnectionLog
from ci_platform.errors import InvalidInputError
from ci_platform.log_files import LONGEST_LINE, MEBIBYTE, LineKind, LogChunk, LogFile, LogLine, closed_mark
from dynflow.clock import Clock, SystemClock, TimerHandle

__all__ = ["LineKind", "LogChunk", "LogKey", "LogLine", "LogWriter", "Logs"]

_PARTIAL_AFTER_US = 300_000
"""How long half a line waits for the rest: long enough not to cut lines of a busy program, short for a prompt."""

_COLLECTED = "collected"
"""In a run's folder: its logs were deleted to make room."""

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


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
        self._files: WeakValueDictionary[Path, LogFile] = WeakValueDictionary()
        self._unmarked = set[Path]()  # closed, with no room on the disk to say so

    def writer(self, key: LogKey) -> LogWriter:
        """Open a log for appending, made if need be, opened again if it was closed. UnavailableError: a full disk."""
        path = self._path(key)
        file = self._files.get(path)
        if file is None or file.users == 0:
            file = self._files[path] = full_disk.told(lambda: self._open(path))()
        closed_mark(path).unlink(missing_ok=True)
        self._unmarked.discard(path)
        file.users += 1
        file.ending = False
        return LogWriter(file, self._clock)

    def _open(self, path: Path) -> LogFile:
        path.parent.mkdir(parents=True, exist_ok=True)
        return LogFile(
            path,
            self._clock,
            self._largest,
            on_change=lambda: self._wake(path),
            on_end=lambda: self._mark_closed(path),
        )

    def size(self, key: LogKey) -> int:
        """Return the bytes of a log's file; 0 where there is none."""
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            return 0

    def connections(self, key: LogKey) -> ConnectionLog:
        """Return the list of a step's connections; it is kept and deleted with its log."""
        return ConnectionLog(self._path(key).with_suffix(".connections"))

    def close(self, key: LogKey) -> None:
        """Say that the step is over: followers come to their end."""
        self._close(self._path(key))

    def close_run(self, run_id: str) -> None:
        """Say that the run is over: no log of it grows any more."""
        folder = self._folder(run_id)
        followed = [path for path in self._changed if path.parent == folder]
        for path in {*folder.glob("*.log"), *followed}:
            self._close(path)

    def _close(self, path: Path) -> None:
        file = self._files.get(path)
        if file is not None and file.users:
            file.ending = True  # a command that is being stopped still says so
            return
        self._mark_closed(path)

    def _mark_closed(self, path: Path) -> None:
        """Say that a log is over, also where nothing was printed: a follower may be waiting for it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            closed_mark(path).touch()
        except OSError as error:
            if error.errno not in full_disk.FULL:
                raise
            self._unmarked.add(path)
        self._wake(path)

    async def read(self, key: LogKey, offset: int = 0, limit: int = 1000) -> LogChunk:
        """Return up to `limit` records from `offset` on, a `next_offset` of an earlier chunk.

        A log that does not exist (yet) is empty.
        """
        return await anyio.to_thread.run_sync(self._read, self._path(key), offset, limit)

    def _read(self, path: Path, offset: int, limit: int) -> LogChunk:
        collected = path.parent / _COLLECTED
        if path.exists() or not collected.exists():
            # Asked before the bytes are read: once it is closed nothing is written any more.
            closed = path in self._unmarked or closed_mark(path).exists()
            return log_files.read(path, offset, limit, closed=closed)
        at = datetime.fromtimestamp(collected.stat().st_mtime, UTC)
        said = [LogLine(1, at, "this log was deleted to make room", "notice")]
        return LogChunk([] if offset else said, 1, complete=True)

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
        return await anyio.to_thread.run_sync(log_files.locate, self._path(key), number)

    async def search(self, key: LogKey, text: str, limit: int = 100) -> list[LogLine]:
        """Return the first `limit` lines that contain `text`, upper and lower case alike."""
        return await anyio.to_thread.run_sync(log_files.search, self._path(key), text, limit)

    def delete(self, run_id: str) -> None:
        """Delete all logs of a run."""
        trash = self._trash()
        with contextlib.suppress(FileNotFoundError):
            self._folder(run_id).rename(trash)
            shutil.rmtree(trash)
        self._wake_all(run_id)

    @property
    def root(self) -> Path:
        """Where each run has a folder."""
        return self._root

    def growing(self) -> set[str]:
        """Return the runs of which something is writing a log."""
        return {path.parent.name for path, file in self._files.items() if file.users}

    def folders(self) -> list[Path]:
        """Return the folders of runs, in no order. Blocks."""
        return [path for path in self._root.glob("[!.]*") if _RUN_ID.fullmatch(path.name)]

    async def collect(self, run_id: str) -> bool:
        """Delete all logs of a run, so that they say so when they are read; False while one of them grows.

        Out of sight by renames, for which no disk is too full, and in one go: nobody begins to write meanwhile.
        """
        if run_id in self.growing():
            return False
        folder, trash = self._folder(run_id), list[Path]()
        for path in sorted(folder.glob("*")):
            mark = folder / _COLLECTED
            if path != mark:
                trash.append(self._trash())
                path.rename(mark if path.suffix == ".log" and not mark.exists() else trash[-1])
        self._wake_all(run_id)
        await anyio.to_thread.run_sync(_empty, folder / _COLLECTED, trash)
        return True

    def sweep(self) -> None:
        """Delete what a killed process was deleting; call once at start."""
        for path in self._root.glob(".trash-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _trash(self) -> Path:
        return self._root / f".trash-{secrets.token_hex(8)}"

    def _wake_all(self, run_id: str) -> None:
        folder = self._folder(run_id)
        for path in [path for path in self._changed if path.parent == folder]:
            self._wake(path)

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

    def __init__(self, file: LogFile, clock: Clock) -> None:
        self._file, self._clock = file, clock
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._timer: TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """Append output: whole lines now, half a line in a moment."""
        *lines, self._line = _clean(self._line + self._decoder.decode(data)).split("\n")
        if lines:
            self._file.append(self, "output", lines)
        if len(self._line) > LONGEST_LINE:
            self._show_partial()
        if self._line and self._timer is None:
            self._timer = self._clock.call_at(self._clock.now_us() + _PARTIAL_AFTER_US, self._due)

    def note(self, kind: LineKind, text: str) -> None:
        """Append lines of the platform's own, after the end of a line that is open."""
        self._end_line()
        self._file.append(self, kind, _clean(text).split("\n"))

    @property
    def size(self) -> int:
        """Bytes of the log's file."""
        return self._file.size

    def leave(self) -> None:
        """Let go of the file without what is left: a later process goes on with it."""
        self._line, self._decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
        if self._timer is not None:
            self._timer.cancel()
        self._file.release()

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


def _clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\0", "\ufffd")


def _empty(mark: Path, trash: list[Path]) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.truncate(mark, 0)
    for path in trash:
        path.unlink(missing_ok=True)


def _slug(step: str) -> str:
    """Return a file name for a step: readable, and different for different steps."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", step)[:48].strip("-")
    # The dot is in no name that stays as it is, so that none can be chosen to meet this one.
    return slug if slug == step else f"{slug}.{hashlib.sha256(step.encode()).hexdigest()[:16]}"
