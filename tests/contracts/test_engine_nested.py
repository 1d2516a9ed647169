"""Steps within steps on every engine: pauses, timeouts and retries of the outer one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynflow.errors import InvalidArgumentError, StepFailedError
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


# --- whose an inner step is ------------------------------------------------------------------------


async def test_inner_steps_of_different_outer_steps_are_different_ones_however_often_run_is_replayed(
    world: World,
) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        async def process(item: str) -> Any:
            return await step.do("fetch", noting(calls, item, f"result of {item}"))

        results = []
        for item in ("a", "b", "c"):
            results.append(await step.do(f"process {item}", lambda item=item: process(item)))
            await step.sleep("pause", 60)
        results.append(await step.do("fetch", noting(calls, "outside", "result outside")))
        return results

    instance = await world.start(run)
    expected = ["result of a", "result of b", "result of c", "result outside"]
    assert await world.run_through(instance) == expected
    assert calls == ["a", "b", "c", "outside"]
    steps = [(step.name, step.count) for step in (await instance.status()).steps if step.kind == "do"]
    assert steps == [
        ("process a", 1), ("fetch", 1), ("process b", 1), ("fetch", 1), ("process c", 1), ("fetch", 1), ("fetch", 1),
    ]  # fmt: skip


async def test_parallel_attempts_do_not_take_each_others_inner_results_after_a_crash(world: World) -> None:
    gates = {"slow": Gate(), "quick": Gate()}

    async def run(event: Any, step: Any) -> Any:
        async def outer(name: str) -> Any:
            inner = await step.do("inner", lambda: f"inner of {name}")
            if name == "slow":
                await gates["slow"]()
            return inner

        return await asyncio.gather(
            *(step.do(name, quick(1, 0), lambda name=name: outer(name)) for name in ("quick", "slow"))
        )

    instance = await world.start(run)
    await gates["slow"].reached()
    await world.saw(instance, "step.completed", 3)  # both inner ones, and the quick outer one
    await world.reopen()
    gates["slow"].opened.set()
    instance = await world.engine.binding("run").get(instance.id)
    assert await instance.result(timeout=DEADLINE) == ["inner of quick", "inner of slow"]


@pytest.mark.parametrize("delay", [0, 10])
async def test_a_second_attempt_finds_what_the_first_one_did_parked_or_not(world: World, delay: int) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        async def outer(ctx: StepContext) -> Any:
            found = [await step.do("same", noting(calls, f"{number}", number)) for number in range(2)]
            await step.sleep("nap", 0)
            if ctx.attempt == 1:
                raise ConnectionError
            return found

        return await step.do("outer", quick(1, delay), outer)

    assert await world.run_through(await world.start(run)) == [0, 1]
    assert calls == ["0", "1"]


async def test_steps_nest_in_steps_that_nest(world: World) -> None:
    seen: list[Any] = []

    async def run(event: Any, step: Any) -> Any:
        def deepest(ctx: StepContext) -> int:
            seen.append((ctx.step.name, ctx.step.count))
            return 1

        async def deep(ctx: StepContext) -> Any:
            seen.append((ctx.step.name, ctx.step.count))
            return await step.do("same", deepest)

        async def middle() -> Any:
            return [await step.do("same", deep), await step.do("same", deep)]

        found = await step.do("same", middle)
        await step.sleep("nap", 1)
        return [found, await step.do("same", lambda: "second at the top")]

    instance = await world.start(run)
    assert await world.run_through(instance) == [[1, 1], "second at the top"]
    assert seen == [("same", 1), ("same", 1), ("same", 2), ("same", 1)]
    told = [event.data["step"] async for event in instance.subscribe(types={"step.started"})]
    assert told == ["same"] * 6


async def test_restart_from_an_inner_step_takes_it_where_there_is_one_of_the_name(world: World) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        async def outer(name: str) -> Any:
            await step.do("shared", noting(calls, f"shared of {name}"))
            return await step.do(f"inner of {name}", noting(calls, f"inner of {name}", name))

        return [await step.do(name, lambda name=name: outer(name)) for name in ("a", "b")]

    instance = await world.start(run)
    assert await instance.result(timeout=DEADLINE) == ["a", "b"]
    before = await instance.status()
    with pytest.raises(InvalidArgumentError, match="more than one step 'shared'"):
        await instance.restart(from_step=("shared", 1))
    assert await instance.status() == before
    await instance.restart(from_step=("inner of b", 1))
    assert await instance.result(timeout=DEADLINE) == ["a", "b"]
    await instance.restart(from_step=("b", 1))
    assert await instance.result(timeout=DEADLINE) == ["a", "b"]
    assert calls == ["shared of a", "inner of a", "shared of b", "inner of b", "shared of b", "inner of b"]


async def test_an_inner_step_that_fails_for_good_says_its_own_name(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        class Local(Exception):  # noqa: N818
            pass

        def fails() -> None:
            raise Local("no")

        async def outer() -> Any:
            try:
                await step.do("inner", quick(0, 0), fails)
            except StepFailedError as error:
                return [error.step, str(error)]

        return await step.do("outer", outer)

    assert await world.result(run) == ["inner", "step 'inner' failed after 1 attempt(s): Local: no"]
