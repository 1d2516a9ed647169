"""One process of scripts/bench_scale.py: makes waiting instances, or opens a file that has them and measures.

Prints one JSON object. The engine is reached through its public interface alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dynflow.binding import WorkflowBinding, WorkflowInstance
from dynflow.engines import InstanceRef
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.types import HistoryEvent
from dynflow.workflow import WorkflowEntrypoint
from scripts import bench_engine
from scripts.measuring import held, percentile, resident_mb, wake_ups

# Instances of one tenant; a batch is of one tenant.
_EACH = 100
# How many batches are created at a time: enough to fill the writer's groups.
_MAKERS = 4
# Every so manieth instance may be woken by a measurement; its id is noted beside the file.
_NOTED = 20
# Instances that run and end before an empty engine's memory is read: what every process loads and keeps anyway.
_WARM_UP = 100
# How many of the instances that it made a process wakes again.
_HANDFUL = 5
# Seconds of processor time in a second, below which an engine is idle: the bar.
_QUIET = 0.01
# More than the instances of a recovery, so that none of them queues.
_CONCURRENCY = 2000


class Waits(WorkflowEntrypoint):
    """A step, a wait for an event, and a step that says when it ran."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.do("one", lambda: 1)
        await step.wait_for_event("w", type="go")
        return await step.do("woken", time.perf_counter)


class OnlyWaits(WorkflowEntrypoint):
    """The same without the first step: quicker to make."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.wait_for_event("w", type="go")
        return await step.do("woken", time.perf_counter)


class Blocks(WorkflowEntrypoint):
    """In the middle of a step for ever; says so to the process that it runs in."""

    inside = 0
    all_inside = asyncio.Event()
    expected = 0

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.do("block", self.block)

    @classmethod
    async def block(cls) -> None:
        """Count who is inside, and stay."""
        cls.inside += 1
        if cls.inside == cls.expected:
            cls.all_inside.set()
        await asyncio.Event().wait()


class Recording(WorkflowBinding):
    """A binding that can delete what was created through it, so that the file keeps its size."""

    def __init__(self, engine: EmbeddedEngine, workflow: str) -> None:
        super().__init__(engine, workflow, tenant=None, tenant_key="tenant_id")
        self._made: list[str] = []

    async def create(self, *args: Any, **options: Any) -> WorkflowInstance:
        """Create and remember."""
        instance = await super().create(*args, **options)
        self._made.append(instance.id)
        return instance

    async def sweep(self) -> None:
        """Delete all that was created here."""
        for first in range(0, len(self._made), 100):
            await self.delete_batch(self._made[first : first + 100])
        self._made.clear()


def noted(path: Path) -> Path:
    """Return the file of ids that may be woken, one `tenant id` a line."""
    return path.with_suffix(".ids")


def engine_of(path: Path, *, bare: bool = False) -> EmbeddedEngine:
    """Return an engine on the file whose workflow "waits" has a step before its wait, unless it is bare."""
    engine = EmbeddedEngine(path)
    engine.register("waits", OnlyWaits if bare else Waits)
    return engine


class Arrivals:
    """Counts instances that have been parked."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._count = self._wanted = 0
        self._reached = asyncio.Event()
        engine.add_listener(self._heard)

    def _heard(self, _ref: InstanceRef, event: HistoryEvent) -> None:
        self._count += event.type == "workflow.waiting"
        if self._count >= self._wanted:
            self._reached.set()

    async def all_of(self, count: int) -> None:
        """Wait until so many have been parked since this was made."""
        self._wanted = count
        if self._count < count:
            self._reached.clear()
            await self._reached.wait()


async def make(binding: WorkflowBinding, tenants: range) -> list[str]:
    """Create `_EACH` instances with random ids for each tenant; returns lines for the file of ids."""
    lines: list[str] = []
    left = iter(tenants)

    async def maker() -> None:
        for number in left:
            tenant = f"tenant-{number}"
            batch = await binding.for_metadata({"tenant_id": tenant}).create_batch([{}] * _EACH)
            lines.extend(f"{tenant} {instance.id}" for instance in batch[::_NOTED])

    await asyncio.gather(*(maker() for _ in range(_MAKERS)))
    return lines


