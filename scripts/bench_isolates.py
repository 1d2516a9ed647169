"""How fast isolates start and answer: `python scripts/bench_isolates.py [--rounds N]`. Milliseconds.

A sample begins when the host calls `fetch` and ends when the answer is there: fork and walls (cold), the tenant's
source sent, compiled and run, one call of a capability, and the way back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable

from dynflow.isolates import Capability, ProcessLoader, TrustedLoader, WorkerCode, WorkerLoader

TENANT = """
from __future__ import annotations

import re
from dataclasses import dataclass

from dynflow import WorkflowEntrypoint


@dataclass
class Point:
    x: int
    y: int


NAME = re.compile(r"[a-z]+")


class Flow(WorkflowEntrypoint):
    async def run(self, event, step):
        return await step.do("one", lambda: Point(1, 2).x)


async def fetch(request, env):
    return await env.ECHO.back(NAME.match(request.json())[0])
"""


class Echo(Capability):
    """Answers at once."""

    async def back(self, text: str) -> str:
        """Return `text`."""
        return text


async def fetch(loader: WorkerLoader, worker_id: str) -> None:
    """Call one worker."""
    code = WorkerCode("index.py", {"index.py": TENANT}, env={"ECHO": Echo()})
    assert await loader.get(worker_id, lambda: code).get_entrypoint().fetch("hello") == "hello"


async def sample(rounds: int, call: Callable[[int], Awaitable[None]], pause: float) -> dict[str, float]:
    """Return p10, median and p95 of `rounds` calls, `pause` seconds apart."""
    times = []
    for number in range(rounds):
        await asyncio.sleep(pause)
        started = time.perf_counter_ns()
        await call(number)
        times.append((time.perf_counter_ns() - started) / 1e6)
    deciles = statistics.quantiles(times, n=20)
    return {
        "p10": round(deciles[1], 2),
        "median": round(statistics.median(times), 2),
        "p95": round(deciles[-1], 2),
    }


async def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return the table: one row per way to get an isolate."""
    table: dict[str, dict[str, float]] = {}
    started = time.perf_counter_ns()
    async with ProcessLoader(ready=0) as loader:
        table["loader start"] = {"median": round((time.perf_counter_ns() - started) / 1e6, 2)}
        table["cold: fork, walls, load, call"] = await sample(rounds, lambda n: fetch(loader, f"c{n}"), 0)
    async with ProcessLoader(ready=0, walls=(), allow_unconfined=True) as loader:
        table["cold, without walls"] = await sample(rounds, lambda n: fetch(loader, f"u{n}"), 0)
    async with ProcessLoader(ready=2) as loader:
        # The pause lets the pool refill: this is the time of a single request, not of a flood.
        table["ready: load, call"] = await sample(rounds, lambda n: fetch(loader, f"r{n}"), 0.02)
        await fetch(loader, "warm")
        table["warm: call"] = await sample(rounds * 5, lambda _: fetch(loader, "warm"), 0)
    async with TrustedLoader() as trusted:
        await fetch(trusted, "t")
        table["trusted, in this process: call"] = await sample(rounds * 5, lambda _: fetch(trusted, "t"), 0)
    return table


async def throughput(seconds: float, at_once: int = 4) -> float:
    """Return isolates started, used and gone per second."""
    done = 0
    async with ProcessLoader(ready=4) as loader:
        end = time.perf_counter() + seconds

        async def client(number: int) -> None:
            nonlocal done
            while time.perf_counter() < end:
                await fetch(loader, f"{number}.{done}")
                done += 1

        await asyncio.gather(*(client(number) for number in range(at_once)))
    return done / seconds


def main() -> None:
    """Print the table, or JSON for `scripts/bench`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table = asyncio.run(measure(arguments.rounds))
    rate = asyncio.run(throughput(3))
    if arguments.json:
        print(json.dumps({"milliseconds": table, "isolates_per_second": round(rate)}))
        return
    print(f"| {'':34} | {'p10':>7} | {'median':>7} | {'p95':>7} |\n|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name:34} | "
            + " | ".join(f"{row.get(key, ''):>7}" for key in ("p10", "median", "p95"))
            + " |"
        )
    print(f"\n{rate:.0f} isolates a second: started, used once, gone")


if __name__ == "__main__":
    main()
