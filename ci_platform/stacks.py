"""The layers of one workspace on disk: which there are, in which order, merged where there are many."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ci_platform import layer_copies, layers
from ci_platform.errors import NotFoundError

COLLECTED = "its files were collected to make room; rerun the run from the start to make them again"

SQUASH_ABOVE = 16
"""Layers above which they are merged. The kernel mounts 500, but mount(2) takes one page of paths."""


@dataclass(frozen=True, slots=True)
class LayerAuthor:
    """Whose changes a layer holds: the step's name, its count among steps of that name, the attempt."""

    step: str
    count: int
    attempt: int

    def same_step(self, other: LayerAuthor) -> bool:
        """Whether both are attempts of one step."""
        return (self.step, self.count) == (other.step, other.count)


@dataclass(frozen=True, slots=True)
class Layer:
    """A committed layer. Later ones have greater orders."""

    folder: Path
    author: LayerAuthor
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> int:
        """Its place among the workspace's layers."""
        return int(self.folder.name)

    @property
    def tree(self) -> Path:
        """Where its files are."""
        return self.folder / "tree"

    def forget(self) -> None:
        """Take it out of the workspace. Its files stay for commands that stand on them."""
        (self.folder / "forgotten").touch()
        flush(self.folder)


@dataclass(frozen=True, slots=True)
class Stack:
    """One workspace's folder. Callers hold the workspace's lock for everything that writes."""

    folder: Path

    def exists(self) -> bool:
        """Whether the workspace has been made."""
        return (self.folder / "workspace.json").exists()

    def create(
        self, scratch: Path, described: Mapping[str, Any], own: Sequence[Path] = (), *, durable: bool
    ) -> None:
        """Make the folder beside and rename it into place; somebody else's is left alone.

        `own` are another workspace's layers, topmost first, which become one of this: as hard links.
        """
        for name in ("layers", "pending"):
            (scratch / name).mkdir(parents=True)
        if own:
            first = scratch / "layers" / f"{1:08d}"
            (first / "tree").mkdir(parents=True)
            for tree in reversed(own):
                layer_copies.Apply(link=True, merge=True)(tree, first / "tree")
            write(first / "layer.json", asdict(LayerAuthor("(snapshot)", 1, 1)), durable=durable)
        write(scratch / "workspace.json", described, durable=durable)
        try:
            scratch.rename(self.folder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            layers.remove_tree(scratch)
        if durable:
            flush(self.folder, self.folder.parent)

    def describe(self) -> dict[str, Any]:
        """Return what `create` was given; NotFoundError where there is no workspace."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "workspace.json").read_bytes())
        except FileNotFoundError:
            why = f": {COLLECTED}" if self.is_collected() else ""
            raise NotFoundError(f"there is no workspace {self.folder.name!r}{why}") from None
        return found

    def is_collected(self) -> bool:
        """Whether the workspace's files were collected."""
        return (self.folder / "collected.json").exists()

    def collect(self) -> None:
        """Let the workspace be one whose files were collected; a rename, for which no disk is too full.

        What then is in the folder but that file is rubbish.
        """
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "workspace.json").rename(self.folder / "collected.json")

    def rubbish(self) -> list[Path]:
        """Return what a collected workspace still has."""
        others = [path for path in self.folder.iterdir() if path.name != "collected.json"]
        return others if self.is_collected() else []

    def layers(self) -> list[Layer]:
        """Return the layers in force, oldest first."""
        folders = sorted((self.folder / "layers").glob("*"))
        return [_layer(path) for path in folders if not (path / "forgotten").exists()]

    def newest_order(self) -> int:
        """Return the greatest order ever given to a layer that is on disk, 0 without any."""
        return max((int(path.name) for path in (self.folder / "layers").iterdir()), default=0)

    def publish(
        self, pending: Path, order: int, author: LayerAuthor, facts: Mapping[str, Any], *, durable: bool
    ) -> None:
        """Turn a pending folder into a layer, with `facts` about it: the rename is the commit."""
        write(pending / "layer.json", {**facts, **asdict(author)}, durable=durable)
        if durable:
            flush(pending)
        pending.rename(self.folder / "layers" / f"{order:08d}")
        if durable:
            flush(self.folder / "layers")

    def keep(self, pending: Path, author: LayerAuthor, facts: Mapping[str, Any], count: int) -> list[Path]:
        """Set a failed command's folder aside; returns older ones to remove, so that `count` stay."""
        kept = self.folder / "kept"
        kept.mkdir(exist_ok=True)
        write(pending / "layer.json", {**facts, **asdict(author)}, durable=False)
        pending.rename(kept / f"{time.time_ns():020d}")
        return sorted(kept.iterdir())[:-count]

    def kept(self) -> list[Layer]:
        """Return what failed commands left, oldest first. Folders are named by nanoseconds since the epoch."""
        return [_layer(path) for path in sorted((self.folder / "kept").glob("[0-9]*"))]

    def outdated(self, seconds: float) -> list[Path]:
        """Return folders of failed commands that were set aside longer ago."""
        oldest = time.time_ns() - int(seconds * 1e9)
        return [path for path in (self.folder / "kept").glob("[0-9]*") if int(path.name) < oldest]

    def snapshot(self, name: str) -> list[Path]:
        """Return the trees, topmost first, of the workspace as it stood after a layer, or where a command failed.

        `name` is the layer's order, 0 for the fork itself, or `failed-` and the name of a kept folder.
        NotFoundError where it is not here, or no longer what it stood on.
        """
        live = {str(layer.order): layer for layer in self.layers()}
        if name == "0" or name in live:
            return [layer.tree for layer in reversed(live.values()) if layer.order <= int(name)]
        for layer in self.kept():
            if name == f"failed-{layer.folder.name}":
                below = [live.get(str(order)) for order in layer.record.get("on", ())]
                if None not in below:
                    return [layer.tree, *(found.tree for found in reversed(below) if found)]
        raise NotFoundError(f"the workspace {self.folder.name!r} has no snapshot {name[:60]!r} (any more)")

    def live_trees(self) -> list[Path]:
        """Return the trees of the layers in force, topmost first."""
        return [layer.tree for layer in reversed(self.layers())]

    def lowers(self, live: Sequence[Layer], in_use: Collection[Path]) -> list[Path]:
        """Return trees that show the same as the layers `live`, topmost first, at most `SQUASH_ABOVE` + 1."""
        merged, covered = self._merged(live)
        rest = live[covered:]
        if len(rest) > SQUASH_ABOVE:
            merged, rest = self._merge(merged, live, rest), []
            for path in self._outdated(merged, in_use):
                layers.remove_tree(path)
        return [layer.tree for layer in reversed(rest)] + ([merged / "tree"] if merged else [])

    def _merged(self, live: Sequence[Layer]) -> tuple[Path | None, int]:
        """Return the merged tree that stands for most of the oldest layers, and for how many."""
        best: Path | None = None
        covered, orders = 0, [layer.order for layer in live]
        for path in (self.folder / "squashed").glob("[!.]*"):
            theirs = json.loads((path / "orders.json").read_bytes())
            if len(theirs) > covered and orders[: len(theirs)] == theirs:
                best, covered = path, len(theirs)
        return best, covered

    def _merge(self, below: Path | None, live: Sequence[Layer], rest: Sequence[Layer]) -> Path:
        """Merge by hard links: a merged tree costs names, not bytes, and the layers stay for `rewind`."""
        name = secrets.token_hex(8)
        scratch, apply = self.folder / "squashed" / f".{name}", layer_copies.Apply(link=True, merge=True)
        (scratch / "tree").mkdir(parents=True)
        for tree in [*([below / "tree"] if below else []), *(layer.tree for layer in rest)]:
            apply(tree, scratch / "tree")
        write(scratch / "orders.json", [layer.order for layer in live], durable=False)
        return scratch.rename(self.folder / "squashed" / name)

    def _outdated(self, current: Path, in_use: Collection[Path]) -> list[Path]:
        others = (self.folder / "squashed").iterdir()
        return [path for path in others if path != current and path / "tree" not in in_use]

    def garbage(self, in_use: Collection[Path]) -> list[Path]:
        """Return the folders of forgotten layers that no open tree stands on."""
        found = [path.parent for path in self.folder.glob("layers/*/forgotten")]
        return [path for path in found if path / "tree" not in in_use]


def _layer(folder: Path) -> Layer:
    record = json.loads((folder / "layer.json").read_bytes())
    return Layer(folder, LayerAuthor(record["step"], record["count"], record["attempt"]), record)


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
