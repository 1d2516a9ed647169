"""A cancel and an event that meet in the embedded engine's file."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynflow.engines.embedded import EmbeddedEngine, rows, steps
from tests.engine_world import NO_RETRIES, World


async def test_an_event_that_comes_together_with_the_cancel_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches the file before the cancel does: taken by the cancelled wait, it is given back, before others."""
    sent: list[int] = []
    original = steps.cancel

    def cancel(db: Any, lease: Any, record: Any, now: int) -> Any:
        if record.name == "lost" and not sent:
            row = rows.by_key(db, lease.key)
            assert row is not None
            for number in range(3):
                sent.append(number)
                steps.send_event(db, row, "go", b"%d" % number, now, 1 << 40)
        return original(db, lease, record, now)

    monkeypatch.setattr(steps, "cancel", cancel)

    async def run(event: Any, step: Any) -> Any:
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(step.wait_for_event("lost", type="go"))
                group.create_task(step.do("fails", NO_RETRIES, lambda: 1 / 0))
        return [(await step.wait_for_event("next", type="go")).payload for _ in range(3)]

    async with World(partial(EmbeddedEngine, tmp_path / "flow.db", synchronous="NORMAL")) as world:
        assert await world.result(run) == [0, 1, 2]
    assert sent == [0, 1, 2]
