"""The list of a tree's files and folders as a file, which a server maps into its memory. Stdlib only.

A head, then one record for each file or folder, then all names. The children of a folder are neighbours, sorted by
name; number 0 is the tree itself.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HEAD = struct.Struct("<8sQqIIQ")
_NODE = struct.Struct("<20sQIIIIH2x")
_MAGIC = b"dynflow1"
FOLDER_SIZE = 4096
"""Bytes that a folder says it has."""


@dataclass(frozen=True, slots=True)
class Node:
    """A file or folder. `size` in bytes; a folder's children are `count` numbers from `first` on."""

    oid: bytes
    size: int
    mode: int
    first: int
    count: int


class TableWriter:
    """Collects nodes in memory. Numbers are given in blocks, one for each folder's children."""

    def __init__(self) -> None:
        self.names: list[bytes] = [b""]
        self.modes: list[int] = [stat.S_IFDIR | 0o755]
        self.oids: list[bytes] = [bytes(20)]
        self.sizes: dict[int, int] = {}
        self._children: dict[int, tuple[int, int]] = {}

    def add_children(self, folder: int, children: Sequence[tuple[bytes, int, bytes]]) -> int:
        """Give a folder its children (name, mode, id), sorted by name; returns the first one's number."""
        first = len(self.names)
        for name, mode, oid in children:
            self.names.append(name)
            self.modes.append(mode)
            self.oids.append(oid)
        self._children[folder] = first, len(children)
        return first

    def write(self, path: Path, *, modified_at: int, uid: int, gid: int) -> None:
        """Write the file. `modified_at` in ns, of everything."""
        nodes = bytearray()
        sizes, children, pack, nothing, at = self.sizes, self._children, _NODE.pack, (0, 0), 0
        for number, (name, mode, oid) in enumerate(zip(self.names, self.modes, self.oids, strict=True)):
            size, length = sizes.get(number, FOLDER_SIZE), len(name)
            nodes += pack(oid, size, mode, *children.get(number, nothing), at, length)
            at += length
        names = b"".join(self.names)
        head = _HEAD.pack(_MAGIC, len(self.names), modified_at, uid, gid, 0)
        path.write_bytes(head + nodes + names)


class Table:
    """The file, read where it lies."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.count: int
        self.modified_at: int
        magic, self.count, self.modified_at, self.uid, self.gid, _ = _HEAD.unpack_from(self._map)
        if magic != _MAGIC:
            raise ValueError(f"{path} is no list of files")
        self._names = _HEAD.size + self.count * _NODE.size

    def node(self, number: int) -> Node:
        """Return a node; IndexError where there is no such number."""
        return Node(*self._raw(number)[:5])

    def name(self, number: int) -> bytes:
        """Return a node's name; the tree itself has none."""
        *_, at, length = self._raw(number)
        return self._map[self._names + at : self._names + at + length]

    def find(self, folder: int, name: bytes) -> int | None:
        """Return the number that a folder has under a name."""
        node = self.node(folder)
        low, high = node.first, node.first + node.count
        while low < high:
            middle = (low + high) // 2
            found = self.name(middle)
            if found == name:
                return middle
            if found < name:
                low = middle + 1
            else:
                high = middle
        return None

    def _raw(self, number: int) -> tuple[bytes, int, int, int, int, int, int]:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return _NODE.unpack_from(self._map, _HEAD.size + number * _NODE.size)
