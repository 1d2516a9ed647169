"""Linux calls that Python's standard library does not have (in 3.11), each as one function. Stdlib only.

All raise OSError. Used by isolates and by the sandboxes of commands.
"""

from __future__ import annotations

import array
import ctypes
import os
import struct
from collections.abc import Iterable

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
_MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2

# Numbers that all 64-bit architectures share since Linux 5.x gave new calls one number everywhere.
_SYS_PROCESS_MADVISE = 440
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
# Per architecture: pivot_root, capset.
_NUMBERS = {"x86_64": (155, 126), "aarch64": (41, 91)}

_libc = ctypes.CDLL(None, use_errno=True)
_libc_holding = ctypes.PyDLL(None, use_errno=True)  # does not let go of the interpreter's lock
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _number(index: int) -> int:
    machine = os.uname().machine
    if machine not in _NUMBERS:
        raise OSError(f"no system-call numbers for {machine}; there are for {', '.join(_NUMBERS)}")
    return _NUMBERS[machine][index]


def fork() -> int:
    """Fork without the hooks of `os.fork`, in a process of one thread; returns 0 in the child.

    They renew locks of threads that are not there, and copy sixty pages for it. A child needs `random.seed()`.
    """
    return _checked(_libc_holding.fork(), "fork")


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (`CLONE_NEW…`)."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """Enter the namespace that `fd` is."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """Mount `source` at `target`."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        None if fstype is None else fstype.encode(),
        ctypes.c_ulong(flags),
        None if data is None else data.encode(),
    )
    _checked(result, f"mount {fstype or source} at {target}")


def unmount(target: str) -> None:
    """Unmount `target` now, and for processes that still use it when they stop."""
    _checked(_libc.umount2(target.encode(), ctypes.c_int(_MNT_DETACH)), f"umount {target}")


def pivot_root(new_root: str) -> None:
    """Make `new_root` the root and unmount the old one."""
    os.chdir(new_root)
    _checked(_libc.syscall(ctypes.c_long(_number(0)), b".", b"."), "pivot_root")
    unmount(".")
    os.chdir("/")


def _prctl(option: int, *args: int) -> None:
    _checked(_libc.prctl(option, *(*args, 0, 0, 0, 0)[:4]), "prctl")


def set_parent_death_signal(signal: int) -> None:
    """Have the kernel send `signal` to this process when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal)


def set_dumpable() -> None:
    """Open /proc/self to this process itself where a change of its uid has closed it."""
    _prctl(_PR_SET_DUMPABLE, 1)


def set_undumpable() -> None:
    """Close /proc/<pid> and ptrace to processes of the same uid."""
    _prctl(_PR_SET_DUMPABLE, 0)


def advise(ranges: array.array[int], advice: int) -> None:
    """Give `advice` (`MADV_…`) about memory of this process: pairs of address and length. Needs Linux 6.13."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        address, items = ranges.buffer_info()
        _checked(
            _libc.syscall(
                ctypes.c_long(_SYS_PROCESS_MADVISE),
                ctypes.c_int(pidfd),
                ctypes.c_void_p(address),
                ctypes.c_size_t(items // 2),
                ctypes.c_int(advice),
                ctypes.c_uint(0),
            ),
            "process_madvise",
        )
    finally:
        os.close(pidfd)


def set_no_new_privileges() -> None:
    """Make exec unable to gain anything; asked for by seccomp and Landlock."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Make every capability unreachable for an exec. Nothing happens without CAP_SETPCAP."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # past the last one, or not allowed: then no_new_privs alone holds
            return


def drop_capabilities() -> None:
    """Give up every capability of this thread."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    _checked(_libc.syscall(ctypes.c_long(_number(1)), header, bytes(24)), "capset")


class SeccompFilter:
    """A BPF program (an array of sock_filter) that can be put around processes. Needs no_new_privs."""

    def __init__(self, program: bytes) -> None:
        self._program = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(self._program))
        self._header = ctypes.create_string_buffer(header)
        self._address = ctypes.addressof(self._header)

    def load(self) -> None:
        """Put this thread, and what it starts, under it."""
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._address)


# --- Landlock ------------------------------------------------------------------------------------

LANDLOCK_READ_FILE = 1 << 2
LANDLOCK_READ_DIR = 1 << 3
# Read and write files, list, make and remove files and folders, truncate (ABI 3).
_LANDLOCK_WRITE = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14
# All rights that each ABI version knows: an unknown bit is refused by the kernel.
_LANDLOCK_FS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_LANDLOCK_NET = 0b11  # bind and connect of TCP, ABI 4
_LANDLOCK_SCOPES = 0b11  # abstract unix sockets and signals stay inside, ABI 6


def landlock_abi() -> int:
    """Return the version of Landlock that the kernel has, 0 for none."""
    version = _libc.syscall(
        ctypes.c_long(_SYS_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1)
    )
    return max(0, int(version))


def landlock(readable: Iterable[str], writable: Iterable[str] = ()) -> int:
    """Forbid this process all of the file system but reading below `readable`, TCP, and signals to outside.

    Below `writable` it may also write, make and remove files and folders.

    Needs no_new_privs. Returns the ABI version that was used; 0 means that nothing was done.
    """
    ruleset = landlock_ruleset(readable, writable)
    if ruleset is None:
        return 0
    try:
        landlock_restrict(ruleset)
    finally:
        os.close(ruleset)
    return landlock_abi()


def landlock_restrict(ruleset: int) -> None:
    """Forbid this process all that `ruleset` does not allow. Needs no_new_privs."""
    _landlock_call(_SYS_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))


def landlock_ruleset(readable: Iterable[str], writable: Iterable[str] = ()) -> int | None:
    """Return a descriptor of what `landlock` forbids, to be closed; None where the kernel has no Landlock."""
    abi = landlock_abi()
    if abi == 0:
        return None
    attributes = struct.pack(
        "QQQ",
        _LANDLOCK_FS[min(abi, 5)],
        _LANDLOCK_NET if abi >= 4 else 0,
        _LANDLOCK_SCOPES if abi >= 6 else 0,
    )
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _landlock_call(
        _SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    try:
        for path in readable:
            _allow_below(ruleset, path, LANDLOCK_READ_FILE | LANDLOCK_READ_DIR)
        for path in writable:
            _allow_below(ruleset, path, _LANDLOCK_WRITE & _LANDLOCK_FS[min(abi, 5)])
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow_below(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, fd)
        _landlock_call(
            _SYS_LANDLOCK_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0)
        )
    finally:
        os.close(fd)


def _landlock_call(number: int, *args: object) -> int:
    return _checked(int(_libc.syscall(ctypes.c_long(number), *args)), "landlock")
