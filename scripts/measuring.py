"""What benchmarks share: durations, figures of this process, summaries, tables."""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Timings = defaultdict[str, list[float]]
"""Durations in milliseconds, by what took them."""


@contextmanager
def timed(timings: Timings, name: str) -> Iterator[None]:
    """Add the duration of the block."""
    started = time.perf_counter()
    yield
    timings[name].append((time.perf_counter() - started) * 1000)


def resident_mb() -> float:
    """Return the resident memory of this process in MB (10^6 bytes), after a collection."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no VmRSS")


def wake_ups() -> int:
    """Return how often the threads of this process have gone to sleep: each time, something had woken them."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                total += int(line.split()[1])
    return total


def held() -> dict[str, int]:
    """Return how many threads and descriptors this process has."""
    return {
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) - 1,  # less the one that lists them
    }


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of every figure over rounds that have the same figures."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def say(what: str) -> None:
    """Tell progress on the standard error."""
    print(f"bench: {what}", file=sys.stderr, flush=True)


def ask(command: Sequence[str | Path], **options: Any) -> Any:
    """Run a process that prints one JSON value as its last line; returns that."""
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, **options
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns after the first are numbers."""
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float | None) -> str:
    """Return three significant digits, or all of a large whole number; a dash for what was not measured."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
