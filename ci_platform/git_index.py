"""Git's index of a tree on disk, made while the tree is written: `git status` then reads no file to compare it.

The format is git's own (Documentation/gitformat-index.txt), versions 2 and 3, with its cache of tree ids. An
entry holds what `lstat` says of its file. The index of a delta is its base's with some entries replaced: copied
in pieces, because reading the entries one by one costs 100 ms where a tree has 80,000.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ci_platform import git_untracked
from ci_platform.git_untracked import Folders, Untracked
from ci_platform.sandboxes import SANDBOX_UID

_HEADER = struct.Struct(">4sII")
_ENTRY = struct.Struct(">10I20sH")
_MADE = struct.Struct(">6I20sH")
_EXTENSION = struct.Struct(">4sI")
_NODE = re.compile(rb"([^\0]*)\0(-?\d+) (\d+)\n")
_WORD = 0xFFFFFFFF
_LONGEST_NAME = 0xFFF
_EXTENDED, _SKIP_WORKTREE = 0x4000, 0x4000
_ID_BYTES = 20
_NOTHING = (0,) * 10

GITLINK = 0o160000
"""The mode of a submodule's entry."""

GITLINK_OUTSIDE = GITLINK | 1 << 16
"""What stands for that of a submodule whose folder is outside of a sparse workspace: git does not miss it there."""


def entry(path: bytes, mode: int, oid: bytes, found: os.stat_result | None) -> bytes:
    """Return an entry. `found` is what `lstat` says of the file; None for one that is not on disk (sparse).

    A submodule has nothing to compare: its folder is there and empty.
    """
    flags = min(len(path), _LONGEST_NAME)
    if found is None and mode != GITLINK:
        fields = _ENTRY.pack(*_stat_fields(None, mode & 0xFFFF), oid, flags | _EXTENDED)
        head = fields + struct.pack(">H", _SKIP_WORKTREE)
    else:
        head = _ENTRY.pack(*_stat_fields(found, mode), oid, flags)
    # One to eight NUL bytes, so that each entry begins at a multiple of eight.
    return head + path + b"\0" * (8 - (len(head) + len(path)) % 8)


def made_entry(path: bytes, mode: int, oid: bytes, times: bytes, inode: int, size: int) -> bytes:
    """Return the entry of a file that is not on disk yet. `times` are its ctime and mtime, packed."""
    about = (0, inode & _WORD, mode, SANDBOX_UID, SANDBOX_UID, size & _WORD)
    head = times + _MADE.pack(*about, oid, min(len(path), _LONGEST_NAME))
    return head + path + b"\0" * (8 - (len(head) + len(path)) % 8)


def _stat_fields(found: os.stat_result | None, mode: int) -> tuple[int, ...]:
    if found is None:
        return (*_NOTHING[:6], mode, *_NOTHING[7:])
    seconds, ctime = divmod(found.st_ctime_ns, 1_000_000_000)
    modified, mtime = divmod(found.st_mtime_ns, 1_000_000_000)
    # Device 0: git does not compare it. The owner is whom a command sees there: itself.
    times = (seconds & _WORD, ctime, modified & _WORD, mtime)
    return (*times, 0, found.st_ino & _WORD, mode, SANDBOX_UID, SANDBOX_UID, found.st_size & _WORD)


@dataclass(slots=True)
class _Node:
    """A directory that is being written: its files and those below, the ids of what is below."""

    name: bytes
    oid: bytes
    files: int = 0
    folders: int = 0
    below: bytearray = field(default_factory=bytearray)

    def encoded(self) -> bytes:
        return self.name + b"\0%d %d\n" % (self.files, self.folders) + self.oid + self.below


