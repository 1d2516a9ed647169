"""Where the time of an isolate's boot goes: CPU of both sides and page faults."""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType

from dynflow.isolates import ProcessLoader
from dynflow.isolates.process import Isolate

PAGE = resource.getpagesize()
Fetch = Callable[[ProcessLoader, str], Awaitable[None]]
"""Calls the worker of this id."""


async def costs(fetch: Fetch, loader: ProcessLoader, rounds: int) -> tuple[float, float, float]:
    """Return medians of a call of a new isolate: milliseconds of CPU of the isolate and of this process; page faults.

    Of a ready one only what comes after the request counts.
    """
    own, host, faults = [], [], []
    for number in range(rounds):
        await asyncio.sleep(0.03)
        pool = loader._pool  # noqa: SLF001 - nobody else knows the processes
        ready = await asyncio.shield(pool._ready[0]) if pool and pool._ready else None  # noqa: SLF001
        before = used(ready) if ready is not None else (0.0, 0)
        started = time.thread_time()
        await fetch(loader, f"cost{number}")
        host.append((time.thread_time() - started) * 1e3)
        after = used(max(loader._keeper.live, key=lambda isolate: isolate.started_at))  # noqa: SLF001
        own.append(after[0] - before[0])
        faults.append(after[1] - before[1])
    return statistics.median(own), statistics.median(host), statistics.median(faults)


def used(isolate: Isolate) -> tuple[float, int]:
    """Return an isolate's milliseconds of CPU and page faults until now."""
    process = isolate._process  # noqa: SLF001
    clock = process.cpu_clock()
    fields = Path(f"/proc/{process._find_pid()}/stat").read_text().rpartition(")")[2].split()  # noqa: SLF001
    return (time.clock_gettime(clock) * 1e3 if clock else 0.0), int(fields[7])


def times_of(work: Callable[[], object]) -> float:
    """Return the median milliseconds of doing `work` again and again."""
    times = []
    for _ in range(50):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def copied_page() -> float:
    """Return the microseconds that the first write to a page takes in a fork: the fastest of 20 times 2,000."""
    memory = bytearray(b"x" * (2_000 * PAGE))
    times = []
    for _ in range(20):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            started = time.perf_counter()
            memory[::PAGE] = bytes(2_000)
            os.write(writing, struct.pack("d", time.perf_counter() - started))
            os._exit(0)
        times.append(float(struct.unpack("d", os.read(reading, 8))[0]) / 2_000 * 1e6)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
    return min(times)


async def where(fetch: Fetch, source: str, rounds: int) -> None:
    """Print where a boot's time goes: CPU and page faults, which a busy machine changes less than it does latencies."""
    async with ProcessLoader(ready=0, warm=1) as loader:
        cold = await costs(fetch, loader, rounds)
    async with ProcessLoader(ready=1, warm=1) as loader:
        ready = await costs(fetch, loader, rounds)
    compiled = compile(source, "index.py", "exec", dont_inherit=True)
    module = sys.modules["index"] = ModuleType("index")  # dataclasses look it up
    running = times_of(lambda: exec(compiled, vars(module)))
    compiling = times_of(lambda: compile(source, "index.py", "exec", dont_inherit=True))
    for name, (own, host, faults) in {"cold": cold, "ready": ready}.items():
        print(
            f"- CPU of a {name} isolate until its answer: {own:.1f} ms, {faults:.0f} page faults among them; "
            f"of its host: {host:.1f} ms"
        )
    print(f"- a page that is copied at its first use: {copied_page():.1f} µs")
    print(
        f"- the hundred lines in a warm process: {compiling:.2f} ms to compile, {running:.2f} ms to run the module"
    )
