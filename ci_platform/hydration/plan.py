"""The list of a commit's files, before any is written, and git's index of them: what a lazy tree begins as.

It is a shortcut that takes what is plain: whatever is odd about a commit, a tree on disk is left to find out and say.
"""

from __future__ import annotations

import stat
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from ci_platform import commit_trees, layers
from ci_platform.cones import Cone
from ci_platform.errors import FailedError, LimitExceededError
from ci_platform.git_index import GITLINK, GITLINK_OUTSIDE, Recorder, made_entry
from ci_platform.hydration.table import TableWriter
from ci_platform.trees import Owner, TreeLimits

_TREE, _SYMLINK = 0o040000, 0o120000
_NO_NAMES = frozenset({b"", b".", b"..", b".git"})
_LONGEST_NAME, _LONGEST_TARGET = 255, 4095
_LARGEST = 1 << 30
"""Bytes of one file: what a tree on disk refuses, too."""

_SIZES_WITHIN = 60.0

INDEX, OFFSETS, TABLE = "index", "offsets", "table"
"""What a plan is in a folder."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """From how many files, or bytes of them, on a tree is worth being lazy: a small one is written sooner."""

    files: int = 5_000
    size: int = 256 * 1024**2


class Objects(Protocol):
    """A repository's objects by their binary ids."""

    def read(self, oid: bytes) -> bytes:
        """Return an object's content."""


class _OddError(Exception):
    """The tree has something that is not for us."""


class _File(NamedTuple):
    """A file, link or submodule in the order of the index. `number` is the table's, None outside of the cone."""

    path: bytes
    mode: int
    oid: bytes
    number: int | None


class _Enter(NamedTuple):
    """The begin of a folder; its end is None."""

    name: bytes
    oid: bytes


@dataclass(slots=True)
class Plan:
    """A tree's list. `write` it into a folder."""

    oid: bytes
    table: TableWriter = field(default_factory=TableWriter)
    steps: list[_File | _Enter | None] = field(default_factory=list)
    size: int = 0

    def write(self, folder: Path, modified_at: int, owner: Owner) -> int:
        """Write table and index; returns their bytes. Files have the time `modified_at` (ns)."""
        self.table.write(folder / TABLE, modified_at=modified_at, uid=owner.uid, gid=owner.gid)
        recorder = Recorder(self.oid)
        seconds, rest = divmod(modified_at, 1_000_000_000)
        times = struct.pack(">4I", seconds & 0xFFFFFFFF, rest, seconds & 0xFFFFFFFF, rest)
        sizes = self.table.sizes
        for step in self.steps:
            if step is None:
                recorder.leave()
            elif isinstance(step, _Enter):
                recorder.enter(step.name, step.oid)
            elif step.number is None or step.mode == GITLINK:
                is_outside = step.number is None and step.mode == GITLINK
                recorder.add(step.path, GITLINK_OUTSIDE if is_outside else step.mode, step.oid, None)
            else:
                size = sizes[step.number]
                recorder.append(made_entry(step.path, step.mode, step.oid, times, step.number + 1, size))
        index, offsets = recorder.finish()
        (folder / OFFSETS).write_bytes(offsets.tobytes())
        return index.write(folder / INDEX)


def plan(
    objects: Objects,
    oid: bytes,
    repository: Path,
    env: Mapping[str, str],
    *,
    cone: Cone | None,
    limits: TreeLimits,
    threshold: Threshold,
) -> Plan | None:
    """Return the list of a tree; None where it is too small, or odd."""
    walk = _Walk(objects, Plan(oid), cone, limits)
    try:
        walk.folder(oid, 0, b"", 0)
        found = walk.found
        wanted = [number for number, mode in enumerate(found.table.modes) if not stat.S_ISDIR(mode)]
        sizes = _sizes([found.table.oids[number] for number in wanted], repository, env)
        found.table.sizes = dict(zip(wanted, sizes, strict=True))
        found.size = sum(sizes)
        _check(objects, found, limits)
    except (_OddError, FailedError, LimitExceededError):
        return None
    is_large = len(wanted) >= threshold.files or found.size >= threshold.size
    return found if is_large else None


