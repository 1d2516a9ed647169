"""The files of an artifact put into a command's tree: folders opened one by one, links not followed. Blocks."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from typing import Protocol, Self

from ci_platform import layers
from ci_platform.artifacts import copying
from ci_platform.artifacts.contents import Entry
from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import Tree
from ci_platform.trees import Owner

_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Readable(Protocol):
    """An artifact that is open."""

    @property
    def entries(self) -> Iterable[Entry]:
        """What is in it, sorted."""

    def open(self, entry: Entry) -> int:
        """Open a file; returns its descriptor."""


def unpack(
    artifact: Readable, tree: Tree, folder: tuple[str, ...], owner: Owner, alive: Callable[[], None]
) -> None:
    """Put an artifact's files into a folder of a tree, in the place of what is there.

    What of the way is no folder, a link too, becomes one. Raises UnavailableError for a file that is damaged.
    """
    with _Folders(tree, owner) as folders:
        for entry in artifact.entries:
            alive()
            *above, name = (*folder, *entry.path.split("/"))
            if entry.kind == "folder":
                folders.at((*above, name))
                continue
            parent = folders.at(tuple(above))
            layers.remove_at(parent, name)
            if entry.kind == "symlink":
                os.symlink(entry.target, name, dir_fd=parent)
            else:
                _write(artifact, entry, parent, name, alive)
            if os.geteuid() == 0:
                os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)


def _write(artifact: Readable, entry: Entry, parent: int, name: str, alive: Callable[[], None]) -> None:
    with contextlib.ExitStack() as opened:
        reader = artifact.open(entry)
        opened.callback(os.close, reader)
        writer = os.open(name, _FILE, 0o600, dir_fd=parent)
        opened.callback(os.close, writer)
        copied = copying.copy(reader, writer, alive)
        if copied.content != entry.content:
            raise UnavailableError("a file of the artifact is damaged on the platform's disk")
        os.fchmod(writer, entry.mode)


class _Folders:
    """The folders of a tree, made where they are missing; the last one stays open, with those above it."""

    def __init__(self, tree: Tree, owner: Owner) -> None:
        self._tree, self._owner = tree, owner
        self._names = list[str]()
        self._open = [layers.open_directory(tree.upper)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def at(self, names: tuple[str, ...]) -> int:
        """Return a folder's descriptor, open until the next call."""
        shared = 0
        while shared < min(len(names), len(self._names)) and names[shared] == self._names[shared]:
            shared += 1
        for descriptor in self._open[shared + 1 :]:
            os.close(descriptor)
        del self._open[shared + 1 :], self._names[shared:]
        for name in names[shared:]:
            self._enter(name)
        return self._open[-1]

    def _enter(self, name: str) -> None:
        parent = self._open[-1]
        if not _is_folder(parent, name):
            layers.remove_at(parent, name)
            os.mkdir(name, 0o700, dir_fd=parent)
            self._made(name)
        self._open.append(layers.open_directory(name, parent))
        self._names.append(name)

    def _made(self, name: str) -> None:
        """Let a new folder look like the one below that it is put over, if it is."""
        path = "/".join((*self._names, name))
        below = layers.locate(self._tree.lowers, path) if self._tree.lowers else None
        mode = 0o755
        if below is not None and stat.S_ISDIR((found := below.lstat()).st_mode):
            mode = stat.S_IMODE(found.st_mode) & 0o1777
        descriptor = layers.open_directory(name, self._open[-1])
        try:
            os.fchmod(descriptor, mode)
            if os.geteuid() == 0:
                os.fchown(descriptor, self._owner.uid, self._owner.gid)
        finally:
            os.close(descriptor)


def _is_folder(parent: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