async def fill(path: Path, before: int, count: int, *, bare: bool) -> dict[str, float]:
    """Make the waiting instances from number `before` to `count`; tells their memory over the engine without them."""
    engine = engine_of(path, bare=bare)
    async with engine:
        binding, arrivals = engine.binding("waits"), Arrivals(engine)
        await wakes(await parked(binding, arrivals, _WARM_UP))
        empty, held_empty = resident_mb(), held()
        start, cpu = time.perf_counter(), time.process_time()
        lines = await make(binding, range(before // _EACH, count // _EACH))
        await arrivals.all_of(_WARM_UP + count - before)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        with noted(path).open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        lines.clear()
        await settled()  # the last to be parked are still ending their tasks
        held_full = held()
        figures = {
            "empty_mb": empty,
            "memory_mb": resident_mb() - empty,
            "tasks": len(asyncio.all_tasks()),
            "more_threads": held_full["threads"] - held_empty["threads"],
            "more_descriptors": held_full["descriptors"] - held_empty["descriptors"],
            "made_per_second": (count - before) / seconds,
            "made_cpu_ms": 1000 * cpu / (count - before),
        }
        figures["woken"] = len(await wakes(await choose(binding, path, _HANDFUL)))
        return figures


async def parked(binding: WorkflowBinding, arrivals: Arrivals, count: int) -> list[WorkflowInstance]:
    """Return new instances that wait."""
    instances = await binding.create_batch([{}] * count)
    await arrivals.all_of(count)
    return instances


async def wakes(instances: list[WorkflowInstance]) -> list[float]:
    """Wake one after the other; returns the milliseconds from each `send_event` to the next step."""
    samples = []
    for instance in instances:
        start = time.perf_counter()
        await instance.send_event(type="go")
        woken: float = await instance.result()
        samples.append(1000 * (woken - start))
    return samples


def forget_cached(path: Path) -> None:
    """Drop the file from the machine's page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


async def rest(path: Path, seconds: float, samples: int, *, cold: bool, bare: bool) -> dict[str, float]:
    """Open the file, be idle, wake some of its instances; without a file of ids, as many new ones."""
    if cold:
        forget_cached(path)
    engine = engine_of(path, bare=bare)
    start = time.perf_counter()
    async with engine:
        opened = time.perf_counter() - start
        idle = await idling(seconds)
        binding = engine.binding("waits")
        if noted(path).exists():
            instances = await choose(binding, path, samples)
        else:
            instances = await parked(binding, Arrivals(engine), samples)
        woken = await wakes(instances)
        return {
            "open_ms": 1000 * opened,
            "woken": len(woken),
            **idle,
            "resident_mb": resident_mb(),
            "wake_p50_ms": percentile(woken, 50),
            "wake_p95_ms": percentile(woken, 95),
        }


async def settled() -> None:
    """Wait until what begins with an engine has ended: a large file is checked beside it."""
    used = math.inf
    while used > _QUIET:
        cpu = time.process_time()
        await asyncio.sleep(1)
        used = time.process_time() - cpu


async def idling(seconds: float) -> dict[str, float]:
    """Do nothing; tells what this process did all the same."""
    if not seconds:
        return {}
    await settled()
    switches, cpu, begin = wake_ups(), time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    idle = time.perf_counter() - begin
    return {
        "idle_cpu_percent": 100 * (time.process_time() - cpu) / idle,
        "idle_wake_ups_per_second": (wake_ups() - switches) / idle,
    }


async def choose(binding: WorkflowBinding, path: Path, count: int) -> list[WorkflowInstance]:
    """Take ids out of the file of ids; returns the handles."""
    lines = noted(path).read_text().split("\n")[:-1]
    random.shuffle(lines)
    noted(path).write_text("".join(f"{line}\n" for line in lines[count:]))
    pairs = (line.split() for line in lines[:count])
    return [await binding.for_metadata({"tenant_id": tenant}).get(id_) for tenant, id_ in pairs]


async def grow(path: Path) -> dict[str, float]:
    """Measure a few short rounds of what scripts/bench_engine.py measures, beside all that the file has."""
    figures: dict[str, float] = {}
    blocked = EmbeddedEngine(path, concurrency=1)
    blocked.register("nothing", bench_engine.Nothing)
    async with blocked:
        await (await blocked.binding("nothing").create()).status()
        await settled()
        binding = Recording(blocked, "nothing")
        figures |= await several(3, binding, "create_per_second", bench_engine.creations)
        figures.pop("create_per_second_cpu_ms")  # the callers' and the writer's: the rate says the same
        await binding.sweep()
    engine = EmbeddedEngine(path)
    for workflow in (bench_engine.Three, bench_engine.Many, bench_engine.Waits):
        engine.register(workflow.__name__, workflow)
    async with engine:
        await settled()
        three, many, waits = (Recording(engine, name) for name in ("Three", "Many", "Waits"))
        figures |= await several(
            3, three, "runs_per_second", bench_engine.runs, operations=5 * bench_engine.CALLERS
        )
        figures |= await several(50, three, "alone_ms", bench_engine.run_alone)
        figures |= await several(5, many, "step_ms", bench_engine.step_alone, operations=100)
        figures |= await several(50, waits, "wake_ms", bench_engine.wake)
    return figures


async def several(
    count: int,
    binding: Recording,
    name: str,
    measure: Callable[[WorkflowBinding], Awaitable[float]],
    operations: int = 1,
) -> dict[str, float]:
    """Return the median of some rounds after one that does not count, and the processor time of an operation."""
    await measure(binding)
    samples, cpu = [], 0.0
    for _ in range(count):
        begin = time.process_time()
        samples.append(await measure(binding))
        cpu += time.process_time() - begin
        await binding.sweep()
    return {name: statistics.median(samples), f"{name}_cpu_ms": 1000 * cpu / count / operations}


async def block(path: Path, count: int, started: float) -> dict[str, float]:
    """Run instances until all are in their step. New ones stay there for whoever kills this process."""
    Blocks.expected = count
    engine = EmbeddedEngine(path, concurrency=_CONCURRENCY)
    engine.register("blocks", Blocks)
    begin = time.monotonic()
    async with engine:
        opened = time.monotonic()
        if not started:
            binding = engine.binding("blocks")
            for first in range(0, count, 100):
                await binding.create_batch([{}] * min(100, count - first))
        await Blocks.all_inside.wait()
        figures = {
            "opened_ms": 1000 * (opened - begin),
            "recovered_ms": 1000 * (time.monotonic() - begin),
            "from_exec_ms": 1000 * (time.monotonic() - started),
        }
        print(json.dumps(figures), flush=True)
        await asyncio.Event().wait()
        return figures


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["fill", "rest", "grow", "block"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--before", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--started", type=float, default=0)
    given = parser.parse_args()
    work: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "fill": lambda: fill(given.path, given.before, given.count, bare=given.bare),
        "rest": lambda: rest(given.path, given.seconds, given.count, cold=given.cold, bare=given.bare),
        "grow": lambda: grow(given.path),
        "block": lambda: block(given.path, given.count, given.started),
    }

    async def run() -> dict[str, float]:
        return await work[given.role]()

    print(json.dumps(asyncio.run(run())))


if __name__ == "__main__":
    main()
