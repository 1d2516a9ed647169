"""How fast isolates start and answer, what they weigh, and others beside them: `python scripts/bench_isolates.py`.

A sample begins when the host calls `fetch` and ends when the answer is there: fork and walls (cold), the tenant's
hundred lines sent, compiled and run, one call of a capability, and the way back. Ways take turns, so that a busy
moment of the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dynflow.isolates import Capability, ProcessLoader, TrustedLoader, WorkerCode, WorkerLoader
from scripts.isolate_costs import where
from scripts.isolate_peers import peers
from scripts.measuring import percentile, resident_mb, say

TENANT = """
from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from datetime import timedelta

from dynflow import NonRetryableError, WorkerEntrypoint, WorkflowEntrypoint


@dataclass
class Point:
    x: int
    y: int

    def moved(self, by):
        return Point(self.x + by, self.y + by)


@dataclass
class Order:
    id: str
    lines: list = field(default_factory=list)
    paid: bool = False

    @property
    def total(self):
        return sum(line["price"] * line["count"] for line in self.lines)

    def add(self, name, price, count=1):
        self.lines.append({"name": name, "price": price, "count": count})
        return self


NAME = re.compile(r"[a-z]+")
WAIT = timedelta(hours=24)
PRICES = {"tea": 3, "coffee": 4, "cake": 5}


class PaymentError(NonRetryableError):
    pass


def parse(text):
    found = NAME.match(text)
    if found is None:
        raise ValueError(f"not a name: {text!r}")
    return found[0]


def order_of(payload):
    order = Order(payload["id"])
    for name in payload.get("items", ()):
        if name not in PRICES:
            raise PaymentError(f"we have no {name}")
        order.add(name, PRICES[name])
    return order


class Flow(WorkflowEntrypoint):
    async def run(self, event, step):
        order = await step.do("order", lambda: order_of(event.payload).total)
        charges = await asyncio.gather(
            step.do("charge", lambda: {"amount": order}),
            step.do("notify", lambda: f"order of {order}"),
        )
        try:
            paid = await step.wait_for_event("payment", type="paid", timeout=WAIT)
        except TimeoutError:
            return {"paid": False, "charges": charges}
        return {"paid": paid.payload, "charges": charges}


class Shop(WorkerEntrypoint):
    def prices(self):
        return PRICES

    def total(self, payload):
        return order_of(payload).total

    async def start(self, payload):
        instance = await self.env.WORKFLOWS.create(params=payload)
        return {"id": instance.id}


async def fetch(request, env):
    return await env.ECHO.back(parse(request.json()))


def plain(value):
    return value


async def wait(request=None):
    from dynflow.workflow import current_env

    return await current_env.get().ECHO.wait()


def dump(value):
    return json.dumps(value, sort_keys=True)
"""


class Echo(Capability):
    """Answers at once, or when it is told."""

    def __init__(self) -> None:
        self.go_on, self.all_wait = asyncio.Event(), asyncio.Event()
        self.waiting = self.expected = 0

    async def back(self, text: str) -> str:
        """Return `text`."""
        return text

    async def wait(self) -> None:
        """Return when it is told."""
        self.waiting += 1
        if self.waiting == self.expected:
            self.all_wait.set()
        await self.go_on.wait()


SMALL = """
async def wait():
    from dynflow.workflow import current_env

    return await current_env.get().ECHO.wait()


def plain(value):
    return value
"""


def code(echo: Echo | None = None, source: str = TENANT) -> WorkerCode:
    """Return a tenant's code."""
    return WorkerCode("index.py", {"index.py": source}, env={"ECHO": echo or Echo()})


async def fetch(loader: WorkerLoader, worker_id: str) -> None:
    """Call one worker."""
    assert await loader.get(worker_id, code).get_entrypoint().fetch("hello") == "hello"


Way = Callable[[int], Awaitable[None]]


async def in_a_row(way: Way, rounds: int) -> list[float]:
    """Return milliseconds of `rounds` calls, one after the other."""
    times = []
    for number in range(rounds):
        started = time.perf_counter_ns()
        await way(number)
        times.append((time.perf_counter_ns() - started) / 1e6)
    return times


