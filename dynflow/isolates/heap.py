"""Room for children of a fork: what they allocate lies together, and not in the holes of what they share.

A hole of 64 bytes that a child fills copies a page of 4 KiB, which costs 2 µs and counts as its memory. A process that
has imported much has some thousand holes. Stdlib only; runs in the zygote, once.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import resource
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from dynflow.isolates import syscalls

# Allocators of CPython hand out blocks of these sizes from pools, larger ones come from the C library.
_ALIGNMENT, _LARGEST = 16, 512
# Allocations that follow each other in memory: then they come from a pool that nobody has used before.
_IN_A_ROW = 8
_MOST = 100_000
# The largest holes of the C library's heap are worth filling too; it maps still larger blocks on their own.
_LARGEST_HOLE = 64 * 1024


class _Heap(ctypes.Structure):
    """What `mallinfo2` returns."""

    _fields_ = [
        *((f"other{number}", ctypes.c_size_t) for number in range(9)),
        ("at_the_end", ctypes.c_size_t),
    ]


def fill_holes() -> None:
    """Allocate every hole, for good. Does nothing where allocators cannot be asked."""
    allocate = ctypes.pythonapi.PyObject_Malloc
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for size in range(_ALIGNMENT, _LARGEST + 1, _ALIGNMENT):
        _fill_pools(allocate, size)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):  # glibc since 2.33
        _fill_heap(libc)


def _fill_pools(allocate: ctypes._FuncPointer, size: int) -> None:
    last, in_a_row = 0, 0
    for _ in range(_MOST):
        block = allocate(size) or 0
        in_a_row = in_a_row + 1 if block == last + size else 0
        last = block
        if in_a_row == _IN_A_ROW:
            return


def _fill_heap(libc: ctypes.CDLL) -> None:
    libc.mallinfo2.restype = _Heap
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    size = _LARGEST_HOLE
    while size >= _ALIGNMENT:
        for _ in range(_MOST):
            left = libc.mallinfo2().at_the_end
            block = libc.malloc(size)
            if libc.mallinfo2().at_the_end != left:  # from the end of the heap: no such hole is left
                libc.free(block)
                break
        size = size // 2 if size > 2 * _LARGEST else size - _ALIGNMENT


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_MOST_RANGES = 1024  # IOV_MAX
# Documentation/admin-guide/mm/pagemap.rst
_PRESENT, _OF_A_FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56


class Pages:
    """Pages that every fork of this process will write to: copied in one go, before anybody waits for it."""

    def __init__(self, ranges: list[int]) -> None:
        self._ranges = array.array("Q", ranges[: 2 * _MOST_RANGES])

    @staticmethod
    def of(rehearsal: BinaryIO) -> Pages:
        """Return what a rehearsal in a fork has written; none where it could not be done."""
        return Pages(json.loads(rehearsal.read() or b"[]"))

    def claim(self) -> None:
        """Copy them now. Raises OSError."""
        if self._ranges:
            syscalls.advise(self._ranges, _POPULATE_WRITE)


class Rehearsal:
    """In a fork: notes the pages of those that it shares that it touches from now on. `proc` is a folder, `/proc`."""

    def __init__(self, proc: int, report: int) -> None:
        syscalls.set_dumpable()  # else /proc/self is root's
        self._report = report
        with open(os.open("self/maps", os.O_RDONLY, dir_fd=proc)) as file:  # noqa: PTH123 - below a descriptor
            self._mappings = list(_writable(file))
        self._pagemap = os.open("self/pagemap", os.O_RDONLY, dir_fd=proc)
        for _ in range(2):  # what looking itself takes is not counted
            self._before = self._look()

    def end(self) -> None:
        """Tell the pages."""
        written: list[int] = []
        page = resource.getpagesize()
        for (start, _), before, after in zip(self._mappings, self._before, self._look(), strict=True):
            for number, (was, now) in enumerate(zip(before, after, strict=True)):
                # Not what is new: the next fork allocates elsewhere.
                if was & now & _PRESENT and now & _EXCLUSIVE and not (was & _EXCLUSIVE or now & _OF_A_FILE):
                    _add(written, start + number * page, page)
        Pages(written).claim()  # where that cannot be done, nobody shall try again
        with open(self._report, "wb") as file:  # noqa: PTH123 - a pipe has no path
            file.write(json.dumps(written).encode())

    def _look(self) -> list[array.array[int]]:
        page = resource.getpagesize()
        found = []
        for start, end in self._mappings:
            entries = array.array("Q")
            entries.frombytes(os.pread(self._pagemap, (end - start) // page * 8, start // page * 8))
            found.append(entries)
        return found


def _add(ranges: list[int], address: int, size: int) -> None:
    """Add to (address, length) pairs, one after the other."""
    if ranges and ranges[-2] + ranges[-1] == address:
        ranges[-1] += size
    else:
        ranges += [address, size]


def _writable(maps: Iterable[str]) -> Iterator[tuple[int, int]]:
    for line in maps:
        where, rights, *_ = line.split()
        start, _, end = where.partition("-")
        if rights.startswith("rw"):
            yield int(start, 16), int(end, 16)
