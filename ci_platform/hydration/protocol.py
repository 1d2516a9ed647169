"""The kernel's language for file systems in programs: what is read from and written to /dev/fuse. Stdlib only.

The numbers are those of include/uapi/linux/fuse.h. A tree never changes, so everything may be kept by the kernel for as
long as it likes: names (also of what is not there), attributes, listings, targets of links and contents. Files and
folders are opened without asking (`NO_OPEN`), so what the kernel has kept is read without a switch to this program.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS = 1, 2, 3, 5, 14, 15, 17
INIT, OPENDIR, READDIR, DESTROY, IOCTL, BATCH_FORGET, READDIRPLUS = 26, 27, 28, 38, 39, 42, 44

IN = struct.Struct("<IIQQIIII")
READ_IN = struct.Struct("<QQII")
_OUT = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_ATTRIBUTES = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_DIRENT = struct.Struct("<QQII")
_STATFS = struct.Struct("<5Q4I24x")

_MAJOR, _MINOR = 7, 41
_ASYNC_READ, _READDIRPLUS, _NO_OPEN, _PARALLEL = 1 << 0, 1 << 13, 1 << 17, 1 << 18
_MAX_PAGES, _CACHE_LINKS, _NO_OPENDIR, _INIT_EXT = 1 << 22, 1 << 23, 1 << 24, 1 << 30
_REQUEST_TIMEOUT = 1 << (42 - 32)
_WANTED = (
    _ASYNC_READ | _READDIRPLUS | _NO_OPEN | _PARALLEL | _MAX_PAGES | _CACHE_LINKS | _NO_OPENDIR | _INIT_EXT
)
_NEEDED = _READDIRPLUS | _NO_OPEN | _NO_OPENDIR
"""Linux 5.1 has them."""

_PAGES = 256
"""Of one read: 1 MiB."""

_FOR_EVER = 10**9
"""Seconds that the kernel may keep what it was told."""

BUFFER = 64 * 1024
"""Bytes of the longest request: nobody writes."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `lstat` says. `number` is the inode's; the time in ns."""

    number: int
    mode: int
    size: int
    modified_at: int
    uid: int
    gid: int

    def packed(self) -> bytes:
        """Return the kernel's `fuse_attr`."""
        seconds, rest = divmod(self.modified_at, 1_000_000_000)
        blocks = -(-self.size // 512)
        times = (seconds, seconds, seconds, rest, rest, rest)
        owner = (self.uid, self.gid)
        return _ATTRIBUTES.pack(self.number, self.size, blocks, *times, self.mode, 1, *owner, 0, 4096, 0)


def initialise(body: bytes, timeout: int) -> bytes:
    """Return the answer to INIT; OSError where the kernel is too old. `timeout` ends everything, in seconds."""
    major, minor, ahead, offered = _INIT_IN.unpack_from(body)[:4]
    more = _INIT_IN.unpack_from(body)[4] if len(body) >= _INIT_IN.size and offered & _INIT_EXT else 0
    if major != _MAJOR or offered & _NEEDED != _NEEDED:
        raise OSError(f"the kernel's FUSE {major}.{minor} cannot open files without asking")
    more &= _REQUEST_TIMEOUT
    return _INIT_OUT.pack(
        _MAJOR,
        min(minor, _MINOR),
        max(ahead, _PAGES * 4096),
        offered & _WANTED,
        64,
        48,
        4096,
        1,
        _PAGES,
        0,
        more,
        0,
        timeout if more else 0,
    )


def answer(unique: int, body: bytes) -> list[bytes]:
    """Return the answer to a request, in pieces."""
    return [_OUT.pack(_OUT.size + len(body), 0, unique), body]


def refusal(unique: int, code: int) -> list[bytes]:
    """Return an error as the answer."""
    return [_OUT.pack(_OUT.size, -code, unique)]


def entry(number: int, attributes: bytes) -> bytes:
    """Return what a name leads to."""
    return _ENTRY.pack(number, 0, _FOR_EVER, _FOR_EVER, 0, 0) + attributes


NOTHING = _ENTRY.pack(0, 0, _FOR_EVER, 0, 0, 0) + bytes(_ATTRIBUTES.size)
"""What a name leads to that is not there, to be remembered."""


def attributes_out(attributes: bytes) -> bytes:
    """Return the answer to GETATTR."""
    return struct.pack("<QII", _FOR_EVER, 0, 0) + attributes


def listed(name: bytes, offset: int, number: int, kind: int, found: bytes | None) -> bytes:
    """Return one entry of a folder. `offset` is where the next one is; with `found` it needs no look-up later."""
    record = _DIRENT.pack(number, offset, len(name), kind) + name
    padding = bytes(-len(record) % 8)
    return (found or b"") + record + padding


def statfs(files: int) -> bytes:
    """Return the answer to STATFS: nothing is free."""
    return _STATFS.pack(0, 0, 0, files, 0, 4096, 255, 4096, 0)
