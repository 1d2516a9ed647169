"""Reports: in order, the newest alone, tried for a day; runs do not wait for them."""

from __future__ import annotations

import threading

import anyio
import pytest

from ci_platform.errors import FailedError, InvalidInputError, NotFoundError, UnavailableError
from ci_platform.forges.github import GitHubForge
from ci_platform.model import OutboxRow, Repository, Run, ShownComment, ShownStatus
from ci_platform.reports import Reports
from ci_platform.store import Store, col
from dynflow.clock import ManualClock
from tests.ci_platform.harness import Harness
from tests.ci_platform.test_runs import finish
from tests.loopback import Answer, Call, loopback

SHA = "a" * 40


async def shown(platform: Harness) -> tuple[str, str]:
    (row,) = await platform.store.read(lambda tx: tx.all(ShownStatus))
    return row.state, row.description


async def states(platform: Harness, run_id: str) -> list[str]:
    return [report.state for report in await platform.reports.of_run(run_id)]


async def deliver_all(platform: Harness, run_id: str) -> None:
    while "waiting" in await states(platform, run_id):
        if not await platform.reports.deliver_due():
            platform.advance(1)


async def test_a_run_shows_on_its_commit_with_context_and_link(platform: Harness) -> None:
    run = await platform.start()
    await platform.reports.deliver_due()
    (row,) = await platform.store.read(lambda tx: tx.all(ShownStatus))
    assert (row.repo, row.sha, row.context) == ("o/r", SHA, "dynflow/push")
    assert row.target_url == f"http://here/runs/{run.id}"
    assert (row.state, row.description) == ("pending", "queued")


async def test_push_and_pull_request_of_one_commit_show_side_by_side(platform: Harness) -> None:
    await platform.start()
    await platform.start(event="pull_request", ref="refs/pull/7/head", pr=7)
    await platform.reports.deliver_due()
    rows = await platform.store.read(lambda tx: tx.all(ShownStatus, order=col(ShownStatus.context)))
    assert [row.context for row in rows] == ["dynflow/pull_request", "dynflow/push"]


async def test_statuses_come_in_order_while_the_run_goes_on(platform: Harness) -> None:
    async with anyio.create_task_group() as group:
        for serve in (platform.runs.serve, platform.reports.serve):
            group.start_soon(serve)
        run = await platform.start("main")
        await platform.reach(run.id, "waiting", "approval")
        with anyio.fail_after(30):
            while not platform.forge.shown or platform.forge.shown[-1][1] != "waiting for approval: approval":
                await anyio.lowlevel.checkpoint()
            await platform.gates.decide(run.id, "approval", "approve", by="alice")
            while platform.forge.shown[-1][0] != "success":
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    order = [description for _, description in platform.forge.shown]
    wanted = ["queued", "running", "waiting for approval: approval", "running", "3 steps passed in 0.0 s"]
    remaining = iter(wanted)
    assert all(description in remaining for description in order), order


