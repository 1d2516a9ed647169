"""The filter's program, run by a BPF interpreter of ten lines: for architectures that this machine is not, too."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from dynflow.isolates.seccomp import isolate_filter

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decide(machine: str, number: int, *args: int, arch: int | None = None) -> int:
    """Return what the filter answers to a system call."""
    data = struct.pack(
        "=IIQ6Q", number, ARCH[machine] if arch is None else arch, 0, *(*args, 0, 0, 0, 0, 0, 0)[:6]
    )
    program = list(struct.iter_unpack("HBBI", isolate_filter(machine)))
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return int(value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[
                code
            ]
            at += if_true if holds else if_false


@pytest.mark.parametrize(
    ("machine", "read", "socket", "execve"), [("x86_64", 0, 41, 59), ("aarch64", 63, 198, 221)]
)
def test_reading_is_answered_and_sockets_and_programs_are_not(
    machine: str, read: int, socket: int, execve: int
) -> None:
    assert decide(machine, read) == ALLOW
    assert decide(machine, socket) == EPERM
    assert decide(machine, execve) == EPERM
    assert decide(machine, 435) == ENOSYS  # clone3
    assert decide(machine, 10_000) == EPERM


@pytest.mark.parametrize(("machine", "mmap", "mprotect"), [("x86_64", 9, 10), ("aarch64", 222, 226)])
def test_memory_is_never_executable(machine: str, mmap: int, mprotect: int) -> None:
    for number in (mmap, mprotect):
        assert decide(machine, number, 0, 4096, 3) == ALLOW
        for protection in (4, 5, 7):
            assert decide(machine, number, 0, 4096, protection) == EPERM


@pytest.mark.parametrize(("machine", "openat", "prlimit"), [("x86_64", 257, 302), ("aarch64", 56, 261)])
def test_files_are_opened_for_reading_and_limits_set_for_oneself_only(
    machine: str, openat: int, prlimit: int
) -> None:
    assert decide(machine, openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_TMPFILE):
        assert decide(machine, openat, 0, 0, flags) == EPERM
    assert decide(machine, prlimit, 0) == ALLOW
    assert decide(machine, prlimit, 1) == EPERM


def test_calls_of_other_architectures_kill() -> None:
    assert decide("x86_64", 0, arch=0x40000003) == KILL  # i386
    assert decide("x86_64", 0x40000000) == KILL  # x32
    assert decide("aarch64", 63, arch=0x40000028) == KILL  # arm


def test_an_unknown_architecture_has_no_filter() -> None:
    with pytest.raises(OSError, match="no system-call filter for riscv64"):
        isolate_filter("riscv64")
