"""Steps within steps on every engine: pauses, timeouts and retries of the outer one."""

from __future__ import annotations

from typing import Any

import pytest

from dynflow.types import StepContext
from tests.engine_world import DEADLINE, Gate, World, noting, quick, step_of


async def test_what_an_inner_step_returned_is_kept_for_the_next_attempt_of_the_outer_one(
    world: World,
) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        async def outer(ctx: StepContext) -> Any:
            inner = await step.do("inner", noting(calls, f"inner in attempt {ctx.attempt}", "in"))
            if ctx.attempt == 1:
                raise ConnectionError
            return inner

        return await step.do("outer", quick(1, 10), outer)

    assert await world.run_through(await world.start(run)) == "in"
    assert calls == ["inner in attempt 1"]


async def test_an_inner_step_that_the_timeout_of_the_outer_cut_off_is_made_again(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        async def outer(ctx: StepContext) -> Any:
            return await step.do("inner", gate if ctx.attempt == 1 else lambda: f"attempt {ctx.attempt}")

        return await step.do("outer", quick(2, 10) | {"timeout": 60}, outer)

    instance = await world.start(run)
    await gate.reached()
    world.advance(60)
    await world.parked(instance)
    world.advance(10)
    assert await instance.result(timeout=DEADLINE) == "attempt 2"
    assert gate.cancelled == 1


async def test_an_inner_wait_that_the_timeout_of_the_outer_cut_off_takes_the_next_event(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        async def outer(ctx: StepContext) -> Any:
            return [ctx.attempt, (await step.wait_for_event("w", type="go")).payload]

        return await step.do("outer", quick(2, 10) | {"timeout": 60}, outer)

    instance = await world.start(run)
    await world.saw(instance, "wait.started")
    world.advance(60)
    await world.parked(instance)
    world.advance(10)
    await world.saw(instance, "attempt.started", 2)
    await instance.send_event(type="go", payload="for the second")
    assert await instance.result(timeout=DEADLINE) == [2, "for the second"]


async def test_a_pause_lets_an_attempt_with_steps_of_its_own_finish(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        async def outer() -> Any:
            await gate()
            return await step.do("inner", lambda: "in")

        return [await step.do("outer", outer), await step.do("after", lambda: "out")]

    instance = await world.start(run)
    await gate.reached()
    await instance.pause()
    gate.opened.set()
    status = await world.status(instance, "paused")
    assert step_of(status, "outer").status == "complete"
    assert [step.name for step in status.steps] == ["outer", "inner"]
    await instance.resume()
    assert await instance.result(timeout=DEADLINE) == ["in", "out"]


@pytest.mark.parametrize("how", ["terminate", "restart", "crash"])
async def test_inner_steps_end_with_the_outer_one(world: World, how: str) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        async def outer() -> Any:
            return await step.do("inner", gate)

        return await step.do("outer", outer)

    instance = await world.start(run)
    await gate.reached()
    gate.entered.clear()
    if how == "crash":
        await world.reopen()
        instance = await world.engine.binding("run").get(instance.id)
    else:
        await getattr(instance, how)()
    assert gate.cancelled == 1
    if how == "terminate":
        return
    await gate.reached()
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == "through"


async def test_an_inner_step_fails_the_outer_one_only_where_it_is_not_caught(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        async def outer() -> Any:
            try:
                await step.do("inner", quick(0, 0), lambda: 1 / 0)
            except ZeroDivisionError as error:
                return [str(error), error.__notes__]

        return await step.do("outer", outer)

    assert await world.result(run) == ["division by zero", ["step 'inner' failed after 1 attempt(s)"]]