def _sizes(oids: Sequence[bytes], repository: Path, env: Mapping[str, str]) -> list[int]:
    """Return the sizes of blobs. By git itself: it takes half the time of libgit2, and leaves this process alone."""
    command = ["git", "--git-dir", str(repository), "cat-file", "--batch-check=%(objectsize)", "--buffer"]
    asked = b"".join(oid.hex().encode() + b"\n" for oid in oids)
    try:
        done = subprocess.run(
            command,
            input=asked,
            env=dict(env),
            cwd="/",
            capture_output=True,
            timeout=_SIZES_WITHIN,
            check=True,
        )
        sizes = [int(line) for line in done.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise _OddError(str(error)) from error
    if len(sizes) != len(oids):
        raise _OddError("git has not answered for all files")
    return sizes


def _check(objects: Objects, found: Plan, limits: TreeLimits) -> None:
    table = found.table
    if found.size > limits.size or max(table.sizes.values(), default=0) > _LARGEST:
        raise _OddError("larger than a tree may be")
    for number, size in table.sizes.items():
        if stat.S_ISLNK(table.modes[number]) and (
            not 0 < size <= _LONGEST_TARGET or b"\0" in objects.read(table.oids[number])
        ):
            raise _OddError("a link that cannot be")


@dataclass(slots=True)
class _Walk:
    """Goes through a tree depth first, as a writer of it does."""

    objects: Objects
    found: Plan
    cone: Cone | None
    limits: TreeLimits
    count: int = 0

    def folder(self, oid: bytes, number: int | None, path: bytes, depth: int) -> None:
        """List a folder. `number` is the table's, None outside of the cone."""
        if depth > layers.MAX_DEPTH:
            raise _OddError("too deep")
        entries = commit_trees.entries(self.objects.read(oid))
        names = [name for _, name, _ in entries]
        self.count += len(names)
        if self.count > self.limits.files:
            raise _OddError("too many files")
        _check_names(names)
        numbers = self._number(entries, number, path)
        steps = self.found.steps
        for mode, name, each in entries:
            kind, inner = _modes(mode)[0], numbers.get(name)
            if kind == _TREE:
                steps.append(_Enter(name, each))
                self.folder(each, inner, path + name + b"/", depth + 1)
                steps.append(None)
            else:
                steps.append(_File(path + name, kind, each, inner))

    def _number(
        self, entries: Sequence[tuple[bytes, bytes, bytes]], folder: int | None, path: bytes
    ) -> dict[bytes, int]:
        """Give numbers to what is on disk of a folder."""
        if folder is None:
            return {}
        children = sorted(
            (name, _modes(mode)[1], oid)
            for mode, name, oid in entries
            if self.cone is None or _modes(mode)[0] != _TREE or self.cone.holds(path + name)
        )
        first = self.found.table.add_children(folder, children)
        return {name: number for number, (name, _, _) in enumerate(children, first)}


def _check_names(names: list[bytes]) -> None:
    """All of a folder's at once: one by one takes as long as all the rest."""
    lower = b"\0".join(names).lower().split(b"\0") if names else []
    if len(set(names)) != len(names) or _NO_NAMES.intersection(lower) or any(b"/" in name for name in lower):
        raise _OddError("a name that no file can have")
    if max(map(len, names), default=0) > _LONGEST_NAME:
        raise _OddError("a long name")


@lru_cache(maxsize=64)
def _modes(text: bytes) -> tuple[int, int]:
    """Return the mode that the index has, and the one that the file has; a submodule is an empty folder."""
    mode = int(text, 8)
    if mode in {_TREE, GITLINK}:
        return mode, stat.S_IFDIR | 0o755
    if mode == _SYMLINK:
        return mode, stat.S_IFLNK | 0o777
    mode = stat.S_IFREG | (0o755 if mode & 0o100 else 0o644)
    return mode, mode
