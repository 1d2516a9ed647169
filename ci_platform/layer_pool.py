"""Sealed layers, each on disk once, whoever shows it: a fork of any stack is a link for each of its layers.

`<workspaces>/.layers/<name>` has a layer's files in `tree`, which nobody changes any more, and in `layer.json` what is
known of it. Whoever shows the layer has a hard link of that file: the file system's own count says whether anybody
does. Making a link and removing one are single calls that no kill tears, and nothing has to be kept in step.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci_platform import layer_copies, layers

POOL = ".layers"

_RECORD, _NAME = "layer.json", "pooled"

_TURN = threading.Lock()
"""Between seeing that nobody shows a layer and taking it out of sight nobody may begin to. Other processes are kept
away by the lock of the data folder."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tree of files and what is known of it."""

    tree: Path
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LayerPool:
    """The pool of all workspaces below `root`. Safe for threads."""

    root: Path

    @property
    def folder(self) -> Path:
        """Where the layers are."""
        return self.root / POOL

    def add(self, scratch: Path, facts: Mapping[str, Any], *, durable: bool) -> Path:
        """Take a folder's `tree` in for good; returns the tree. Nobody shows it yet: until then a sweep takes it."""
        name = secrets.token_hex(8)
        write(scratch / _RECORD, {**facts, _NAME: name}, durable=durable)
        if durable:
            flush(scratch)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        place = scratch.rename(self.folder / name)
        if durable:
            flush(self.folder)
        return place / "tree"

    def has(self, tree: Path) -> bool:
        """Whether a tree is one of the pool's."""
        return tree.parent.parent == self.folder

    def show(self, part: Part, link: Path, *, durable: bool = False) -> None:
        """Make a link by which somebody shows a part from now on. FileNotFoundError where the part is gone.

        One that is no layer of the pool (of a release before), or has all links that a file can have, is first made
        another: a hard link for each of its files.
        """
        if self.has(part.tree):
            try:
                self._link(part.tree, link)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
            else:
                return
        scratch = self.root / ".new" / secrets.token_hex(8)
        (scratch / "tree").mkdir(parents=True)
        layer_copies.Apply(link=True, merge=True)(part.tree, scratch / "tree")
        self._link(self.add(scratch, part.record, durable=durable), link)

    def _link(self, tree: Path, link: Path) -> None:
        with _TURN:
            link.hardlink_to(tree.parent / _RECORD)

    def read(self, link: Path) -> Part:
        """Return what a link shows. IsADirectoryError where there is a folder."""
        record = json.loads(link.read_bytes())
        return Part(self.folder / record[_NAME] / "tree", record)

    def let_go(self, trees: Iterable[Path], in_use: Collection[Path], trash: Path) -> list[Path]:
        """Move those of some trees to the folder `trash` that nobody shows or uses any more; returns where they are."""
        found = []
        for tree in set(trees):
            if self.has(tree) and tree not in in_use:
                with suppress(FileNotFoundError), _TURN:
                    if (tree.parent / _RECORD).stat().st_nlink == 1:
                        found.append(tree.parent.rename(trash / secrets.token_hex(8)))
        return found

    def shared(self, links: Iterable[Path]) -> list[Path]:
        """Return the trees of some links that are about to be removed.

        What has lost its links, because the data folder was copied by a program that does not know them, is left to
        the next start, which makes them again.
        """
        found = []
        for link in links:
            with suppress(FileNotFoundError):
                if link.stat().st_nlink > 1:
                    found.append(self.read(link).tree)
        return found

    def sweep(self, links: Iterable[Path], in_use: Collection[Path], trash: Path) -> list[Path]:
        """Let go of all that nobody shows, after a kill; `links` are all that there are. See `let_go`."""
        for link in links:
            if link.stat().st_nlink == 1:
                self._mend(link)
        if not self.folder.is_dir():
            return []
        return self.let_go([path / "tree" for path in self.folder.iterdir()], in_use, trash)

    def _mend(self, link: Path) -> None:
        mended = self.root / ".new" / secrets.token_hex(8)
        with suppress(FileNotFoundError):  # then the layer is gone, and who needs it is told
            self._link(self.read(link).tree, mended)
            mended.replace(link)


def write(path: Path, value: object, *, durable: bool) -> None:
    """Write a small JSON file that nobody reads yet."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def flush(*folders: Path) -> None:
    """Write directories to disk."""
    for folder in folders:
        with layers.directory(folder) as descriptor:
            os.fsync(descriptor)
