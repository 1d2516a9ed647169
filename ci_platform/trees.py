"""Trees of commits on disk: written once, atomically, kept for the next run, evicted by age.

A tree is a folder `<root>/<repo>/<key>` with the files under `tree`. A base holds a whole commit; a delta is
a layer (see `ci_platform.layers`) that turns a base into a nearby commit. Neither changes once it has its
name. A tree counts only until the machine restarts: nothing is flushed while it is written, so after a power
cut its files could be empty.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ci_platform import layers
from ci_platform.errors import FailedError, LimitExceededError

_EVICT_NOT_BEFORE = 600.0
"""Seconds after its last use in which a tree is safe: whoever asked for it has pinned it long before."""

_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Owner:
    """Who the files of tenants belong to."""

    uid: int
    gid: int

    @classmethod
    def of_sandboxes(cls, uid: int) -> Owner:
        """Return `uid` where the platform is root and may give files away, else who the platform is."""
        return cls(uid, uid) if os.geteuid() == 0 else cls(os.geteuid(), os.getegid())


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """The largest commit that is written to disk: a few kilobytes of git can name billions of files."""

    files: int = 1_000_000
    size: int = 16 * 1024**3


@dataclass(slots=True)
class TreeWriter:
    """Writes one tree depth first. Refuses names and duplicates by which a commit could leave its tree."""

    root: Path
    owner: Owner
    limits: TreeLimits
    files: int = 0
    size: int = 0
    _stack: list[int] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stack.append(layers.open_directory(self.root))
        self._give(self._stack[-1], 0o755)
        return self

    def __exit__(self, *_: object) -> None:
        while self._stack:
            os.close(self._stack.pop())

    def enter(self, name: bytes) -> None:
        """Make a directory and go into it."""
        parent, path = self._stack[-1], _checked(name)
        if len(self._stack) > layers.MAX_DEPTH:
            raise LimitExceededError(f"directories of the commit are nested deeper than {layers.MAX_DEPTH}")
        self._count(0)
        with _naming(path):
            os.mkdir(path, dir_fd=parent)
        self._stack.append(layers.open_directory(path, parent))
        self._give(self._stack[-1], 0o755)

    def leave(self) -> None:
        """Go back to the parent directory."""
        os.close(self._stack.pop())

    def file(self, name: bytes, content: bytes, *, executable: bool) -> None:
        """Write a regular file."""
        path = _checked(name)
        self._count(len(content))
        with _naming(path):
            descriptor = os.open(path, _FILE, 0o600, dir_fd=self._stack[-1])
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            self._give(descriptor, 0o755 if executable else 0o644)
        finally:
            os.close(descriptor)

    def symlink(self, name: bytes, target: bytes) -> None:
        """Write a symbolic link, to wherever it says: only tenants follow it."""
        path, parent = _checked(name), self._stack[-1]
        self._count(len(target))
        if not target or b"\0" in target:
            raise FailedError(f"the commit has a symbolic link without a target: {path!r}")
        with _naming(path):
            os.symlink(target, path, dir_fd=parent)
        if os.geteuid() == 0:
            os.chown(path, self.owner.uid, self.owner.gid, dir_fd=parent, follow_symlinks=False)

    def hide(self, name: bytes) -> None:
        """Record in a delta that the base's path is gone."""
        path = _checked(name)
        self._count(0)
        with _naming(path):
            layers.make_whiteout(self._stack[-1], path)

    def _count(self, size: int) -> None:
        self.files += 1
        self.size += size
        if self.files > self.limits.files or self.size > self.limits.size:
            limit = f"{self.limits.files} files or {self.limits.size} bytes"
            raise LimitExceededError(f"the commit has more than {limit}")

    def _give(self, descriptor: int, mode: int) -> None:
        if os.geteuid() == 0:
            os.fchown(descriptor, self.owner.uid, self.owner.gid)
        os.fchmod(descriptor, mode)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise FailedError(f"the commit has two entries named {path!r}") from None
    except OSError as error:
        if error.errno in {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}:
            raise FailedError(f"the commit has a name that no file can have: {path[:80]!r}") from error
        raise


