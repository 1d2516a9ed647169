"""Workflows whose histories are recorded in tests/data/histories, and the recorder.

Never change these workflows: they stand for code that customers have deployed. A new release adds a recording
beside the old ones, and all have to run to their ends:

    .venv/bin/python -m tests.dynflow.recorded tests/data/histories/<version>.sql
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import WorkflowTimeoutError
from tests.engine_world import Gate, World

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


WORKFLOWS = (order, deadline, saga, held)

# What becomes of each recorded instance once everything that it waits for comes.
ENDS = {
    "waiting": [True, "one", "attempt 2", "two"],
    "retrying": [True, "one", "attempt 2", "two"],
    "sleeping": [True, "one", "attempt 2", "two"],
    "paused": [True, "one", "attempt 2", "two"],
    "queued": [True, "one", "attempt 2", "two"],
    "both-sent": [True, "one", "attempt 2", "two"],
    "timing-out": "timed out",
    "rolled-back": ValueError,
    "to-roll-back": ValueError,
    "cut-off": "through",
}


def new_world(file: Path) -> World:
    """Return a world over a file that knows the workflows and has little room."""
    return World(partial(EmbeddedEngine, file, synchronous="NORMAL", concurrency=8))


async def record(file: Path) -> None:
    """Bring an instance into each state, and stop."""
    async with new_world(file) as world:
        bindings = {run.__name__: world.register(run) for run in WORKFLOWS}

        async def order_that(name: str, *sent: str) -> Any:
            instance = await bindings["order"].create(id=name)
            for payload in sent:
                await instance.send_event(type="go", payload=payload)
            return instance

        done = await order_that("both-sent", "one", "two")
        sleeping = await order_that("sleeping", "one")
        await world.status(sleeping, "waiting")
        await world.status(done, "waiting")
        world.advance(timedelta(hours=1))
        await world.saw(sleeping, "sleep.started")
        await world.saw(done, "sleep.started")
        await world.parked(await order_that("waiting"))
        await world.parked(await order_that("retrying", "one", "two"))
        paused = await order_that("paused")
        await world.parked(paused)
        await paused.pause()
        await paused.send_event(type="go", payload="one")
        await world.parked(await bindings["deadline"].create(id="timing-out"))
        await world.status(await bindings["saga"].create(id="rolled-back"), "errored")
        await world.parked(await bindings["saga"].create(id="to-roll-back", params={"think": 86_400}))
        for name in ("cut-off", *(f"busy-{number}" for number in range(7))):
            await bindings["held"].create(id=name)
            await world.saw(await bindings["held"].get(name), "attempt.started")
        await order_that("queued", "one")


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
