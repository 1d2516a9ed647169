"""The few Linux calls that the standard library of Python 3.11 does not wrap. Stdlib only, no state.

The launcher of isolate sandboxes is made of them. Every call raises OSError with the name of the call.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 4096, 16384, 1 << 18, 1 << 19
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_CLOEXEC = 0o2000000
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 4
# The calls of the new mount API have the same numbers on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(platform.machine(), -1)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x2008_0522
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_CAPABILITIES = 64

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _check(name: str, result: int, path: str | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}", path)
    return result


def _syscall(name: str, number: int, *arguments: object) -> int:
    return _check(name, _libc.syscall(ctypes.c_long(number), *arguments))


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


def unshare(flags: int) -> None:
    """Move this process (for pid: its next children) into new namespaces."""
    _check("unshare", _libc.unshare(flags))


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    """Mount in the old way."""
    type_ = kind.encode() if kind else None
    _check(
        "mount",
        _libc.mount(os.fsencode(source), os.fsencode(target), type_, ctypes.c_ulong(flags), options.encode()),
        target,
    )


def unmount(target: str, flags: int = 0) -> None:
    """Unmount `target`."""
    _check("umount", _libc.umount2(os.fsencode(target), flags), target)


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root of this mount namespace and put the old root at `old`."""
    _syscall("pivot_root", _PIVOT_ROOT, os.fsencode(new), os.fsencode(old))


def bind(source: str, target: str, attributes: int, *, recursive: bool = True) -> None:
    """Bind `source` with what is mounted below it to `target`, with `ATTR_…` set on all of it."""
    fd = detached(source, attributes, recursive=recursive)
    try:
        move_mount(fd, target)
    finally:
        os.close(fd)


def detached(source: str, attributes: int, *, recursive: bool = False) -> int:
    """Return a mount of `source` that is nowhere yet, for `move_mount`."""
    flags = _OPEN_TREE_CLONE | _CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    fd = _syscall("open_tree", _OPEN_TREE, _long(_AT_FDCWD), os.fsencode(source), _long(flags))
    try:
        set_mount_attributes(fd, attributes, recursive=recursive)
    except BaseException:
        os.close(fd)
        raise
    return fd


def enter_mounts(pid: int) -> None:
    """Move this thread, whose current folder is its own (`unshare`), to where another process has its mounts."""
    fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check("setns", _libc.setns(fd, CLONE_NEWNS))
    finally:
        os.close(fd)


def set_mount_attributes(mount_fd: int, attributes: int, *, recursive: bool = True) -> None:
    """Set `ATTR_…` on the mount of `mount_fd`; none that is set already is cleared."""
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    wanted = _MountAttributes(attributes, 0, 0, 0)
    arguments = (_long(mount_fd), b"", _long(flags), ctypes.byref(wanted), _long(ctypes.sizeof(wanted)))
    _syscall("mount_setattr", _MOUNT_SETATTR, *arguments)


def move_mount(fd: int, target: str) -> None:
    """Put a mount that is nowhere yet at `target`."""
    where = (_long(fd), b"", _long(_AT_FDCWD), os.fsencode(target), _long(_MOVE_MOUNT_F_EMPTY_PATH))
    _syscall("move_mount", _MOVE_MOUNT, *where)


def mount_filesystem(
    kind: str, options: Iterable[tuple[str, str | None]], target: str, attributes: int
) -> None:
    """Mount a new file system with the mount API of Linux 5.2, which knows no limit on all options together.

    An option's value is at most 255 bytes long; None is a flag.
    """
    context = _syscall("fsopen", _FSOPEN, kind.encode(), _long(1))
    try:
        for key, value in options:
            command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
            raw = None if value is None else os.fsencode(value)
            _syscall(
                f"fsconfig {key}", _FSCONFIG, _long(context), _long(command), key.encode(), raw, _long(0)
            )
        _syscall("fsconfig", _FSCONFIG, _long(context), _long(_FSCONFIG_CMD_CREATE), None, None, _long(0))
        made = _syscall("fsmount", _FSMOUNT, _long(context), _long(1), _long(attributes))
    finally:
        os.close(context)
    try:
        move_mount(made, target)
    finally:
        os.close(made)


_WHOLE = (("metacopy", "off"), ("redirect_dir", "nofollow"))


def mount_overlay(lowers: Sequence[str], upper: str, work: str, target: str, *, as_root: bool) -> None:
    """Mount an overlay, topmost layer first in `lowers`, without the sync at unmount (`volatile`).

    Layers keep their marks in `trusted.` attributes as root and in `user.` ones elsewhere, as workspaces do. Whatever a
    kernel does by default, a changed file is whole in `upper`, and a moved folder has its files there: layers are read
    and linked on their own. Elsewhere than as root it is never otherwise, and must not be asked for.
    A kernel before 6.7 gets the old call, which takes one page of options: paths are made short by naming
    them from their common folder.
    """
    common = os.path.commonpath([*lowers, upper, work])
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(common)
    try:
        *layers, top, scratch = [os.path.relpath(path, common) for path in (*lowers, upper, work)]
        folders = [("upperdir", top), ("workdir", scratch)]
        pairs = [*folders, *(_WHOLE if as_root else ())]
        _mount_overlay(layers, pairs, ["volatile"] if as_root else ["volatile", "userxattr"], target)
    finally:
        os.fchdir(before)
        os.close(before)


def _mount_overlay(
    lowers: Sequence[str], pairs: list[tuple[str, str]], flags: list[str], target: str
) -> None:
    options: list[tuple[str, str | None]] = [("lowerdir+", lower) for lower in lowers]
    options += [*pairs, *((flag, None) for flag in flags)]
    try:
        mount_filesystem("overlay", options, target, ATTR_NOSUID | ATTR_NODEV)
    except OSError as error:
        if "fsconfig lowerdir+" not in str(error):
            raise
        texts = [f"lowerdir={':'.join(lowers)}", *("=".join(pair) for pair in pairs), *flags]
        mount("overlay", target, "overlay", MS_NOSUID | MS_NODEV, ",".join(texts))


def die_with_parent() -> None:
    """Have this process killed when its parent ends. Changing ids afterwards undoes it."""
    _check("prctl", _libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0))


def live_on() -> None:
    """Take `die_with_parent` back."""
    _check("prctl", _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0))


def hide_memory() -> None:
    """Keep other processes of this user out of this process's memory and /proc entries."""
    _check("prctl", _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def drop_bounding_capabilities() -> None:
    """Take every capability out of reach of later exec calls."""
    for capability in range(_CAPABILITIES):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break


def drop_capabilities() -> None:
    """Give up all capabilities that this process holds, and the way to get any again."""
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check("capset", _libc.capset(header, bytes(24)))
    _check("prctl", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def load_filter(program: bytes) -> None:
    """Install a seccomp program on this thread and its children; needs `drop_capabilities` before."""
    wrapped = _FilterProgram(len(program) // 8, program)
    _check("seccomp", _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(wrapped), 0, 0))


def map_user(inner_uid: int, inner_gid: int, outer_uid: int, outer_gid: int) -> None:
    """Name this process's user inside of the user namespace that it has just entered."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{inner_uid} {outer_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{inner_gid} {outer_gid} 1")


def set_hostname(name: str) -> None:
    """Name this uts namespace."""
    _check("sethostname", _libc.sethostname(name.encode(), len(name)))


def loopback_up() -> None:
    """Start `lo` in a fresh network namespace, so that a test may talk to its own server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