async def in_turns(ways: dict[str, Way], rounds: int, pause: float = 0.02) -> dict[str, list[float]]:
    """Return milliseconds of `rounds` calls of each way. The pause lets pools refill: single requests, no flood."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            await asyncio.sleep(pause)
            started = time.perf_counter_ns()
            await way(number)
            times[name].append((time.perf_counter_ns() - started) / 1e6)
    return times


def row(name: str, times: list[float]) -> str:
    """Return a line of the table."""
    figures = (percentile(times, 10), statistics.median(times), percentile(times, 95))
    return f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + f" | {len(times)} |"


async def latencies(rounds: int, beside: int) -> None:
    """Print the table of latencies, ours and others'."""
    print("| From request to answer, milliseconds | p10 | median | p95 | n |\n|---|--:|--:|--:|--:|")
    async with (
        ProcessLoader(ready=0, warm=0) as cold,
        ProcessLoader(ready=0, warm=0, walls=(), allow_unconfined=True) as bare,
        ProcessLoader(ready=2, warm=1) as ready,
        ProcessLoader(ready=0) as warm,
        TrustedLoader() as trusted,
    ):
        await fetch(warm, "warm")
        entrypoint = warm.get("warm", code).get_entrypoint()

        async def plain(_: int) -> None:
            await entrypoint.call("plain", 1)

        ours: dict[str, Way] = {
            "isolate, cold: fork, walls, load, call": lambda n: fetch(cold, f"c{n}"),
            "isolate, cold, without walls": lambda n: fetch(bare, f"u{n}"),
            "isolate, from the pool: load, call": lambda n: fetch(ready, f"r{n}"),
        }
        again: dict[str, Way] = {
            "isolate, warm: next call": plain,
            "isolate, warm: next call, which calls a binding": lambda _: fetch(warm, "warm"),
            "trusted, in this process: next call": lambda _: fetch(trusted, "t"),
        }
        say("latencies")
        await in_turns(ours, 10)
        for name, times in (await in_turns(ours, rounds)).items():
            print(row(name, times))
        for name, way in again.items():
            await in_a_row(way, 50)
            print(row(name, await in_a_row(way, rounds * 5)))
        with peers(TENANT) as (found, missing):

            def once(peer: object) -> Way:
                async def way(_: int) -> None:
                    peer.once()  # type: ignore[attr-defined]  # a Peer

                return way

            ways = {"isolate, cold, beside these": ours["isolate, cold: fork, walls, load, call"]}
            ways |= {peer.name: once(peer) for peer in found}
            say(f"beside {', '.join(ways)}")
            await in_turns(ways, 2)
            for name, times in (await in_turns(ways, beside)).items():
                print(row(name, times))
            for what in missing:
                print(f"| *{what}* | | | | |")


async def throughput(seconds: float, source: str, at_once: int = 4) -> float:
    """Return isolates started, used and gone per second."""
    done = 0
    async with ProcessLoader(ready=4, warm=0) as loader:
        end = time.perf_counter() + seconds

        async def client() -> None:
            nonlocal done
            while time.perf_counter() < end:
                await loader.load(code(source=source)).get_entrypoint().call("plain", 1)
                done += 1

        await asyncio.gather(*(client() for _ in range(at_once)))
    return done / seconds


async def memory(count: int, source: str) -> tuple[float, float]:
    """Return the median private memory of `count` isolates that wait, and the zygote's resident memory, in MB."""
    echo = Echo()
    echo.expected = count
    async with ProcessLoader(ready=0) as loader:
        calls = [
            asyncio.ensure_future(
                loader.get(f"m{n}", lambda: code(echo, source)).get_entrypoint().call("wait")
            )
            for n in range(count)
        ]
        await echo.all_wait.wait()
        zygote = psutil.Process().children()[0].children()[0]
        uss = [child.memory_full_info().uss / 1e6 for child in zygote.children()]
        resident = zygote.memory_info().rss / 1e6
        echo.go_on.set()
        await asyncio.gather(*calls)
    return statistics.median(uss), resident


async def tenants(count: int, calls: int) -> tuple[float, float, float]:
    """Register `count` tenants; call some at random, and some of a hundred others, in turns.

    Returns both medians in milliseconds, and by how many MB this process grew.
    """
    async with ProcessLoader(ready=0, warm=0) as many, ProcessLoader(ready=0, warm=0) as few:
        for n in range(100):
            await fetch(few, f"t{n}")
            await fetch(many, f"first{n}")
        before = resident_mb()
        for n in range(count):
            many.get(f"t{n}", code)
        chosen = random.Random(1)
        ways: dict[str, Way] = {
            "few": lambda _: fetch(few, f"t{chosen.randrange(100)}"),
            "many": lambda _: fetch(many, f"t{chosen.randrange(count)}"),
        }
        times = await in_turns(ways, calls, pause=0)
        grown = resident_mb() - before
    return statistics.median(times["few"]), statistics.median(times["many"]), grown


async def figures(many: int, calls: int) -> None:
    """Print the figures that are no latencies."""
    say("throughput")
    rate, slower = await throughput(5, SMALL), await throughput(5, TENANT)
    say("memory")
    small, zygote = await memory(100, SMALL)
    large, _ = await memory(100, TENANT)
    print(
        f"\n- {rate:.0f} isolates a second with a small tenant, {slower:.0f} with the hundred lines: started, fully"
    )
    print("  confined, used once, gone; four at a time")
    print(
        f"- {small:.2f} MB private memory (USS) of an idle isolate with a small tenant, {large:.2f} MB with the"
    )
    print(f"  hundred lines, medians of 100; their zygote has {zygote:.0f} MB")
    say("where it goes")
    await where(fetch, TENANT, 50)
    say("tenants")
    few, median, grown = await tenants(many, calls)
    print(
        f"- {many:,} tenants, {calls:,} cold calls at random: median {median:.2f} ms ({few:.2f} ms with 100"
    )
    print(f"  tenants, {median / few:.2f} times), and this process grew by {grown:.1f} MB")


def main() -> None:
    """Print the tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--beside", type=int, default=30, help="rounds of the peers")
    parser.add_argument("--tenants", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=1_000)
    arguments = parser.parse_args()
    asyncio.run(latencies(arguments.rounds, arguments.beside))
    asyncio.run(figures(arguments.tenants, arguments.calls))


if __name__ == "__main__":
    main()
