"""The saga's way back on every engine: workflows.md section 6."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynflow.errors import InstanceTerminatedError, WorkflowFatalError
from dynflow.types import RollbackContext
from tests.engine_world import DEADLINE, NO_RETRIES, Gate, World, quick


async def test_handlers_run_in_reverse_order_of_start_for_steps_that_have_one(world: World) -> None:
    seen: list[Any] = []

    def undo(rollback: RollbackContext) -> None:
        seen.append((rollback.ctx.step.name, rollback.ctx.step.count, rollback.output, rollback.error))

    async def run(event: Any, step: Any) -> None:
        await step.do("a", lambda: 1, rollback=undo)
        await step.do("none", lambda: 2)
        await step.sleep("nap", 10)
        await step.do("a", NO_RETRIES, lambda: 3, rollback=undo)
        await step.do("fails", NO_RETRIES, lambda: 1 / 0, rollback=undo)

    instance = await world.start(run)
    with pytest.raises(ZeroDivisionError):
        await world.run_through(instance)
    error = "ZeroDivisionError: division by zero"
    assert seen == [("fails", 1, None, error), ("a", 2, 3, error), ("a", 1, 1, error)]
    status = await instance.status()
    assert status.status == "errored"
    assert status.rollback is not None
    assert status.rollback.outcome == "complete"
    kinds = world.kinds(instance)
    assert (kinds["rollback.started"], kinds["rollback.completed"]) == (3, 3)


async def test_no_handler_runs_on_success_or_after_a_caught_failure(world: World) -> None:
    seen: list[int] = []

    async def run(event: Any, step: Any) -> str:
        try:
            await step.do("fails", NO_RETRIES, lambda: 1 / 0, rollback=lambda: seen.append(1))
        except ZeroDivisionError:
            return "fine"
        return "not reached"

    instance = await world.start(run)
    assert await instance.result(timeout=DEADLINE) == "fine"
    assert seen == []
    assert (await instance.status()).rollback is None


async def test_a_handler_is_retried_by_its_own_config_and_hibernates_between(world: World) -> None:
    attempts: list[int] = []

    def undo(rollback: RollbackContext) -> None:
        attempts.append(rollback.ctx.attempt)
        if rollback.ctx.attempt < 3:
            raise ValueError("again")

    async def run(event: Any, step: Any) -> None:
        await step.do("a", lambda: 1, rollback=undo, rollback_config=quick(2, 100))
        raise KeyError("gone")

    instance = await world.start(run)
    await world.parked(instance)
    with pytest.raises(KeyError):
        await world.run_through(instance)
    assert attempts == [1, 2, 3]


async def test_the_first_handler_that_finally_fails_ends_the_chain(world: World) -> None:
    seen: list[str] = []

    def broken() -> None:
        raise ValueError("cannot undo")

    async def run(event: Any, step: Any) -> None:
        await step.do("first", lambda: 1, rollback=lambda: seen.append("first"))
        await step.do("second", lambda: 1, rollback=broken, rollback_config=NO_RETRIES)
        await step.do("third", lambda: 1, rollback=lambda: seen.append("third"))
        raise KeyError("gone")

    instance = await world.start(run)
    with pytest.raises(KeyError):
        await instance.result(timeout=DEADLINE)
    assert seen == ["third"]
    rollback = (await instance.status()).rollback
    assert rollback is not None
    assert rollback.outcome == "failed"
    assert rollback.error is not None
    assert (rollback.error.name, rollback.error.message) == ("ValueError", "cannot undo")


@pytest.mark.parametrize("state", ["running", "waiting", "paused"])
async def test_terminate_with_rollback_undoes_started_and_unfinished_steps(world: World, state: str) -> None:
    gate, seen = Gate(), []

    def undo(rollback: RollbackContext) -> None:
        seen.append((rollback.ctx.step.name, rollback.output, rollback.error))

    async def run(event: Any, step: Any) -> None:
        await step.do("done", lambda: 1, rollback=undo)
        if state == "running":
            await step.do("unfinished", gate, rollback=undo)
        else:
            await step.sleep("nap", 1000)
        await step.do("never started", lambda: 1, rollback=undo)

    instance = await world.start(run)
    if state == "running":
        await gate.reached()
    else:
        await world.parked(instance)
    if state == "paused":
        await instance.pause()
    await instance.terminate(rollback=True)
    with pytest.raises(InstanceTerminatedError):
        await instance.result(timeout=DEADLINE)
    reason = "the instance was terminated"
    unfinished = [("unfinished", None, reason)] if state == "running" else []
    assert seen == [*unfinished, ("done", 1, reason)]
    assert gate.cancelled == (state == "running")
    status = await instance.status()
    assert status.status == "terminated"
    assert status.rollback is not None
    assert status.rollback.outcome == "complete"


async def test_terminate_with_rollback_and_nothing_to_undo_just_terminates(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.sleep("nap", 1000)

    instance = await world.start(run)
    await world.parked(instance)
    await instance.terminate(rollback=True)
    status = await world.status(instance, "terminated")
    assert status.rollback is None


async def test_handlers_that_are_done_are_not_repeated_after_a_restart_of_the_engine(world: World) -> None:
    gate, seen = Gate(), []

    async def run(event: Any, step: Any) -> None:
        async def undo_slowly(rollback: RollbackContext) -> None:
            seen.append(f"first, attempt {rollback.ctx.attempt}")
            if rollback.ctx.attempt == 1:
                await gate()

        await step.do("first", lambda: 1, rollback=undo_slowly, rollback_config=NO_RETRIES)
        await step.do("second", lambda: 1, rollback=lambda: seen.append("second"))
        raise KeyError("gone")

    instance = await world.start(run)
    await gate.reached()
    assert (await instance.status()).status == "running"
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    with pytest.raises(KeyError):
        await instance.result(timeout=DEADLINE)
    assert seen == ["second", "first, attempt 1", "first, attempt 2"]


async def test_a_step_called_while_rolling_back_is_refused(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        async def undo() -> None:
            await step.do("new", lambda: 1)

        await step.do("a", lambda: 1, rollback=undo)
        raise KeyError("gone")

    instance = await world.start(run)
    with pytest.raises(KeyError):
        await instance.result(timeout=DEADLINE)
    rollback = (await instance.status()).rollback
    assert rollback is not None
    assert rollback.error is not None
    assert rollback.error.name == "WorkflowFatalError"
    assert "rolling back" in rollback.error.message


@pytest.mark.parametrize("wrong", [{"rollback": 7}, {"rollback": print, "rollback_config": {"retires": 1}}])
async def test_a_wrong_handler_or_config_is_refused_before_the_step_starts(world: World, wrong: Any) -> None:
    calls: list[int] = []

    async def run(event: Any, step: Any) -> None:
        await step.do("a", lambda: calls.append(1), **wrong)

    with pytest.raises(WorkflowFatalError, match="'a"):
        await world.result(run)
    assert calls == []


async def test_restart_after_a_rollback_starts_afresh(world: World) -> None:
    outcomes = iter([True, False])
    seen: list[str] = []

    async def run(event: Any, step: Any) -> str:
        await step.do("a", lambda: 1, rollback=lambda: seen.append("undone"))
        if next(outcomes):
            raise KeyError("gone")
        return "fine"

    instance = await world.start(run)
    with pytest.raises(KeyError):
        await instance.result(timeout=DEADLINE)
    await instance.restart()
    assert await instance.result(timeout=DEADLINE) == "fine"
    assert (await instance.status()).rollback is None
    assert seen == ["undone"]


async def test_handlers_of_parallel_steps_run_one_by_one_the_last_started_first(world: World) -> None:
    gates = {"slow": Gate(), "quick": Gate()}
    undone: list[str] = []
    running, most = 0, 0

    async def undo(rollback: RollbackContext) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10):
            await asyncio.sleep(0)
        undone.append(rollback.ctx.step.name)
        running -= 1

    async def run(event: Any, step: Any) -> None:
        await asyncio.gather(
            *(step.do(name, gate, rollback=undo) for name, gate in gates.items()),
            step.do("third", lambda: 1, rollback=undo),
        )
        raise KeyError("gone")

    instance = await world.start(run)
    for name in ("quick", "slow"):
        await gates[name].reached()
        gates[name].opened.set()
        await asyncio.sleep(0)
    with pytest.raises(KeyError):
        await instance.result(timeout=DEADLINE)
    assert undone == ["third", "quick", "slow"]
    assert most == 1


async def test_a_step_that_was_under_way_when_run_failed_is_undone_too(world: World) -> None:
    gate, seen = Gate(), []

    def undo(rollback: RollbackContext) -> None:
        seen.append((rollback.ctx.step.name, rollback.output))

    async def run(event: Any, step: Any) -> None:
        await step.do("done", lambda: "output", rollback=undo)
        working = asyncio.ensure_future(step.do("under way", gate, rollback=undo))
        await step.do("wait for it", gate.reached)
        raise KeyError(repr(working.done()))

    instance = await world.start(run)
    with pytest.raises(KeyError, match="False"):
        await instance.result(timeout=DEADLINE)
    assert seen == [("under way", None), ("done", "output")]
    assert gate.cancelled == 1


async def test_a_step_that_never_started_is_not_undone(world: World) -> None:
    seen: list[str] = []

    async def run(event: Any, step: Any) -> None:
        await step.do("a", lambda: 1, rollback=lambda: seen.append("a"))
        try:
            await step.do("refused", {"timeout": 0}, lambda: 1, rollback=lambda: seen.append("refused"))
        finally:
            step.do("never awaited", lambda: 1, rollback=lambda: seen.append("never awaited")).close()

    with pytest.raises(WorkflowFatalError):
        await world.result(run)
    assert seen == ["a"]


async def test_a_handler_is_cancelled_at_the_timeout_of_its_config(world: World) -> None:
    gate = Gate()

    async def undo(rollback: RollbackContext) -> None:
        await gate()

    async def run(event: Any, step: Any) -> None:
        await step.do("a", lambda: 1, rollback=undo, rollback_config=NO_RETRIES | {"timeout": 7})
        raise KeyError("gone")

    instance = await world.start(run)
    await gate.reached()
    status = await instance.status()
    assert (status.status, status.rollback) == ("running", None)
    world.advance(6.9)
    assert gate.cancelled == 0
    world.advance(0.1)
    with pytest.raises(KeyError):
        await instance.result(timeout=DEADLINE)
    rollback = (await instance.status()).rollback
    assert rollback is not None
    assert rollback.error is not None
    assert (rollback.outcome, rollback.error.name) == ("failed", "WorkflowTimeoutError")
    assert gate.cancelled == 1


async def test_a_termination_with_rollback_ends_terminated_over_a_crash(world: World) -> None:
    gate, seen = Gate(), []

    async def run(event: Any, step: Any) -> None:
        async def undo(rollback: RollbackContext) -> None:
            seen.append(rollback.ctx.attempt)
            if rollback.ctx.attempt == 1:
                await gate()

        await step.do("a", lambda: 1, rollback=undo)
        await step.sleep("nap", 1000)

    instance = await world.start(run)
    await world.parked(instance)
    await instance.terminate(rollback=True)
    await gate.reached()
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    with pytest.raises(InstanceTerminatedError):
        await world.run_through(instance)
    status = await instance.status()
    assert status.rollback is not None
    assert (status.status, status.rollback.outcome, seen) == ("terminated", "complete", [1, 2])


async def test_a_handler_takes_the_context_or_nothing_and_may_be_sync_or_async(world: World) -> None:
    seen: list[str] = []

    async def later() -> None:
        seen.append("async, nothing")

    async def with_context(rollback: RollbackContext) -> None:
        seen.append(f"async, {rollback.ctx.config['timeout']}")

    async def run(event: Any, step: Any) -> None:
        await step.do("a", {"timeout": 5}, lambda: 1, rollback=later)
        await step.do("b", lambda: 1, rollback=with_context, rollback_config={"timeout": 3})
        await step.do("c", lambda: 1, rollback=lambda: seen.append("sync, nothing"))
        raise KeyError("gone")

    with pytest.raises(KeyError):
        await world.result(run)
    assert seen == ["sync, nothing", "async, 0:00:03", "async, nothing"]
