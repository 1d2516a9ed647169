"""The layers of one workspace on disk: which there are, in which order, merged where there are many."""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ci_platform import layer_copies, layers
from ci_platform.errors import NotFoundError
from ci_platform.layer_pool import LayerPool, Part, flush, write

COLLECTED = "its files were collected to make room; rerun the run from the start to make them again"

_FORGOTTEN = ".forgotten"

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
    """A committed layer. Later ones have greater orders.

    `place` is its link to the pool; or a folder, of what a workspace began as, or of a release before.
    `parts` have its files, topmost first.
    """

    place: Path
    author: LayerAuthor
    record: Mapping[str, Any]
    parts: tuple[Part, ...]

    @property
    def order(self) -> int:
        """Its place among the workspace's layers."""
        return int(self.place.name)

    @property
    def trees(self) -> tuple[Path, ...]:
        """Where its files are, topmost first."""
        return tuple(part.tree for part in self.parts)

    @property
    def modified_at(self) -> float:
        """When it was committed, in seconds since the epoch."""
        return (self.place / "layer.json" if self.place.is_dir() else self.place).stat().st_mtime

    def forget(self) -> None:
        """Take it out of the workspace. Its files stay for commands that stand on them."""
        if self.place.is_dir():
            (self.place / "forgotten").touch()
            flush(self.place)
        else:
            self.place.rename(self.place.with_suffix(_FORGOTTEN))
            flush(self.place.parent)

    def take(self, place: Path, pool: LayerPool, *, durable: bool) -> None:
        """Have another workspace show it. FileNotFoundError where it is gone."""
        if not (self.place / "trees").is_dir():
            pool.show(self.parts[0], place, durable=durable)
            return
        place.mkdir()
        (place / "layer.json").hardlink_to(self.place / "layer.json")
        show_all(self.parts, place / "trees", pool, durable=durable)


def show_all(parts: Sequence[Part], folder: Path, pool: LayerPool, *, durable: bool) -> None:
    """Show parts, topmost first, in a new folder."""
    folder.mkdir()
    for number, part in enumerate(parts):
        pool.show(part, folder / f"{number:08d}", durable=durable)
    if durable:
        flush(folder, folder.parent)


