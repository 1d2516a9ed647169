"""The system calls that an isolate may make, as a BPF program. Everything else answers EPERM.

Written by hand rather than through libseccomp: an allowlist of sixty numbers and five argument checks is
forty lines, and a library would have to be present where isolates are started. Numbers are those of Linux'
`asm/unistd_64.h` (x86_64) and `asm-generic/unistd.h` (aarch64). Stdlib only.
"""

from __future__ import annotations

import errno
import os
import struct

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_…, column below
_X32_BIT = 0x40000000

# What CPython needs to run code that only computes, reads its standard library, and talks on one socket.
# No socket(), no exec, no fork, no thread, no signal to anybody, no wait, no epoll, no pipe, no memfd.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "stat": (4, None),
    "lstat": (6, None),
    "statx": (332, 291),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    "futex": (202, 98),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getrandom": (318, 278),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getrusage": (98, 165),
    "times": (100, 153),
    "uname": (63, 160),
    "restart_syscall": (219, 128),
    "poll": (7, None),
    "ppoll": (271, 73),
    "recvfrom": (45, 207),  # on the one socket there is
    "sendto": (44, 206),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),  # without CAP_SYS_RESOURCE limits only go down
}
_MMAP, _MPROTECT, _OPENAT, _PRLIMIT, _CLONE3 = (9, 222), (10, 226), (257, 56), (302, 261), (435, 435)

_PROT_EXEC = 4
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)

# Offsets in struct seccomp_data; arguments are read by their low 32 bits (little endian on both architectures).
_NR, _ARCH, _ARGS = 0, 4, 16

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_LOAD, _RETURN = 0x20, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_RET|BPF_K
_JUMP_EQUAL, _JUMP_NOT_LESS, _JUMP_ANY_BIT = 0x15, 0x35, 0x45


def _errno(number: int) -> int:
    return 0x00050000 | number


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _load(offset: int) -> bytes:
    return _instruction(_LOAD, offset)


def _return(value: int) -> bytes:
    return _instruction(_RETURN, value)


def _unless_bits(number: int, argument: int, bits: int) -> bytes:
    """Allow the call `number` where `argument` has none of `bits`."""
    return b"".join(
        [
            _instruction(_JUMP_EQUAL, number, 0, 4),
            _load(_ARGS + 8 * argument),
            _instruction(_JUMP_ANY_BIT, bits, 1, 0),
            _return(_ALLOW),
            _return(_errno(errno.EPERM)),
        ]
    )


def isolate_filter(machine: str | None = None) -> bytes:
    """Return the program for `machine` (None: this one). Raises OSError for an architecture it does not know."""
    machine = machine or os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(f"there is no system-call filter for {machine}, only for {', '.join(_ARCHITECTURES)}")
    arch, column = _ARCHITECTURES[machine]
    program = [
        _load(_ARCH),
        _instruction(_JUMP_EQUAL, arch, 1, 0),
        _return(_KILL),  # 32-bit calls have other numbers
        _load(_NR),
        _instruction(_JUMP_NOT_LESS, _X32_BIT, 0, 1),
        _return(_KILL),
    ]
    for numbers in _ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += [_instruction(_JUMP_EQUAL, number, 0, 1), _return(_ALLOW)]
    program += [
        _unless_bits(_MMAP[column], 2, _PROT_EXEC),
        _unless_bits(_MPROTECT[column], 2, _PROT_EXEC),
        _unless_bits(_OPENAT[column], 2, _WRITING),
        _unless_bits(_PRLIMIT[column], 0, 0xFFFFFFFF),  # only of itself
        # glibc then falls back to clone, which is refused.
        _instruction(_JUMP_EQUAL, _CLONE3[column], 0, 1),
        _return(_errno(errno.ENOSYS)),
        _return(_errno(errno.EPERM)),
    ]
    return b"".join(program)
