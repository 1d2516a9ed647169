"""How this machine and user can give each command its own cheap copy of a tree: overlay, reflink, plain copy.

Whatever the method, a command's changes end up in the format of `ci_platform.layers`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ci_platform import layer_copies, layers, overlay_probe
from ci_platform.errors import UnavailableError

MethodName = Literal["overlay", "user-overlay", "reflink", "copy"]
METHODS: tuple[MethodName, ...] = ("overlay", "user-overlay", "reflink", "copy")
"""Best first. `overlay` is a plain mount by root, `user-overlay` one in a user namespace with `userxattr`."""

_PROBE_SECONDS = 20

Stamps = Mapping[str, tuple[int, int, int]]
"""Path -> inode, ctime in ns, mode, of every path of a copy. Nobody can set a ctime."""


@dataclass(frozen=True, slots=True)
class Method:
    """What `probe` chose. `refused` says of each better method why it cannot be used here."""

    name: MethodName
    refused: Mapping[MethodName, str]

    @property
    def mounts(self) -> bool:
        """Whether a command's tree is an overlay for the sandbox to mount."""
        return self.name in {"overlay", "user-overlay"}

    def describe(self) -> dict[str, str]:
        """Return lines for `dynflow doctor`."""
        lines = {"workspaces": self.name}
        return lines | {f"workspaces without {name}": reason for name, reason in self.refused.items()}


def probe(root: Path, forced: MethodName | None = None) -> Method:
    """Choose the best method that works under `root`, by trying; takes some 50 ms, so call it once.

    `forced` is tried alone (`overlay` in both its ways): UnavailableError with the reason where it does not work.
    """
    root.mkdir(parents=True, exist_ok=True)
    refused: dict[MethodName, str] = {}
    for name in METHODS if forced is None else METHODS[:2] if forced == "overlay" else (forced,):
        reason = _refusal(name, root)
        if reason is None:
            return Method(name, refused)
        refused[name] = reason
    raise UnavailableError(f"workspaces cannot use {forced!r} under {root}: {refused}")


def _refusal(name: MethodName, root: Path) -> str | None:
    if name == "overlay":
        return _overlay_refusal(root, "privileged") if os.geteuid() == 0 else "needs root"
    if name == "user-overlay":
        return _overlay_refusal(root, "unprivileged")
    return _reflink_refusal(root) if name == "reflink" else None


def _overlay_refusal(root: Path, kind: str) -> str | None:
    command = [sys.executable, "-I", "-S", overlay_probe.__file__, str(root), kind]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_PROBE_SECONDS, check=False, env={}, text=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"probe exited with {done.returncode}"])[-1]


def _reflink_refusal(root: Path) -> str | None:
    with tempfile.TemporaryFile(dir=root) as source, tempfile.TemporaryFile(dir=root) as target:
        source.write(b"x" * 4096)
        source.flush()
        try:
            fcntl.ioctl(target.fileno(), layer_copies.FICLONE, source.fileno())
        except OSError as error:
            return error.strerror
    return None


def copy_view(lowers: Sequence[Path], target: Path, *, clone: bool) -> Stamps:
    """Write the merged view of layers (topmost first) to the new directory `target`; returns its stamps."""
    target.mkdir(mode=0o700)
    apply = layer_copies.Apply(clone=clone)
    for layer in reversed(lowers):
        apply(layer, target)
    stamps = {entry.path: _stamp(entry.stat) for entry in layers.walk(target)}
    _outlive(max((ctime for _, ctime, _ in stamps.values()), default=0), target.parent)
    return stamps


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    # A directory's ctime moves with its entries, which are looked at one by one.
    directory = stat.S_ISDIR(found.st_mode)
    return found.st_ino, 0 if directory else found.st_ctime_ns, found.st_mode


def _outlive(newest: int, folder: Path) -> None:
    """Wait until a change would get a later ctime than `newest`; file systems' clocks tick every 1-10 ms."""
    with tempfile.TemporaryFile(dir=folder) as probe_file:
        while os.fstat(probe_file.fileno()).st_ctime_ns <= newest:
            time.sleep(0.001)
            os.fchmod(probe_file.fileno(), 0o600)


def capture(copy: Path, stamps: Stamps, upper: Path) -> None:
    """Move what changed in a copy since `copy_view` into the new directory `upper`, as a layer."""
    upper.mkdir(mode=0o700)
    with layers.directory(copy) as source, layers.directory(upper) as target:
        _same_directory(os.fstat(source), target)
    directories, seen = {""}, set[str]()
    changes = []
    for entry in layers.walk(copy):
        seen.add(entry.path)
        if stat.S_ISDIR(entry.stat.st_mode):
            directories.add(entry.path)
        if stamps.get(entry.path) == _stamp(entry.stat):
            continue
        if stat.S_ISDIR(entry.stat.st_mode):
            changes.append(entry.path)
        else:
            _ensure_directory(os.path.dirname(entry.path), copy, upper)  # noqa: PTH120 - hot
            os.rename(entry.name, upper / entry.path, src_dir_fd=entry.parent)
            _strip(upper / entry.path, entry.stat)
    for path in changes:
        _ensure_directory(path, copy, upper)
    for path in stamps.keys() - seen:
        parent, name = os.path.split(path)
        if parent in directories:
            _ensure_directory(parent, copy, upper)
            with layers.directory(upper / parent) as target:
                layers.make_whiteout(target, name)


def _ensure_directory(path: str, copy: Path, upper: Path) -> None:
    """Make a directory of the layer. Only this module made the ones above it: none of them is a link."""
    if not path or (upper / path).exists():
        return
    _ensure_directory(os.path.dirname(path), copy, upper)  # noqa: PTH120 - hot
    (upper / path).mkdir(mode=0o700)
    with layers.directory(upper / path) as target:
        _same_directory((copy / path).lstat(), target)


def _same_directory(found: os.stat_result, target: int) -> None:
    if os.geteuid() == 0:
        os.fchown(target, found.st_uid, found.st_gid)
    os.fchmod(target, stat.S_IMODE(found.st_mode) & 0o1777)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _strip(path: Path, found: os.stat_result) -> None:
    """Take away xattrs that a tenant wrote into a plain copy and that mean something in a layer."""
    if not stat.S_ISREG(found.st_mode):
        return
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return
        raise
    for name in names:
        if name.startswith("user.overlay."):
            with contextlib.suppress(OSError):
                os.removexattr(path, name, follow_symlinks=False)
