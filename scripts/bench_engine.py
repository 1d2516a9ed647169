"""Measure the embedded engine: creations, three-step runs, a step, a wake-up. Trusted workflows in this process.

Prints a Markdown table; with `--json` one JSON object instead. Every figure is a median over 20 rounds or more.
What has many callers takes turns, round by round, with a bare journal (`bare_journal.py`): the machine's minute is the
same for both. The other supported Pythons that are on the PATH measure the concurrent run, too.
`--synchronous NORMAL` for commits that a power loss may take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dynflow.binding import WorkflowBinding
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.workflow import WorkflowEntrypoint
from scripts.bare_journal import BareJournal

ROUNDS = 20
# How many callers a concurrent round has.
CALLERS = 128


class Three(WorkflowEntrypoint):
    """Three trivial steps."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run them."""
        first = await step.do("one", lambda: 1)
        second = await step.do("two", lambda: first + 1)
        return await step.do("three", lambda: second + 1)


class Many(WorkflowEntrypoint):
    """As many trivial steps as it is told."""

    async def run(self, event: Any, step: Any) -> Any:
        """Run them."""
        for _ in range(event.payload):
            await step.do("work", lambda: 1)


class Waits(WorkflowEntrypoint):
    """Waits for an event and says when the step after it ran."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.do("one", lambda: 1)
        await step.wait_for_event("w", type="go")
        return await step.do("woken", time.perf_counter)


class Nothing(WorkflowEntrypoint):
    """Is never claimed in the measurement of creations: its engine has no free slot."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Sleep for ever, awake."""
        await step.do("block", asyncio.Event().wait)


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    """Return the seconds that `work` took."""
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def concurrent(call: Callable[[], Awaitable[Any]], each: int) -> float:
    """Return calls a second of concurrent callers, `each` so many one after the other."""

    async def caller() -> None:
        for _ in range(each):
            await call()

    seconds = await timed(lambda: asyncio.gather(*(caller() for _ in range(CALLERS))))
    return CALLERS * each / seconds


async def creations(binding: WorkflowBinding) -> float:
    """Return creations a second: concurrent callers of `create`, one instance a call."""
    return await concurrent(binding.create, 20)


async def batches(binding: WorkflowBinding) -> float:
    """Return creations a second by batches of a hundred."""
    seconds = await timed(
        lambda: asyncio.gather(*(binding.create_batch([{}] * 100) for _ in range(20))),
    )
    return 2000 / seconds


async def runs(binding: WorkflowBinding) -> float:
    """Return whole three-step runs a second with concurrent callers."""

    async def run() -> None:
        await (await binding.create()).result()

    return await concurrent(run, 5)


async def run_alone(binding: WorkflowBinding) -> float:
    """Return the milliseconds from create to result of one three-step run."""

    async def one() -> None:
        await (await binding.create()).result()

    return 1000 * await timed(one)


async def step_alone(binding: WorkflowBinding) -> float:
    """Return the milliseconds that a step adds to a run."""

    async def with_steps(count: int) -> float:
        async def one() -> None:
            await (await binding.create(params=count)).result()

        return await timed(one)

    return 1000 * (await with_steps(110) - await with_steps(10)) / 100


async def wake(binding: WorkflowBinding) -> float:
    """Return the milliseconds from `send_event` to the next step's start."""
    instance = await binding.create()
    await anext(instance.subscribe(types={"workflow.waiting"}))
    start = time.perf_counter()
    await instance.send_event(type="go")
    woken: float = await instance.result()
    return 1000 * (woken - start)


def summary(samples: list[float]) -> dict[str, float]:
    """Return median and 95th percentile."""
    ordered = sorted(samples)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p95": round(ordered[max(0, round(0.95 * len(ordered)) - 1)], 3),
        "rounds": len(ordered),
    }


async def rounds(count: int, work: Callable[[], Awaitable[float]]) -> dict[str, float]:
    """Measure `count` times after one round that is not counted."""
    await work()
    return summary([await work() for _ in range(count)])


async def in_turns(
    count: int, work: Callable[[], Awaitable[float]], bare: Callable[[], Awaitable[float]]
) -> dict[str, float]:
    """Measure both `count` times, one after the other; the figure is `work`'s, and what part it is of `bare`'s."""
    await work()
    await bare()
    both = [(await work(), await bare()) for _ in range(count)]
    figures = summary([ours for ours, _ in both])
    figures["bare"] = round(statistics.median(theirs for _, theirs in both), 3)
    figures["share"] = round(statistics.median(ours / theirs for ours, theirs in both), 3)
    return figures


