"""Runs are kept as long as they should be, and then leave nothing."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest

from ci_platform.errors import NotFoundError
from ci_platform.retention import Retention
from dynflow.errors import InstanceNotFoundError
from tests.ci_platform.harness import Harness, KilledError
from tests.ci_platform.test_runs import finish


def retention(platform: Harness, deleted: list[str]) -> Retention:
    async def delete(run_id: str) -> None:
        deleted.append(run_id)

    keep = timedelta(days=20)
    return Retention(platform.runs, platform.workflows, platform.clock, keep=keep, files=[delete])


async def test_what_ended_long_ago_is_deleted_and_nothing_else(platform: Harness) -> None:
    deleted: list[str] = []
    old = await platform.start()
    await finish(platform, old.id)
    waiting = await platform.at_gate()
    assert await platform.runs.open_ids() == {waiting.id}
    platform.advance(19 * 86_400)
    young = await platform.start("young")
    await finish(platform, young.id)
    platform.advance(2 * 86_400)
    assert await retention(platform, deleted).purge() == 1
    assert deleted == [old.id]
    assert await platform.runs.kept_ids() == {waiting.id, young.id}
    with pytest.raises(InstanceNotFoundError):
        await platform.workflows.get(old.id)
    with pytest.raises(NotFoundError):
        await platform.runs.get(old.id)


async def test_a_deletion_that_was_cut_off_is_finished_later(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    platform.advance(21 * 86_400)
    platform.workflows.after.add("delete")
    with pytest.raises(KilledError):
        await retention(platform, []).purge()
    assert await platform.runs.kept_ids() == {run.id}
    platform.workflows.after.clear()
    assert await retention(platform, []).purge() == 1
    assert await platform.runs.kept_ids() == set()


async def test_the_server_goes_on_though_something_cannot_be_deleted(
    platform: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    platform.advance(21 * 86_400)
    platform.workflows.before.add("delete")
    async with anyio.create_task_group() as group:
        group.start_soon(retention(platform, []).serve)
        with anyio.fail_after(30):
            while "could not be deleted" not in caplog.text:
                await anyio.lowlevel.checkpoint()
            platform.workflows.before.clear()
            while await platform.runs.kept_ids():
                platform.advance(3601)
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
