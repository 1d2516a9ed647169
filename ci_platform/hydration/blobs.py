"""Contents of files out of a git repository, by way of `git cat-file`: in batches, neighbours ahead. Stdlib only."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

_KEPT = 64 << 20
"""Bytes of small files that were read ahead and not asked for yet."""

_LARGE = 4 << 20
"""Bytes above which a file is kept on disk, to be read in parts."""

_MOST_LARGE = 4
"""Large files that are kept."""

_REMEMBERED = 4096
"""Files given whole: who has one of them again and again has it from memory, not each time from git."""

_PIECE = 1 << 20


class LostError(Exception):
    """A file's content cannot be had: the repository has not got it (any more)."""


def _size(oid: bytes, line: bytes) -> int:
    """Return the size that git says a file has: id, type, size."""
    head = line.split()
    if len(head) != 3 or head[1] != b"blob":
        raise LostError(f"the repository has no file {oid.hex()}")
    return int(head[2])


class Blobs:
    """Reads contents, one caller at a time."""

    def __init__(self, repository: str, env: Mapping[str, str], scratch: Path) -> None:
        self._command = ["git", "--git-dir", repository, "cat-file", "--batch"]
        self._env, self._scratch = dict(env), scratch
        self._git: subprocess.Popen[bytes] | None = None
        self._ahead: OrderedDict[bytes, bytes] = OrderedDict()
        self._held = 0
        self._given: OrderedDict[bytes, None] = OrderedDict()
        self._large: OrderedDict[bytes, IO[bytes]] = OrderedDict()

    def read(self, oid: bytes, size: int, offset: int, count: int) -> tuple[bytes, bool]:
        """Return a part of a file, and whether it was here already; LostError."""
        if size > _LARGE:
            return os.pread(self._file(oid, size).fileno(), count, offset), True
        content, was_here = self._ahead.get(oid), True
        if content is None:
            (content,), was_here = self._fetch([oid]), False
        if offset + count < size or self._is_wanted_again(oid):
            if not was_here:
                self._keep(oid, content)
        else:
            self._forget(oid)  # the kernel has it now
        return content[offset : offset + count], was_here

    def _is_wanted_again(self, oid: bytes) -> bool:
        """Whether a file that was given whole is asked for once more: somebody reads past what the kernel keeps."""
        again = oid in self._given
        self._given[oid] = None
        self._given.move_to_end(oid)
        while len(self._given) > _REMEMBERED:
            self._given.popitem(last=False)
        return again

    def fetch_ahead(self, wanted: Sequence[tuple[bytes, int]]) -> None:
        """Fetch contents (id, size) that will be asked for soon. What is lost is said when it is asked for."""
        missing = [oid for oid, size in wanted if size <= _LARGE and oid not in self._ahead]
        try:
            for oid, content in zip(missing, self._fetch(missing), strict=True):
                self._keep(oid, content)
        except LostError:
            return

    def _keep(self, oid: bytes, content: bytes) -> None:
        self._forget(oid)
        self._ahead[oid] = content
        self._held += len(content)
        while self._held > _KEPT:
            self._forget(next(iter(self._ahead)))

    def _forget(self, oid: bytes) -> None:
        self._held -= len(self._ahead.pop(oid, b""))

    def _fetch(self, oids: Sequence[bytes]) -> list[bytes]:
        found = []
        for oid, stream, size in self._ask(oids):
            content = stream.read(size + 1)
            if len(content) != size + 1:
                raise LostError(f"git ended while it read {oid.hex()}")
            found.append(content[:-1])
        return found

    def _file(self, oid: bytes, size: int) -> IO[bytes]:
        if oid not in self._large:
            file: IO[bytes] = tempfile.TemporaryFile(dir=self._scratch, buffering=0)  # noqa: SIM115 - kept
            for _, stream, found in self._ask([oid]):
                self._copy(stream, file, found)
                if found != size or not stream.read(1):
                    raise LostError(f"git ended while it read {oid.hex()}")
            self._large[oid] = file
            while len(self._large) > _MOST_LARGE:
                self._large.popitem(last=False)[1].close()
        self._large.move_to_end(oid)
        return self._large[oid]

    def _copy(self, stream: IO[bytes], file: IO[bytes], size: int) -> None:
        while size > 0 and (piece := stream.read(min(size, _PIECE))):
            size -= len(piece)
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]

    def _ask(self, oids: Sequence[bytes]) -> Iterator[tuple[bytes, IO[bytes], int]]:
        """Yield each id, the stream from which to read its content and one byte more, and the content's size."""
        try:
            git = self._running()
            assert git.stdin is not None and git.stdout is not None  # noqa: S101, PT018 - both are pipes
            git.stdin.write(b"".join(oid.hex().encode() + b"\n" for oid in oids))
            git.stdin.flush()
            for oid in oids:
                yield oid, git.stdout, _size(oid, git.stdout.readline())
        except (OSError, LostError) as error:
            self.close()
            raise LostError(str(error)) from error

    def _running(self) -> subprocess.Popen[bytes]:
        if self._git is not None and self._git.poll() is not None:
            self.close()
        if self._git is None:
            self._git = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self._env,
                cwd="/",
                bufsize=1 << 16,
            )
        return self._git

    def kill(self) -> None:
        """End git, from another thread than the one that reads."""
        if (git := self._git) is not None:
            git.kill()

    def close(self) -> None:
        """End git; the next read starts it anew."""
        git, self._git = self._git, None
        if git is not None:
            git.kill()
            git.wait()
            for stream in (git.stdin, git.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
