"""From git's tree objects to files: a whole commit, or what differs between two."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ci_platform.errors import FailedError, LimitExceededError
from ci_platform.trees import TreeWriter

_TREE, _SYMLINK, _SUBMODULE = 0o040000, 0o120000, 0o160000
_ENTRY = re.compile(rb"([0-7]{1,7}) ([^\0]*)\0(.{20})", re.DOTALL)
MOST_LOOKED_AT = 10_000
"""Entries of a folder and those below it that `files` looks at."""


class Objects(Protocol):
    """A repository's objects by their binary ids."""

    def read(self, oid: bytes) -> bytes:
        """Return an object's content; FailedError where it is not there or too large."""


class TooDifferentError(Exception):
    """Two trees differ in more paths than a delta is worth."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a tree object."""

    name: bytes
    mode: int
    oid: bytes

    @property
    def is_tree(self) -> bool:
        """Whether it is a directory."""
        return self.mode == _TREE

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return self.mode & 0o170000 == 0o100000


def items(content: bytes) -> Iterator[Item]:
    """Parse a tree object; FailedError for one that no git wrote."""
    return itertools.starmap(_item, entries(content))


def entries(content: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Return mode, name and id of each entry. One expression: a loop over the bytes takes five times as long."""
    found: list[tuple[bytes, bytes, bytes]] = _ENTRY.findall(content)
    if sum(map(len, itertools.chain.from_iterable(found))) + 2 * len(found) != len(content):
        raise FailedError("the commit has a damaged tree")
    return found


def _item(mode: bytes, name: bytes, oid: bytes) -> Item:
    return Item(name, int(mode, 8), oid)


def _differences(objects: Objects, old: bytes, new: bytes) -> Iterator[tuple[Item | None, Item | None]]:
    """Yield what each name was and is that two trees have different, what is gone at the end."""
    before, after = entries(objects.read(old)), entries(objects.read(new))
    same = set(before).intersection(after)
    was = {entry[1]: _item(*entry) for entry in before if entry not in same}
    for entry in after:
        if entry not in same:
            yield was.pop(entry[1], None), _item(*entry)
    for item in was.values():
        yield item, None


def find(objects: Objects, tree: bytes, path: str) -> Item | None:
    """Return what a tree has under a relative path."""
    found = Item(b"", _TREE, tree)
    for name in path.encode(errors="surrogateescape").split(b"/"):
        if not found.is_tree:
            return None
        inner = next((item for item in items(objects.read(found.oid)) if item.name == name), None)
        if inner is None:
            return None
        found = inner
    return found


def files(objects: Objects, tree: bytes, *, suffix: str, depth: int = 8) -> Iterator[tuple[str, Item]]:
    """Yield path and item of the regular files of a tree whose names end with `suffix`, `depth` levels down.

    LimitExceededError where it has more entries than are worth looking at: a few kilobytes of git name billions.
    """
    return _files(objects, tree, suffix, depth, iter(range(MOST_LOOKED_AT)))


def _files(
    objects: Objects, tree: bytes, suffix: str, depth: int, budget: Iterator[int]
) -> Iterator[tuple[str, Item]]:
    for item in items(objects.read(tree)):
        if next(budget, None) is None:
            raise LimitExceededError(f"the folder has more than {MOST_LOOKED_AT:,} entries")
        name = item.name.decode(errors="surrogateescape")
        if item.is_file and name.endswith(suffix):
            yield name, item
        elif item.is_tree and depth > 1:
            for inner, found in _files(objects, item.oid, suffix, depth - 1, budget):
                yield f"{name}/{inner}", found


def parts(objects: Objects, tree: bytes, limit: int) -> Iterator[bytes]:
    """Yield the ids of a tree, its folders and its files, each once; LimitExceededError above `limit`."""
    seen, folders = {tree}, [tree]
    yield tree
    while folders:
        for item in items(objects.read(folders.pop())):
            if item.oid in seen or item.mode == _SUBMODULE:
                continue
            seen.add(item.oid)
            if len(seen) > limit:
                raise LimitExceededError(f"the commit has more than {limit:,} files and folders")
            if item.is_tree:
                folders.append(item.oid)
            yield item.oid


def write_tree(objects: Objects, oid: bytes, writer: TreeWriter) -> None:
    """Write all of a tree. Deep trees are refused by the writer before they exhaust the stack."""
    for item in items(objects.read(oid)):
        _write(objects, item, writer)


def _write(objects: Objects, item: Item, writer: TreeWriter) -> None:
    executable = bool(item.mode & 0o100)
    if item.is_tree:
        writer.enter(item.name, item.oid)
        write_tree(objects, item.oid, writer)
        writer.leave()
    elif item.mode == _SUBMODULE:
        writer.submodule(item.name, item.oid)
    elif writer.is_outside:
        mode = _SYMLINK if item.mode == _SYMLINK else 0o100755 if executable else 0o100644
        writer.leave_out(item.name, mode, item.oid)
    elif item.mode == _SYMLINK:
        writer.symlink(item.name, objects.read(item.oid), item.oid)
    else:
        writer.file(item.name, objects.read(item.oid), item.oid, executable=executable)


def distance(objects: Objects, old: bytes, new: bytes, *, limit: int) -> int:
    """Return how many paths a delta from one tree to another has; TooDifferentError above `limit`.

    Compares ids, so it reads only directories that differ: libgit2's own comparison takes ten times as long
    on a large repository.
    """
    found = 0
    for was, item in _differences(objects, old, new):
        found += 1
        if item is not None and item.is_tree:
            if was is not None and was.is_tree:
                found += distance(objects, was.oid, item.oid, limit=limit - found)
            else:
                found += _count(objects, item.oid, limit - found)
        if found > limit:
            raise TooDifferentError
    return found


def _count(objects: Objects, tree: bytes, limit: int) -> int:
    found = 0
    for item in items(objects.read(tree)):
        found += 1 + (_count(objects, item.oid, limit - found) if item.is_tree else 0)
        if found > limit:
            raise TooDifferentError
    return found


def write_delta(objects: Objects, old: bytes, new: bytes, writer: TreeWriter) -> None:
    """Write the layer that turns one tree into another."""
    for was, item in _differences(objects, old, new):
        if item is None:
            assert was is not None  # noqa: S101 - one of the two there is
            writer.hide(was.name)
        elif was is not None and was.is_tree and item.is_tree:
            writer.enter(item.name, item.oid)
            write_delta(objects, was.oid, item.oid, writer)
            writer.leave()
        else:
            if was is not None and (was.is_tree or item.is_tree):
                writer.replace(item.name)
            _write(objects, item, writer)
