"""Gates: opened by waits, decided by people, once; one event for an approval, whatever dies in between."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError
from tests.ci_platform.harness import Harness, KilledError
from tests.ci_platform.test_runs import finish


async def test_a_wait_for_an_event_opens_a_gate(platform: Harness) -> None:
    run = await platform.at_gate()
    (gate,) = await platform.gates.open()
    assert (gate.run_id, gate.name, gate.state) == (run.id, "approval", "open")
    assert gate.event_type == "deploy-approval"
    assert gate.deadline == gate.opened_at + timedelta(hours=24)
    assert run.gates == (gate,)


async def test_gates_are_listed_by_repository(platform: Harness) -> None:
    await platform.at_gate()
    assert len(await platform.gates.open(repo="o/r")) == 1
    assert await platform.gates.open(repo="o/other") == []


async def test_an_approval_lets_the_run_go_on_and_tells_it_who_and_why(platform: Harness) -> None:
    run = await platform.at_gate()
    gate = await platform.gates.decide(run.id, "approval", "approve", by="alice", comment="ship it")
    assert (gate.state, gate.decided_by, gate.comment) == ("approved", "alice", "ship it")
    await finish(platform, run.id)
    payload = {"decision": "approve", "comment": "ship it", "by": "alice"}
    assert platform.done == ["build", f"approval: {payload}", "deploy"]
    assert await platform.gates.open() == []
    assert (await platform.runs.get(run.id)).conclusion == "success"


async def test_a_rejection_ends_the_run_as_a_failure_and_says_by_whom(platform: Harness) -> None:
    run = await platform.at_gate()
    gate = await platform.gates.decide(run.id, "approval", "reject", by="bob", comment="not on a Friday")
    assert gate.state == "rejected"
    await finish(platform, run.id)
    ended = await platform.runs.get(run.id)
    assert ended.conclusion == "failure"
    assert ended.reason == "gate approval rejected by bob: not on a Friday"
    assert platform.done == ["build"]


async def test_the_first_decision_wins_and_the_second_is_told_whose_it_was(platform: Harness) -> None:
    run = await platform.at_gate()
    await platform.gates.decide(run.id, "approval", "approve", by="alice")
    with pytest.raises(ConflictError, match="approved by alice"):
        await platform.gates.decide(run.id, "approval", "reject", by="bob")
    await finish(platform, run.id)
    assert (await platform.runs.get(run.id)).conclusion == "success"


async def test_of_many_decisions_at_once_one_wins(platform: Harness) -> None:
    run = await platform.at_gate()
    refused = []

    async def decide(number: int) -> None:
        decision = "approve" if number % 2 else "reject"
        try:
            await platform.gates.decide(run.id, "approval", decision, by=f"p{number}")  # type: ignore[arg-type]
        except ConflictError:
            refused.append(number)

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(decide, number)
    assert len(refused) == 9
    await finish(platform, run.id)
    (gate,) = await platform.gates.of_run(run.id)
    wanted = {"approved": "success", "rejected": "failure"}[gate.state]
    assert (await platform.runs.get(run.id)).conclusion == wanted
    assert platform.workflows.calls.count("send_event") == (gate.state == "approved")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_approval_that_was_cut_off_becomes_exactly_one_event(platform: Harness, when: str) -> None:
    """The second gate waits for the same type: a second event would open it."""
    run = await platform.at_gate("two-gates", "first")
    getattr(platform.workflows, when).add("send_event")
    await platform.gates.decide(run.id, "first", "approve", by="alice")
    with pytest.raises(KilledError):
        await platform.runs.project(run.id)
    getattr(platform.workflows, when).clear()
    await platform.runs.sweep()
    await platform.reach(run.id, "waiting", "second")
    await platform.runs.sweep()
    assert [gate.name for gate in await platform.gates.open()] == ["second"]
    status = await platform.status(run.id)
    assert [step.name for step in status.steps if step.status == "waiting"] == ["second"]


async def test_a_gate_that_is_not_there_is_not_found(platform: Harness) -> None:
    run = await platform.at_gate()
    with pytest.raises(NotFoundError, match="no open gate 'other'"):
        await platform.gates.decide(run.id, "other", "approve", by="alice")
    with pytest.raises(NotFoundError, match="no run"):
        await platform.gates.decide("nope", "approval", "approve", by="alice")


async def test_what_is_no_decision_is_refused(platform: Harness) -> None:
    run = await platform.at_gate()
    with pytest.raises(InvalidInputError):
        await platform.gates.decide(run.id, "approval", "maybe", by="alice")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        await platform.gates.decide(run.id, "approval", "approve", by="alice", comment="x" * 5000)
    assert len(await platform.gates.open()) == 1


async def test_a_gate_that_nobody_decides_times_out(platform: Harness) -> None:
    run = await platform.at_gate()
    platform.advance(24 * 3600 + 1)
    await finish(platform, run.id)
    ended = await platform.runs.get(run.id)
    assert (ended.conclusion, ended.reason) == ("timed_out", "nobody decided approval in time")
    assert [gate.state for gate in ended.gates] == ["timed_out"]
    with pytest.raises(ConflictError, match="timed out"):
        await platform.gates.decide(run.id, "approval", "approve", by="alice")


async def test_the_gates_of_a_cancelled_run_are_closed(platform: Harness) -> None:
    run = await platform.at_gate()
    await platform.runs.cancel(run.id, by="alice")
    await platform.runs.project(run.id)
    assert [gate.state for gate in await platform.gates.of_run(run.id)] == ["closed"]
    with pytest.raises(ConflictError, match="closed"):
        await platform.gates.decide(run.id, "approval", "approve", by="alice")


async def test_a_rerun_opens_its_gate_anew(platform: Harness) -> None:
    run = await platform.at_gate()
    await platform.gates.decide(run.id, "approval", "reject", by="bob")
    await finish(platform, run.id)
    platform.advance(60)
    await platform.runs.rerun(run.id, from_step=("build", 1))
    await platform.runs.project(run.id)
    await platform.reach(run.id, "waiting", "approval")
    assert [gate.state for gate in await platform.gates.of_run(run.id)] == ["rejected", "open"]
    await platform.gates.decide(run.id, "approval", "approve", by="alice")
    await finish(platform, run.id)
    assert (await platform.runs.get(run.id)).conclusion == "success"
