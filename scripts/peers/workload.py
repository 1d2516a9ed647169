"""The workload that every engine is given, and its measurement. Runs in each peer's own environment.

Only the standard library, since that is all the environments share. `main(Peer)` is what a peer's module calls.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

# Concurrent callers of a throughput figure.
CALLERS = 64
# Seconds that a figure is measured for, and the fewest rounds.
_SECONDS, _ROUNDS = 4.0, 5
# How many instances wait when memory is read.
WAITING = 5_000
# How long it is idle with them, in seconds.
_IDLE = 8.0


class Peer(ABC):
    """An engine with its worker in this process. `settings`: what was set other than the defaults, and why.

    Order of calls: `open`, then any. `server` is where its server listens, if it has one, and `folder` what
    it may write to; both outlive the process in a recovery.
    """

    name: str
    settings: str = "defaults"
    # The two lengths whose difference says what a step costs.
    steps: tuple[int, int] = (10, 110)
    # How many wait; fewer where starting them takes minutes.
    waiting: int = WAITING
    # What the peer cannot do.
    without: frozenset[str] = frozenset()

    def __init__(self, folder: Path, server: str) -> None:
        self.folder, self.server = folder, server
        # How many instances are to be in their step at once, and what each calls there.
        self.interrupted = 0
        self.inside: Callable[[], None] = lambda: None

    @abstractmethod
    async def open(self) -> None:
        """Start the worker. Nothing closes it: the process ends with the measurement."""

    @abstractmethod
    async def create(self) -> None:
        """Store an instance that does not run; returns when that is durable."""

    @abstractmethod
    async def run(self, steps: int) -> None:
        """Create an instance with so many trivial durable steps; returns when its result is here."""

    @abstractmethod
    async def park(self, count: int) -> list[Any]:
        """Start instances of a step, a wait for an event, and a step that returns `time.perf_counter()`."""

    @abstractmethod
    async def wake(self, waiting: Any) -> float:
        """Send the event; returns what the last step returned."""

    async def prepare(self, part: str) -> None:  # noqa: B027 - most have nothing to do
        """Change settings before the measurement of a part."""

    async def block(self) -> None:
        """Start `interrupted` instances that call `inside` in a step and stay there."""
        raise NotImplementedError


def family(processes: list[int | str]) -> list[int | str]:
    """Return processes and what they have started, as it is now: PostgreSQL has one for each connection."""
    found = list(processes)
    for process in found:
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident_mb(processes: list[int | str]) -> float:
    """Return the memory of processes in MB (10^6 bytes); shared pages count in part."""
    gc.collect()
    total = 0
    for process in family(processes):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total / 1e6


def cpu_seconds(processes: list[int | str]) -> float:
    """Return the processor time that processes have used."""
    ticks = 0
    for process in family(processes):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


def say(what: str) -> None:
    """Tell progress."""
    print(f"bench:   {what}", file=sys.stderr, flush=True)


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    """Return the seconds that `work` took."""
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def repeated(work: Callable[[], Awaitable[float]], seconds: float = _SECONDS) -> list[float]:
    """Measure for some seconds, after one round that does not count."""
    await work()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < _ROUNDS or time.perf_counter() < end:
        samples.append(await work())
    return samples


async def throughput(work: Callable[[], Awaitable[None]]) -> float:
    """Return operations a second with concurrent callers: the median of rounds of about a second."""

    async def rate(each: int) -> float:
        async def caller() -> None:
            for _ in range(each):
                await work()

        return CALLERS * each / await timed(lambda: asyncio.gather(*(caller() for _ in range(CALLERS))))

    await rate(1)
    each = max(1, min(50, round(await rate(1) / CALLERS)))
    return statistics.median([await rate(each) for _ in range(_ROUNDS)])


def milliseconds(name: str, samples: list[float]) -> dict[str, float]:
    """Return median and 95th percentile of seconds as milliseconds."""
    ordered = sorted(samples)
    return {
        f"{name}_p50_ms": 1000 * statistics.median(ordered),
        f"{name}_p95_ms": 1000 * ordered[max(0, math.ceil(0.95 * len(ordered)) - 1)],
    }


async def step_cost(peer: Peer) -> float:
    """Return the seconds that one more step adds to a run that is alone."""
    short, long = peer.steps

    async def once() -> float:
        few = await timed(lambda: peer.run(short))
        return (await timed(lambda: peer.run(long)) - few) / (long - short)

    return statistics.median(await repeated(once))


async def waking(peer: Peer) -> list[float]:
    """Return the seconds from sending an event to the next step, one instance at a time."""

    async def once() -> float:
        (waiting,) = await peer.park(1)
        start = time.perf_counter()
        return await peer.wake(waiting) - start

    return await repeated(once)


async def holding(peer: Peer, servers: list[int | str]) -> dict[str, float]:
    """Return what waiting instances cost while nothing happens, here and in the server."""
    here: list[int | str] = ["self"]
    before, server_before = resident_mb(here), resident_mb(servers)
    seconds = await timed(lambda: peer.park(peer.waiting))
    await asyncio.sleep(2)
    start, cpu, server_cpu = time.perf_counter(), cpu_seconds(here), cpu_seconds(servers)
    await asyncio.sleep(_IDLE)
    idle = time.perf_counter() - start
    figures = {
        "waiting": peer.waiting,
        "waiting_made_s": seconds,
        "waiting_mb": resident_mb(here) - before,
        "idle_percent": 100 * (cpu_seconds(here) - cpu) / idle,
    }
    if servers:
        figures["server_mb"] = resident_mb(servers)
        figures["server_waiting_mb"] = figures["server_mb"] - server_before
        figures["server_idle_percent"] = 100 * (cpu_seconds(servers) - server_cpu) / idle
    return figures


async def measure(peer: Peer, servers: list[int | str]) -> dict[str, Any]:
    """Return all figures of a peer. Creations come last: what they leave queued is in nobody's way then."""

    async def alone() -> dict[str, float]:
        return milliseconds("alone", await repeated(lambda: timed(lambda: peer.run(3))))

    async def steps() -> dict[str, float]:
        return {"step_ms": 1000 * await step_cost(peer)}

    async def company() -> dict[str, float]:
        return {"runs_per_second": await throughput(lambda: peer.run(3))}

    async def wake() -> dict[str, float]:
        return milliseconds("wake", await waking(peer))

    async def create() -> dict[str, float]:
        return {"create_per_second": await throughput(peer.create)}

    parts: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "alone": alone,
        "steps": steps,
        "runs": company,
        "wake": wake,
        "waiting": lambda: holding(peer, servers),
        "create": create,
    }
    figures: dict[str, Any] = {}
    for part, work in parts.items():
        if part not in peer.without:
            say(part)
            await peer.prepare(part)
            figures |= await work()
    return figures


