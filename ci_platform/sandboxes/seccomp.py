"""The system calls that a command in an isolate sandbox may not make, as a seccomp program. Stdlib only.

Builds need most of Linux, so the list names what they do not need and what has no other wall. What is newer
than the list is answered with ENOSYS, as on an older kernel.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24

_NEW_NAMESPACES = 0x7E02_0000
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}: inside a user namespace a process has every capability over
much kernel code that expects root."""

_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK (getifaddrs). Not AF_VSOCK: it is not namespaced and reaches the
hypervisor; not AF_ALG, AF_PACKET, AF_XDP and the rest, for the bugs that lived there."""

_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
"""Typing into a terminal that somebody else reads."""

_NEWEST = 463
"""The first number that this list does not judge (Linux 6.12). Numbers above 424 are the same everywhere."""

_EVERYWHERE = {
    "io_uring_setup": 425,  # a second way to most calls, which no filter sees
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,  # mounts
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "quotactl_fd": 443,
}
_BY_MACHINE: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000_003E,
        {
            "mount": 165,
            "umount2": 166,
            "pivot_root": 155,
            "chroot": 161,
            "setns": 308,
            "unshare": 272,
            "keyctl": 250,  # keyrings belong to the user, not to a namespace
            "add_key": 248,
            "request_key": 249,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,  # stops the kernel in the middle of a copy
            "kexec_load": 246,
            "kexec_file_load": 320,
            "init_module": 175,
            "finit_module": 313,
            "delete_module": 176,
            "reboot": 169,
            "swapon": 167,
            "swapoff": 168,
            "acct": 163,
            "quotactl": 179,
            "settimeofday": 164,
            "clock_settime": 227,
            "clock_adjtime": 305,
            "adjtimex": 159,
            "syslog": 103,
            "iopl": 172,
            "ioperm": 173,
            "modify_ldt": 154,
            "vhangup": 153,
            "open_by_handle_at": 304,
            "fanotify_init": 300,
            "lookup_dcookie": 212,
            "uselib": 134,
            "sysfs": 139,
            "_sysctl": 156,
            "nfsservctl": 180,
        },
    ),
    "aarch64": (
        0xC000_00B7,
        {
            "mount": 40,
            "umount2": 39,
            "pivot_root": 41,
            "chroot": 51,
            "setns": 268,
            "unshare": 97,
            "keyctl": 219,
            "add_key": 217,
            "request_key": 218,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "kexec_load": 104,
            "kexec_file_load": 294,
            "init_module": 105,
            "finit_module": 273,
            "delete_module": 106,
            "reboot": 142,
            "swapon": 224,
            "swapoff": 225,
            "acct": 89,
            "quotactl": 60,
            "settimeofday": 170,
            "clock_settime": 112,
            "clock_adjtime": 266,
            "adjtimex": 171,
            "syslog": 116,
            "vhangup": 58,
            "open_by_handle_at": 265,
            "fanotify_init": 262,
            "lookup_dcookie": 18,
            "nfsservctl": 42,
        },
    ),
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_CLONE3 = 435
_X32_BIT = 0x4000_0000


def supported() -> bool:
    """Whether there is a list for this machine."""
    return platform.machine() in _BY_MACHINE


def program() -> bytes:
    """Return the seccomp program for this machine, which must be `supported`."""
    machine = platform.machine()
    architecture, numbers = _BY_MACHINE[machine]
    nosys, refused = _ERRNO | errno.ENOSYS, _ERRNO | errno.EPERM
    code = [
        *_load(_ARCHITECTURE),
        _instruction(_JUMP_EQUAL, architecture, 1, 0),
        # Another architecture's numbers mean other calls; glibc of this machine never gets here.
        _instruction(_RETURN, _KILL),
        *_load(_NUMBER),
        _instruction(_JUMP_GREATER_EQUAL, _X32_BIT, 0, 1),
        _instruction(_RETURN, nosys),
        # clone3 hides its flags behind a pointer; libc falls back to clone.
        *_if_number(_CLONE3, [_instruction(_RETURN, nosys)]),
    ]
    for number in sorted({*_EVERYWHERE.values(), *numbers.values()}):
        code += _if_number(number, [_instruction(_RETURN, refused)])
    code += _if_number(_CLONE[machine], _when_any(_ARGUMENT_0, _NEW_NAMESPACES, refused))
    code += _if_number(_IOCTL[machine], _unless(_ARGUMENT_1, (_TIOCSTI, _TIOCLINUX), _ALLOW, refused))
    no_family = _ERRNO | errno.EAFNOSUPPORT
    for call in (_SOCKET[machine], _SOCKETPAIR[machine]):
        code += _if_number(call, _unless(_ARGUMENT_0, _FAMILIES, no_family, _ALLOW))
    code += [
        _instruction(_JUMP_GREATER_EQUAL, _NEWEST, 0, 1),
        _instruction(_RETURN, nosys),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load(offset: int) -> list[bytes]:
    return [_instruction(_LOAD, offset)]


def _if_number(number: int, then: list[bytes]) -> list[bytes]:
    """Run `then`, which returns, if the loaded call number is `number`."""
    return [_instruction(_JUMP_EQUAL, number, 0, len(then)), *then]


def _when_any(argument: int, bits: int, verdict: int) -> list[bytes]:
    answer = [_instruction(_RETURN, verdict), _instruction(_RETURN, _ALLOW)]
    return [*_load(argument), _instruction(_JUMP_ANY, bits, 0, 1), *answer]


def _unless(argument: int, values: Iterable[int], otherwise: int, verdict: int) -> list[bytes]:
    """Return `verdict` if the argument is one of `values`, else `otherwise`."""
    code = _load(argument)
    for value in values:
        code += [_instruction(_JUMP_EQUAL, value, 0, 1), _instruction(_RETURN, verdict)]
    return [*code, _instruction(_RETURN, otherwise)]
