#!/usr/bin/env python3
"""Kill the platform at random moments, again and again, and check that nothing is lost, repeated or left.

Usage: .venv/bin/python scripts/fuzz_kills.py [--rounds N] [--kills N] [--seed N]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.scenarios.github_server import serve_github
from tests.scenarios.kill_fuzz import Fuzz


def main() -> None:
    """Run rounds, each with a seed of its own that is printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--repositories", type=int, default=3)
    parser.add_argument("--pushes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    for seed in range(given.seed, given.seed + given.rounds):
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="tmp.fuzz-") as folder, serve_github() as github:
            fuzz = Fuzz(Path(folder), github, seed=seed, repositories=given.repositories, pushes=given.pushes)
            try:
                fuzz.run(given.kills)
            finally:
                fuzz.end()
        took = time.monotonic() - started
        print(f"seed {seed}: {given.kills} kills, {len(fuzz.wanted)} runs, {took:.0f} s: ok", flush=True)


if __name__ == "__main__":
    main()