async def test_a_newer_status_takes_the_place_of_one_that_waits(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    await platform.reports.deliver_due()
    assert platform.forge.shown == [("success", "2 steps passed in 0.0 s")]
    assert (await states(platform, run.id))[-1] == "delivered"
    assert set((await states(platform, run.id))[:-1]) == {"superseded"}


async def test_the_run_does_not_wait_for_a_forge_that_is_down(platform: Harness) -> None:
    platform.forge.trouble += [UnavailableError("down")] * 3
    run = await platform.start()
    await platform.reports.deliver_due()
    await finish(platform, run.id)
    assert (await platform.runs.get(run.id)).conclusion == "success"
    await deliver_all(platform, run.id)
    assert await shown(platform) == ("success", "2 steps passed in 0.0 s")


async def test_tries_are_spaced_out(platform: Harness) -> None:
    platform.forge.trouble += [UnavailableError("down")] * 4
    await platform.start()
    waits = []
    for _ in range(5):
        before = platform.clock.now()
        while not await platform.reports.deliver_due():
            platform.advance(0.5)
        waits.append((platform.clock.now() - before).total_seconds())
    assert waits == [0, 1, 2, 4, 8]


async def test_a_forge_that_names_a_time_is_left_alone_until_then_by_all_reports(platform: Harness) -> None:
    platform.forge.trouble.append(UnavailableError("rate limit", retry_after=120))
    await platform.start("one", sha="1" * 40)
    await platform.start("two", sha="2" * 40)
    await platform.reports.deliver_due()
    platform.advance(119)
    assert await platform.reports.deliver_due() == 0
    assert len(platform.forge.shown) == 1
    platform.advance(2)
    assert await platform.reports.deliver_due() == 2


async def test_after_a_day_a_report_is_dead_and_says_why(platform: Harness) -> None:
    platform.forge.trouble += [UnavailableError("down")] * 500
    run = await platform.start()
    while (await states(platform, run.id))[-1] == "waiting":
        await platform.reports.deliver_due()
        platform.advance(600)
    report = (await platform.reports.of_run(run.id))[-1]
    assert report.state == "dead"
    assert "given up" in (report.last_error or "")
    assert "down" in (report.last_error or "")


async def test_what_a_forge_refuses_for_good_is_not_tried_again(platform: Harness) -> None:
    platform.forge.trouble.append(FailedError("no such commit"))
    run = await platform.start()
    await platform.reports.deliver_due()
    platform.advance(86_400)
    assert await platform.reports.deliver_due() == 0
    (report,) = await platform.reports.of_run(run.id)
    assert (report.state, report.attempts, report.last_error) == ("dead", 1, "no such commit")


async def test_a_defect_in_one_report_keeps_no_other(
    platform: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    platform.forge.trouble.append(RuntimeError("defect"))
    await platform.start("one", sha="1" * 40)
    await platform.start("two", sha="2" * 40)
    await platform.reports.deliver_due()
    assert len(await platform.store.read(lambda tx: tx.all(ShownStatus))) == 1
    assert "could not be delivered" in caplog.text


async def test_a_report_that_was_cut_off_is_delivered_at_start_with_the_same_effect(
    platform: Harness, clock: ManualClock
) -> None:
    await platform.start()
    row = await platform.reports._due()
    await platform.reports._show(row[0])  # shown, and killed before that was noted
    reborn = Reports(platform.store, clock, forges={"local": platform.forge}, public_url="http://here")
    assert await reborn.deliver_due() == 1
    assert await shown(platform) == ("pending", "queued")


async def test_a_rerun_shows_pending_again(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    await platform.reports.deliver_due()
    await platform.runs.rerun(run.id)
    await platform.reports.deliver_due()
    assert await shown(platform) == ("pending", "queued")


async def test_an_older_run_does_not_speak_over_a_newer_one_of_its_commit(platform: Harness) -> None:
    older, newer = await platform.start("one"), await platform.start("two")
    await finish(platform, newer.id)
    await finish(platform, older.id)
    await platform.reports.deliver_due()
    (row,) = await platform.store.read(lambda tx: tx.all(ShownStatus))
    assert row.target_url.endswith(newer.id)


# --- comments ------------------------------------------------------------------------------------


async def pull_request(platform: Harness, branch: str = "topic") -> str:
    run = await platform.start(branch, event="pull_request", ref="refs/pull/7/head", pr=7)
    return run.id


async def comments(platform: Harness) -> list[str]:
    return [row.body for row in await platform.store.read(lambda tx: tx.all(ShownComment))]


async def test_a_comment_is_shown_once_however_often_its_step_is_tried(platform: Harness) -> None:
    run_id = await pull_request(platform)
    for _ in range(3):
        await platform.reports.comment(run_id, 7, "| Step |")
    await platform.reports.deliver_due()
    assert await comments(platform) == ["| Step |"]
    assert [report.kind for report in await platform.reports.of_run(run_id)].count("comment") == 1


async def test_a_newer_comment_takes_the_place_of_the_one_before(platform: Harness) -> None:
    run_id = await pull_request(platform)
    await platform.reports.comment(run_id, 7, "one")
    await platform.reports.deliver_due()
    await platform.reports.comment(run_id, 7, "two")
    await platform.reports.deliver_due()
    assert await comments(platform) == ["two"]


async def test_what_comments_said_before_is_not_kept(platform: Harness) -> None:
    run = await platform.start(event="pull_request", ref="refs/pull/7/head", pr=7)
    for number in range(5):
        await platform.reports.comment(run.id, 7, f"{number}" * 1000)
        if number == 2:
            await platform.reports.deliver_due()
    kept = await platform.store.read(lambda tx: tx.all(OutboxRow, col(OutboxRow.kind) == "comment"))
    assert [row.payload["body"][0] for row in kept] == ["4"]


async def test_a_run_comments_on_its_own_pull_request_alone(platform: Harness) -> None:
    run_id, push = await pull_request(platform), await platform.start()
    for wrong_run, pr in ((run_id, 8), (push.id, 7)):
        with pytest.raises(InvalidInputError, match="may not comment"):
            await platform.reports.comment(wrong_run, pr, "x")
    with pytest.raises(NotFoundError):
        await platform.reports.comment("nope", 7, "x")


async def test_a_comment_of_absurd_length_is_refused(platform: Harness) -> None:
    with pytest.raises(InvalidInputError):
        await platform.reports.comment(await pull_request(platform), 7, "x" * 2_000_000)


# --- to GitHub, over a socket --------------------------------------------------------------------


async def test_reports_reach_github_in_order_though_it_is_slow_and_fails(
    store: Store, clock: ManualClock
) -> None:
    """Two updates of one status overlap a slow call: what GitHub is told last is what was said last."""
    first_came, go_on = threading.Event(), threading.Event()

    def behave(call: Call) -> Answer:
        if call.body["description"] == "one":
            first_came.set()
            go_on.wait(30)
        return Answer(201, {})

    repository = Repository(name="octo/r", forge="github", created_at=clock.now())
    run = Run(
        id="r1", repo="octo/r", number=1, event="push", action="push", sha=SHA, ref="refs/heads/main",
        branch="main", created_at=clock.now(),
    )  # fmt: skip
    await store.write(lambda tx: (tx.add(repository), tx.add(run)))
    with loopback(behave) as server:
        forge = GitHubForge(api_url=server.url, token="t")
        reports = Reports(store, clock, forges={"github": forge}, public_url="http://here")

        async def say(description: str) -> None:
            await store.write(lambda tx: reports.put_status(tx, run, "pending", description))
            reports.wake()

        async with anyio.create_task_group() as group:
            group.start_soon(reports.serve)
            await say("one")
            await anyio.to_thread.run_sync(first_came.wait)
            await say("two")
            await say("three")
            go_on.set()
            with anyio.fail_after(30):
                while [report.state for report in await reports.of_run("r1")][-1] != "delivered":
                    await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        assert [call.body["description"] for call in server.calls] == ["one", "three"]