async def interrupted(peer: Peer, again: float) -> None:
    """Have instances in a step, say so, and stay there until killed. `again`: when the process that goes on started."""
    all_inside, left = asyncio.Event(), peer.interrupted
    loop = asyncio.get_running_loop()

    def inside() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            loop.call_soon_threadsafe(all_inside.set)

    peer.inside = inside
    await peer.open()
    if not again:
        await peer.block()
    await all_inside.wait()
    print(json.dumps({"recovered_s": time.monotonic() - again}), flush=True)
    await asyncio.Event().wait()


def main(make: Callable[[Path, str], Peer]) -> None:
    """Measure one peer and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server", default="")
    parser.add_argument("--processes", type=int, nargs="*", default=[])
    parser.add_argument("--interrupted", type=int, default=0)
    parser.add_argument("--again", type=float, default=0)
    given = parser.parse_args()

    async def run() -> None:
        peer = make(given.folder, given.server)
        peer.interrupted = given.interrupted
        if given.interrupted:
            await interrupted(peer, given.again)
            return
        await peer.open()
        figures = await measure(peer, given.processes)
        print(json.dumps({"name": peer.name, "settings": peer.settings} | figures), flush=True)
        os._exit(0)  # thousands of waiting coroutines end slowly and loudly elsewhere

    asyncio.run(run())
