"""Patches put onto a tree of layers: planned in memory first, then written as a layer of their own."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ci_platform import layer_views, layers
from ci_platform.errors import LimitExceededError, PatchError
from ci_platform.patches import FilePatch, Hunk
from ci_platform.trees import Owner

LARGEST_FILE = 16 << 20
MOST_WRITTEN = 64 << 20
_MOST_COMPARED = 5_000_000
"""Lines that may be looked at to find where hunks fit: seconds, whatever a patch and a file are made of."""

_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Content:
    """What a path has: the bytes of a `file` or a `script`, or where a `symlink` leads."""

    kind: str
    data: bytes


@dataclass(slots=True)
class Plan:
    """What a patch makes of the tree that `lowers` (topmost first) show: path -> content, None where it is deleted."""

    lowers: Sequence[Path]
    changes: dict[str, Content | None] = field(default_factory=dict)
    _compared: int = 0

    # --- planning ---

    def add(self, patch: FilePatch) -> None:
        """Take up the change of one file. Raises PatchError where it does not fit."""
        was = None if patch.old is None else self._existing(patch.old)
        if patch.new is None:
            if self._changed(patch, was).data:
                raise PatchError(f"{patch.shown!r}: it would be deleted, but has more than the patch says")
            self.changes[patch.old or ""] = None
            return
        self._check_place(patch.new, is_new=patch.new != patch.old)
        becomes = self._changed(patch, was)
        if becomes.kind == "symlink" and (not becomes.data or b"\0" in becomes.data):
            raise PatchError(f"{patch.shown!r}: a symbolic link leads nowhere")
        if patch.old is not None and patch.old != patch.new and not patch.keeps:
            self.changes[patch.old] = None
        self.changes[patch.new] = becomes
        if sum(len(each.data) for each in self.changes.values() if each) > MOST_WRITTEN:
            raise PatchError(f"the patched files have more than {MOST_WRITTEN:,} bytes together")

    def _existing(self, path: str) -> Content:
        if path in self.changes:
            found = self.changes[path]
            if found is None:
                raise PatchError(f"{path!r}: the patch has deleted or renamed it before")
            return found
        self._check_parents(path)
        located = layers.locate(self.lowers, path)
        if located is None:
            raise PatchError(f"{path!r}: there is no such file in the workspace")
        mode = located.lstat().st_mode
        if stat.S_ISLNK(mode):
            return Content("symlink", os.fsencode(located.readlink()))
        if not stat.S_ISREG(mode):
            raise PatchError(f"{path!r} is not a file")
        try:
            data = layer_views.read(self.lowers, path, LARGEST_FILE)
        except LimitExceededError as error:
            raise PatchError(f"{path!r} is too large to be patched: {error}") from None
        if data is None:
            raise PatchError(f"{path!r} cannot be read")
        return Content("script" if mode & stat.S_IXUSR else "file", data)

    def _check_place(self, path: str, *, is_new: bool) -> None:
        """See that a path can be written: through folders alone, and onto nothing where it is new."""
        self._check_parents(path)
        if any(other.startswith(f"{path}/") and held for other, held in self.changes.items()):
            raise PatchError(f"{path!r} is a folder")
        located = layers.locate(self.lowers, path)
        if located is not None and stat.S_ISDIR(located.lstat().st_mode):
            raise PatchError(f"{path!r} is a folder")
        if is_new and (self.changes[path] is not None if path in self.changes else located is not None):
            raise PatchError(f"{path!r}: the patch makes this file, but it is there already")

    def _check_parents(self, path: str) -> None:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent in self.changes:
                if self.changes[parent] is not None:
                    raise PatchError(f"{path!r} leads through {parent!r}, which is no folder")
                continue
            located = layers.locate(self.lowers, parent)
            if located is not None and not stat.S_ISDIR(located.lstat().st_mode):
                raise PatchError(f"{path!r} leads through {parent!r}, which is a link or a file, no folder")

    def _changed(self, patch: FilePatch, was: Content | None) -> Content:
        data = b"" if was is None else was.data
        kind = patch.kind or ("file" if was is None else was.kind)
        if was is not None and "symlink" in {kind, was.kind} and kind != was.kind:
            raise PatchError(f"{patch.shown!r}: the patch takes a link for a file, or a file for a link")
        if patch.hunks:
            *whole, last = data.split(b"\n")
            lines = [line + b"\n" for line in whole] + ([last] if last else [])
            data = b"".join(self._with_hunks(patch, lines))
        return Content(kind, data)

    def _with_hunks(self, patch: FilePatch, lines: list[bytes]) -> Iterator[bytes]:
        done = shift = 0
        for hunk in patch.hunks:
            at = self._place(hunk, lines, done, shift)
            if at is None:
                expected = hunk.before[0].decode(errors="replace").strip()[:80] if hunk.before else ""
                raise PatchError(
                    f"{patch.shown!r}, hunk {hunk.number} (line {hunk.line}) does not apply: the file has nothing "
                    f"that fits from {expected!r} on"
                )
            yield from lines[done:at]
            yield from hunk.after
            done, shift = at + len(hunk.before), at - _line(hunk)
        yield from lines[done:]

    def _place(self, hunk: Hunk, lines: list[bytes], done: int, shift: int) -> int | None:
        """Return where a hunk's lines are: at the place it names, else at the nearest one that has them all."""
        count, named = len(hunk.before), _line(hunk) + shift
        if not count:  # nothing is taken away and nothing is beside it: only its number says where
            return named if done <= named <= len(lines) else None
        last = len(lines) - count
        if last < done:
            return None
        named = min(max(named, done), last)
        for distance in range(max(named - done, last - named) + 1):
            for at in {named - distance, named + distance}:
                if done <= at <= last:
                    self._compared += 1
                    if lines[at] == hunk.before[0]:
                        self._compared += count
                        if tuple(lines[at : at + count]) == hunk.before:
                            return at
                    if self._compared > _MOST_COMPARED:
                        raise PatchError("the patch takes too long to find its places: give it better ones")
        return None

    # --- writing ---

    def write(self, upper: Path, owner: Owner) -> None:
        """Write the changes as a layer into the folder `upper`, which is there and empty."""
        for path, content in self.changes.items():
            folder, _, name = path.rpartition("/")
            is_below = layers.locate(self.lowers, path) is not None
            if content is None and not is_below:
                continue
            with layers.directory(self._folder(upper, folder, owner)) as parent:
                if content is None:
                    layers.make_whiteout(parent, name)
                else:
                    _write(parent, name, content, owner)

    def _folder(self, upper: Path, folder: str, owner: Owner) -> Path:
        """Make a folder of the layer, like the one that it is put over. Only this module made those above it."""
        if not folder:
            return upper
        path = upper / folder
        if not path.exists():
            self._folder(upper, folder.rpartition("/")[0], owner)
            below = layers.locate(self.lowers, folder)
            path.mkdir()
            if os.geteuid() == 0:
                os.chown(path, owner.uid, owner.gid)
            path.chmod(0o755 if below is None else stat.S_IMODE(below.lstat().st_mode) & 0o1777)
        return path


def _line(hunk: Hunk) -> int:
    """Return the index of a hunk's first line; where it has none before, its number is that of the line above."""
    return hunk.line - 1 if hunk.before else hunk.line


def _write(parent: int, name: str, content: Content, owner: Owner) -> None:
    if content.kind == "symlink":
        os.symlink(content.data, os.fsencode(name), dir_fd=parent)
    else:
        descriptor = os.open(name, _FILE, 0o600, dir_fd=parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.data)
            os.fchmod(descriptor, 0o755 if content.kind == "script" else 0o644)
    if os.geteuid() == 0:
        os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)


def plan(patches: Sequence[FilePatch], lowers: Sequence[Path]) -> Plan:
    """Return what patches make of a tree. Raises PatchError, with file and hunk; nothing is written."""
    made = Plan(lowers)
    for patch in patches:
        made.add(patch)
    return made
