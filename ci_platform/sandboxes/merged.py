"""A job's tree as one plain folder of the host, for an engine that only knows folders: mounted, else copied."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ci_platform import copy_on_write, layers
from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import Tree, linux

TREE = "tree"
_PREFIX = "dynflow-tree-"
_CLONE_FS = 0x200
_ATTRIBUTES = linux.ATTR_NOSUID | linux.ATTR_NODEV


@contextlib.contextmanager
def merged(tree: Tree) -> Iterator[Path]:
    """Show `tree` as a folder while the context lasts; what changes in there ends up in `tree.upper`. Blocks.

    As root it is an overlay in the host's own mount namespace, which the engine has to share. Elsewhere it is a
    copy, and what changed is found afterwards.
    """
    if not tree.lowers:
        yield tree.upper
        return
    place = make_place()
    try:
        with (_mounted if os.geteuid() == 0 else _copied)(tree, place / TREE) as folder:
            yield folder
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()


def make_place() -> Path:
    """Make a folder for trees, which the next platform sweeps if this one is killed."""
    # Nobody else may enter: the trees inside have the modes that their commands gave them.
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


def mount(tree: Tree, target: Path) -> None:
    """Mount a tree over the folder `target`. Blocks for a millisecond; needs root. Raises UnavailableError."""
    _mount(tree, str(target))


def _mount(tree: Tree, target: str) -> None:
    def work() -> None:
        if not tree.lowers:
            linux.bind(str(tree.upper), target, _ATTRIBUTES, recursive=False)
            return
        lowers = [str(lower) for lower in tree.lowers]
        linux.mount_overlay(lowers, str(tree.upper), str(tree.work), target, as_root=True)

    apart(work, "cannot mount the workspace")


def apart(work: Callable[[], None], trouble: str) -> None:
    """Do some work with mounts in a thread whose current folder and root are its own. Raises UnavailableError."""
    problems: list[OSError] = []

    def guarded() -> None:
        try:
            linux.unshare(_CLONE_FS)
            work()
        except OSError as error:
            problems.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if problems:
        raise UnavailableError(f"container sandbox: {trouble}: {problems[0]}")


def mounts_below(folder: str, process: str = "self") -> list[str]:
    """Return what a process has mounted below a folder, the last one first. The names are real: no link is in them."""
    places = [line.split()[4] for line in Path(f"/proc/{process}/mountinfo").read_text().splitlines()]
    named = [re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), place) for place in places]
    return [place for place in reversed(named) if place.startswith(folder + "/")]


def unmount(target: Path) -> bool:
    """Unmount what is mounted at `target`; returns False where something is open in it, and it goes when that does."""
    try:
        linux.unmount(str(target))
    except OSError as error:
        if error.errno != errno.EBUSY:
            return error.errno == errno.EINVAL  # nothing is mounted there
        with contextlib.suppress(OSError):
            linux.unmount(str(target), linux.MNT_DETACH)
        return False
    return True


def mount_below(tree: Tree, root: Path, path: str) -> None:
    """Mount a tree over a folder below another one, in which tenants' programs may run. Raises UnavailableError."""
    with contextlib.ExitStack() as stack:
        try:
            folder = _open(stack, root, path)
        except OSError as error:
            why = f"{path!r} is no folder of the workspace any more: {error}"
            raise UnavailableError(f"container sandbox: {why}") from None
        # The folder that was found, wherever it is moved meanwhile; a name would be looked up again.
        _mount(tree, f"/proc/self/fd/{folder}/.")


def unmount_below(root: Path, path: str) -> bool:
    """`unmount` for what `mount_below` has mounted; False also where it is not there any more."""
    above, _, name = path.rpartition("/")
    went = False

    def work() -> None:
        nonlocal went
        with contextlib.ExitStack() as stack:
            os.fchdir(_open(stack, root, above))
            try:
                linux.unmount(name, linux.UMOUNT_NOFOLLOW)
                went = True
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                linux.unmount(name, linux.UMOUNT_NOFOLLOW | linux.MNT_DETACH)

    with contextlib.suppress(UnavailableError):
        apart(work, "cannot unmount in the workspace")
    return went


def _open(stack: contextlib.ExitStack, root: Path, path: str) -> int:
    """Open a folder below another one through real folders alone: a link of a tenant's would lead about the host."""
    folder = stack.enter_context(layers.directory(root))
    for name in filter(None, path.split("/")):
        folder = stack.enter_context(layers.directory(name, folder))
    return folder


@contextlib.contextmanager
def _mounted(tree: Tree, target: Path) -> Iterator[Path]:
    target.mkdir()
    try:
        mount(tree, target)
        yield target
    finally:
        unmount(target)
        with contextlib.suppress(OSError):
            target.rmdir()


@contextlib.contextmanager
def _copied(tree: Tree, place: Path) -> Iterator[Path]:
    stamps = copy_on_write.copy_view(tree.lowers, place, clone=False)
    try:
        yield place
        tree.upper.rmdir()
        copy_on_write.capture(place, stamps, tree.upper)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sweep(is_spared: Callable[[Path], bool] = lambda _: False) -> int:
    """Unmount and remove what platforms left behind that are dead; returns how many trees.

    A place that `is_spared` stays as it is.
    """
    swept = 0
    for place in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = place.name.removeprefix(_PREFIX).partition("-")[0]
        if _is_ours(place) and not Path("/proc", pid).exists() and not is_spared(place):
            remove_place(place)
            swept += not place.exists()
    return swept


def remove_place(place: Path) -> None:
    """Unmount and remove a place of `make_place` and what is in it, unless something stays mounted there."""
    for target in (*map(Path, mounts_below(str(place))), place):
        if target.is_mount():
            unmount(target)
    if not (place / TREE).is_mount() and not place.is_mount():  # else it would be a workspace that is emptied
        shutil.rmtree(place, ignore_errors=True)


def _is_ours(place: Path) -> bool:
    """Return whether we made it. Anybody may make links in a folder for temporary files, to mounts of the host's."""
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
