"""Bytes from one file to another, digested on the way: holes stay holes, memory stays small. Blocks."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ci_platform.errors import UnavailableError

PIECE = 1 << 20
_ZEROS = memoryview(bytes(PIECE))


@dataclass(slots=True)
class Copied:
    """What was copied: bytes, SHA-256 in hexadecimal, CRC-32."""

    size: int = 0
    crc: int = 0
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def content(self) -> str:
        """The SHA-256 of all of it."""
        return self._digest.hexdigest()

    def add(self, piece: bytes | memoryview) -> None:
        """Take up what comes next."""
        self._digest.update(piece)
        self.crc = zlib.crc32(piece, self.crc)
        self.size += len(piece)


def copy(reader: int, writer: int, alive: Callable[[], None] = lambda: None) -> Copied:
    """Copy a regular file into an empty one. `alive` is called for each mebibyte, and may raise."""
    copied = Copied()
    for piece, is_hole in _pieces(reader):
        alive()
        if not is_hole:
            _write(writer, piece, copied.size)
        copied.add(piece)
    os.ftruncate(writer, copied.size)
    return copied


def _pieces(reader: int) -> Iterator[tuple[bytes | memoryview, bool]]:
    """Yield a file's bytes, and whether they are of a hole, which nobody wrote."""
    size, at = os.fstat(reader).st_size, 0
    while at < size:
        data = _seek(reader, at, os.SEEK_DATA, size)
        while at < data:
            piece = _ZEROS[: min(PIECE, data - at)]
            yield piece, True
            at += len(piece)
        end = _seek(reader, at, os.SEEK_HOLE, size) if at < size else size
        while at < end:
            read = os.pread(reader, min(PIECE, end - at), at)
            if not read:
                raise UnavailableError("a file became shorter while it was copied")
            yield read, False
            at += len(read)


def _seek(reader: int, at: int, what: int, size: int) -> int:
    try:
        return min(os.lseek(reader, at, what), size)
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data up to the end
            raise
        return size


def _write(writer: int, piece: bytes | memoryview, at: int) -> None:
    left = memoryview(piece)
    while left:
        written = os.pwrite(writer, left, at)
        left, at = left[written:], at + written


def verified(reader: int, content: str, size: int) -> Iterator[bytes]:
    """Yield a file's bytes; the last piece only once all of it has the digest that it should have.

    Raises UnavailableError otherwise: who reads gets too little, and not something else.
    """
    copied, held = Copied(), b""
    while piece := os.read(reader, PIECE):
        if held:
            yield held
        copied.add(piece)
        held = piece
    if (copied.content, copied.size) != (content, size):
        raise UnavailableError("a file of the artifact is damaged on the platform's disk")
    if held:
        yield held
