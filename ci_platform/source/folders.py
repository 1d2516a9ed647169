"""Repositories as folders: made and removed by one rename each, forked by hard links, repaired after a kill.

A fork shares its parent's packs as hard links, not by git's alternates: packs are never written to again, so
neither deleting nor packing one of the two can take anything from the other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ci_platform import layers
from ci_platform.errors import ConflictError, UnavailableError
from ci_platform.source import own_lfs

_PIECES_WORTH_PACKING = 20
"""Packs, or files of single objects, above which looking an object up gets slow."""

_LARGE_PACK = 32 << 20
"""Bytes. Packs of that size that forks share stay as they are; smaller ones cost less than being many."""

_CANNOT_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EACCES}
_PACK_PARTS = (".pack", ".promisor", ".rev", ".bitmap", ".idx")
"""Of a pack, in the order in which they are linked: git takes one for whole when it sees the last."""

_CONFIG = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n"
"""All that git needs. Made by hand: libgit2's way keeps 13 KB of memory for each, for ever."""


class Journal:
    """Which repositories are being written to: a file for each, so that after a kill nobody has to search.

    Not flushed for its own sake: the file systems in use order it before what git flushes later.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def is_new(self) -> bool:
        """Whether nothing was ever written down: an older release left repositories, and no journal of them."""
        return not self._folder.is_dir()

    @contextmanager
    def entry(self, repo: str) -> Iterator[None]:
        """Name a repository for the time of the block, however that ends; a kill leaves the name."""
        path = self._write(secrets.token_hex(8), repo)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def keep(self, repo: str) -> None:
        """Name a repository until it is forgotten."""
        self._write(hashlib.sha256(repo.encode()).hexdigest()[:32], repo)

    def _write(self, name: str, repo: str) -> Path:
        path = self._folder / name
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(repo, encoding="ascii")
        return path

    def read(self) -> set[str]:
        """Return the repositories that are named."""
        with suppress(FileNotFoundError):
            return {path.read_text(encoding="ascii") for path in self._folder.iterdir()} - {""}
        return set()

    def forget(self) -> None:
        """Forget all names. For the start, before anything is written."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in list(self._folder.iterdir()):
            path.unlink()


def initialise(path: Path, default_branch: str) -> None:
    """Make an empty repository, which is whole when it has its name. Nothing where there is one already."""
    with suppress(ConflictError), fresh(path, default_branch) as scratch:
        publish(scratch, path)


@contextmanager
def fresh(path: Path, default_branch: str) -> Iterator[Path]:
    """Yield an empty repository beside `path`, to be filled and published; it is gone after the block."""
    scratch = prepare(path, default_branch)
    try:
        yield scratch
    except OSError as error:
        raise UnavailableError(f"cannot create {path}: {error}") from error
    finally:
        layers.remove_tree(scratch)


def prepare(path: Path, default_branch: str) -> Path:
    """Make an empty repository beside `path` and return where."""
    scratch = path.parent / f".new-{secrets.token_hex(8)}"
    try:
        for name in ("objects/info", "objects/pack", "refs/heads", "refs/tags"):
            (scratch / name).mkdir(parents=True)
        (scratch / "config").write_text(_CONFIG, encoding="ascii")
        (scratch / "HEAD").write_text(f"ref: refs/heads/{default_branch}\n", encoding="utf-8")
    except OSError as error:
        layers.remove_tree(scratch)
        raise UnavailableError(f"cannot create {path}: {error}") from error
    return scratch


def replace(scratch: Path, path: Path, trash: Path) -> None:
    """Give a finished repository its name, in the place of any that had it."""
    old = trash / secrets.token_hex(8)
    trash.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileNotFoundError):
        path.rename(old)
    scratch.rename(path)
    layers.remove_tree(old)


def publish(scratch: Path, path: Path) -> None:
    """Give a finished repository its name; ConflictError where the name is taken."""
    try:
        scratch.rename(path)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise ConflictError(f"the repository {path.name!r} exists already") from None
        raise


def discard(path: Path, trash: Path) -> None:
    """Take a repository away by one rename, then remove its files."""
    target = trash / secrets.token_hex(8)
    trash.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileNotFoundError):
        path.rename(target)
    layers.remove_tree(target)


def fork(parent: Path, target: Path, refs: Mapping[bytes, str], head: str) -> None:
    """Make `target` a repository with these refs (full name -> what they point at) and the parent's objects.

    Nothing may take packs away from the parent meanwhile. ConflictError where the name is taken.
    """
    with fresh(target, head) as scratch:
        with suppress(FileNotFoundError):
            shutil.copyfile(parent / "shallow", scratch / "shallow")
        lines = [oid.encode() + b" " + name + b"\n" for name, oid in sorted(refs.items())]
        (scratch / "packed-refs").write_bytes(b"# pack-refs with: sorted \n" + b"".join(lines))
        _link_objects(parent / "objects", scratch / "objects")
        for path in own_lfs.files(parent):
            kept = own_lfs.place_of(scratch, path.name)
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError):  # garbage, which was collected just now
                _link(path, kept)
        publish(scratch, target)


