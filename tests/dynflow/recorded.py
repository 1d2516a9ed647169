"""Workflows whose histories are recorded in tests/data/histories, and the recorder.

Never change these workflows: they stand for code that customers have deployed. A new release adds a recording
beside the old ones, as does a new version of the schema, and all have to run to their ends:

    .venv/bin/python -m tests.dynflow.recorded tests/data/histories/<release>-schema-<version>.sql
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from dynflow.binding import WorkflowInstance
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import InstanceTerminatedError, WorkflowTimeoutError
from tests.engine_world import Gate, World

RECORDINGS = sorted((Path(__file__).parents[1] / "data" / "histories").glob("*.sql"))

STARTED = datetime(2026, 1, 1, tzinfo=UTC)
RETRY = {"retries": {"limit": 2, "delay": "1 hour", "backoff": "linear"}, "timeout": "5 minutes"}
# Results that are stored in each recording, of every type that a result may have.
VALUES: list[Any] = [
    None, True, 10**30, 1.5, "text", b"bytes", [1, [2]], (3, (4,)), {5}, {"key": {"nested": []}},
    STARTED, STARTED.date(), timedelta(minutes=1), Decimal("1.10"),
]  # fmt: skip

gate = Gate()
rolled_back: list[str] = []


async def order(event: Any, step: Any) -> Any:
    """Keep a value of each type, wait for two events, fail once."""
    values = await step.do("values", lambda: VALUES)
    first = await step.wait_for_event("first", type="go", timeout="2 days")

    def flaky(ctx: Any) -> str:
        if ctx.attempt == 1:
            raise ConnectionError("down")
        return f"attempt {ctx.attempt}"

    tried = await step.do("flaky", RETRY, flaky)
    await step.sleep("nap", "1 hour")
    second = (await step.wait_for_event("second", type="go", timeout="2 days")).payload
    return [values == VALUES, first.payload, tried, second]


async def deadline(event: Any, step: Any) -> str:
    """Wait for an event that does not come, after a wait that was cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(step.wait_for_event("cancelled", type="go"))
            group.create_task(step.do("fails", {"retries": {"limit": 0, "delay": 0}}, lambda: 1 / 0))
    except ExceptionGroup:
        pass
    try:
        return str((await step.wait_for_event("late", type="go", timeout="1 day")).payload)
    except WorkflowTimeoutError:
        return "timed out"


async def saga(event: Any, step: Any) -> None:
    """Book two things, then fail."""
    await step.do("flight", lambda: "F1", rollback=lambda ctx: rolled_back.append(ctx.output))
    await step.do("hotel", lambda: "H1", rollback=lambda ctx: rolled_back.append(ctx.output))
    await step.sleep("think", event.payload.get("think", 0))
    raise ValueError("no taxi")


async def held(event: Any, step: Any) -> Any:
    """Be in the midst of an attempt."""
    return await step.do("held", RETRY, gate)


async def stuck(event: Any, step: Any) -> None:
    """Be in the midst of a rollback, as the end that the payload says leads to it."""
    await step.do("hotel", lambda: "H2", rollback=lambda ctx: rolled_back.append(ctx.output))
    await step.do("flight", lambda: "F2", rollback=lambda ctx: gate())
    if event.payload["waits"]:
        await step.wait_for_event("taxi", type="go")
    raise ValueError("no taxi")


WORKFLOWS = (order, deadline, saga, held, stuck)


@dataclass(frozen=True)
class Recorded:
    """An instance in a recording: its status there, and what becomes of it once all that it waits for comes.

    `sent` are the events that it has yet to be sent. An end is an output, or the error.
    """

    workflow: str
    status: str
    end: Any
    sent: tuple[str, ...] = ()


