"""What is deleted is gone from the embedded engine's file: every row of it, whatever table it is in."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynflow import DynamicWorkflowBinding, InstanceNotFoundError, create_dynamic_workflow_entrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import TrustedLoader, WorkerCode
from tests.engine_world import DEADLINE, World

TENANT = """
from dynflow import WorkflowEntrypoint

class Everything(WorkflowEntrypoint):
    async def run(self, event, step):
        retry = {"retries": {"limit": 1, "delay": 0}}
        await step.do("flaky", retry, lambda ctx: "x" * 5000 if ctx.attempt > 1 else 1 / 0, rollback=lambda: None)
        await step.sleep("nap", 0)
        await step.wait_for_event("w", type="go")
        await step.wait_for_event("more", type="more")
"""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    loader = TrustedLoader()

    def make(**options: Any) -> EmbeddedEngine:
        async def load_runner(_: Any) -> Any:
            return loader.get("t", lambda: WorkerCode("index.py", {"index.py": TENANT})).get_entrypoint()

        engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL", **options)
        engine.register("everything", create_dynamic_workflow_entrypoint(load_runner))
        return engine

    async with loader, World(make) as world:
        yield world


def rows(file: Path) -> dict[str, int]:
    """How many rows each table has, but for SQLite's own counters."""
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        tables = [name for name in names if not name.startswith("sqlite_")]
        return {name: db.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables}


async def swept(instance: Any) -> None:
    """Wait until the instance is gone."""
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(InstanceNotFoundError):
            while await instance.status():
                pass


@pytest.mark.parametrize("how", ["handle", "batch", "waiting", "paused", "retention"])
async def test_no_row_is_left_of_what_is_deleted(world: World, tmp_path: Path, how: str) -> None:
    file = tmp_path / "flow.db"
    empty = rows(file)
    binding = DynamicWorkflowBinding(world.engine.binding("everything"), {"tenant_id": "t"})
    instance = await binding.create(id="one", params={"secret": 1}, retention="1 day")
    for _ in range(3):
        await instance.send_event(type="go", payload="y" * 100)
    await world.parked(instance)
    if how == "paused":
        await instance.pause()
        await instance.send_event(type="more")
    if how in {"handle", "batch", "retention"}:
        await instance.terminate(rollback=True)
        await world.status(instance, "terminated")
    full = rows(file)
    assert sum(full.values()) > sum(empty.values()) + 8
    if how == "batch":
        assert await binding.delete_batch(["one"]) == ["one"]
    elif how == "retention":
        world.advance(86_400)
        await swept(instance)
    else:
        await instance.delete()
    assert rows(file) == empty