class Recorder:
    """Takes down the entries of a whole tree, in git's order, which is that of a walk of its tree objects."""

    def __init__(self, oid: bytes) -> None:
        self._content, self._offsets = bytearray(_HEADER.size), array("Q")
        self._nodes = [_Node(b"", oid)]
        self._extended = False
        self._folders, self._path = Folders(), b""

    def enter(self, name: bytes, oid: bytes) -> None:
        """Begin a directory."""
        self._nodes.append(_Node(name, oid))
        self._path += b"/" * bool(self._path) + name
        self._folders.enter(self._path)

    def leave(self, found: os.stat_result | None = None) -> None:
        """End a directory. `found` is what `lstat` says of it; None for one that is not on disk."""
        self._folders.leave(self._path, found)
        self._path = self._path.rpartition(b"/")[0]
        node = self._nodes.pop()
        parent = self._nodes[-1]
        parent.below += node.encoded()
        parent.files += node.files
        parent.folders += 1

    def add(self, path: bytes, mode: int, oid: bytes, found: os.stat_result | None) -> None:
        """Take down a file."""
        self._extended = self._extended or (found is None and mode != GITLINK)
        if path.rpartition(b"/")[2] == b".gitignore":
            self._folders.ignores(self._path, oid)
        self.append(entry(path, mode, oid, found))

    def append(self, new: bytes) -> None:
        """Take down a file's entry that somebody has made."""
        self._offsets.append(len(self._content))
        self._content += new
        self._nodes[-1].files += 1

    def remove(self, path: bytes) -> None:
        """Take down a removal, which whole trees have none of."""
        raise AssertionError(f"a whole tree removes nothing: {path!r}")

    def finish(self) -> tuple[Index, array[int]]:
        """Return the index, and where in its file each entry begins."""
        version, count = 3 if self._extended else 2, len(self._offsets)
        entries = memoryview(self._content)[_HEADER.size :]
        return Index(version, count, [entries], self._nodes[0].encoded()), self._offsets

    def untracked(self) -> Untracked | None:
        """Return the cache of untracked files, for a tree that is the workspace itself; None where it has no use."""
        return None if self._extended else self._folders.finish()


@dataclass(slots=True)
class Changes:
    """What a delta replaces in the index of the whole tree at its bottom. Same methods as `Recorder`."""

    removed: set[bytes] = field(default_factory=set)
    added: dict[bytes, bytes] = field(default_factory=dict)

    def enter(self, name: bytes, oid: bytes) -> None:
        """Begin a directory."""

    def leave(self, found: os.stat_result | None = None) -> None:
        """End a directory."""

    def add(self, path: bytes, mode: int, oid: bytes, found: os.stat_result | None) -> None:
        """Take down a file that is new or changed."""
        self.added[path] = entry(path, mode, oid, found)

    def remove(self, path: bytes) -> None:
        """Take down that a path is gone, with everything below."""
        self.removed.add(path)

    def after(self, earlier: Changes) -> Changes:
        """Return both as one: these came later."""
        kept = {path: new for path, new in earlier.added.items() if not _covered(path, self.removed)}
        return Changes(earlier.removed | self.removed, kept | self.added)

    def as_json(self) -> dict[str, list[str] | dict[str, str]]:
        """Return something that JSON can hold; names have any bytes."""
        added = {path.decode("latin-1"): new.hex() for path, new in self.added.items()}
        return {"removed": [path.decode("latin-1") for path in self.removed], "added": added}

    @classmethod
    def from_json(cls, removed: Iterable[str], added: Mapping[str, str]) -> Changes:
        """Return what `as_json` returned."""
        read = {path.encode("latin-1"): bytes.fromhex(new) for path, new in added.items()}
        return cls({path.encode("latin-1") for path in removed}, read)


def _covered(path: bytes, removed: set[bytes]) -> bool:
    return path in removed or any(parent in removed for parent in _parents(path))


def _parents(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:depth]) for depth in range(1, len(parts))]


@dataclass(frozen=True, slots=True)
class Index:
    """An index to be written: how many entries, pieces of encoded ones, the caches of tree ids and untracked files."""

    version: int
    count: int
    entries: Sequence[bytes | memoryview]
    trees: bytes
    untracked: bytes = b""

    def write(self, path: Path) -> int:
        """Write git's file; return its bytes."""
        header = _HEADER.pack(b"DIRC", self.version, self.count)
        pieces = [header, *self.entries, _EXTENSION.pack(b"TREE", len(self.trees)), self.trees]
        if self.untracked:
            pieces += [_EXTENSION.pack(git_untracked.SIGNATURE, len(self.untracked)), self.untracked]
        digest = hashlib.sha1(usedforsecurity=False)
        for piece in pieces:
            digest.update(piece)
        with path.open("xb") as file:
            file.writelines([*pieces, digest.digest()])
            return file.tell()