_ORDERED = [True, "one", "attempt 2", "two"]
INSTANCES = {
    "waiting": Recorded("order", "waiting", _ORDERED, ("one", "two")),
    "retrying": Recorded("order", "waiting", _ORDERED),
    "sleeping": Recorded("order", "waiting", _ORDERED, ("two",)),
    "paused": Recorded("order", "paused", _ORDERED, ("two",)),
    "queued": Recorded("order", "queued", _ORDERED, ("two",)),
    "both-sent": Recorded("order", "waiting", _ORDERED),
    "restarted": Recorded("order", "waiting", _ORDERED, ("one", "two")),
    "finished": Recorded("order", "complete", _ORDERED),
    "timing-out": Recorded("deadline", "waiting", "timed out"),
    "stopped": Recorded("deadline", "terminated", InstanceTerminatedError),
    "rolled-back": Recorded("saga", "errored", ValueError),
    "to-roll-back": Recorded("saga", "waiting", ValueError),
    "rolling-back": Recorded("stuck", "running", ValueError),
    "terminating": Recorded("stuck", "running", InstanceTerminatedError),
    "cut-off": Recorded("held", "running", "through"),
    "pausing": Recorded("held", "waiting_for_pause", "through"),
}


def new_world(file: Path) -> World:
    """Return a world over a file that knows the workflows and has little room."""
    return World(partial(EmbeddedEngine, file, synchronous="NORMAL", concurrency=8))


async def record(file: Path) -> None:
    """Bring an instance into each state, and stop."""
    async with new_world(file) as world:
        bindings = {run.__name__: world.register(run) for run in WORKFLOWS}

        async def start(name: str, *sent: str, params: Any = None) -> WorkflowInstance:
            instance = await bindings[INSTANCES[name].workflow].create(id=name, params=params)
            for payload in sent:
                await instance.send_event(type="go", payload=payload)
            return instance

        await _record_what_took_hours(world, start)
        await world.parked(await start("waiting"))
        await world.parked(await start("retrying", "one", "two"))
        restarted = await start("restarted", "one", "two")
        await world.parked(restarted)
        await restarted.restart()
        await world.parked(restarted, 2)
        paused = await start("paused")
        await world.parked(paused)
        await paused.pause()
        await paused.send_event(type="go", payload="one")
        await world.parked(await start("timing-out"))
        stopped = await start("stopped")
        await world.parked(stopped)
        await stopped.terminate()
        await world.status(await start("rolled-back"), "errored")
        await world.parked(await start("to-roll-back", params={"think": 86_400}))
        await _record_what_runs(world, start)
        for number in range(4):  # no slot is left
            busy = await bindings["held"].create(id=f"busy-{number}")
            await world.saw(busy, "attempt.started")
        await start("queued", "one")


Start = Callable[..., Awaitable[WorkflowInstance]]


async def _record_what_took_hours(world: World, start: Start) -> None:
    finished = await start("finished", "one", "two")
    await world.parked(finished)
    world.advance(timedelta(hours=1))
    await world.parked(finished, 2)
    napping = [await start("both-sent", "one", "two"), await start("sleeping", "one")]
    for instance in napping:
        await world.parked(instance)
    world.advance(timedelta(hours=1))
    await world.status(finished, "complete")
    for instance in napping:
        await world.parked(instance, 2)


async def _record_what_runs(world: World, start: Start) -> None:
    await world.saw(await start("cut-off"), "attempt.started")
    pausing = await start("pausing")
    await world.saw(pausing, "attempt.started")
    await pausing.pause()
    await world.saw(await start("rolling-back", params={"waits": False}), "rollback.started")
    terminating = await start("terminating", params={"waits": True})
    await world.parked(terminating)
    await terminating.terminate(rollback=True)
    await world.saw(terminating, "rollback.started")


def load(recording: Path, file: Path) -> None:
    """Make an engine's file from a recording."""
    with sqlite3.connect(file) as db:
        db.executescript(recording.read_text())
    db.close()


def dump(file: Path) -> str:
    """Return an engine's file as SQL."""
    db = sqlite3.connect(file)
    numbers = [f"PRAGMA {name} = {db.execute(f'PRAGMA {name}').fetchone()[0]};" for name in
               ("application_id", "user_version")]  # fmt: skip
    text = "\n".join([*numbers, *db.iterdump()])
    db.close()
    return text + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "flow.db"
        asyncio.run(record(made))
        Path(sys.argv[1]).write_text(dump(made))
