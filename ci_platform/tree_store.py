"""Trees of commits on disk: built once, atomically, kept for the next run, evicted by age.

A tree is a folder `<root>/<repo>/<key>` with the files under `tree`. A base holds a whole commit; a delta is
a layer (see `ci_platform.layers`) that turns the tree below into a nearby commit's. Neither changes once it has
its name. A stand-in has no files, but can be mounted as the base that it stands for, until that is written (see
`ci_platform.hydration`). A tree counts only until the machine restarts: nothing is flushed while it is written, so
after a power cut its files could be empty.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci_platform import layers
from ci_platform.trees import Owner

_BASE, _STAND_IN, _BUILDING = "base", "lazy", ".building"

_BUILDERS_END = 10.0
"""Seconds in which processes end that are told to: longer, and what they leave is there until the next start."""

SAFE_FOR = 600.0
"""Seconds after its last use in which a tree is safe: whoever asked for it has pinned it long before."""

CHEAP_FOR = 3600.0
"""Seconds after its last use in which a tree stays that costs next to nothing to build again (`cheap`)."""


def stands_for(key: str) -> str:
    """Return the key of the base for which there is a stand-in by this key; other keys as they are."""
    return _BASE + key.removeprefix(_STAND_IN) if key.startswith(_STAND_IN) else key


@dataclass(frozen=True, slots=True)
class StoredTree:
    """A tree on disk. `base` is the key of the tree below a delta, `used_at` in seconds since the epoch."""

    key: str
    folder: Path
    base: str | None
    size: int
    used_at: float
    cheap: bool = False

    @property
    def path(self) -> Path:
        """Where the files are."""
        return self.folder / "tree"

    @property
    def is_stand_in(self) -> bool:
        """Whether its files are not on disk."""
        return self.key.startswith(_STAND_IN)

    @property
    def is_of_lfs(self) -> bool:
        """Whether its files are links of those that LFS keeps."""
        return self.key.startswith("lfs-")

    @property
    def stands_for(self) -> str:
        """The key of the base whose files these are; of others their own."""
        return stands_for(self.key)


class TreeStore:
    """Trees by repository and key. Safe for threads; two that build the same key agree on the first."""

    def __init__(self, root: Path, owner: Owner, *, look_only: bool = False) -> None:
        self._root, self._owner = root, owner
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        if not look_only:
            for name in (_BUILDING, ".trash"):
                (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            root.chmod(0o700)

    def find(self, repo: str, key: str) -> StoredTree | None:
        """Return a tree and note that it is in use; None where it has to be built."""
        found = self._read(self._root / repo / key)
        if found is not None:
            self.use([found])
        return found

    def chain(self, repo: str, key: str, *, stand_ins: bool = False) -> list[StoredTree]:
        """Return a tree and those below it, topmost first; empty where one is gone.

        With `stand_ins`, a base that is not written may be its stand-in.
        """
        found = list[StoredTree]()
        wanted: str | None = key
        while wanted is not None:
            tree = self._read(self._root / repo / wanted)
            if tree is None and stand_ins:
                tree = self.stand_in(repo, wanted)
            if tree is None:
                return []
            found.append(tree)
            wanted = tree.base
        return found

    def stand_in(self, repo: str, key: str) -> StoredTree | None:
        """Return what stands for a base, written or not, by the base's key."""
        return self._read(self._root / repo / key.replace(_BASE, _STAND_IN, 1))

    def use(self, trees: Sequence[StoredTree]) -> list[StoredTree]:
        """Note that trees are in use, the first of them as the last used one; return them."""
        for tree in reversed(trees):
            with contextlib.suppress(FileNotFoundError):
                os.utime(tree.folder)
        return list(trees)

    def keys(self, repo: str) -> list[str]:
        """Return the keys of a repository's trees, last used first. Some may be of before a restart."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._root / repo) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, entry.name))
        return [name for _, name in sorted(found, reverse=True)]

    def _read(self, folder: Path) -> StoredTree | None:
        try:
            record = json.loads((folder / "tree.json").read_bytes())
            used_at = folder.stat().st_mtime
        except FileNotFoundError:
            return None
        if (record["boot"], record["owner"]) != (self._boot, self._owner.uid):
            return None
        cheap = bool(record.get("cheap"))
        return StoredTree(folder.name, folder, record["base"], record["size"], used_at, cheap=cheap)

    def build(
        self,
        repo: str,
        key: str,
        fill: Callable[[Path], int],
        *,
        base: str | None = None,
        cheap: bool = False,
    ) -> StoredTree:
        """Write a tree under a name that nobody sees, then rename it into place.

        `fill` gets the folder, in which there is an empty `tree`; it returns the bytes that it wrote.
        """
        scratch = self._root / _BUILDING / secrets.token_hex(8)
        try:
            (scratch / "tree").mkdir(parents=True)
            size = fill(scratch)
            record = {
                "boot": self._boot,
                "owner": self._owner.uid,
                "base": base,
                "size": size,
                "cheap": cheap,
            }
            (scratch / "tree.json").write_text(json.dumps(record), encoding="utf-8")
            self._publish(scratch, self._root / repo / key)
        finally:
            layers.remove_tree(scratch)
        found = self.find(repo, key)
        if found is None:
            raise FileNotFoundError(self._root / repo / key)
        return found

    def _publish(self, scratch: Path, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and self._read(folder) is None:
            self._discard(folder)
        # Renaming onto a folder that is not empty fails: somebody was faster, with the same content.
        try:
            scratch.rename(folder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise

    def all(self) -> list[tuple[str, StoredTree]]:
        """Return all trees with their repositories. None of them counts as used by that."""
        found = list[tuple[str, StoredTree]]()
        for folder in self._root.glob("[!.]*/*/*"):
            if tree := self._read(folder):
                found.append((f"{folder.parent.parent.name}/{folder.parent.name}", tree))
        return found

    def remove(self, repo: str, key: str) -> bool:
        """Remove a tree, unless it was used in the last ten minutes or another one stands on it.

        Nobody may ask for trees of the repository meanwhile.
        """
        tree = self._read(self._root / repo / key)
        if tree is None:
            return True
        others = (self._read(self._root / repo / name) for name in self.keys(repo))
        if tree.used_at > time.time() - SAFE_FOR or any(each and each.base == key for each in others):
            return False
        self._discard(tree.folder)
        return True

    def _discard(self, folder: Path) -> None:
        trash = self._root / ".trash" / secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(trash)
        layers.remove_tree(trash)

    def sweep(self) -> None:
        """Remove what a killed process left half built or half removed, and trees of before a restart.

        Waits for the builders of one that was killed just now: they end by themselves, and might write on meanwhile.
        """
        with layers.directory(self._root / _BUILDING) as builders:
            _await(builders)
        for name in (_BUILDING, ".trash"):
            for path in (self._root / name).iterdir():
                layers.remove_tree(path)
        for path in self._root.glob("[!.]*/*/*"):
            if self._read(path) is None:
                self._discard(path)


def join_builders(root: Path) -> int:
    """Be one of the processes that build trees below `root`, as long as the returned descriptor is open."""
    descriptor = layers.open_directory(root / _BUILDING)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _await(builders: int) -> None:
    until = time.monotonic() + _BUILDERS_END
    while time.monotonic() < until:
        try:
            fcntl.flock(builders, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return
