"""Runs forked from others: decided once, made whole or not at all, never speaking for their commit."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from ci_platform.caches.scopes import RunScopes
from ci_platform.errors import ConflictError, ForbiddenError, InvalidInputError, NotFoundError, PatchError
from ci_platform.model import Run, RunImage
from ci_platform.run_forks import WhatIf, kept_before, note_calls
from ci_platform.run_views import RunView
from ci_platform.store import col
from dynflow.types import InstanceStatus, StepStatus
from tests.ci_platform.harness import SHA, Harness, KilledError
from tests.ci_platform.test_runs import finish

DEPLOY = WhatIf("deploy")


async def ended(platform: Harness, branch: str = "topic", **fields: Any) -> RunView:
    run = await platform.start(branch, **fields)
    await finish(platform, run.id)
    platform.done.clear()
    return await platform.runs.get(run.id)


async def forks_of(platform: Harness, run_id: str) -> list[Run]:
    return list(await platform.store.read(lambda tx: tx.all(Run, col(Run.forked_from) == run_id)))


async def test_a_what_if_is_a_run_of_its_own_and_leaves_the_other_alone(platform: Harness) -> None:
    source = await ended(platform)
    made = await platform.runs.what_if(source.id, DEPLOY, by="alice")
    await finish(platform, made.id)
    assert platform.done == ["deploy"]
    run, still = await platform.runs.get(made.id), await platform.runs.get(source.id)
    assert (run.number, run.conclusion, run.actor, run.sha) == (2, "success", "alice", source.sha)
    assert [(step.name, step.kept) for step in run.steps] == [("build", True), ("deploy", False)]
    assert run.forked is not None
    assert (run.forked.run, run.forked.number, run.forked.step) == (source.id, 1, "deploy")
    assert [(fork.run, fork.by) for fork in still.forks] == [(made.id, "alice")]
    assert (still.steps, still.attempt, still.ended_at) == (source.steps, 1, source.ended_at)
    assert platform.forked.calls == [(source.id, made.id, [("build", 1)], None)]
    assert platform.layers.calls == []


async def test_its_inputs_take_the_place_of_the_payloads_and_it_is_told_what_it_is(platform: Harness) -> None:
    source = await ended(platform)
    wanted = WhatIf("deploy", inputs={"branch": "broken", "new": [1]})
    made = await platform.runs.what_if(source.id, wanted, by="alice")
    await finish(platform, made.id)
    run = await platform.runs.get(made.id)
    assert (run.conclusion, run.branch) == ("failure", "topic")  # as the branch `broken` has it
    assert run.forked is not None
    assert run.forked.inputs == {"branch": "broken", "new": [1]}


async def test_what_is_asked_of_people_is_asked_again(platform: Harness) -> None:
    run = await platform.at_gate()
    await platform.gates.decide(run.id, "approval", "approve", by="bob")
    await finish(platform, run.id)
    platform.done.clear()
    made = await platform.runs.what_if(run.id, DEPLOY, by="alice")
    await platform.reach(made.id, "waiting", "approval")
    assert platform.done == []
    assert [gate.state for gate in await platform.gates.of_run(made.id)] == ["open"]
    await platform.gates.decide(made.id, "approval", "approve", by="carol")
    await finish(platform, made.id)
    assert platform.done == ["deploy"]


async def test_it_says_nothing_about_its_commit_and_its_comments_are_withheld(platform: Harness) -> None:
    source = await ended(platform, pr=7, event="pull_request")
    before = await platform.statuses(source.id)
    made = await platform.runs.what_if(source.id, WhatIf(inputs={"branch": "broken"}), by="alice")
    await platform.reports.comment(made.id, 7, "first")
    await platform.reports.comment(made.id, 7, "second")
    await finish(platform, made.id)
    await platform.runs.rerun(made.id)
    await finish(platform, made.id)
    assert (await platform.statuses(made.id), await platform.statuses(source.id)) == ([], before)
    kept = await platform.reports.of_run(made.id)
    assert [(report.state, report.payload["body"]) for report in kept] == [("withheld", "second")]
    await platform.reports.comment(source.id, 7, "the real one")
    assert (await platform.reports.of_run(source.id))[-1].state == "waiting"


async def test_a_run_that_goes_on_can_be_forked_where_everything_before_has_ended(platform: Harness) -> None:
    run = await platform.at_gate()
    made = await platform.runs.what_if(run.id, WhatIf("build"), by="alice")
    await platform.reach(made.id, "waiting", "approval")
    assert platform.done == ["build", "build"]
    assert (await platform.runs.get(run.id)).status == "waiting"


async def test_a_fork_is_rerun_from_what_is_its_own(platform: Harness) -> None:
    source = await ended(platform)
    made = await platform.runs.what_if(source.id, DEPLOY, by="alice")
    await finish(platform, made.id)
    with pytest.raises(ConflictError, match="forked from"):
        await platform.runs.rerun(made.id, from_step=("build", 1))
    await platform.runs.rerun(made.id)
    await finish(platform, made.id)
    assert platform.done == ["deploy", "deploy"]
    assert platform.layers.calls == [(made.id, [("deploy", 1)])]


async def test_a_fork_of_a_fork_knows_where_it_comes_from(platform: Harness) -> None:
    source = await ended(platform)
    first = await platform.runs.what_if(source.id, DEPLOY, by="alice")
    await finish(platform, first.id)
    second = await platform.runs.what_if(first.id, DEPLOY, by="alice")
    await finish(platform, second.id)
    assert platform.done == ["deploy", "deploy"]
    assert platform.forked.calls[-1][:2] == (first.id, second.id)


async def test_what_it_saves_in_caches_no_other_run_reads(platform: Harness) -> None:
    source = await ended(platform)
    made = await platform.runs.what_if(source.id, DEPLOY, by="alice")
    theirs, own = [await RunScopes(platform.store).of(run_id) for run_id in (source.id, made.id)]
    assert own.readable == (f"what-if {made.id}", *theirs.readable)
    assert own.own not in theirs.readable


async def test_images_mean_what_they_meant(platform: Harness) -> None:
    source = await ended(platform)
    pin = RunImage(run_id=source.id, asked="", name="ci", exact="ci@sha256:1", pinned_at=platform.clock.now())
    await platform.store.write(lambda tx: tx.add(pin))
    made = await platform.runs.what_if(source.id, DEPLOY, by="alice")
    assert (await platform.runs.get(made.id)).images == {"ci": "ci@sha256:1"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [None, "deploy"])
async def test_a_fork_that_was_cut_off_is_finished_once(
    platform: Harness, when: str, step: str | None
) -> None:
    source = await ended(platform)
    getattr(platform.workflows, when).update({"fork", "create"})
    with pytest.raises(KilledError):
        await platform.runs.what_if(source.id, WhatIf(step), by="alice")
    getattr(platform.workflows, when).clear()
    with pytest.raises(ConflictError, match="being forked"):  # what it stands on stays, until it is made
        await platform.runs.rerun(source.id)
    assert source.id in await platform.runs.open_ids()  # nor are its files collected
    (made,) = await forks_of(platform, source.id)
    await finish(platform, made.id)
    assert source.id not in await platform.runs.open_ids()
    assert platform.done == (["build", "deploy"] if step is None else ["deploy"])
    assert len([call for call in platform.workflows.calls if call == "fork"]) == (1 if step else 0)
    await platform.runs.rerun(source.id)


async def test_a_fork_whose_source_is_gone_concludes_with_that(platform: Harness) -> None:
    source = await ended(platform)
    platform.workflows.before.add("fork")
    with pytest.raises(KilledError):
        await platform.runs.what_if(source.id, DEPLOY, by="alice")
    platform.workflows.before.clear()
    await (await platform.workflows.get(source.id)).delete()
    (made,) = await forks_of(platform, source.id)
    await finish(platform, made.id)
    run = await platform.runs.get(made.id)
    assert (run.conclusion, "not what it was" in (run.reason or "")) == ("error", True)


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        (WhatIf("nothing"), NotFoundError, "no step 'nothing'"),
        (WhatIf("deploy", 2), NotFoundError, "number 2"),
        (WhatIf(inputs={"trusted": True}), InvalidInputError, "'trusted' is what a run is"),
        (WhatIf(inputs={"repo": "x/y"}), InvalidInputError, "'repo'"),
        (WhatIf(inputs={"": 1}), InvalidInputError, "name"),
        (WhatIf(inputs={"a": "x" * 70_000}), InvalidInputError, "bytes"),
        (WhatIf("deploy", code="b" * 40), ForbiddenError, "no trusted run"),
    ],
)
async def test_what_cannot_be_tried_is_refused_before_anything_is_made(
    platform: Harness, wanted: WhatIf, error: type[Exception], words: str
) -> None:
    source = await ended(platform)
    with pytest.raises(error, match=words):
        await platform.runs.what_if(source.id, wanted, by="alice")
    platform.forked.trouble.append(PatchError("hunk 1"))
    with pytest.raises(PatchError):
        await platform.runs.what_if(source.id, WhatIf("deploy", patch="x"), by="alice")
    assert await forks_of(platform, source.id) == []
    assert (await platform.start("another")).number == 2


async def test_code_is_of_commits_that_are_trusted_here_or_the_run_is_not(platform: Harness) -> None:
    source, other = await ended(platform), await ended(platform, sha="c" * 40)
    made = await platform.runs.what_if(source.id, WhatIf("deploy", code=other.sha), by="alice")
    run = await platform.runs.get(made.id)
    assert (run.sha, run.pipeline_digest) == (SHA, f"sha256:o/r@{other.sha}")
    stranger = await ended(platform, "fork", sha="d" * 40, trusted=False, pr=3)
    with pytest.raises(ForbiddenError):
        await platform.runs.what_if(source.id, WhatIf("deploy", code=stranger.sha), by="alice")
    made = await platform.runs.what_if(stranger.id, WhatIf("deploy", code=source.sha), by="alice")
    assert not made.trusted


async def test_steps_that_the_code_did_not_call_are_told(platform: Harness) -> None:
    source = await ended(platform)
    made = await platform.runs.what_if(source.id, DEPLOY, by="alice")
    await note_calls(platform.store, made.id, {("do", "compile", 1), ("sleep", "build", 1)})
    forked = (await platform.runs.get(made.id)).forked
    assert forked is not None
    assert (forked.unused_steps, forked.reached) == (("build #1",), False)


def steps(*parts: tuple[str, str, str, int, int | None]) -> InstanceStatus:
    """Return a status of steps: name, status, within, start and end in seconds."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    made = [
        StepStatus(
            name,
            "do",
            1,
            cast("Any", status),
            begin + timedelta(seconds=start),
            None if end is None else begin + timedelta(seconds=end),
            within=within,
        )
        for name, status, within, start, end in parts
    ]
    return InstanceStatus("i", "running", begin, steps=tuple(made))


def test_a_step_that_has_not_ended_stands_in_the_way_of_what_began_after_it() -> None:
    status = steps(
        ("a", "complete", "", 0, 1), ("slow", "running", "", 1, None), ("quick", "complete", "", 1, 2)
    )
    assert [step.name for step in kept_before(status, "slow", 1)] == ["a"]
    with pytest.raises(ConflictError, match="'slow' began before 'quick'"):
        kept_before(status, "quick", 1)


def test_the_steps_that_a_step_is_within_are_not_kept() -> None:
    status = steps(
        ("a", "complete", "", 0, 1),
        ("outer", "complete", "", 1, 9),
        ("middle", "complete", "outer", 2, 8),
        ("first", "complete", "middle", 3, 4),
        ("second", "complete", "middle", 5, 6),
    )
    assert [step.name for step in kept_before(status, "second", 1)] == ["a", "first"]
