"""Runs: started once, stopped, rerun, concluded; also when the process dies in between."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError
from dynflow.engines import InstanceRef
from tests.ci_platform.harness import Harness, KilledError, request


async def finish(platform: Harness, run_id: str) -> None:
    """See the run to its conclusion with the loop that the server runs."""
    async with anyio.create_task_group() as group:
        group.start_soon(platform.runs.serve)
        with anyio.fail_after(30):
            await platform.runs.concluded(run_id)
        group.cancel_scope.cancel()


async def test_a_run_goes_from_its_cause_to_its_conclusion(platform: Harness) -> None:
    run = await platform.start()
    assert (run.number, run.status, run.attempt, run.conclusion) == (1, "queued", 1, None)
    await finish(platform, run.id)
    ended = await platform.runs.get(run.id)
    assert (ended.status, ended.conclusion, ended.reason) == (
        "finished",
        "success",
        "2 steps passed in 0.0 s",
    )
    assert [step.name for step in ended.steps] == ["build", "deploy"]
    assert ended.started_at is not None
    assert ended.ended_at is not None
    assert (await platform.statuses(run.id))[0] == ("pending", "queued")
    assert (await platform.statuses(run.id))[-1] == ("success", "2 steps passed in 0.0 s")


async def test_the_same_cause_starts_one_run(platform: Harness) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(platform.start)
    await finish(platform, request().run_id)
    again = await platform.start()
    assert (again.conclusion, again.number) == ("success", 1)
    assert platform.done == ["build", "deploy"]
    assert len((await platform.runs.list()).runs) == 1


async def test_runs_of_a_repository_are_numbered(platform: Harness) -> None:
    numbers = [(await platform.start(f"b{n}")).number for n in range(3)]
    assert numbers == [1, 2, 3]


async def test_a_start_that_was_cut_off_before_its_instance_is_finished_later(platform: Harness) -> None:
    platform.workflows.before.add("create")
    with pytest.raises(KilledError):
        await platform.start()
    platform.workflows.before.clear()
    await finish(platform, request().run_id)
    assert platform.done == ["build", "deploy"]


async def test_a_start_that_was_cut_off_after_its_instance_is_finished_later(platform: Harness) -> None:
    platform.workflows.after.add("create")
    with pytest.raises(KilledError):
        await platform.start()
    platform.workflows.after.clear()
    await finish(platform, request().run_id)
    assert platform.workflows.calls.count("create") == 1
    assert platform.done == ["build", "deploy"]


async def test_a_failing_step_concludes_failure_with_its_words(platform: Harness) -> None:
    run = await platform.start("broken")
    await finish(platform, run.id)
    ended = await platform.runs.get(run.id)
    assert (ended.conclusion, ended.reason) == ("failure", "test: boom\nsecond line")
    assert (await platform.statuses(run.id))[-1] == ("failure", "test: boom")


async def test_looking_again_at_any_time_changes_nothing(platform: Harness) -> None:
    run = await platform.at_gate()
    before = await platform.statuses(run.id)
    for _ in range(3):
        await platform.runs.project(run.id)
    assert await platform.statuses(run.id) == before
    assert len(await platform.gates.of_run(run.id)) == 1


async def test_a_run_at_a_gate_says_that_it_waits_and_for_what(platform: Harness) -> None:
    run = await platform.at_gate()
    assert (run.status, run.waiting_for) == ("waiting", "approval: approval")
    listed = (await platform.runs.list(status="waiting")).runs
    assert [(one.id, one.waiting_for) for one in listed] == [(run.id, "approval: approval")]
    assert (await platform.statuses(run.id))[-1] == ("pending", "waiting for approval: approval")


# --- cancel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["main", "endless"])
async def test_a_run_is_cancelled_whatever_it_does(platform: Harness, branch: str) -> None:
    run = await platform.start(branch)
    await platform.reach(run.id, "waiting" if branch == "main" else "running")
    cancelled = await platform.runs.cancel(run.id, by="alice", reason="wrong branch")
    assert cancelled.stopping
    await finish(platform, run.id)
    ended = await platform.runs.get(run.id)
    assert (ended.conclusion, ended.reason) == ("cancelled", "cancelled by alice: wrong branch")
    assert "deploy" not in platform.done
    assert (await platform.statuses(run.id))[-1] == ("error", "cancelled by alice: wrong branch")


async def test_a_run_whose_instance_was_never_made_can_be_cancelled(platform: Harness) -> None:
    platform.workflows.before.add("create")
    with pytest.raises(KilledError):
        await platform.start()
    run_id = request().run_id
    await platform.runs.cancel(run_id, by="alice")
    await platform.runs.project(run_id)
    assert (await platform.runs.get(run_id)).conclusion == "cancelled"
    assert platform.done == []


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_cancellation_that_was_cut_off_is_carried_out_later(platform: Harness, when: str) -> None:
    run = await platform.at_gate()
    getattr(platform.workflows, when).add("terminate")
    await platform.runs.cancel(run.id, by="alice")
    with pytest.raises(KilledError):
        await platform.runs.project(run.id)
    getattr(platform.workflows, when).clear()
    assert await platform.runs.sweep() == 1
    assert (await platform.runs.get(run.id)).conclusion == "cancelled"


async def test_the_first_reason_to_stop_is_the_one_that_shows(platform: Harness) -> None:
    run = await platform.at_gate()
    await platform.runs.cancel(run.id, by="alice")
    await platform.runs.cancel(run.id, by="bob")
    await platform.runs.project(run.id)
    assert (await platform.runs.get(run.id)).reason == "cancelled by alice"


async def test_a_run_that_has_ended_cannot_be_cancelled(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    with pytest.raises(ConflictError, match="success"):
        await platform.runs.cancel(run.id, by="alice")
    with pytest.raises(NotFoundError):
        await platform.runs.cancel("nope", by="alice")


# --- rerun ---------------------------------------------------------------------------------------


async def test_a_rerun_does_everything_again_under_the_same_id(platform: Harness) -> None:
    run = await platform.start("broken")
    await finish(platform, run.id)
    again = await platform.runs.rerun(run.id)
    assert (again.attempt, again.status, again.conclusion) == (2, "queued", None)
    await finish(platform, run.id)
    assert platform.done == ["build", "build"]
    assert platform.layers.calls == [(run.id, [("build", 1), ("test", 1)])]
    ended = await platform.runs.get(run.id)
    assert (ended.attempt, ended.conclusion) == (2, "failure")


async def test_a_rerun_posts_pending_again(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    await platform.runs.rerun(run.id)
    assert (await platform.statuses(run.id))[-1] == ("pending", "queued")
    await finish(platform, run.id)
    assert (await platform.statuses(run.id))[-1][0] == "success"


async def test_a_rerun_from_a_step_keeps_what_came_before_it(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    await platform.runs.rerun(run.id, from_step=("deploy", 1))
    await finish(platform, run.id)
    assert platform.done == ["build", "deploy", "deploy"]
    assert platform.layers.calls == [(run.id, [("deploy", 1)])]


async def test_a_rerun_from_a_step_of_a_step_is_refused_for_it_would_do_nothing(platform: Harness) -> None:
    run = await platform.start("nested")
    await finish(platform, run.id)
    with pytest.raises(ConflictError, match="a step of 'outer'"):
        await platform.runs.rerun(run.id, from_step=("inner", 1))
    await platform.runs.rerun(run.id, from_step=("outer", 1))
    await finish(platform, run.id)
    assert platform.done == ["build", "inner", "deploy", "inner", "deploy"]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_rerun_that_was_cut_off_happens_once(platform: Harness, when: str) -> None:
    run = await platform.at_gate()
    await platform.gates.decide(run.id, "approval", "approve", by="alice")
    await finish(platform, run.id)
    platform.done.clear()
    await platform.runs.rerun(run.id)
    getattr(platform.workflows, when).add("restart")
    with pytest.raises(KilledError):
        await platform.runs.project(run.id)
    assert (await platform.runs.summary(run.id)).conclusion is None
    getattr(platform.workflows, when).clear()
    await platform.runs.sweep()
    await platform.reach(run.id, "waiting", "approval")
    assert platform.done == ["build"]


async def test_a_rerun_that_was_cut_off_and_ended_before_anybody_looked_happens_once(
    platform: Harness,
) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    platform.done.clear()
    await platform.runs.rerun(run.id)
    platform.advance(1)
    platform.workflows.after.add("restart")
    with pytest.raises(KilledError):
        await platform.runs.project(run.id)
    platform.workflows.after.clear()
    with anyio.fail_after(30):
        await platform.engine.result(InstanceRef("ci", run.id, None))
    await platform.runs.sweep()
    assert (await platform.runs.summary(run.id)).conclusion == "success"
    assert platform.done == ["build", "deploy"]


async def test_what_cannot_be_rerun_is_left_as_it_is(platform: Harness) -> None:
    run = await platform.at_gate()
    with pytest.raises(ConflictError, match="not ended"):
        await platform.runs.rerun(run.id)
    await platform.runs.cancel(run.id, by="alice")
    await platform.runs.project(run.id)
    for step in (("nope", 1), ("build", 2), ("approval", 1)):
        with pytest.raises(NotFoundError, match="no step"):
            await platform.runs.rerun(run.id, from_step=step)
    assert (await platform.runs.get(run.id)).conclusion == "cancelled"
    with pytest.raises(NotFoundError):
        await platform.runs.rerun("nope")


async def test_of_two_reruns_at_once_one_counts(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    refused = []

    async def rerun() -> None:
        try:
            await platform.runs.rerun(run.id)
        except ConflictError:
            refused.append(1)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(rerun)
    assert refused == [1, 1]
    assert (await platform.runs.summary(run.id)).attempt == 2


# --- time and loss -------------------------------------------------------------------------------


async def test_a_run_that_works_too_long_is_stopped(platform: Harness) -> None:
    run = await platform.start("endless")
    async with anyio.create_task_group() as group:
        group.start_soon(platform.runs.serve)
        await platform.reach(run.id, "running")
        with anyio.fail_after(30):
            while (await platform.runs.summary(run.id)).conclusion is None:
                platform.advance(3601)
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    ended = await platform.runs.get(run.id)
    assert ended.conclusion == "timed_out"
    assert "6 h 0 min" in (ended.reason or "") or "hang" in (ended.reason or "")


async def test_waiting_does_not_count_as_working(platform: Harness) -> None:
    run = await platform.at_gate()
    platform.advance(12 * 3600)
    async with anyio.create_task_group() as group:
        group.start_soon(platform.runs.serve)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert (await platform.runs.get(run.id)).status == "waiting"


async def test_a_run_that_the_engine_lost_concludes_error(platform: Harness) -> None:
    run = await platform.at_gate()
    await (await platform.workflows.get(run.id)).delete()
    await platform.runs.project(run.id)
    ended = await platform.runs.get(run.id)
    assert (ended.conclusion, ended.reason) == ("error", "the engine has no record of this run any more")
    assert [gate.state for gate in ended.gates] == ["closed"]


async def test_a_rerun_of_a_run_that_the_engine_lost_starts_with_no_files(platform: Harness) -> None:
    run = await platform.at_gate()
    await (await platform.workflows.get(run.id)).delete()
    await platform.runs.project(run.id)
    await platform.runs.rerun(run.id)
    await platform.runs.sweep()
    await platform.reach(run.id, "waiting", "approval")
    assert platform.layers.deleted == [run.id]


async def test_a_new_run_takes_over_no_instance_of_a_row_that_was_lost(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    await platform.runs.forget(run.id)
    again = await platform.start()
    assert (again.id, again.conclusion) == (run.id, None)
    await finish(platform, run.id)
    assert platform.done == ["build", "deploy", "build", "deploy"]


async def test_trouble_with_one_run_is_tried_again_and_keeps_no_other(platform: Harness) -> None:
    stuck = await platform.at_gate()
    platform.workflows.before.add("terminate")
    await platform.runs.cancel(stuck.id, by="alice")
    async with anyio.create_task_group() as group:
        group.start_soon(platform.runs.serve)
        other = await platform.start("other")
        with anyio.fail_after(30):
            await platform.runs.concluded(other.id)
        platform.workflows.before.clear()
        with anyio.fail_after(30):
            while (await platform.runs.summary(stuck.id)).conclusion is None:
                platform.advance(60)
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()


# --- questions -----------------------------------------------------------------------------------


async def test_runs_are_listed_in_pages_the_newest_first(platform: Harness) -> None:
    for number in range(7):
        await platform.start(f"b{number}")
    seen: list[str] = []
    cursor = None
    while True:
        page = await platform.runs.list(limit=3, cursor=cursor)
        seen += [run.branch for run in page.runs]
        await platform.start(f"later-{len(seen)}")  # new runs do not shift the pages
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == [f"b{number}" for number in reversed(range(7))]


async def test_runs_are_filtered(platform: Harness) -> None:
    await platform.start("one", sha="1" * 40)
    await platform.start("two", sha="2" * 40, event="pull_request", ref="refs/pull/7/head", pr=7)
    listed = platform.runs.list
    assert [run.branch for run in (await listed(ref="one")).runs] == ["one"]
    assert [run.branch for run in (await listed(ref="refs/pull/7/head")).runs] == ["two"]
    assert [run.branch for run in (await listed(pr=7)).runs] == ["two"]
    assert [run.branch for run in (await listed(sha="1" * 40)).runs] == ["one"]
    assert len((await listed(repo="o/r")).runs) == 2
    assert (await listed(repo="o/other")).runs == ()
    assert (await listed(status="success")).runs == ()


@pytest.mark.parametrize("filters", [{"status": "done"}, {"limit": 0}, {"limit": 500}, {"cursor": "x"}])
async def test_filters_that_cannot_be_are_refused(platform: Harness, filters: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        await platform.runs.list(**filters)  # type: ignore[arg-type]


async def test_a_runs_history_can_be_followed_to_its_end(platform: Harness) -> None:
    run = await platform.start()
    with anyio.fail_after(30):
        types = [event.type async for event in platform.runs.events(run.id)]
    assert types[0] == "workflow.queued"
    assert types[-1] == "workflow.completed"


async def test_what_is_kept_too_long_is_forgotten_with_all_it_has(platform: Harness) -> None:
    run = await platform.at_gate()
    with pytest.raises(ConflictError):
        await platform.runs.forget(run.id)
    await platform.runs.cancel(run.id, by="alice")
    await platform.runs.project(run.id)
    assert await platform.runs.expired(timedelta(days=30)) == []
    platform.advance(31 * 86_400)
    assert await platform.runs.expired(timedelta(days=30)) == [run.id]
    await platform.runs.forget(run.id)
    assert await platform.runs.kept_ids() == set()
