"""No statement of the hot path reads more rows than it needs, however many instances are stored."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

from dynflow import WorkflowEntrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.engines.embedded.writer import Operation


class Steps(WorkflowEntrypoint):
    """A workflow that does what most do."""

    async def run(self, event: Any, step: Any) -> Any:
        first = await step.do("first", lambda: 1)
        await step.sleep("nap", 0)
        answer = await step.wait_for_event("answer", type="go", timeout=60)
        return [first, answer.payload]


def plan(db: sqlite3.Connection, statement: str) -> str:
    return "; ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}"))


async def test_every_statement_of_a_run_goes_through_an_index(tmp_path: Path) -> None:
    engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL", tenant_concurrency=1)
    engine.register("steps", Steps)
    statements: set[str] = set()

    async def submit(operation: Operation[Any]) -> Any:
        return await engine._storage.submit(operation)

    async with engine:
        await submit(lambda db: db.set_trace_callback(statements.add))
        binding = engine.binding("steps")
        # Two of one tenant, one at a time: the claim has to leave a full tenant out.
        instances = [await binding.create(id=f"i{number}", params={}) for number in range(3)]
        for instance in instances:
            await instance.send_event(type="go", payload="on")
            assert await instance.result(timeout=30) == [1, "on"]
        await submit(lambda db: db.set_trace_callback(None))
        read = sorted(text for text in statements if text.split()[0] in {"SELECT", "UPDATE", "DELETE"})
        plans = await submit(lambda db: {text: plan(db, text) for text in read})

    wasteful = {text: found for text, found in plans.items() if "TEMP B-TREE" in found or "SCAN" in found}
    assert wasteful == {}


class Idle(WorkflowEntrypoint):
    """Runs until it is told to stop, without a step."""

    async def run(self, event: Any, step: Any) -> Any:
        await step.do("work", asyncio.Event().wait)


async def claim_beside(path: Path, backlog: int) -> int:
    """Return how many of SQLite's instructions a one-step run takes beside the backlog of a tenant that is full."""
    engine = EmbeddedEngine(path, synchronous="NORMAL", tenant_concurrency=1)
    engine.register("idle", Idle, concurrency=2)
    engine.register("steps", Steps)
    instructions = 0

    def count() -> int:
        nonlocal instructions
        instructions += 1
        return 0

    async with engine:
        for first in range(0, backlog, 100):
            of_one_tenant = {"__dispatcher_metadata": {"tenant_id": "greedy"}}
            await engine.binding("idle").create_batch([{"params": of_one_tenant}] * min(100, backlog - first))
        await engine._storage.submit(lambda db: db.set_progress_handler(count, 1))
        instance = await engine.binding("steps").create(params={})
        await instance.send_event(type="go")
        await instance.result(timeout=30)
        await engine._storage.submit(lambda db: db.set_progress_handler(None, 1))
    return instructions


async def test_a_backlog_that_may_not_run_costs_others_nothing(tmp_path: Path) -> None:
    few = await claim_beside(tmp_path / "few.db", 100)
    many = await claim_beside(tmp_path / "many.db", 3000)
    assert many < 1.5 * few
