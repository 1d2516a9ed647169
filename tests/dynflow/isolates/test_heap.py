"""Holes in the memory of a process that will fork are filled, so that its children allocate side by side."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from dynflow.isolates import heap

SIZES = {"blocks": (100, 120_000, 1_000), "chunks": (2_000, 6_000, 300)}
size, many, some = SIZES[sys.argv[1]]
kept = [bytes(size) for _ in range(many)]
del kept[::2]
if sys.argv[2] == "filled":
    heap.fill_holes()
new = [bytes(size) for _ in range(some)]
print(len({id(each) >> 12 for each in new}))
"""


def _pages(what: str, how: str) -> int:
    """Return on how many pages a process puts what it allocates, after every second block was freed."""
    command = [sys.executable, "-c", _PROGRAM, what, how]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.parametrize(("what", "at_most"), [("blocks", 45), ("chunks", 160)])
def test_what_is_allocated_later_lies_together(what: str, at_most: int) -> None:
    assert _pages(what, "filled") <= at_most < _pages(what, "as it is") * 0.8


_REHEARSAL = """
import os, resource, sys, time
from dynflow.isolates import heap, syscalls

memory = bytearray(400 * 4096)
memory[::4096] = bytes([1]) * 400

def use(step):
    memory[::step * 4096] = bytes([2]) * len(memory[::step * 4096])

reading, writing = os.pipe()
proc = os.open("/proc", os.O_RDONLY)
if syscalls.fork() == 0:
    rehearsal = heap.Rehearsal(proc, writing)
    use(2)
    rehearsal.end()
    os._exit(0)
os.close(writing)
with open(reading, "rb") as file:
    pages = heap.Pages.of(file)
os.wait()
if syscalls.fork() == 0:
    if sys.argv[1] == "claimed":
        pages.claim()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)
os.wait()
"""


def _faults(how: str) -> int:
    command = [sys.executable, "-c", _REHEARSAL, how]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_what_a_fork_has_rehearsed_the_next_one_does_without_page_faults() -> None:
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (6, 13):
        pytest.skip("this kernel takes no advice about many ranges at a time")
    assert _faults("claimed") < 50
    assert _faults("as it is") >= 200
