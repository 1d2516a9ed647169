"""Forking an instance before one of its steps, on every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dynflow.errors import InstanceExistsError, InstanceNotFoundError, InvalidArgumentError
from dynflow.router import METADATA_KEY, DynamicWorkflowBinding
from tests.engine_world import DEADLINE, Gate, World, noting, quick, step_of


def numbering(calls: list[str]) -> Callable[[Any, Any], Any]:
    """Return a workflow of four steps; each gives how many had been performed in all."""

    async def run(event: Any, step: Any) -> Any:
        def work(ctx: Any) -> int:
            calls.append(ctx.step.name)
            return len(calls)

        return [event.payload, [await step.do(name, work) for name in ("a", "b", "b", "c")]]

    return run


async def test_a_fork_has_what_came_before_its_step_and_leaves_the_other_alone(world: World) -> None:
    calls: list[str] = []
    source = await world.start(numbering(calls), params={"n": 1}, id="source")
    assert await source.result(timeout=DEADLINE) == [{"n": 1}, [1, 2, 3, 4]]
    before = await source.status()
    binding = world.engine.binding("run")
    same = await binding.fork("source", before=("b", 2))
    assert await same.result(timeout=DEADLINE) == [{"n": 1}, [1, 2, 5, 6]]
    other = await binding.fork("source", before=("b", 2, "do"), id="other", params={"n": 2})
    assert await other.result(timeout=DEADLINE) == [{"n": 2}, [1, 2, 7, 8]]
    assert await source.status() == before
    forked = [event for _, event in world.history if event.type == "workflow.forked"]
    assert [event.event_id for event in forked] == [2, 2]
    assert forked[0].data == {"from": "source", "step": "b", "count": 2, "kind": "do", "kept": 2}
    kept = (await same.status()).steps[:2]
    assert kept == before.steps[:2]
    await world.check_histories()


async def test_a_fork_of_a_fork_and_its_restart_are_as_any_instances(world: World) -> None:
    calls: list[str] = []
    source = await world.start(numbering(calls), id="source")
    await source.result(timeout=DEADLINE)
    binding = world.engine.binding("run")
    first = await binding.fork("source", before=("b", 1), id="first")
    assert (await first.result(timeout=DEADLINE))[1] == [1, 5, 6, 7]
    second = await binding.fork("first", before=("c", 1), id="second")
    assert (await second.result(timeout=DEADLINE))[1] == [1, 5, 6, 8]
    await source.delete()
    await second.restart(from_step=("b", 2))
    assert (await second.result(timeout=DEADLINE))[1] == [1, 5, 9, 10]
    await second.restart()
    assert (await second.result(timeout=DEADLINE))[1] == [11, 12, 13, 14]


async def test_a_fork_asks_for_events_anew_and_sleeps_no_more(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.sleep("rest", "1 hour")
        got = await step.wait_for_event("gate", type="go")
        return [got.payload, await step.do("deploy", lambda: "deployed")]

    source = await world.start(run, id="source")
    await world.parked(source)
    world.advance(3600)
    await world.saw(source, "wait.started")
    await source.send_event(type="go", payload="theirs")
    assert await source.result(timeout=DEADLINE) == ["theirs", "deployed"]
    fork = await world.engine.binding("run").fork("source", before=("deploy", 1))
    status = await world.parked(fork)
    assert step_of(status, "rest").status == "complete"
    assert step_of(status, "gate").status == "waiting"
    await fork.send_event(type="go", payload="ours")
    assert await fork.result(timeout=DEADLINE) == ["ours", "deployed"]


async def test_failures_that_were_caught_come_along_and_attempts_with_them(world: World) -> None:
    calls: list[str] = []

    def fails() -> None:
        calls.append("fails")
        raise ValueError("no")

    async def run(event: Any, step: Any) -> Any:
        caught = ""
        try:
            await step.do("flaky", quick(1, 0), fails)
        except ValueError as error:
            caught = str(error)
        return [caught, await step.do("after", noting(calls, "after", 1))]

    source = await world.start(run, id="source")
    assert await source.result(timeout=DEADLINE) == ["no", 1]
    fork = await world.engine.binding("run").fork("source", before=("after", 1))
    assert await fork.result(timeout=DEADLINE) == ["no", 1]
    assert calls == ["fails", "fails", "after", "after"]
    assert step_of(await fork.status(), "flaky") == step_of(await source.status(), "flaky")


async def test_what_has_not_ended_yet_is_performed_by_the_fork_itself(world: World) -> None:
    gate, calls = Gate(), list[str]()

    async def run(event: Any, step: Any) -> Any:
        await step.do("quick", noting(calls, "quick"))
        if event.payload["forked"]:
            return await step.do("slow", noting(calls, "slow", "mine"))
        return await step.do("slow", gate)

    source = await world.start(run, params={"forked": False}, id="source")
    await gate.reached()
    fork = await world.engine.binding("run").fork("source", before=("slow", 1), params={"forked": True})
    assert await fork.result(timeout=DEADLINE) == "mine"
    assert calls == ["quick", "slow"]
    gate.opened.set()
    await source.result(timeout=DEADLINE)


async def test_a_step_that_the_place_is_within_is_performed_again(world: World) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        async def outer() -> list[str]:
            return [await step.do(name, noting(calls, name, name)) for name in ("first", "second")]

        return await step.do("outer", outer)

    source = await world.start(run, id="source")
    await source.result(timeout=DEADLINE)
    fork = await world.engine.binding("run").fork("source", before=("second", 1))
    assert await fork.result(timeout=DEADLINE) == ["first", "second"]
    assert calls == ["first", "second", "second"]


async def test_a_fork_is_there_after_a_crash_and_refused_where_it_cannot_be(world: World) -> None:
    calls: list[str] = []
    run = numbering(calls)
    source = await world.start(run, id="source")
    await source.result(timeout=DEADLINE)
    binding = world.engine.binding("run")
    for step in (("nothing", 1), ("b", 3), ("a", 1, "sleep")):
        with pytest.raises(InvalidArgumentError, match="no step"):
            await binding.fork("source", before=step, id="made")
    with pytest.raises(InvalidArgumentError):
        await binding.fork("source", before="a")
    with pytest.raises(InstanceNotFoundError):
        await binding.fork("nobody", before=("a", 1), id="made")
    with pytest.raises(InstanceExistsError):
        await binding.fork("source", before=("b", 1), id="source")
    with pytest.raises(InstanceNotFoundError):
        await binding.get("made")
    await binding.fork("source", before=("c", 1), id="made")
    await world.reopen()
    binding = world.register(run)
    assert (await (await binding.get("made")).result(timeout=DEADLINE))[1][:3] == [1, 2, 3]


async def test_a_tenant_forks_its_own_instances_alone_and_in_its_own_envelope(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.do("first", lambda: 1)
        return [event.payload, await step.do("second", lambda: 2)]

    raw = world.register(run)
    ours, theirs = (DynamicWorkflowBinding(raw, {"tenant_id": name}) for name in ("ours", "theirs"))
    source = await ours.create(id="source", params="mine")
    await source.result(timeout=DEADLINE)
    with pytest.raises(InstanceNotFoundError):
        await theirs.fork("source", before=("second", 1))
    fork = await ours.fork("source", before=("second", 1), params={METADATA_KEY: {"tenant_id": "theirs"}})
    payload, _ = await fork.result(timeout=DEADLINE)
    assert payload[METADATA_KEY] == {"tenant_id": "ours"}
    with pytest.raises(InstanceNotFoundError):
        await theirs.get(fork.id)