async def measure_runs(folder: Path, synchronous: Any) -> dict[str, float]:
    """Return the figure of concurrent three-step runs."""
    engine = EmbeddedEngine(folder / "runs.db", synchronous=synchronous)
    engine.register("three", Three)
    async with engine, BareJournal(folder / "bare_runs.db", synchronous) as bare:
        return await in_turns(ROUNDS, lambda: runs(engine.binding("three")), lambda: concurrent(bare.run, 5))


def other_pythons() -> dict[str, str]:
    """Return the other Pythons that the engine supports and that are here: their paths by version."""
    here = "{}.{}".format(*sys.version_info)
    found: dict[str, str] = {}
    for version in ("3.11", "3.12", "3.13"):
        path = shutil.which(f"python{version}")
        if path is not None and version != here and _is_one(path):
            found[version] = path
        elif version != here:
            print(f"bench: no python{version} on the PATH, its row is left out", file=sys.stderr)
    return found


def _is_one(path: str) -> bool:
    """Whether it is a Python, and not the shim of one that is not chosen."""
    return subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0


def runs_of(python: str, synchronous: str) -> dict[str, float]:
    """Return the figure of concurrent three-step runs in another Python: the engine needs nothing but itself."""
    command = [python, __file__, "--json", "--runs", "--synchronous", synchronous]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    figure: dict[str, float] = json.loads(done.stdout)
    return figure


async def measure(folder: Path, synchronous: Any) -> dict[str, dict[str, float]]:
    """Return all figures by name."""
    figures: dict[str, dict[str, float]] = {}
    blocked = EmbeddedEngine(folder / "create.db", synchronous=synchronous, concurrency=1)
    blocked.register("nothing", Nothing)
    async with blocked, BareJournal(folder / "bare_create.db", synchronous) as bare:
        print("bench: creations", file=sys.stderr)
        figures["create, concurrent callers (per second)"] = await in_turns(
            ROUNDS, lambda: creations(blocked.binding("nothing")), lambda: concurrent(bare.create, 20)
        )
        figures["create, batches of 100 (per second)"] = await rounds(
            ROUNDS, lambda: batches(blocked.binding("nothing"))
        )
    print("bench: runs", file=sys.stderr)
    figures["three-step run, concurrent (per second)"] = await measure_runs(folder, synchronous)
    for version, python in other_pythons().items():
        figures[f"the same with Python {version}"] = await asyncio.to_thread(runs_of, python, synchronous)
    engine = EmbeddedEngine(folder / "run.db", synchronous=synchronous)
    for workflow in (Three, Many, Waits):
        engine.register(workflow.__name__, workflow)
    three, many, waits = (engine.binding(workflow.__name__) for workflow in (Three, Many, Waits))
    async with engine, BareJournal(folder / "bare_run.db", synchronous) as bare:

        async def bare_alone() -> float:
            return 1000 * await timed(bare.run)

        figures["three-step run, alone (ms)"] = await in_turns(200, lambda: run_alone(three), bare_alone)
        print("bench: steps and wake-ups", file=sys.stderr)
        figures["added by a step, alone (ms)"] = await rounds(ROUNDS, lambda: step_alone(many))
        figures["event to next step, alone (ms)"] = await rounds(200, lambda: wake(waits))
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| Embedded engine | median | p95 | rounds | a bare journal, in turns | of its speed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, each in figures.items():
        cells = [name, f"{each['p50']:,}", f"{each['p95']:,}", str(each["rounds"]), *_beside(name, each)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside(name: str, figure: dict[str, float]) -> list[str]:
    if "bare" not in figure:
        return ["", ""]
    share = 1 / figure["share"] if "(ms)" in name else figure["share"]
    return [f"{figure['bare']:,}", f"{share:.0%}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--synchronous", choices=["FULL", "NORMAL"], default="FULL")
    parser.add_argument("--runs", action="store_true", help="concurrent runs only, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dynflow-bench-") as folder:
        if options.runs:
            print(json.dumps(asyncio.run(measure_runs(Path(folder), options.synchronous))))
            return
        figures = asyncio.run(measure(Path(folder), options.synchronous))
    print(json.dumps(figures, indent=2) if options.json else table(figures))


if __name__ == "__main__":
    main()
