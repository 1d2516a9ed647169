"""What goes wrong without anybody's ill will: told at once, in words that help."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dynflow.errors import InvalidArgumentError, WorkflowInternalError, WorkflowTimeoutError
from dynflow.router import METADATA_KEY, dispatch_workflow
from dynflow.types import WorkflowEvent
from tests.engine_world import World


async def test_an_oversize_result_fails_its_step_at_once(world: World) -> None:
    attempts: list[int] = []

    async def run(event: Any, step: Any) -> Any:
        def big(ctx: Any) -> str:
            attempts.append(ctx.attempt)
            return "x" * 2_000_000

        return await step.do("big", big)

    instance = await world.register(run).create()
    with pytest.raises(WorkflowInternalError, match="1,048,576"):
        await instance.result(timeout=30)
    assert attempts == [1]


async def test_a_sync_callback_over_its_timeout_has_failed(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        config = {"timeout": 1, "retries": {"limit": 0, "delay": 0}}
        return await step.do("slow", config, lambda: world.clock.advance(2))

    instance = await world.register(run).create()
    with pytest.raises(WorkflowTimeoutError, match="0:00:01"):
        await instance.result(timeout=30)


async def test_a_loader_that_returns_no_runner_is_told_so() -> None:
    event = WorkflowEvent({METADATA_KEY: {}, "params": None}, datetime.now(UTC), "i", "w")
    context, step, nothing = (
        SimpleNamespace(env=None, ctx=None),
        cast("Any", None),
        cast("Any", lambda _: None),
    )
    with pytest.raises(InvalidArgumentError, match="load_runner returned None"):
        await dispatch_workflow(context, event, step, nothing)
