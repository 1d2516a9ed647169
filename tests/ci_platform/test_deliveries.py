"""Deliveries: stored once, dispatched after the answer, never lost, never in the way of others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import pytest

from ci_platform.errors import FailedError, NotFoundError, UnavailableError
from ci_platform.forges import Change, Delivery
from ci_platform.model import Counter, Repository
from ci_platform.pushes import Pushes, RefUpdate
from ci_platform.store import col
from tests.ci_platform.harness import Harness

CHANGE = Change("push", "push", "o/r", "a" * 40, "refs/heads/topic", "topic", actor="alice", title="Add")


def delivery(number: int = 1, change: Change | None = CHANGE, **fields: Any) -> Delivery:
    repo = change.repo if change else None
    return Delivery("local", f"d{number}", "push", repo, change=change, **fields)


async def state_of(platform: Harness, number: int) -> tuple[str, str | None]:
    view = await platform.deliveries.get(number)
    return view.state, view.reason


async def test_a_delivery_is_stored_before_anything_starts_and_then_dispatched(platform: Harness) -> None:
    accepted = await platform.deliveries.accept(delivery())
    assert (accepted.state, accepted.redelivered) == ("received", False)
    assert platform.commits.asked == []
    assert await platform.deliveries.sweep() == 1
    view = await platform.deliveries.get(accepted.id)
    (run,) = (await platform.runs.list()).runs
    assert (view.state, view.run_ids) == ("dispatched", (run.id,))
    assert (run.actor, run.title, run.pipeline_digest) == ("alice", "Add", "sha256:1")
    cause = (await platform.runs.get(run.id)).cause
    assert cause is not None
    assert (cause.delivery, cause.delivery_id) == (accepted.id, "d1")


async def test_a_redelivery_is_answered_the_same_and_starts_nothing(platform: Harness) -> None:
    first = await platform.deliveries.accept(delivery())
    await platform.deliveries.sweep()
    again = await platform.deliveries.accept(delivery())
    assert (again.id, again.state, again.redelivered) == (first.id, "dispatched", True)
    assert await platform.deliveries.sweep() == 0
    assert (await platform.deliveries.get(first.id)).redeliveries == 1
    assert len((await platform.runs.list()).runs) == 1


async def test_another_delivery_of_the_same_cause_finds_its_run(platform: Harness) -> None:
    for number in (1, 2):
        await platform.deliveries.accept(delivery(number))
    await platform.deliveries.sweep()
    views, _ = await platform.deliveries.list()
    assert len({view.run_ids for view in views}) == 1
    assert len((await platform.runs.list()).runs) == 1


async def test_what_was_left_by_a_crash_is_dispatched_at_start(platform: Harness) -> None:
    await platform.deliveries.accept(delivery())
    async with anyio.create_task_group() as group:
        group.start_soon(platform.deliveries.serve)
        with anyio.fail_after(30):
            while (await state_of(platform, 1))[0] == "received":
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    assert await state_of(platform, 1) == ("dispatched", None)


async def test_the_server_dispatches_what_comes_in(platform: Harness) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(platform.deliveries.serve)
        group.start_soon(platform.runs.serve)
        await anyio.wait_all_tasks_blocked()
        await platform.deliveries.accept(delivery())
        with anyio.fail_after(30):
            while not (await platform.deliveries.get(1)).run_ids:
                await anyio.lowlevel.checkpoint()
            (run_id,) = (await platform.deliveries.get(1)).run_ids
            assert (await platform.runs.concluded(run_id)).conclusion == "success"
        group.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace(CHANGE, repo="no/where"), "not registered"),
        (replace(CHANGE, deleted=True), "deleted"),
        (replace(CHANGE, title="[skip ci]"), "[skip ci]"),
        (None, "nothing"),
    ],
)
async def test_what_starts_nothing_is_recorded_with_its_reason(
    platform: Harness, change: Change | None, reason: str
) -> None:
    accepted = await platform.deliveries.accept(delivery(change=change))
    assert accepted.state == "ignored"
    assert reason in (accepted.reason or "")
    assert await platform.deliveries.sweep() == 0
    assert await state_of(platform, accepted.id) == ("ignored", accepted.reason)


async def test_a_repository_of_another_forge_is_not_started_from_here(platform: Harness) -> None:
    accepted = await platform.deliveries.accept(replace(delivery(), forge="github"))
    assert accepted.reason == "repository 'o/r' is registered at forge 'local'"


async def test_a_disabled_repository_starts_nothing(platform: Harness) -> None:
    where = col(Repository.name) == "o/r"
    await platform.store.write(lambda tx: tx.change(Repository, {"enabled": False}, where))
    assert (await platform.deliveries.accept(delivery())).state == "ignored"


async def test_a_commit_without_a_pipeline_starts_nothing(platform: Harness) -> None:
    platform.commits.digest = None
    await platform.deliveries.accept(delivery())
    await platform.deliveries.sweep()
    assert await state_of(platform, 1) == ("ignored", "there is no .dynflow/ci.py at aaaaaaaaaaaa")


async def test_a_marker_in_a_message_that_only_git_knows_counts_as_well(platform: Harness) -> None:
    platform.commits.message = "Add\n\n[skip ci]"
    await platform.deliveries.accept(delivery())
    await platform.deliveries.sweep()
    assert (await state_of(platform, 1))[0] == "ignored"


async def test_a_title_that_the_delivery_does_not_tell_is_the_commits(platform: Harness) -> None:
    platform.commits.message = "First line\n\nbody"
    await platform.deliveries.accept(delivery(change=replace(CHANGE, title="")))
    await platform.deliveries.sweep()
    assert (await platform.runs.list()).runs[0].title == "First line"


async def test_a_title_that_only_git_knows_is_cleaned_too(platform: Harness) -> None:
    platform.commits.message = "Clear\x1b[2J the \u202escreen\x00 \ud800\n\nbody"
    await platform.deliveries.accept(delivery(change=replace(CHANGE, title="")))
    await platform.deliveries.sweep()
    assert (await platform.runs.list()).runs[0].title == "Clear[2J the screen "


async def test_pull_requests_from_forks_can_be_switched_off(platform: Harness) -> None:
    stranger = replace(CHANGE, event="pull_request", pr=7, trusted=False)
    platform.deliveries._allow_forks = False
    await platform.deliveries.accept(delivery(change=stranger))
    assert (await state_of(platform, 1))[0] == "ignored"
    platform.deliveries._allow_forks = True
    await platform.deliveries.accept(delivery(2, change=stranger))
    assert (await state_of(platform, 2))[0] == "received"


async def test_a_commit_that_is_gone_starts_nothing(platform: Harness) -> None:
    platform.commits.trouble.append(FailedError("no such commit"))
    await platform.deliveries.accept(delivery())
    await platform.deliveries.sweep()
    assert await state_of(platform, 1) == ("ignored", "no such commit")


async def test_a_remote_that_is_down_is_tried_again_until_it_answers(platform: Harness) -> None:
    platform.commits.trouble += [UnavailableError("down")] * 3
    await platform.deliveries.accept(delivery())
    waits = []
    while (await state_of(platform, 1))[0] == "received":
        before = platform.clock.now()
        while not await platform.deliveries.sweep():
            platform.advance(0.5)
        waits.append((platform.clock.now() - before).total_seconds())
    assert waits == [0, 1, 2, 4]
    assert (await platform.deliveries.get(1)).last_error == "down"


async def test_a_remote_that_stays_down_is_given_up_after_a_day(platform: Harness) -> None:
    platform.commits.trouble += [UnavailableError("down")] * 200
    await platform.deliveries.accept(delivery())
    started = platform.clock.now()
    while (await state_of(platform, 1))[0] == "received":
        await platform.deliveries.sweep()
        platform.advance(600)
    state, reason = await state_of(platform, 1)
    assert state == "failed"
    assert "down" in (reason or "")
    assert 86_400 < (platform.clock.now() - started).total_seconds() < 2 * 86_400


async def test_a_defect_of_ours_stops_no_other_delivery_and_is_given_up(
    platform: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    platform.commits.trouble.append(RuntimeError("secret inside"))
    await platform.deliveries.accept(delivery(1))
    await platform.deliveries.accept(delivery(2, replace(CHANGE, sha="b" * 40)))
    await platform.deliveries.sweep()
    assert (await state_of(platform, 2))[0] == "dispatched"
    platform.commits.trouble += [RuntimeError("secret inside")] * 10
    for _ in range(6):
        platform.advance(3600)
        await platform.deliveries.sweep()
    state, reason = await state_of(platform, 1)
    assert (state, reason) == ("failed", "given up after 5 attempts: internal error: RuntimeError")
    assert "could not be dispatched" in caplog.text


async def test_refused_deliveries_are_only_counted(platform: Harness) -> None:
    for _ in range(2):
        await platform.deliveries.count_refused("signature")
    counter = await platform.store.read(lambda tx: tx.get(Counter, "deliveries_refused_signature"))
    assert counter is not None
    assert counter.value == 2
    assert (await platform.deliveries.list())[0] == []


async def test_deliveries_are_listed_in_pages_the_newest_first(platform: Harness) -> None:
    for number in range(5):
        await platform.deliveries.accept(delivery(number, None))
    first, cursor = await platform.deliveries.list(limit=3)
    rest, end = await platform.deliveries.list(limit=3, cursor=cursor)
    assert [view.delivery_id for view in (*first, *rest)] == ["d4", "d3", "d2", "d1", "d0"]
    assert end is None
    assert (await platform.deliveries.list(repo="o/r"))[0] == []


@pytest.mark.parametrize("number", [0, 99, 2**40])
async def test_a_delivery_that_is_not_there_is_not_found(platform: Harness, number: int) -> None:
    with pytest.raises(NotFoundError):
        await platform.deliveries.get(number)


# --- pushes to our own git server ----------------------------------------------------------------


@dataclass
class Mirror:
    """The refs of a repository on disk."""

    refs: dict[str, str] = field(default_factory=dict)

    async def ref_snapshot(self, repo: str) -> dict[str, str]:
        assert repo == "o/r"
        return self.refs


@pytest.fixture
def mirror() -> Mirror:
    return Mirror()


@pytest.fixture
def pushes(platform: Harness, mirror: Mirror) -> Pushes:
    return Pushes(platform.store, platform.deliveries, mirror)


MAIN, TAG = "refs/heads/topic", "refs/tags/v1"


async def test_a_push_becomes_one_delivery_per_ref(platform: Harness, pushes: Pushes) -> None:
    moved = [RefUpdate(MAIN, None, "1" * 40), RefUpdate(TAG, "0" * 40, "1" * 40)]
    assert len(await pushes.accept("o/r", moved, actor="alice")) == 2
    await platform.deliveries.sweep()
    runs = (await platform.runs.list()).runs
    assert [(run.ref, run.sha, run.actor) for run in runs] == [
        (TAG, "1" * 40, "alice"),
        (MAIN, "1" * 40, "alice"),
    ]


async def test_the_same_push_told_twice_counts_once(pushes: Pushes) -> None:
    moved = [RefUpdate(MAIN, None, "1" * 40)]
    assert len(await pushes.accept("o/r", moved, actor="alice")) == 1
    assert await pushes.accept("o/r", moved, actor="alice") == []


async def test_a_push_that_a_crash_kept_from_us_is_found_at_start(
    platform: Harness, pushes: Pushes, mirror: Mirror
) -> None:
    await pushes.accept("o/r", [RefUpdate(MAIN, None, "1" * 40)], actor="alice")
    mirror.refs = {MAIN: "2" * 40, TAG: "2" * 40}
    assert await pushes.reconcile({"o/r"}) == 2
    assert await pushes.reconcile({"o/r"}) == 0
    await platform.deliveries.sweep()
    assert {run.sha for run in (await platform.runs.list()).runs} == {"1" * 40, "2" * 40}


async def test_going_back_and_forth_is_a_new_delivery_each_time(platform: Harness, pushes: Pushes) -> None:
    shas = ["1" * 40, "2" * 40, "1" * 40, "2" * 40]
    for before, after in zip([None, *shas], shas, strict=False):
        assert len(await pushes.accept("o/r", [RefUpdate(MAIN, before, after)], actor="alice")) == 1
    views, _ = await platform.deliveries.list()
    assert len({view.delivery_id for view in views}) == 4


@pytest.mark.parametrize("gone", [None, "0" * 40, ""])
async def test_a_deleted_branch_is_recorded_and_starts_nothing(
    platform: Harness, pushes: Pushes, gone: str | None
) -> None:
    await pushes.accept("o/r", [RefUpdate(MAIN, None, "1" * 40)], actor="alice")
    (accepted,) = await pushes.accept("o/r", [RefUpdate(MAIN, "1" * 40, gone)], actor="alice")
    assert accepted.state == "ignored"
    assert "deleted" in (accepted.reason or "")
    assert await pushes.reconcile({"o/r"}) == 0


async def test_a_push_to_what_is_not_registered_is_refused(pushes: Pushes) -> None:
    with pytest.raises(NotFoundError):
        await pushes.accept("no/where", [RefUpdate(MAIN, None, "1" * 40)], actor="alice")
