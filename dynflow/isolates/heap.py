"""Room for children of a fork: what they allocate lies together, and not in the holes of what they share.

A hole of 64 bytes that a child fills copies a page of 4 KiB, which costs 2 µs and counts as its memory. A process that
has imported much has some thousand holes. Stdlib only; runs in the zygote, once.
"""

from __future__ import annotations

import ctypes

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
