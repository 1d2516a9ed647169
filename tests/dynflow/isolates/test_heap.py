"""Holes in the memory of a process that will fork are filled, so that its children allocate side by side."""

from __future__ import annotations

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
