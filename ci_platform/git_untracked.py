"""Git's cache of untracked files, for a tree that has none: which folders `git status` need not list again.

It is an extension of the index (gitformat-index, "Untracked cache"): for each folder what `lstat` says of it, and the
id of its `.gitignore`. Git looks at each folder again, and lists those that are not as they were. Whatever changes in
a folder changes its time of change, which nobody can set; git compares that by the second, so a folder that is as
young as the cache is not in it.
"""

from __future__ import annotations

import os
import struct
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from ci_platform.sandboxes import SANDBOX_UID

SIGNATURE = b"UNTR"

_STAT = struct.Struct(">9I")
_UNKNOWN = bytes(_STAT.size)
_ID_BYTES = 20
_NO_ID = bytes(_ID_BYTES)
_EMPTY_FILE = bytes.fromhex("e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
_AS_STATUS_LISTS = 6
"""DIR_SHOW_OTHER_DIRECTORIES and DIR_HIDE_EMPTY_DIRECTORIES: the cache is for `git status` as it is without options."""

_IDENTITY = b"Location /workspace, system Linux\0"
"""Where the tree is for commands; git uses the cache nowhere else."""

_LAG = 0.5
"""Seconds by which the clock of files may be behind: it ticks a hundred times a second."""

_WORD = 0xFFFFFFFF
_LENGTH = struct.Struct(">I")


@dataclass(slots=True)
class Folders:
    """Takes down the folders of a tree while it is written, in any order in which parents come first."""

    _found: dict[bytes, tuple[bytes, bytes]] = field(default_factory=lambda: {b"": (_UNKNOWN, _NO_ID)})
    _whole: bool = True

    def enter(self, path: bytes) -> None:
        """Take down a folder, that is not done yet."""
        self._found[path] = (_UNKNOWN, _NO_ID)

    def ignores(self, path: bytes, oid: bytes) -> None:
        """Take down that a folder has a `.gitignore`."""
        self._found[path] = (self._found[path][0], oid)

    def leave(self, path: bytes, found: os.stat_result | None) -> None:
        """Take down what `lstat` says of a folder that is done; None where it is not on disk."""
        if found is None:
            self._whole = False
        else:
            self._found[path] = (_packed(found), self._found[path][1])

    def finish(self) -> Untracked | None:
        """Return the cache, None for a tree that is not on disk as a whole. No folder may be written to any more."""
        if not self._whole:
            return None
        order = list(_in_order(self._found))
        stats = b"".join(self._found[path][0] for path, _ in order)
        ids = b"".join(self._found[path][1] for path, _ in order)
        blocks = b"".join(_varint(0) + _varint(below) + _name(path) + b"\0" for path, below in order)
        return Untracked(b"\0".join(path for path, _ in order), blocks, stats, ids)


@dataclass(frozen=True, slots=True)
class Untracked:
    """The cache of a whole tree. `paths`, `stats` and `ids` are those of its folders, in the order of `blocks`."""

    paths: bytes
    blocks: bytes
    stats: bytes
    ids: bytes

    def as_bytes(self) -> bytes:
        """Return something that a file can hold."""
        parts = (self.paths, self.blocks, self.stats, self.ids)
        return b"".join(_LENGTH.pack(len(part)) + part for part in parts)

    @classmethod
    def from_bytes(cls, content: bytes) -> Untracked:
        """Return what `as_bytes` returned."""
        parts, position = list[bytes](), 0
        while position < len(content):
            (length,) = _LENGTH.unpack_from(content, position)
            position += _LENGTH.size + length
            parts.append(content[position - length : position])
        return cls(*parts)

    def encoded(self, touched: Collection[bytes] = ()) -> bytes:
        """Return the extension for an index that is written now.

        Folders in `touched` have to be listed: something in them is not as it was. So has the root, which each command
        has of its own.
        """
        paths, now = self.paths.split(b"\0"), int(time.time() - _LAG)
        again = [not path or path in touched for path in paths]
        stats = [self.stats[at : at + _STAT.size] for at in range(0, len(self.stats), _STAT.size)]
        ids = [self.ids[at : at + _ID_BYTES] for at in range(0, len(self.ids), _ID_BYTES)]
        known = [_is_older(stat, now) and not listed for stat, listed in zip(stats, again, strict=True)]
        ignoring = [oid != _NO_ID for oid in ids]
        pieces = [_varint(len(_IDENTITY)), _IDENTITY, _UNKNOWN, _UNKNOWN, _LENGTH.pack(_AS_STATUS_LISTS)]
        # Of `info/exclude`, which is empty, and of the user's own file, which is not there.
        pieces += [_EMPTY_FILE, _NO_ID, b".gitignore\0", _varint(len(paths)), self.blocks]
        pieces += [_bitmap(known), _bitmap([False] * len(paths)), _bitmap(ignoring)]
        pieces += [stat for stat, valid in zip(stats, known, strict=True) if valid]
        pieces += [oid for oid in ids if oid != _NO_ID]
        return b"".join([*pieces, b"\0"])


def _packed(found: os.stat_result) -> bytes:
    seconds, changed = divmod(found.st_ctime_ns, 1_000_000_000)
    modified, fraction = divmod(found.st_mtime_ns, 1_000_000_000)
    # As in the index: device 0, which git does not compare, and the owner that a command sees.
    about = (0, found.st_ino & _WORD, SANDBOX_UID, SANDBOX_UID, found.st_size & _WORD)
    return _STAT.pack(seconds & _WORD, changed, modified & _WORD, fraction, *about)


def _is_older(stat: bytes, second: int) -> bool:
    return stat != _UNKNOWN and int.from_bytes(stat[:4], "big") < second


def _in_order(found: Collection[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield each folder, and how many are in it, before those; by their names' bytes, as git looks for them."""
    below = defaultdict[bytes, list[bytes]](list)
    for path in found:
        if path:
            below[path.rpartition(b"/")[0]].append(path)
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        inner = sorted(below[path], reverse=True)
        yield path, len(inner)
        waiting += inner


def _name(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]


def _varint(value: int) -> bytes:
    """Return a number as git packs offsets: seven bits in each byte, and no two ways to write one number."""
    found = [value & 127]
    while value := value >> 7:
        value -= 1
        found.append(128 | value & 127)
    return bytes(reversed(found))


def _bitmap(bits: list[bool]) -> bytes:
    """Return bits in the format of EWAH, without its compression: one marker, then the words as they are."""
    words = (len(bits) + 63) // 64
    number = int("".join("1" if bit else "0" for bit in reversed(bits)), 2)
    literal = struct.pack(f">{words}Q", *struct.unpack(f"<{words}Q", number.to_bytes(words * 8, "little")))
    return struct.pack(">IIQ", len(bits), words + 1, words << 33) + literal + _LENGTH.pack(0)
