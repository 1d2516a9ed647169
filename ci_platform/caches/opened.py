"""The caches that a command uses while it runs: what was found, where its files are, and what is made of them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ci_platform import layer_copies, layers, sealing
from ci_platform.caches.specs import Place, place_of
from ci_platform.copy_on_write import Method
from ci_platform.errors import CacheInvalidError
from ci_platform.sandboxes import Mount, Tree
from ci_platform.trees import Owner

Outcome = Literal["hit", "restored", "miss"]

_BLOCK, _INODE = 4096, 512
"""Bytes: files fill whole blocks, and each name costs something, or a million of empty files would cost nothing."""


@dataclass(frozen=True, slots=True)
class OpenCache:
    """One cache of a command. `entry` is the id and `files` the folder of what was found; None after a miss.

    `folder` has what the command works on. `record` is the id of its row in the run's record.
    """

    key: str
    paths: tuple[str, ...]
    outcome: Outcome
    folder: Path
    entry: str | None = None
    files: Path | None = None
    record: int | None = None

    def mounts(self) -> tuple[Mount, ...]:
        """Return what the sandbox has to show."""
        return tuple(self._mount(number, place_of(path)) for number, path in enumerate(self.paths))

    def _mount(self, number: int, place: Place) -> Mount:
        folder = self.folder / str(number)
        is_overlay = (folder / "work").exists()
        lowers = (self.files / str(number),) if self.files is not None and is_overlay else ()
        return Mount(place.root, place.path, Tree(folder / "tree", folder / "work", lowers))

    def prepare(self, method: Method, owner: Owner) -> None:
        """Make the folders that the command will write to: over what was found, or a copy of it, or empty. Blocks."""
        for number in range(len(self.paths)):
            upper = self.folder / str(number) / "tree"
            upper.mkdir(parents=True)
            if self.files is not None and method.mounts:
                (upper.parent / "work").mkdir()
            elif self.files is not None:
                layer_copies.Apply(clone=method.name == "reflink")(self.files / str(number), upper)
            if os.geteuid() == 0:
                os.chown(upper, owner.uid, owner.gid)
            upper.chmod(0o755)

    def collect(self, scratch: Path, owner: Owner, *, durable: bool) -> tuple[int, int]:
        """Put what the command has left into `scratch`, as an entry has it; returns bytes and files. Blocks.

        Nothing may use the folders any more. Files that did not change are shared with the entry they came from.
        """
        size = count = 0
        for number, mount in enumerate(self.mounts()):
            target = scratch / "files" / str(number)
            sealing.seal(mount.tree.upper, owner, durable=durable and not mount.tree.lowers)
            target.parent.mkdir(exist_ok=True)
            if mount.tree.lowers:
                target.mkdir()
                for layer in (*mount.tree.lowers, mount.tree.upper):
                    layer_copies.Apply(link=True)(layer, target)
                sealing.seal(target, owner, durable=durable)
            else:
                mount.tree.upper.rename(target)
            for entry in layers.walk(target):
                count += 1
                blocks = -(-entry.stat.st_size // _BLOCK) if entry.kind == "file" else 0
                size += blocks * _BLOCK + _INODE
        return size, count

    def as_plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        files = None if self.files is None else str(self.files)
        return asdict(self) | {"folder": str(self.folder), "files": files}

    @staticmethod
    def from_plain(told: Mapping[str, Any]) -> OpenCache:
        """Return what `as_plain` was of."""
        files = None if told["files"] is None else Path(told["files"])
        return OpenCache(
            **{**told, "paths": tuple(told["paths"]), "folder": Path(told["folder"]), "files": files}
        )


@dataclass(slots=True)
class OpenCaches:
    """All caches of one command. `made` are folders of a copied workspace that were made for mounts, parents first."""

    run_id: str
    folder: Path
    caches: tuple[OpenCache, ...] = ()
    made: list[str] = field(default_factory=list)

    def mounts(self) -> tuple[Mount, ...]:
        """Return what the sandbox has to show."""
        return tuple(mount for each in self.caches for mount in each.mounts())

    def make_ways(self, tree: Tree, places: Sequence[Place]) -> Tree:
        """Return the tree with a folder at each place of the workspace, made if need be. Blocks.

        Of an overlay it is a lower layer more, so that the command's own layer has none of it. Raises CacheInvalidError
        where something else is on the way: a mount must not go where a link of the tenant's leads.
        """
        paths = [place.path for place in places if place.root == "workspace"]
        if not paths:
            return tree
        if not tree.lowers:
            for path in paths:
                self._make_in_copy(tree.upper, path)
            return tree
        ways = self.folder / "ways"
        ways.mkdir()
        for path in paths:
            _make_in_layer(ways, tree.lowers, path)
        return Tree(tree.upper, tree.work, (ways, *tree.lowers))

    def _make_in_copy(self, root: Path, path: str) -> None:
        for prefix in _prefixes(path):
            found = root / prefix
            if not os.path.lexists(found):
                found.mkdir()
                self.made.append(prefix)
                if os.geteuid() == 0:
                    status = root.stat()
                    os.chown(found, status.st_uid, status.st_gid)
            _refuse_unless_folder(found.lstat(), path, prefix)

    def remove_ways(self, root: Path) -> None:
        """Remove the folders that were made in a copied workspace, those that are empty still. Blocks."""
        for path in reversed(self.made):
            *above, name = path.split("/")
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                descriptor = stack.enter_context(layers.directory(root))
                for part in above:
                    descriptor = stack.enter_context(layers.directory(part, descriptor))
                os.rmdir(name, dir_fd=descriptor)

    def as_plain(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {
            "run_id": self.run_id,
            "folder": str(self.folder),
            "caches": [each.as_plain() for each in self.caches],
            "made": self.made,
        }

    @staticmethod
    def from_plain(told: Mapping[str, Any]) -> OpenCaches:
        """Return what `as_plain` was of."""
        caches = tuple(map(OpenCache.from_plain, told["caches"]))
        return OpenCaches(told["run_id"], Path(told["folder"]), caches, list(told["made"]))


def _make_in_layer(ways: Path, lowers: Sequence[Path], path: str) -> None:
    """Make the folders of a path, each as it looks in the layers below, whose look it covers."""
    for prefix in _prefixes(path):
        found = layers.locate(lowers, prefix)
        if found is not None:
            _refuse_unless_folder(found.lstat(), path, prefix)
        if not (ways / prefix).exists():
            (ways / prefix).mkdir()
            like = lowers[-1].stat() if found is None else found.lstat()
            if os.geteuid() == 0:
                os.chown(ways / prefix, like.st_uid, like.st_gid)
            (ways / prefix).chmod(0o755 if found is None else stat.S_IMODE(like.st_mode))
    for prefix in reversed(list(_prefixes(path))):
        if (found := layers.locate(lowers, prefix)) is not None:
            like = found.lstat()
            os.utime(ways / prefix, ns=(like.st_atime_ns, like.st_mtime_ns))


def _prefixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[: number + 1]) for number in range(len(parts))]


def _refuse_unless_folder(found: os.stat_result, path: str, prefix: str) -> None:
    if not stat.S_ISDIR(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
        raise CacheInvalidError(
            f"cache: {path!r:.100} cannot be mounted, for {prefix!r:.100} is {kind} in the workspace"
        )
