#!/usr/bin/env python3
"""Send hostile bytes to the host's side of the wire for a while, and check that it never hangs, crashes or grows.

Usage: .venv/bin/python scripts/fuzz_wire.py [--seconds N] [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.security.wire_fuzz import one_case

# What the process may take more at the end than after the first cases: allocators keep some.
_MOST_GROWTH = 20 << 20
_WARM_UP = 3_000


def main() -> None:
    """Run cases, each with a seed of its own; a failure names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    given = parser.parse_args()
    asyncio.run(_fuzz(given.seconds, given.seed))


async def _fuzz(seconds: float, seed: int) -> None:
    ended: Counter[str] = Counter()
    until = time.monotonic() + seconds
    first = before = told = 0
    slowest = 0.0
    for number in range(seed, sys.maxsize):
        started = time.perf_counter()
        try:
            ended[await one_case(number)] += 1
        except BaseException:
            print(f"FAILED with the seed {number}", flush=True)
            raise
        slowest = max(slowest, time.perf_counter() - started)
        if number - seed == _WARM_UP:
            before, first = _memory(), number
        if time.monotonic() > until:
            break
        if number - seed >= told + 20_000:
            told = number - seed
            print(f"{told:,} cases, {_memory() / 1e6:.1f} MB", flush=True)
    grown = _memory() - before if first else 0
    print(
        f"seed {seed}: {sum(ended.values()):,} cases, {dict(ended)}, "
        f"slowest {slowest:.2f} s, grown by {grown / 1e6:.1f} MB: {'ok' if grown < _MOST_GROWTH else 'GROWS'}"
    )
    if grown >= _MOST_GROWTH:
        sys.exit(1)


def _memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