def _link_objects(source: Path, target: Path) -> None:
    (target / "pack").mkdir(exist_ok=True)
    for index in source.glob("pack/pack-*.idx"):
        for suffix in _PACK_PARTS:
            _link(index.with_suffix(suffix), target / "pack" / index.with_suffix(suffix).name)
    for folder in source.glob("[0-9a-f][0-9a-f]"):
        (target / folder.name).mkdir(exist_ok=True)
        for loose in folder.iterdir():
            if not loose.name.startswith("tmp_"):
                _link(loose, target / folder.name / loose.name)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        if source.suffix in {".pack", ".idx", ""}:
            raise
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, target)


def needs_packing(repository: Path) -> bool:
    """Whether the repository is in so many pieces that packing is worth it."""
    packs = sum(1 for _ in repository.glob("objects/pack/pack-*.idx"))
    loose = sum(1 for _ in repository.glob("objects/[0-9a-f][0-9a-f]/*"))
    return packs > _PIECES_WORTH_PACKING or loose > _PIECES_WORTH_PACKING


def shared_packs(repository: Path) -> list[str]:
    """Return the names of large packs that another repository has as well: packing them anew would copy them."""
    return [
        path.name
        for path in repository.glob("objects/pack/pack-*.pack")
        if (found := path.stat()).st_nlink > 1 and found.st_size >= _LARGE_PACK
    ]


def unlock(repository: Path) -> None:
    """Remove what git processes left that died with an earlier process of ours: nobody else works here."""
    for lock in (*repository.glob("*.lock"), *repository.glob("refs/**/*.lock")):
        lock.unlink(missing_ok=True)
    for path in repository.glob("objects/pack/tmp_*"):
        path.unlink(missing_ok=True)
    for path in repository.glob("objects/pack/.tmp-*"):
        path.unlink(missing_ok=True)
    for path in repository.glob("objects/??/tmp_obj_*"):
        path.unlink(missing_ok=True)
    for path in (*repository.glob("objects/tmp_objdir-*"), *repository.glob("objects/incoming-*")):
        layers.remove_tree(path)


def sweep(root: Path, trash: Path) -> None:
    """Remove repositories below `root` that were being made, and what was being removed."""
    for path in root.glob("*/.new-*"):
        layers.remove_tree(path)
    if trash.is_dir():
        for path in list(trash.iterdir()):
            layers.remove_tree(path)


_MEASURED_FOR = 3600.0
"""Seconds for which what a repository takes is good enough, where it seems to be the same."""

_Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Held:
    """What a repository takes: bytes on disk, files and folders; `used_at` in seconds since the epoch."""

    repo: str
    size: int
    files: int
    used_at: float


@dataclass(slots=True)
class Sizes:
    """What the repositories below a folder take. One whose packs are the same is walked through once in an hour.

    For one thread at a time.
    """

    _known: dict[str, tuple[_Stamp, float, tuple[int, int]]] = field(default_factory=dict)

    def held(self, root: Path) -> list[Held]:
        """Return all repositories."""
        found, known = list[Held](), self._known
        self._known = {}
        for repo in served(root):
            path = root / f"{repo}.git"
            with suppress(FileNotFoundError):
                used_at, stamp = path.stat().st_mtime, _stamp(path)
                before, measured_at, taken = known.get(repo, (None, 0.0, (0, 0)))
                if before != stamp or not 0 <= time.time() - measured_at < _MEASURED_FOR:
                    measured_at, taken = time.time(), layers.taken(path)
                self._known[repo] = (stamp, measured_at, taken)
                found.append(Held(repo, *taken, used_at))
        return found


def _stamp(path: Path) -> _Stamp:
    """Return what changes when objects come or go: mostly in packs, or in new folders of single objects."""
    objects = [(path / name).stat() for name in ("objects/pack", "objects")]
    return tuple((each.st_ino, each.st_mtime_ns) for each in objects)


def used_before(path: Path, moment: float) -> bool:
    """Whether a repository was used last before a moment, in seconds since the epoch; so was one that is gone."""
    try:
        return path.stat().st_mtime <= moment
    except FileNotFoundError:
        return True


def served(root: Path) -> list[str]:
    """Return the names of the repositories below a folder, sorted."""
    with suppress(FileNotFoundError):
        owners = sorted(entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
        return [f"{owner}/{name}" for owner in owners for name in sorted(_names(root / owner))]
    return []


def _names(owner: Path) -> Iterator[str]:
    for entry in os.scandir(owner):
        if (
            entry.name.endswith(".git")
            and not entry.name.startswith(".")
            and entry.is_dir(follow_symlinks=False)
        ):
            yield entry.name.removesuffix(".git")
