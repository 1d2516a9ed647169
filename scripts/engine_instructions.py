"""Count the instructions of a three-step run in the engine: Python, SQLite and both threads; not the kernel.

On a busy machine seconds say nothing about a change of some percent; instructions do, to about one percent, since
they are counted and not timed. Needs valgrind on the PATH. `--single` is what runs inside of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dynflow.engines.embedded import EmbeddedEngine
from scripts.bench_engine import CALLERS, Three, concurrent

# Python's start and the first runs are the same in both, and cancel out.
_FEW, _MANY = 1, 16


async def _run(each: int) -> None:
    with tempfile.TemporaryDirectory(prefix="dynflow-bench-") as folder:
        engine = EmbeddedEngine(Path(folder) / "runs.db")
        engine.register("three", Three)
        async with engine:
            binding = engine.binding("three")

            async def run() -> None:
                await (await binding.create()).result()

            await concurrent(run, each)


def _instructions(each: int) -> int:
    command = [
        "valgrind", "--tool=cachegrind", "--cache-sim=no", "--fair-sched=yes", "--cachegrind-out-file=/dev/null",
        sys.executable, "-m", "scripts.engine_instructions", "--single", str(each),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stderr.splitlines() if "I refs:" in " ".join(line.split()))
    return int(line.rpartition(":")[2].replace(",", ""))


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--single", type=int, metavar="EACH", help="run so many for each caller, and nothing else"
    )
    each = parser.parse_args().single
    if each is not None:
        asyncio.run(_run(each))
    elif shutil.which("valgrind") is None:
        sys.exit("valgrind is not here: install it (Debian: apt-get install valgrind)")
    else:
        counted = (_instructions(_MANY) - _instructions(_FEW)) // (CALLERS * (_MANY - _FEW))
        print(f"{counted:,} instructions a three-step run, with {CALLERS} callers")


if __name__ == "__main__":
    main()
