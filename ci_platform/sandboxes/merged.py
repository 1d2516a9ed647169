"""A job's tree as one plain folder of the host, for an engine that only knows folders: mounted, else copied."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ci_platform import copy_on_write
from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import Tree

_PREFIX, _TREE = "dynflow-tree-", "tree"
_PACKAGE_HOME = str(Path(__file__).resolve().parents[2])
_MOUNT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from ci_platform.sandboxes import linux; "
    "linux.mount_overlay(sys.argv[5:], sys.argv[3], sys.argv[4], sys.argv[2], as_root=True)"
)


@contextlib.contextmanager
def merged(tree: Tree) -> Iterator[Path]:
    """Show `tree` as a folder while the context lasts; what changes in there ends up in `tree.upper`. Blocks.

    As root it is an overlay in the host's own mount namespace, which the engine has to share. Elsewhere it is a
    copy, and what changed is found afterwards.
    """
    if not tree.lowers:
        yield tree.upper
        return
    # Nobody else may enter: the tree inside has the modes that its commands gave it.
    place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        with (_mounted if os.geteuid() == 0 else _copied)(tree, place / _TREE) as folder:
            yield folder
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()


@contextlib.contextmanager
def _mounted(tree: Tree, place: Path) -> Iterator[Path]:
    # In a process of its own: the call changes the current folder, which threads share.
    place.mkdir()
    lowers = [str(lower) for lower in tree.lowers]
    command = [sys.executable, "-I", "-S", "-c", _MOUNT, _PACKAGE_HOME]
    command += [str(place), str(tree.upper), str(tree.work), *lowers]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    if done.returncode != 0:
        place.rmdir()
        raise UnavailableError(f"container sandbox: cannot mount the workspace: {done.stderr.strip()[-300:]}")
    try:
        yield place
    finally:
        _unmount(place)
        with contextlib.suppress(OSError):
            place.rmdir()


@contextlib.contextmanager
def _copied(tree: Tree, place: Path) -> Iterator[Path]:
    stamps = copy_on_write.copy_view(tree.lowers, place, clone=False)
    try:
        yield place
        tree.upper.rmdir()
        copy_on_write.capture(place, stamps, tree.upper)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sweep() -> int:
    """Unmount and remove what platforms left behind that are dead; returns how many trees."""
    swept = 0
    for place in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = place.name.removeprefix(_PREFIX).partition("-")[0]
        if _is_ours(place) and not Path("/proc", pid).exists():
            _unmount(place / _TREE)
            if not (place / _TREE).is_mount():  # else it would be a workspace that is emptied
                shutil.rmtree(place, ignore_errors=True)
                swept += 1
    return swept


def _is_ours(place: Path) -> bool:
    """Return whether we made it. Anybody may make links in a folder for temporary files, to mounts of the host's."""
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _unmount(place: Path) -> None:
    # Lazily where something is still open in it: a container that is being removed lets go a moment later.
    if place.is_mount() and subprocess.run(["umount", place], capture_output=True, check=False).returncode:
        subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)
