"""An artifact as one file: zip or tar, written as it is read, and the same bytes for the same files. Pure.

Nothing is compressed: what is worth it is compressed already (wheels, images), the size is known before the first
byte, and no version of a library has a say in the bytes. All times are the first moment that zip knows.
"""

from __future__ import annotations

import calendar
import stat
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from ci_platform.artifacts.contents import Entry

Format = Literal["zip", "tar"]
Pieces = Callable[[Entry], Iterable[bytes]]
"""Gives the bytes of a file."""

_TIME = calendar.timegm((1980, 1, 1, 0, 0, 0))
_DATE = 0x21  # 1980-01-01, as DOS wrote it
_UTF_8 = 0x800
_MOST, _MOST_ENTRIES = 0xFFFFFFFF, 0xFFFF
"""What fits into the fields that zip had first; above, there are others (zip64)."""
_UNIX = 3 << 8
_BLOCK = 512


def archive(form: Format, entries: Sequence[Entry], pieces: Pieces) -> Iterator[bytes]:
    """Yield an archive of entries, which are sorted."""
    return _zip(entries, pieces) if form == "zip" else _tar(entries, pieces)


def size_of(form: Format, entries: Sequence[Entry]) -> int:
    """Return how many bytes `archive` yields."""
    files = sum(entry.size for entry in entries if entry.kind == "file")
    if form == "zip":
        return files + sum(map(len, _zip(entries, lambda _: ())))
    padding = sum(-entry.size % _BLOCK for entry in entries if entry.kind == "file")
    return files + padding + sum(len(_tar_header(entry)) for entry in entries) + 2 * _BLOCK


# --- zip: APPNOTE.TXT 6.3, sections 4.3.7 to 4.3.16 and 4.5.3 -------------------------------------------


def _zip(entries: Sequence[Entry], pieces: Pieces) -> Iterator[bytes]:
    at, central = 0, list[bytes]()
    for entry in entries:
        head = _local(entry)
        central.append(_central(entry, at))
        at += len(head) + _size(entry)
        yield head
        if entry.kind == "file":
            yield from pieces(entry)
        elif entry.kind == "symlink":
            yield entry.target.encode()
    yield from central
    yield _end(len(entries), sum(map(len, central)), at)


def _size(entry: Entry) -> int:
    return len(entry.target.encode()) if entry.kind == "symlink" else entry.size


def _name(entry: Entry) -> bytes:
    return (entry.path + ("/" if entry.kind == "folder" else "")).encode()


def _common(entry: Entry, extra: bytes, size: int) -> bytes:
    """Return the fields that a file has in both places, from the version that is needed to the length of `extra`."""
    crc = zlib.crc32(entry.target.encode()) if entry.kind == "symlink" else entry.crc
    needs = 45 if extra else 20
    return struct.pack(
        "<HHHHHIIIHH", needs, _UTF_8, 0, 0, _DATE, crc, size, size, len(_name(entry)), len(extra)
    )


def _local(entry: Entry) -> bytes:
    size, extra = _size(entry), b""
    if size >= _MOST:
        extra, size = struct.pack("<HHQQ", 1, 16, size, size), _MOST
    return b"PK\3\4" + _common(entry, extra, size) + _name(entry) + extra


def _central(entry: Entry, at: int) -> bytes:
    size = _size(entry)
    large = [size, size] if size >= _MOST else []
    if at >= _MOST:
        large.append(at)
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    kinds = {"file": stat.S_IFREG, "symlink": stat.S_IFLNK, "folder": stat.S_IFDIR}
    attributes = (kinds[entry.kind] | entry.mode) << 16 | (0x10 if entry.kind == "folder" else 0)
    made_by = struct.pack("<H", _UNIX | 45)
    rest = struct.pack("<HHHII", 0, 0, 0, attributes, min(at, _MOST))
    return b"PK\1\2" + made_by + _common(entry, extra, min(size, _MOST)) + rest + _name(entry) + extra


def _end(count: int, length: int, at: int) -> bytes:
    more = b""
    if count > _MOST_ENTRIES or at >= _MOST or length >= _MOST:
        more = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, _UNIX | 45, 45, 0, 0, count, count, length, at)
        more += b"PK\6\7" + struct.pack("<IQI", 0, at + length, 1)
    few = min(count, _MOST_ENTRIES)
    return more + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, few, few, min(length, _MOST), min(at, _MOST), 0)


# --- tar ------------------------------------------------------------------------------------------------


def _tar(entries: Sequence[Entry], pieces: Pieces) -> Iterator[bytes]:
    for entry in entries:
        yield _tar_header(entry)
        if entry.kind == "file":
            yield from pieces(entry)
            yield bytes(-entry.size % _BLOCK)
    yield bytes(2 * _BLOCK)


def _tar_header(entry: Entry) -> bytes:
    member = tarfile.TarInfo(entry.path)
    member.mtime, member.mode = _TIME, entry.mode
    if entry.kind == "folder":
        member.type = tarfile.DIRTYPE
    elif entry.kind == "symlink":
        member.type, member.linkname = tarfile.SYMTYPE, entry.target
    else:
        member.size = entry.size
    return member.tobuf(tarfile.PAX_FORMAT)


def gathered(pieces: Iterable[bytes], least: int = 1 << 18) -> Iterator[bytes]:
    """Yield the same bytes in pieces that are worth sending: thousands of small files are thousands of pieces."""
    held, size = list[bytes](), 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= least:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