def _checked(name: bytes) -> str:
    if name in {b"", b".", b".."} or b"/" in name or b"\0" in name or name.lower() == b".git":
        raise FailedError(f"the commit has an entry named {name!r}, which no tree may have")
    return os.fsdecode(name)


@dataclass(frozen=True, slots=True)
class StoredTree:
    """A tree on disk. `base` is the key of the tree below a delta, `used_at` in seconds since the epoch."""

    key: str
    folder: Path
    base: str | None
    size: int
    used_at: float

    @property
    def path(self) -> Path:
        """Where the files are."""
        return self.folder / "tree"


class TreeStore:
    """Trees by repository and key. Safe for threads; two that build the same key agree on the first."""

    def __init__(self, root: Path, owner: Owner, limits: TreeLimits) -> None:
        self._root, self._owner, self._limits = root, owner, limits
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        for name in (".building", ".trash"):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700)

    def find(self, repo: str, key: str) -> StoredTree | None:
        """Return a tree and note that it is in use; None where it has to be built."""
        folder = self._root / repo / key
        found = self._read(folder)
        if found is not None:
            os.utime(folder)
        return found

    def _read(self, folder: Path) -> StoredTree | None:
        try:
            record = json.loads((folder / "tree.json").read_bytes())
            used_at = folder.stat().st_mtime
        except FileNotFoundError:
            return None
        if (record["boot"], record["owner"]) != (self._boot, self._owner.uid):
            return None
        return StoredTree(folder.name, folder, record["base"], record["size"], used_at)

    def build(
        self, repo: str, key: str, fill: Callable[[TreeWriter], None], *, base: str | None = None
    ) -> StoredTree:
        """Write a tree by `fill` under a name that nobody sees, then rename it into place."""
        scratch = self._root / ".building" / secrets.token_hex(8)
        try:
            (scratch / "tree").mkdir(parents=True)
            with TreeWriter(scratch / "tree", self._owner, self._limits) as writer:
                fill(writer)
            record = {"boot": self._boot, "owner": self._owner.uid, "base": base, "size": writer.size}
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

    def bases(self, repo: str) -> list[StoredTree]:
        """Return the repository's whole trees, last used first."""
        return [tree for tree in self._all(self._root / repo) if tree.base is None]

    def _all(self, *folders: Path) -> list[StoredTree]:
        found = (self._read(path) for folder in folders if folder.is_dir() for path in folder.iterdir())
        return sorted((tree for tree in found if tree), key=lambda tree: tree.used_at, reverse=True)

    def evict(self, budget: int, keep: Collection[Path]) -> int:
        """Remove trees, longest unused first, until `budget` bytes are left; returns the bytes freed.

        Trees whose files are in `keep`, bases of those that stay and whatever was used in the last ten
        minutes stay.
        """
        repositories = [path for owner in self._root.glob("[!.]*") for path in owner.iterdir()]
        trees = self._all(*repositories)
        oldest = time.time() - _EVICT_NOT_BEFORE
        pinned = {tree.folder for tree in trees if tree.path in keep or tree.used_at > oldest}
        pinned |= {tree.folder.parent / tree.base for tree in trees if tree.base and tree.folder in pinned}
        total, freed = sum(tree.size for tree in trees), 0
        for tree in reversed(trees):
            if total - freed > budget and tree.folder not in pinned and tree.folder.exists():
                freed += tree.size + self._evict_on(tree, trees)
        return freed

    def _evict_on(self, base: StoredTree, trees: Collection[StoredTree]) -> int:
        """Remove a tree after the deltas that stand on it; returns the bytes of those."""
        deltas = [
            tree for tree in trees if tree.folder.parent == base.folder.parent and tree.base == base.key
        ]
        for tree in [*deltas, base]:
            if tree.folder.exists():
                self._discard(tree.folder)
        return sum(tree.size for tree in deltas)

    def _discard(self, folder: Path) -> None:
        trash = self._root / ".trash" / secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(trash)
        layers.remove_tree(trash)

    def sweep(self) -> None:
        """Remove what a killed process left half built or half removed, and trees of before a restart."""
        for name in (".building", ".trash"):
            for path in (self._root / name).iterdir():
                layers.remove_tree(path)
        for path in self._root.glob("[!.]*/*/*"):
            if self._read(path) is None:
                self._discard(path)
