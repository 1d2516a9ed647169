"""No statement of the hot path reads more rows than it needs, however many instances are stored."""

from __future__ import annotations

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
        assert any("tenant NOT IN" in text for text in read)
        plans = await submit(lambda db: {text: plan(db, text) for text in read})

    # A walk along the queue in its order, up to the limit, is what a claim is.
    wasteful = {
        text: found
        for text, found in plans.items()
        if "TEMP B-TREE" in found or "SCAN" in found.replace("SCAN instances USING INDEX instances_queue", "")
    }
    assert wasteful == {}
    claims = [found for text, found in plans.items() if text.startswith("SELECT key, rank")]
    assert claims
    assert all("instances_queue" in found for found in claims)
