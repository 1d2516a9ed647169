"""Creating, following and controlling instances on every engine: workflows.md sections 5 and 8."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from dynflow.errors import (
    EngineClosedError,
    IllegalMoveError,
    InstanceExistsError,
    InstanceNotFoundError,
    InstanceTerminatedError,
    InvalidArgumentError,
    InvalidInstanceIdError,
    UnserializableError,
    ValueTooLargeError,
)
from tests.engine_world import DEADLINE, Gate, World, noting, step_of


async def one(event: Any, step: Any) -> Any:
    return await step.do("one", lambda: 1)


async def waits(event: Any, step: Any) -> Any:
    first = await step.do("first", lambda: 1)
    got = await step.wait_for_event("w", type="go")
    return [first, got.payload]


# --- create, get, delete -------------------------------------------------------------------------


async def test_create_makes_an_id_up_and_get_finds_it(world: World) -> None:
    binding = world.register(one)
    made = await binding.create()
    assert (await binding.get(made.id)).id == made.id
    assert await made.result(timeout=DEADLINE) == 1


@pytest.mark.parametrize("id_", ["", "-a", "a b", "x" * 101, "a/b", 7, "ä", "a\n", b"a"])
async def test_an_invalid_id_is_refused_everywhere(world: World, id_: Any) -> None:
    binding = world.register(one)
    for call in (
        lambda: binding.create(id=id_),
        lambda: binding.get(id_),
        lambda: binding.delete_batch([id_]),
    ):
        with pytest.raises(InvalidInstanceIdError):
            await call()
    with pytest.raises(InvalidInstanceIdError):
        await binding.create_batch([{"id": "fine"}, {"id": id_}])
    with pytest.raises(InstanceNotFoundError):
        await binding.get("fine")  # nothing of a refused batch was made


async def test_ids_may_be_long_and_strange(world: World) -> None:
    binding = world.register(one)
    for id_ in ("0", "_", "a-", "x" * 100, "None"):
        assert await (await binding.create(id=id_)).result(timeout=DEADLINE) == 1


async def test_a_duplicate_id_is_refused_even_after_the_end(world: World) -> None:
    binding = world.register(one)
    instance = await binding.create(id="a")
    with pytest.raises(InstanceExistsError, match="'a'"):
        await binding.create(id="a")
    await instance.result(timeout=DEADLINE)
    with pytest.raises(InstanceExistsError):
        await binding.create(id="a")


async def test_of_many_concurrent_creators_one_wins(world: World) -> None:
    binding = world.register(one)
    results = await asyncio.gather(*(binding.create(id="a") for _ in range(50)), return_exceptions=True)
    assert sum(isinstance(result, InstanceExistsError) for result in results) == 49


async def test_the_same_id_in_two_workflows_is_two_instances(world: World) -> None:
    left, right = world.register(one, "left"), world.register(waits, "right")
    await left.create(id="a")
    await right.create(id="a")
    assert await (await left.get("a")).result(timeout=DEADLINE) == 1
    assert (await (await right.get("a")).status()).status != "complete"


@pytest.mark.parametrize("params", [object(), {1: 2}, {"a": {"b": object()}}])
async def test_params_must_be_plain_data(world: World, params: Any) -> None:
    with pytest.raises(UnserializableError, match="params"):
        await world.register(one).create(id="a", params=params)
    with pytest.raises(InstanceNotFoundError):
        await world.engine.binding("one").get("a")


async def test_params_and_payloads_have_the_result_limit(world: World) -> None:
    binding = world.register(waits)
    with pytest.raises(ValueTooLargeError, match=r"params.*1,048,576"):
        await binding.create(params="x" * 1024 * 1024)
    instance = await binding.create(params="x" * (1024 * 1024 - 2))
    with pytest.raises(ValueTooLargeError, match="payload"):
        await instance.send_event(type="go", payload="x" * 1024 * 1024)


async def test_a_batch_leaves_existing_ids_out(world: World) -> None:
    binding = world.register(one)
    await binding.create(id="b")
    made = await binding.create_batch([{"id": "a"}, {"id": "b"}, {"params": {"x": 1}}, {"id": "a"}])
    assert len(made) == 2
    assert made[0].id == "a"
    assert [await instance.result(timeout=DEADLINE) for instance in made] == [1, 1]


@pytest.mark.parametrize("batch", [[], [{}] * 101, {}, "ab", None, [None], [{"name": 1}], [7]])
async def test_a_wrong_batch_is_refused(world: World, batch: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        await world.register(one).create_batch(batch)


async def test_delete_removes_everything_and_frees_the_id(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        await step.do("gate", gate)

    binding = world.register(run)
    instance = await binding.create(id="a")
    await gate.reached()
    await instance.delete()
    assert gate.cancelled == 1  # its attempt was running
    for call in (instance.status, instance.delete, instance.pause, instance.terminate, instance.restart):
        with pytest.raises(InstanceNotFoundError):
            await call()
    again = await binding.create(id="a")
    await world.status(again, "running")
    gate.opened.set()
    await again.result(timeout=DEADLINE)
    assert (await anext(again.subscribe())).event_id == 1


async def test_nothing_of_a_deleted_instance_comes_back_with_its_id(world: World) -> None:
    binding = world.register(waits)
    instance = await binding.create(id="a", params={"old": 1})
    await world.parked(instance)
    await instance.pause()
    await instance.send_event(type="go", payload="old")
    await instance.delete()
    again = await binding.create(id="a")
    status = await world.parked(again, 2)
    assert [(step.name, step.status) for step in status.steps] == [("first", "complete"), ("w", "waiting")]
    await again.send_event(type="go", payload="new")
    assert await again.result(timeout=DEADLINE) == [1, "new"]
    assert [event.type async for event in again.subscribe()].count("workflow.queued") == 1


async def test_what_create_has_returned_is_there_after_a_crash(engine_factory: Any) -> None:
    gate = Gate()

    async def blocks(event: Any, step: Any) -> None:
        await step.do("gate", gate)

    async with World(engine_factory, concurrency=1) as world:
        await world.start(blocks)
        await gate.reached()
        binding = world.register(one)
        made = [await binding.create(), *await binding.create_batch([{"id": "a"}, {"id": "b"}])]
        gate.opened.set()
        await world.reopen()
        for instance in made:
            again = await world.engine.binding("one").get(instance.id)
            assert await again.result(timeout=DEADLINE) == 1


async def test_a_batch_takes_the_options_of_create(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return event.payload

    batch = [{"id": "a", "params": {"n": 1}, "retention": "1 hour"}, {}]
    made = await world.register(run).create_batch(batch)
    assert [await instance.result(timeout=DEADLINE) for instance in made] == [{"n": 1}, {}]
    world.advance(3600)
    await parked_gone(made[0])
    assert (await made[1].status()).status == "complete"


async def test_retention_is_thirty_days_where_nobody_says_otherwise(world: World) -> None:
    instance = await world.register(one).create()
    await instance.result(timeout=DEADLINE)
    world.advance(timedelta(days=30, seconds=-1))
    assert (await instance.status()).status == "complete"
    world.advance(1)
    await parked_gone(instance)


async def test_delete_batch_says_which_existed(world: World) -> None:
    binding = world.register(one)
    await binding.create(id="a")
    await binding.create(id="b")
    assert await binding.delete_batch(["a", "nobody", "b", "a"]) == ["a", "b"]
    with pytest.raises(InvalidArgumentError):
        await binding.delete_batch([])
    with pytest.raises(InvalidArgumentError):
        await binding.delete_batch("ab")


async def test_ended_instances_go_after_their_retention(world: World) -> None:
    async def fails(event: Any, step: Any) -> None:
        raise ValueError("no")

    good, bad, waiting = world.register(one), world.register(fails), world.register(waits)
    by_outcome = {"complete": "1 hour", "errored": "2 hours"}
    short = await good.create(retention=by_outcome)
    failed = await bad.create(retention=by_outcome)
    default = await good.create()
    parked = await waiting.create(retention=1)
    for instance in (short, default):
        await instance.result(timeout=DEADLINE)
    await world.status(failed, "errored")
    await world.parked(parked)

    async def kept() -> list[bool]:
        found = []
        for instance in (short, failed, default, parked):
            try:
                await instance.status()
            except InstanceNotFoundError:
                found.append(False)
            else:
                found.append(True)
        return found

    for seconds, expected in ((3599, [1, 1, 1, 1]), (1, [0, 1, 1, 1]), (3600, [0, 0, 1, 1])):
        world.advance(seconds)
        assert await kept() == [bool(each) for each in expected]
    await parked.terminate()
    world.advance(timedelta(days=31))
    await parked_gone(parked)
    assert await kept() == [False] * 4


async def parked_gone(instance: Any) -> None:
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                await instance.status()
            except InstanceNotFoundError:
                return


@pytest.mark.parametrize("retention", ["soon", -1, {"finished": 1}, {"complete": "x"}])
async def test_a_wrong_retention_is_refused(world: World, retention: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="retention"):
        await world.register(one).create(retention=retention)


# --- pause and resume ----------------------------------------------------------------------------


async def test_pause_lets_the_running_attempt_finish_and_starts_no_other(world: World) -> None:
    gate = Gate()
    calls: list[int] = []

    async def run(event: Any, step: Any) -> Any:
        await step.do("first", gate)
        return await step.do("second", noting(calls, 1, "second"))

    instance = await world.start(run)
    await gate.reached()
    await instance.pause()
    assert (await instance.status()).status == "waiting_for_pause"
    gate.opened.set()
    status = await world.status(instance, "paused")
    assert step_of(status, "first").status == "complete"
    assert calls == []
    await instance.pause()  # a no-op
    await instance.resume()
    assert await instance.result(timeout=DEADLINE) == "second"
    assert gate.times == 1


async def test_a_pause_that_takes_effect_with_a_restart_is_told_too(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        return await step.do("first", gate)

    instance = await world.start(run)
    await gate.reached()
    await instance.pause()
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    assert (await instance.status()).status == "paused"
    assert world.kinds(instance)["workflow.paused"] == 1
    gate.opened.set()
    await instance.resume()
    await instance.result(timeout=DEADLINE)


async def test_resume_before_the_pause_takes_effect_cancels_it(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        await step.do("first", gate)
        return await step.do("second", lambda: 2)

    instance = await world.start(run)
    await gate.reached()
    await instance.pause()
    await instance.resume()
    assert (await instance.status()).status == "running"
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == 2
    assert world.kinds(instance)["workflow.paused"] == 0


async def test_resume_shifts_deadlines_by_the_time_paused(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        results = await asyncio.gather(
            step.sleep("nap", 100), step.wait_for_event("w", type="go", timeout=200), return_exceptions=True
        )
        return [type(result).__name__ for result in results]

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(60)
    await instance.pause()
    assert (await instance.status()).status == "paused"
    world.advance(1000)
    assert (await instance.status()).status == "paused"
    await instance.resume()
    status = await world.parked(instance, 2)
    assert step_of(status, "nap").deadline == world.clock.now() + timedelta(seconds=40)
    assert step_of(status, "w").deadline == world.clock.now() + timedelta(seconds=140)
    world.advance(40)
    await world.saw(instance, "sleep.completed")
    assert await world.run_through(instance) == ["NoneType", "WorkflowTimeoutError"]


async def test_a_retry_delay_is_shifted_by_a_pause_too(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return await step.do(
            "flaky", {"retries": {"limit": 1, "delay": 100}}, lambda ctx: 1 // (ctx.attempt - 1)
        )

    instance = await world.start(run)
    await world.parked(instance)
    await instance.pause()
    world.advance(500)
    await instance.resume()
    await world.parked(instance, 2)
    world.advance(99)
    assert (await instance.status()).status == "waiting"
    world.advance(1)
    assert await instance.result(timeout=DEADLINE) == 1


async def test_pause_cuts_waits_of_a_running_instance_at_once(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        return await asyncio.gather(step.sleep("nap", 10), step.do("gate", gate))

    instance = await world.start(run)
    await gate.reached()
    await world.saw(instance, "sleep.started")
    await instance.pause()
    world.advance(50)  # the nap is due, but paused
    gate.opened.set()
    await world.status(instance, "paused")
    assert world.kinds(instance)["sleep.completed"] == 0
    await instance.resume()
    assert await world.run_through(instance) == [None, "through"]


async def test_a_wait_that_came_due_under_a_cancelled_pause_ends(world: World) -> None:
    gate, napped = Gate(), asyncio.Event()

    async def run(event: Any, step: Any) -> Any:
        async def nap() -> None:
            await step.sleep("nap", 10)
            napped.set()

        await asyncio.gather(nap(), step.do("gate", gate))

    instance = await world.start(run)
    await gate.reached()
    await world.saw(instance, "sleep.started")
    await instance.pause()
    world.advance(50)
    await instance.resume()
    await asyncio.wait_for(napped.wait(), DEADLINE)
    gate.opened.set()
    await instance.result(timeout=DEADLINE)


async def test_events_to_a_paused_instance_are_delivered_after_the_resume_in_order(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return [(await step.wait_for_event("w", type="go")).payload for _ in range(3)]

    instance = await world.start(run)
    await world.parked(instance)
    await instance.pause()
    for number in range(3):
        await instance.send_event(type="go", payload=number)
    status = await instance.status()
    assert (status.status, step_of(status, "w").status) == ("paused", "waiting")
    assert world.kinds(instance)["wait.completed"] == 0
    await instance.resume()
    assert await instance.result(timeout=DEADLINE) == [0, 1, 2]


async def test_an_event_sent_before_a_pause_took_effect_reaches_the_branch_after_the_resume(
    world: World,
) -> None:
    gate, got = Gate(), asyncio.Event()

    async def run(event: Any, step: Any) -> Any:
        async def branch() -> Any:
            received = await step.wait_for_event("w", type="go")
            got.set()
            return received.payload

        return await asyncio.gather(branch(), step.do("gate", gate))

    instance = await world.start(run)
    await gate.reached()
    await world.saw(instance, "wait.started")
    await instance.pause()
    await instance.send_event(type="go", payload=1)
    assert not got.is_set()
    await instance.resume()
    await asyncio.wait_for(got.wait(), DEADLINE)
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == [1, "through"]


async def test_a_queued_instance_pauses_at_once_and_starts_after_the_resume(engine_factory: Any) -> None:
    gate = Gate()

    async def blocks(event: Any, step: Any) -> None:
        await step.do("gate", gate)

    async with World(engine_factory, concurrency=1) as world:
        blocker = await world.start(blocks)
        await gate.reached()
        instance = await world.start(one)
        await instance.pause()
        assert (await instance.status()).status == "paused"
        gate.opened.set()
        await blocker.result(timeout=DEADLINE)
        assert (await instance.status()).status == "paused"
        await instance.resume()
        assert await instance.result(timeout=DEADLINE) == 1
        assert world.kinds(instance)["workflow.started"] == 1


async def test_a_pause_survives_a_restart_of_the_engine(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        await step.do("first", gate)
        return "done"

    instance = await world.start(run)
    await gate.reached()
    await instance.pause()
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    assert (await instance.status()).status == "paused"
    gate.opened.set()
    await instance.resume()
    assert await instance.result(timeout=DEADLINE) == "done"


async def test_pause_and_resume_of_a_finished_instance_do_nothing(world: World) -> None:
    instance = await world.start(one)
    await instance.result(timeout=DEADLINE)
    await instance.pause()
    await instance.resume()
    assert (await instance.status()).status == "complete"


async def test_pauses_and_resumes_at_any_moment_lose_nothing(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        total = 0
        for _ in range(15):
            total += await step.do("add", lambda: 1)
            await step.sleep("nap", 0)
        return total

    binding = world.register(run)
    instances = [await binding.create() for _ in range(10)]
    rounds = max(3, world.many // 66)

    async def disturb(instance: Any, spins: int) -> None:
        for round_ in range(rounds):
            for _ in range((spins * round_) % 11):
                await asyncio.sleep(0)
            await instance.pause()
            for _ in range((spins + round_) % 5):
                await asyncio.sleep(0)
            await instance.resume()

    await asyncio.gather(*(disturb(instance, spins) for spins, instance in enumerate(instances)))
    for instance in instances:
        assert await instance.result(timeout=DEADLINE) == 15


# --- terminate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["queued", "running", "waiting", "waiting_for_pause", "paused"])
async def test_terminate_works_from_every_unfinished_status(engine_factory: Any, state: str) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        await step.do("gate", gate)
        await step.sleep("nap", 60)

    async with World(engine_factory, concurrency=1) as world:
        instance = await world.start(run)
        await gate.reached()
        if state == "queued":
            instance = await world.engine.binding("run").create()
        elif state == "waiting_for_pause":
            await instance.pause()
        elif state in {"waiting", "paused"}:
            gate.opened.set()
            await world.parked(instance)
            if state == "paused":
                await instance.pause()
        assert (await instance.status()).status == state
        await instance.terminate()
        assert (await instance.status()).status == "terminated"
        assert gate.cancelled == (state in {"running", "waiting_for_pause"})
        with pytest.raises(InstanceTerminatedError):
            await instance.result(timeout=DEADLINE)
        with pytest.raises(IllegalMoveError, match="terminated"):
            await instance.terminate()
        for _ in range(100):
            await asyncio.sleep(0)
        assert world.order(instance)[-1] == "workflow.terminated"


async def test_a_finished_instance_cannot_be_terminated(world: World) -> None:
    instance = await world.start(one)
    await instance.result(timeout=DEADLINE)
    with pytest.raises(IllegalMoveError, match="complete"):
        await instance.terminate()
    assert (await instance.status()).status == "complete"


async def test_a_step_that_terminates_its_own_instance(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        async def leave() -> None:
            await (await world.engine.binding("run").get(event.instance_id)).terminate()

        await step.do("leave", leave)

    instance = await world.start(run)
    assert (await world.status(instance, "terminated")).output is None


# --- restart -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", ["running", "waiting", "waiting_for_pause", "paused", "complete", "errored", "terminated"]
)
async def test_restart_forgets_everything_but_id_and_params(world: World, state: str) -> None:
    gate = Gate()
    calls: list[int] = []

    async def run(event: Any, step: Any) -> Any:
        calls.append(await step.do("first", lambda: len(calls)))
        await step.do("gate", gate)
        got = await step.wait_for_event("w", type="go")
        if got.payload == "fail":
            raise ValueError("as told")
        return [event.payload, got.payload]

    instance = await world.start(run, {"kept": 1}, id="a")
    await gate.reached()
    await instance.send_event(type="other", payload="forgotten")
    if state == "waiting_for_pause":
        await instance.pause()
    elif state != "running":
        gate.opened.set()
        await world.parked(instance)
    if state == "paused":
        await instance.pause()
    elif state == "complete":
        await instance.send_event(type="go", payload="old")
        await instance.result(timeout=DEADLINE)
    elif state == "errored":
        await instance.send_event(type="go", payload="fail")
        await world.status(instance, "errored")
    elif state == "terminated":
        await instance.terminate()
    assert (await instance.status()).status == state
    before = len(calls)
    await instance.restart()
    gate.opened.set()
    await world.saw(instance, "workflow.started", 2)
    await world.status(instance, "waiting")
    assert len(calls) > before
    assert (await instance.status()).output is None
    await instance.send_event(type="go", payload="new")
    assert await instance.result(timeout=DEADLINE) == [{"kept": 1}, "new"]


async def test_restart_from_a_step_keeps_what_started_before_it(world: World) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        def work(ctx: Any) -> int:
            calls.append(ctx.step.name)
            return len(calls)

        return [await step.do(name, work) for name in ("a", "b", "b", "c")]

    instance = await world.start(run)
    assert await instance.result(timeout=DEADLINE) == [1, 2, 3, 4]
    await instance.restart(from_step=("b", 2))
    assert await instance.result(timeout=DEADLINE) == [1, 2, 5, 6]
    assert calls == ["a", "b", "b", "c", "b", "c"]


async def test_a_queued_instance_that_is_restarted_runs_once(engine_factory: Any) -> None:
    gate, ran = Gate(), []

    async def run(event: Any, step: Any) -> None:
        ran.append(event.instance_id)
        await step.do("gate", gate)

    async with World(engine_factory, concurrency=1) as world:
        await world.start(run, id="first")
        await gate.reached()
        queued = await world.engine.binding("run").create(id="queued")
        await queued.restart()
        assert (await queued.status()).status == "queued"
        gate.opened.set()
        await queued.result(timeout=DEADLINE)
    assert ran == ["first", "queued"]


async def test_restart_from_a_step_goes_by_the_order_of_starts_and_not_of_ends(world: World) -> None:
    gates, calls = {"slow": Gate(), "quick": Gate()}, []

    async def run(event: Any, step: Any) -> Any:
        async def work(ctx: Any) -> str:
            calls.append(ctx.step.name)
            await gates[ctx.step.name]()
            return f"{ctx.step.name} {len(calls)}"

        results = await asyncio.gather(step.do("slow", work), step.do("quick", work))
        return [*results, await step.do("after", lambda: calls.append("after"))]

    instance = await world.start(run)
    for name in ("quick", "slow"):  # the second one to start ends first
        await gates[name].reached()
        gates[name].opened.set()
        await world.saw(instance, "step.completed", len(calls) - 1 if name == "quick" else 3)
    await instance.result(timeout=DEADLINE)
    await instance.restart(from_step=("quick", 1))
    assert await instance.result(timeout=DEADLINE) == ["slow 2", "quick 4", None]
    assert calls == ["slow", "quick", "after", "quick", "after"]


@pytest.mark.parametrize("from_step", [None, ("first", 1), ("start", 1, "wait_for_event")])
async def test_restart_forgets_events_that_nobody_has_taken(world: World, from_step: Any) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.do("first", lambda: 1)
        await step.wait_for_event("start", type="start")
        return (await step.wait_for_event("w", type="go")).payload

    instance = await world.start(run)
    await world.parked(instance)
    await instance.send_event(type="go", payload="old")
    await instance.restart(from_step=from_step)
    await world.parked(instance, 2)
    await instance.send_event(type="start")
    await instance.send_event(type="go", payload="new")
    assert await instance.result(timeout=DEADLINE) == "new"


async def test_restart_from_a_step_forgets_buffered_events_and_the_end(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        first = await step.do("first", lambda: 1)
        got = await step.wait_for_event("w", type="go")
        await step.do("second", lambda: 1)
        return [first, got.payload]

    instance = await world.start(run)
    await world.parked(instance)
    for payload in ("taken", "left"):
        await instance.send_event(type="go", payload=payload)
    await instance.result(timeout=DEADLINE)
    await instance.restart(from_step=("w", 1, "wait_for_event"))
    status = await world.parked(instance, 2)
    assert (status.output, status.ended_at) == (None, None)
    assert [step.name for step in status.steps] == ["first", "w"]
    await instance.send_event(type="go", payload="new")
    assert await instance.result(timeout=DEADLINE) == [1, "new"]


@pytest.mark.parametrize("meanwhile", ["time passes", "it is terminated"])
async def test_restart_from_a_step_gives_earlier_waits_what_came_in_a_pause(
    world: World, meanwhile: str
) -> None:
    """Their events were acknowledged, and their deadlines stood still."""

    async def run(event: Any, step: Any) -> Any:
        waits = (step.wait_for_event(name, type="go", timeout=60) for name in ("early", "late"))
        early, _, late = await asyncio.gather(next(waits), step.do("between", lambda: 1), next(waits))
        return [early.payload, late.payload]

    instance = await world.start(run)
    await world.parked(instance)
    await instance.pause()
    for payload in ("first", "second"):
        await instance.send_event(type="go", payload=payload)
    if meanwhile == "it is terminated":
        await instance.terminate()
    else:
        world.advance(3600)
    await instance.restart(from_step=("between", 1))
    early, _, late = (await world.parked(instance, 2)).steps
    assert (early.status, early.output.payload) == ("complete", "first")
    assert late.status == "waiting"
    world.advance(59)
    await instance.send_event(type="go", payload="third")
    assert await instance.result(timeout=DEADLINE) == ["first", "third"]


async def test_restart_from_a_sleep_by_kind(world: World) -> None:
    calls: list[int] = []

    async def run(event: Any, step: Any) -> Any:
        await step.do("same", lambda: calls.append(1))
        await step.sleep("same", 10)
        return await step.do("after", lambda: len(calls))

    instance = await world.start(run)
    await world.run_through(instance)
    await instance.restart(from_step=("same", 1, "sleep"))
    await world.parked(instance, 2)
    await world.run_through(instance)
    assert calls == [1]


@pytest.mark.parametrize(
    "from_step",
    [("nobody", 1), ("first", 2), ("first", 1, "sleep"), "first", ("first",), (1, "first"), ("a", 1, "x")],
)
async def test_restart_from_an_unknown_step_leaves_the_instance_untouched(
    world: World, from_step: Any
) -> None:
    instance = await world.start(waits)
    await world.parked(instance)
    before = await instance.status()
    with pytest.raises(InvalidArgumentError):
        await instance.restart(from_step=from_step)
    assert await instance.status() == before


async def test_restarts_at_any_moment_leave_one_run(world: World) -> None:
    running, most = 0, 0

    async def run(event: Any, step: Any) -> Any:
        async def work() -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                for _ in range(3):
                    await asyncio.sleep(0)
            finally:
                try:
                    await asyncio.sleep(0)  # a sandbox takes a moment to end
                finally:
                    running -= 1
            return 1

        return sum([await step.do("work", work) for _ in range(5)])

    instance = await world.start(run)
    for spins in range(40):
        for _ in range(spins):
            await asyncio.sleep(0)
        await instance.restart()
    assert await instance.result(timeout=DEADLINE) == 5
    assert most == 1


# --- following -----------------------------------------------------------------------------------


async def test_subscribe_yields_history_then_live_and_ends_with_the_instance(world: World) -> None:
    instance = await world.start(waits)
    await world.parked(instance)
    seen = []
    async for event in instance.subscribe():
        seen.append(event)
        if event.type == "workflow.waiting":
            await instance.send_event(type="go")
    assert [event.type for event in seen] == [
        "workflow.queued", "workflow.started", "workflow.running",
        "step.started", "attempt.started", "attempt.completed", "step.completed",
        "wait.started", "workflow.waiting", "wait.completed", "workflow.running", "workflow.completed",
    ]  # fmt: skip
    assert [event.event_id for event in seen] == list(range(1, 13))
    for cursor in range(13):
        later = [event async for event in instance.subscribe(cursor)]
        assert later == seen[cursor:]
    steps = [event async for event in instance.subscribe(types={"step.completed", "wait.completed"})]
    assert [event.data["step"] for event in steps] == ["first", "w"]


@pytest.mark.parametrize("cursor", [-1, "1", 1.5, True])
async def test_a_wrong_cursor_is_refused(world: World, cursor: Any) -> None:
    instance = await world.start(one)
    with pytest.raises(InvalidArgumentError, match="cursor"):
        await anext(instance.subscribe(cursor))


async def test_a_cursor_beyond_the_end_shows_nothing_of_anyone(world: World) -> None:
    instance = await world.start(one)
    await instance.result(timeout=DEADLINE)
    await world.result(one)
    for cursor in (2**24 - 1, 2**24, 2**25, 2**62):
        assert [event async for event in instance.subscribe(cursor)] == []


async def test_subscribers_of_a_deleted_instance_end(world: World) -> None:
    instance = await world.start(waits)
    await world.parked(instance)
    started = asyncio.Event()

    async def follow() -> list[str]:
        kinds = []
        async for event in instance.subscribe():
            kinds.append(event.type)
            started.set()
        return kinds

    task = asyncio.ensure_future(follow())
    waiting = asyncio.ensure_future(instance.result(timeout=DEADLINE))
    await started.wait()
    await instance.delete()
    assert (await asyncio.wait_for(task, DEADLINE))[-1] == "workflow.waiting"
    with pytest.raises(InstanceNotFoundError):
        await waiting


async def test_leaving_a_subscription_early_leaves_no_watcher(world: World) -> None:
    instance = await world.start(waits)
    for _ in range(10):
        events = instance.subscribe()
        await anext(events)
        await events.aclose()
    with pytest.raises(TimeoutError):
        await instance.result(timeout=0)
    if hasattr(world.engine, "_telling"):
        assert world.engine._telling._followers == {}


async def test_a_listener_that_fails_harms_nobody(world: World) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    def broken(ref: Any, event: Any) -> None:
        raise ValueError("a listener's own")

    world.engine.add_listener(broken)
    assert await world.result(one) == 1
    assert {str(context["exception"]) for context in told} == {"a listener's own"}


# --- scheduling ----------------------------------------------------------------------------------


async def test_surplus_instances_queue_and_all_run(engine_factory: Any) -> None:
    running, most, full = 0, 0, asyncio.Event()

    async def run(event: Any, step: Any) -> None:
        async def work() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == 3:
                full.set()
            await full.wait()
            running -= 1

        await step.do("work", work)

    async with World(engine_factory, concurrency=3) as world:
        binding = world.register(run)
        instances = await binding.create_batch([{} for _ in range(50)])
        for instance in instances:
            await instance.result(timeout=DEADLINE)
    assert most == 3


@pytest.mark.parametrize("which", ["workflow", "tenant"])
async def test_concurrency_of_a_workflow_and_of_a_tenant_hold_while_others_run(
    engine_factory: Any, which: str
) -> None:
    gate, other_ran = Gate(), asyncio.Event()
    running, most = 0, 0

    async def limited(event: Any, step: Any) -> None:
        async def work() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await gate()
            running -= 1

        await step.do("work", work)

    async def other(event: Any, step: Any) -> None:
        await step.do("work", other_ran.set)

    options = {"tenant_concurrency": 2} if which == "tenant" else {}
    async with World(engine_factory, **options) as world:
        binding = world.register(limited, concurrency=None if options else 2)
        params = {"__dispatcher_metadata": {"tenant_id": "busy"}, "params": {}}
        instances = await binding.create_batch([{"params": params} for _ in range(20)])
        await gate.reached()
        await world.start(other)
        await asyncio.wait_for(other_ran.wait(), DEADLINE)
        assert [(await instance.status()).status for instance in instances].count("queued") == 18
        gate.opened.set()
        for instance in instances:
            await instance.result(timeout=DEADLINE)
    assert most == 2


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5, "2"])
async def test_a_wrong_concurrency_is_refused(engine_factory: Any, concurrency: Any) -> None:
    for options in ({"concurrency": concurrency}, {"tenant_concurrency": concurrency}):
        with pytest.raises(InvalidArgumentError, match="concurrency"):
            engine_factory(**options)
    async with World(engine_factory) as world:
        with pytest.raises(InvalidArgumentError, match="concurrency"):
            world.register(one, concurrency=concurrency)


async def test_waiting_instances_hold_no_slot_and_woken_go_before_new(engine_factory: Any) -> None:
    order: list[str] = []
    gate = Gate()

    async def run(event: Any, step: Any) -> None:
        order.append(f"{event.instance_id} starts")
        if event.instance_id == "sleeper":
            await step.sleep("nap", 10)
            order.append("sleeper woke")
        elif event.instance_id == "blocker":
            await step.do("gate", gate)

    async with World(engine_factory, concurrency=1) as world:
        binding = world.register(run)
        sleeper = await binding.create(id="sleeper")
        await world.parked(sleeper)
        await binding.create(id="blocker")
        await gate.reached()
        new = await binding.create_batch([{"id": f"new{n}"} for n in range(5)])
        world.advance(10)
        assert (await world.status(sleeper, "queued")).status == "queued"
        gate.opened.set()
        await sleeper.result(timeout=DEADLINE)
        await new[-1].result(timeout=DEADLINE)
    woke, first_new = order.index("sleeper woke"), order.index("new0 starts")
    assert woke < first_new


async def test_tenants_are_served_fairly(engine_factory: Any) -> None:
    order: list[str] = []
    gate = Gate()

    async def run(event: Any, step: Any) -> None:
        order.append(event.payload["params"])
        if event.payload["params"] == "block":
            await step.do("gate", gate)

    async with World(engine_factory, concurrency=1) as world:
        binding = world.register(run)

        def params(tenant: str) -> dict[str, Any]:
            return {"params": {"__dispatcher_metadata": {"tenant_id": tenant}, "params": tenant}}

        await binding.create(params=params("block")["params"])
        await gate.reached()
        await binding.create_batch([params("many") for _ in range(50)])
        few = await binding.create_batch([params("few") for _ in range(3)])
        for instance in few:
            await world.status(instance, "queued")
        gate.opened.set()
        for instance in few:
            await instance.result(timeout=DEADLINE)
    assert [n for n, tenant in enumerate(order) if tenant == "few"][-1] <= 7


async def test_a_workflow_that_is_not_registered_waits_for_who_registers_it(world: World) -> None:
    instance = await world.start(waits, id="a")
    await world.parked(instance)
    await instance.send_event(type="go", payload=1)
    await instance.result(timeout=DEADLINE)
    await instance.restart()
    await world.parked(instance, 2)
    world._registered.clear()
    await world.reopen()
    binding = world.register(one)
    assert await (await binding.create()).result(timeout=DEADLINE) == 1
    with pytest.raises(InvalidArgumentError, match="waits"):
        world.engine.binding("waits")
    instance = await world.register(waits).get("a")
    await instance.send_event(type="go", payload=2)
    assert await instance.result(timeout=DEADLINE) == [1, 2]


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, None, "ä"])
async def test_a_wrong_workflow_name_is_refused(world: World, name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="workflow name"):
        world.engine.register(name, type("W", (), {"run": lambda: None}))


@pytest.mark.parametrize("entrypoint", [None, 7, object(), type("NoRun", (), {})])
async def test_only_classes_with_run_are_registered(world: World, entrypoint: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="run"):
        world.engine.register("name", entrypoint)


async def test_a_closed_engine_refuses_calls(engine_factory: Any) -> None:
    async with World(engine_factory) as world:
        instance = await world.start(one)
        await instance.result(timeout=DEADLINE)
    for call in (instance.status, instance.pause, instance.restart, instance.delete):
        with pytest.raises(EngineClosedError):
            await call()
    with pytest.raises(EngineClosedError):
        await anext(instance.subscribe())


async def test_closing_cancels_running_attempts_and_the_next_engine_goes_on(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        async def work(ctx: Any) -> int:
            if ctx.attempt == 1:
                await gate()
            return ctx.attempt  # type: ignore[no-any-return]

        return [
            await step.do("first", lambda: "kept"),
            await step.do("work", {"retries": {"limit": 0, "delay": 0}}, work),
        ]

    instance = await world.start(run)
    await gate.reached()
    await world.reopen()
    assert gate.cancelled == 1
    instance = await world.engine.binding("run").get(instance.id)
    assert await instance.result(timeout=DEADLINE) == [
        "kept",
        2,
    ]  # an interruption never uses up the last try
    attempts = step_of(await instance.status(), "work").attempts
    assert [(each.number, each.error and each.error.name) for each in attempts] == [
        (1, "Interrupted"),
        (2, None),
    ]
