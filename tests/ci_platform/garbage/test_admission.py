"""Runs for which there is no room: they queue, say why, and begin by themselves when there is room."""

from __future__ import annotations

import anyio
import pytest

from ci_platform.errors import ConflictError
from tests.ci_platform.harness import Harness
from tests.ci_platform.test_runs import finish

WHY = "room on the disk: less than 1.0 GiB are free (setting min_free)"


async def test_a_new_run_is_held_back_with_the_reason_and_begins_when_there_is_room(
    platform: Harness,
) -> None:
    platform.shortage.append(WHY)
    run = await platform.start()
    held = await platform.runs.get(run.id)
    assert (held.status, held.waiting_for, held.steps) == ("queued", WHY, ())
    assert await platform.statuses(run.id) == [
        ("pending", "queued"),
        ("pending", f"queued, waiting for {WHY}"),
    ]
    await platform.runs.sweep()  # as the next start does
    assert platform.workflows.calls == []
    platform.runs.let_go()
    assert platform.workflows.calls == []
    seen: list[str] = []
    async with anyio.create_task_group() as group:

        async def follow() -> None:
            async for event in platform.runs.events(run.id):
                seen.append(event.type)  # noqa: PERF401 - looked at while it grows

        group.start_soon(follow)
        group.start_soon(platform.runs.serve)
        await anyio.wait_all_tasks_blocked()
        assert seen == []
        platform.shortage.clear()
        platform.runs.let_go()
        with anyio.fail_after(30):
            ended = await platform.runs.concluded(run.id)
            while "workflow.completed" not in seen:
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    assert (ended.conclusion, ended.waiting_for) == ("success", None)


async def test_what_runs_already_goes_on_and_a_held_run_can_be_cancelled(platform: Harness) -> None:
    at_gate = await platform.at_gate()
    platform.shortage.append(WHY)
    held = await platform.start("other")
    await platform.runs.cancel(held.id, by="ada")
    await platform.runs.project(held.id)
    assert (await platform.runs.get(held.id)).conclusion == "cancelled"
    await platform.runs.decide(at_gate.id, "approval", "approve", by="ada")
    await finish(platform, at_gate.id)
    assert (await platform.runs.get(at_gate.id)).conclusion == "success"


async def test_a_rerun_is_held_back_too(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    platform.shortage.append(WHY)
    await platform.runs.rerun(run.id, from_step=("deploy", 1))
    await platform.runs.project(run.id)
    held = await platform.runs.get(run.id)
    assert (held.status, held.waiting_for, held.attempt) == ("queued", WHY, 2)
    assert platform.layers.calls == []
    platform.shortage.clear()
    await finish(platform, run.id)
    assert (await platform.runs.get(run.id)).conclusion == "success"
    assert platform.done == ["build", "deploy", "deploy"]


async def test_a_rerun_from_a_step_whose_files_were_collected_is_refused_and_one_from_the_start_is_not(
    platform: Harness,
) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    platform.layers.collected.add(run.id)
    with pytest.raises(ConflictError, match="collected"):
        await platform.runs.rerun(run.id, from_step=("deploy", 1))
    assert (await platform.runs.get(run.id)).conclusion == "success"
    await platform.runs.rerun(run.id)
    await finish(platform, run.id)
    assert (await platform.runs.get(run.id)).attempt == 2