class WrittenIndex:
    """The index of a whole tree, from its file and where in it each entry begins (an array's bytes)."""

    def __init__(self, content: bytes, offsets: bytes, untracked: Untracked | None = None) -> None:
        self._content, self._offsets, self._untracked = content, array("Q", offsets), untracked
        _, self._version, self._count = _HEADER.unpack_from(content)
        self._end = _HEADER.size
        if self._count:
            start = self._offsets[-1]
            name = content.index(b"\0", start + _fixed_size(content, start))
            self._end = start + (name - start) // 8 * 8 + 8

    @property
    def trees(self) -> bytes:
        """The cache of tree ids."""
        _, size = _EXTENSION.unpack_from(self._content, self._end)
        start = self._end + _EXTENSION.size
        return self._content[start : start + size]

    def changed(self, changes: Changes) -> Index:
        """Return the index after some changes. Directories that they touch lose their cached ids."""
        touched = changes.removed | changes.added.keys()
        gone, pieces = self._gone(changes, touched), list[bytes | memoryview]()
        count, position, content = 0, 0, memoryview(self._content)
        places = [(self._place(path), changes.added[path]) for path in sorted(changes.added)]
        for place, new in [*places, (self._count, b"")]:
            for first, last in _without(position, place, gone):
                pieces.append(content[self._start(first) : self._start(last)])
                count += last - first
            pieces.append(new)
            count += bool(new)
            position = place
        extended = self._version == 3 or any(_is_extended(new, 0) for new in changes.added.values())
        above = {parent for path in touched for parent in (b"", *_parents(path))}
        trees, untracked = _forget_trees(self.trees, touched, above), b""
        if self._untracked is not None and not extended:
            untracked = self._untracked.encoded(above | touched)
        return Index(3 if extended else 2, count, pieces, trees, untracked)

    def _gone(self, changes: Changes, touched: set[bytes]) -> list[tuple[int, int]]:
        """Return which entries go, as sorted ranges that do not meet."""
        ranges = set[tuple[int, int]]()
        for path in touched:
            place = self._place(path)
            ranges.add((place, place + (self._name(place) == path)))
        for path in changes.removed:
            # "0" is the character after "/".
            ranges.add((self._place(path + b"/"), self._place(path + b"0")))
        found = list[tuple[int, int]]()
        for first, last in sorted(ranges):
            if found and first <= found[-1][1]:
                found[-1] = (found[-1][0], max(last, found[-1][1]))
            else:
                found.append((first, last))
        return found

    def _start(self, number: int) -> int:
        return self._offsets[number] if number < self._count else self._end

    def _name(self, number: int) -> bytes | None:
        if number >= self._count:
            return None
        start = self._offsets[number]
        start += _fixed_size(self._content, start)
        return self._content[start : self._content.index(b"\0", start)]

    def _place(self, path: bytes) -> int:
        """Return the number of the first entry that is not before `path`."""
        return bisect_left(range(self._count), path, key=lambda number: self._name(number) or b"")


def _fixed_size(content: bytes, start: int) -> int:
    return _ENTRY.size + (2 if _is_extended(content, start) else 0)


def _is_extended(content: bytes, start: int) -> bool:
    return bool(content[start + _ENTRY.size - 2] & (_EXTENDED >> 8))


def _without(first: int, last: int, gone: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that none of the sorted ranges `gone` takes."""
    for begin, end in gone[max(bisect_left(gone, (first,)) - 1, 0) :]:
        if begin >= last:
            break
        if first < begin:
            yield first, begin
        first = max(first, end)
    if first < last:
        yield first, last


def _forget_trees(trees: bytes, touched: Collection[bytes], above: Collection[bytes]) -> bytes:
    """Return the cache of tree ids without those of directories above touched paths, and at them."""
    pieces = list[bytes]()

    def skip(position: int) -> int:
        left = 1
        while left:
            position, found = _node(trees, position)
            left += int(found[3]) - 1
        return position

    def copy(path: bytes, position: int) -> int:
        start = position
        position, found = _node(trees, position)
        place = len(pieces)
        pieces.append(trees[start:position])
        if path not in above:
            whole = skip(start)
            pieces[place] = trees[start:whole]
            return whole
        kept = 0
        for _ in range(int(found[3])):
            below = path + b"/" * bool(path) + _node(trees, position)[1][1]
            if below in touched:
                position = skip(position)
            else:
                position, kept = copy(below, position), kept + 1
        # A count of -1 says that the directory's id has to be found anew.
        pieces[place] = found[1] + b"\0-1 %d\n" % kept
        return position

    copy(b"", 0)
    return b"".join(pieces)


def _node(trees: bytes, position: int) -> tuple[int, re.Match[bytes]]:
    """Return where the node's head ends, and what it says: name, count of files, count of directories."""
    found = _NODE.match(trees, position)
    if found is None:
        raise ValueError("a damaged cache of tree ids")
    return found.end() + (_ID_BYTES if int(found[2]) >= 0 else 0), found