@dataclass(frozen=True, slots=True)
class Stack:
    """One workspace's folder. Callers hold the workspace's lock for everything that writes."""

    folder: Path

    @property
    def pool(self) -> LayerPool:
        """Where the files of layers are."""
        return LayerPool(self.folder.parent)

    def exists(self) -> bool:
        """Whether the workspace has been made."""
        return (self.folder / "workspace.json").exists()

    def create(
        self, scratch: Path, described: Mapping[str, Any], own: Sequence[Part] = (), *, durable: bool
    ) -> None:
        """Make the folder beside and rename it into place; somebody else's is left alone.

        `own` are another workspace's layers, topmost first, which become one of this.
        """
        for name in ("layers", "pending"):
            (scratch / name).mkdir(parents=True)
        if own:
            first = scratch / "layers" / f"{1:08d}"
            first.mkdir()
            write(first / "layer.json", asdict(LayerAuthor("(snapshot)", 1, 1)), durable=durable)
            show_all(own, first / "trees", self.pool, durable=durable)
        self.put(scratch, described, durable=durable)

    def put(self, scratch: Path, described: Mapping[str, Any], *, durable: bool) -> None:
        """Give a folder with layers the workspace's name; somebody else's is left alone."""
        write(scratch / "workspace.json", described, durable=durable)
        try:
            scratch.rename(self.folder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            layers.remove_tree(scratch)
        if durable:  # at the end, where one flush takes all of it: what is lost before is made again
            flush(self.folder / "layers", self.folder, self.folder.parent)

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
        places = sorted((self.folder / "layers").glob("[0-9]*"))
        return [self._layer(path) for path in places if not path.suffix and not (path / "forgotten").exists()]

    def newest_order(self) -> int:
        """Return the greatest order ever given to a layer that something on disk still names, 0 without any."""
        stood_on = (order for layer in self.kept() for order in layer.record.get("on", ()))
        named = (int(path.stem) for path in (self.folder / "layers").iterdir())
        return max((*named, *stood_on), default=0)

    def _layer(self, place: Path) -> Layer:
        try:
            parts: tuple[Part, ...] = (self.pool.read(place),)
            record = parts[0].record
        except IsADirectoryError:
            record = json.loads((place / "layer.json").read_bytes())
            links = sorted((place / "trees").glob("*"))
            parts = tuple(map(self.pool.read, links)) or (Part(place / "tree", record),)
        author = LayerAuthor(record["step"], record["count"], record["attempt"])
        return Layer(place, author, record, parts)

    def publish(
        self, pending: Path, order: int, author: LayerAuthor, facts: Mapping[str, Any], *, durable: bool
    ) -> None:
        """Turn a pending folder into a layer, with `facts` about it: the link is the commit."""
        link = self.folder / "layers" / f"{order:08d}"
        self._show(pending, {**facts, **asdict(author)}, link, durable=durable)
        if durable:
            flush(self.folder / "layers")

    def _show(self, pending: Path, facts: Mapping[str, Any], link: Path, *, durable: bool) -> None:
        self.pool.show(Part(self.pool.add(pending, facts, durable=durable), facts), link)

    def keep(self, pending: Path, author: LayerAuthor, facts: Mapping[str, Any], count: int) -> list[Path]:
        """Set a failed command's folder aside; returns older ones to remove, so that `count` stay."""
        kept = self.folder / "kept"
        kept.mkdir(exist_ok=True)
        self._show(pending, {**facts, **asdict(author)}, kept / f"{time.time_ns():020d}", durable=False)
        return sorted(kept.iterdir())[:-count]

    def kept(self) -> list[Layer]:
        """Return what failed commands left, oldest first. They are named by nanoseconds since the epoch."""
        return [self._layer(path) for path in sorted((self.folder / "kept").glob("[0-9]*"))]

    def snapshot(self, name: str) -> list[Part]:
        """Return the files, topmost first, of the workspace as it stood after a layer, or where a command failed.

        `name` is the layer's order, 0 for the fork itself, or `failed-` and the name of what is kept.
        NotFoundError where it is not here, or no longer what it stood on.
        """
        live = {str(layer.order): layer for layer in self.layers()}
        if name == "0" or name in live:
            return parts_of([layer for layer in live.values() if layer.order <= int(name)])
        for layer in self.kept():
            if name == f"failed-{layer.place.name}":
                below = [live.get(str(order)) for order in layer.record.get("on", ())]
                if None not in below:
                    return parts_of([*(found for found in below if found), layer])
        raise NotFoundError(f"the workspace {self.folder.name!r} has no snapshot {name[:60]!r} (any more)")

    def live_trees(self) -> list[Path]:
        """Return the trees of the layers in force, topmost first."""
        return trees_of(self.layers())

    def lowers(self, live: Sequence[Layer]) -> tuple[list[Path], list[Path]]:
        """Return trees that show the same as the layers `live`, topmost first, at most `SQUASH_ABOVE` + 1.

        And what is of no use any more: the links to what was merged before.
        """
        trees = trees_of(live)[::-1]
        merged, covered = self._merged(trees)
        rest, outdated = trees[covered:], list[Path]()
        if len(rest) > SQUASH_ABOVE:
            outdated = self._squashed()
            merged, rest = self._merge([*([merged] if merged else []), *rest], trees), []
        return [*reversed(rest), *([merged] if merged else [])], outdated

    def _squashed(self) -> list[Path]:
        folder = self.folder / "squashed"
        return list(folder.iterdir()) if folder.is_dir() else []

    def merges(self, trees: Sequence[Path]) -> list[Part]:
        """Return what was merged of the oldest of some trees, oldest first."""
        found, names = list[Part](), self._names(trees)
        for path in self._squashed():
            with contextlib.suppress(IsADirectoryError):  # of a release before: it is made again
                part = self.pool.read(path)
                if part.record["of"] == names[: len(part.record["of"])]:
                    found.append(part)
        return found

    def _merged(self, trees: Sequence[Path]) -> tuple[Path | None, int]:
        """Return the merged tree that stands for most of the oldest of some trees, and for how many."""
        best = max(self.merges(trees), key=lambda part: len(part.record["of"]), default=None)
        return (None, 0) if best is None else (best.tree, len(best.record["of"]))

    def _merge(self, trees: Sequence[Path], of: Sequence[Path]) -> Path:
        """Merge by hard links: a merged tree costs names, not bytes, and the layers stay for `rewind`."""
        scratch, apply = (
            self.folder.parent / ".new" / secrets.token_hex(8),
            layer_copies.Apply(link=True, merge=True),
        )
        (scratch / "tree").mkdir(parents=True)
        for tree in trees:
            apply(tree, scratch / "tree")
        (self.folder / "squashed").mkdir(exist_ok=True)
        part = Part(self.pool.add(scratch, {"of": self._names(of)}, durable=False), {})
        self.pool.show(part, self.folder / "squashed" / secrets.token_hex(8))
        return part.tree

    def _names(self, trees: Sequence[Path]) -> list[str]:
        """Return what tells trees apart for good: no name is ever given again."""
        return [str(tree.relative_to(self.folder.parent)) for tree in trees]

    def links(self) -> Iterator[Path]:
        """Yield the workspace's links to the pool, also those of layers that are forgotten."""
        for name in ("layers", "kept", "squashed"):
            for place in (self.folder / name).glob("*"):
                yield from links_at(place)

    def garbage(self, in_use: Collection[Path]) -> list[Path]:
        """Return where forgotten layers are that no open tree stands on."""
        links = (self.folder / "layers").glob(f"*{_FORGOTTEN}")
        folders = (path.parent for path in self.folder.glob("layers/*/forgotten"))
        found = [(path, self._layer(path).trees) for path in (*links, *folders)]
        return [path for path, trees in found if not any(tree in in_use for tree in trees)]


def links_at(place: Path) -> Iterator[Path]:
    """Yield the links to the pool by which a layer is where it is."""
    yield from (place / "trees").glob("*") if place.is_dir() else (place,)


def parts_of(live: Sequence[Layer]) -> list[Part]:
    """Return the parts of layers, oldest first: theirs topmost first."""
    return [part for layer in reversed(live) for part in layer.parts]


def trees_of(live: Sequence[Layer]) -> list[Path]:
    """Return the trees of layers, oldest first: theirs topmost first."""
    return [part.tree for part in parts_of(live)]
