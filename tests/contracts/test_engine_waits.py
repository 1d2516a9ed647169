"""Sleeps, events and hibernation on every engine: workflows.md section 4."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest

from dynflow.errors import IllegalMoveError, InvalidArgumentError, WorkflowFatalError, WorkflowTimeoutError
from tests.engine_world import DEADLINE, Gate, World, fewer_tasks, step_of

# --- sleeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [(90, 90), (0.5, 0.5), ("5 minutes", 300), ("1 hour", 3600), (timedelta(days=2), 172_800)],
)
async def test_a_sleep_lasts_as_long_as_it_says(world: World, duration: Any, seconds: float) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.sleep("nap", duration)

    instance = await world.start(run)
    started = world.clock.now()
    deadline = step_of(await world.parked(instance), "nap").deadline
    assert deadline == started + timedelta(seconds=seconds)
    world.advance(seconds)
    await instance.result(timeout=DEADLINE)


@pytest.mark.parametrize("duration", ["1 h", -1, "soon", None, True, "366 days", float("nan")])
async def test_a_wrong_duration_is_refused(world: World, duration: Any) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.sleep("nap", duration)

    with pytest.raises(WorkflowFatalError, match="nap"):
        await world.result(run)


async def test_the_duration_is_not_part_of_a_sleeps_identity(world: World) -> None:
    durations = iter([60, 1_000_000])

    async def run(event: Any, step: Any) -> str:
        await step.sleep("nap", next(durations))
        return "awake"

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(60)
    assert await instance.result(timeout=DEADLINE) == "awake"


@pytest.mark.parametrize("how", ["datetime", "epoch", "other zone"])
async def test_sleep_until_replays_after_its_time_without_error(world: World, how: str) -> None:
    moment = world.clock.now() + timedelta(hours=1)
    when: Any = {"datetime": moment, "epoch": moment.timestamp(), "other zone": moment.astimezone()}[how]

    async def run(event: Any, step: Any) -> str:
        await step.sleep_until("dawn", when)
        await step.sleep("more", "1 hour")
        return "up"

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(3600)
    await world.parked(instance, 2)
    world.advance(3600)
    assert await instance.result(timeout=DEADLINE) == "up"


async def test_sleep_until_a_past_time_returns_at_once(world: World) -> None:
    async def run(event: Any, step: Any) -> str:
        await step.sleep_until("past", datetime(1970, 1, 2, tzinfo=UTC))
        await step.sleep("none", 0)
        return "at once"

    assert await world.result(run) == "at once"


@pytest.mark.parametrize(
    "when",
    [
        datetime(2026, 1, 2),  # noqa: DTZ001
        datetime(2030, 1, 1, tzinfo=UTC),
        "2026-01-02",
        None,
        float("nan"),
        1e300,
        4e9,
        True,
    ],
)
async def test_a_wrong_time_is_refused(world: World, when: Any) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.sleep_until("dawn", when)

    with pytest.raises(WorkflowFatalError, match="dawn"):
        await world.result(run)


async def test_after_a_restart_of_the_engine_only_the_remainder_is_slept(world: World) -> None:
    async def run(event: Any, step: Any) -> str:
        await step.sleep("nap", 100)
        return "awake"

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(60)
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    world.advance(39.9)
    assert (await instance.status()).status == "waiting"
    world.advance(0.1)
    assert await instance.result(timeout=DEADLINE) == "awake"


async def test_what_came_due_while_the_engine_was_down_goes_on_by_itself(world: World) -> None:
    async def run(event: Any, step: Any) -> str:
        await step.sleep("nap", 100)
        return "awake"

    instance = await world.start(run)
    await world.parked(instance)
    await world.__aexit__()
    world.advance(1000)
    await world.__aenter__()
    assert await (await world.engine.binding("run").get(instance.id)).result(timeout=DEADLINE) == "awake"


async def test_a_retry_delay_survives_a_restart_of_the_engine(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        config = {"retries": {"limit": 1, "delay": 100}}
        return await step.do("flaky", config, lambda ctx: ctx.attempt if ctx.attempt > 1 else 1 / 0)

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(60)
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    world.advance(39)
    assert (await instance.status()).status == "waiting"
    world.advance(1)
    assert await instance.result(timeout=DEADLINE) == 2


# --- events --------------------------------------------------------------------------------------


async def one_event(event: Any, step: Any) -> Any:
    got = await step.wait_for_event("w", type="go")
    return [got.type, got.payload, got.timestamp]


async def test_an_event_wakes_its_waiter(world: World) -> None:
    instance = await world.start(one_event)
    status = await world.parked(instance)
    waiting = step_of(status, "w")
    assert (waiting.status, waiting.event_type) == ("waiting", "go")
    assert waiting.deadline == world.clock.now() + timedelta(hours=24)
    world.advance(5)
    await instance.send_event(type="go", payload={"by": "me"})
    assert await instance.result(timeout=DEADLINE) == ["go", {"by": "me"}, world.clock.now()]


async def test_events_sent_before_the_wait_are_kept_in_order(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        await step.do("gate", gate)
        got = [(await step.wait_for_event(f"w{n}", type="go")).payload for n in range(20)]
        return [got, (await step.wait_for_event("o", type="other")).payload]

    instance = await world.start(run)
    await gate.reached()
    await instance.send_event(type="other", payload="other")
    for number in range(20):
        await instance.send_event(type="go", payload=number)
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == [list(range(20)), "other"]


async def test_many_buffered_events_keep_their_order_over_a_restart(world: World) -> None:
    count = world.many // 2

    async def run(event: Any, step: Any) -> Any:
        await step.wait_for_event("start", type="start")
        return [(await step.wait_for_event("w", type="go")).payload for _ in range(count)]

    instance = await world.start(run)
    await world.parked(instance)
    await asyncio.gather(*(instance.send_event(type="go", payload=n) for n in range(count)))
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    await instance.send_event(type="start")
    assert await instance.result(timeout=DEADLINE) == list(range(count))


async def test_an_event_may_be_sent_before_the_instance_has_started(engine_factory: Any) -> None:
    gate = Gate()

    async def blocks(event: Any, step: Any) -> None:
        await step.do("gate", gate)

    async with World(engine_factory, concurrency=1) as world:
        await world.start(blocks)
        await gate.reached()
        instance = await world.start(one_event)
        assert (await instance.status()).status == "queued"
        await instance.send_event(type="go", payload=1)
        gate.opened.set()
        assert (await instance.result(timeout=DEADLINE))[1] == 1


async def test_the_type_must_match_exactly(world: World) -> None:
    instance = await world.start(one_event)
    await world.parked(instance)
    await instance.send_event(type="GO")
    await instance.send_event(type="go2")
    assert (await instance.status()).status == "waiting"
    await instance.send_event(type="go", payload="right")
    assert (await instance.result(timeout=DEADLINE))[1] == "right"


async def test_concurrent_waiters_are_served_in_the_order_of_their_calls(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        waits = [step.wait_for_event(f"w{n}", type="go") for n in range(3)]
        return [got.payload for got in await asyncio.gather(*waits)]

    instance = await world.start(run)
    await world.parked(instance)
    for number in range(3):
        await instance.send_event(type="go", payload=number)
    assert await instance.result(timeout=DEADLINE) == [0, 1, 2]


async def test_an_event_that_does_not_come_times_out_and_is_memoised(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        try:
            await step.wait_for_event("w", type="go", timeout="1 minute")
        except WorkflowTimeoutError as error:
            await step.sleep("nap", 1)
            return str(error)

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(60)
    await world.parked(instance, 2)
    await instance.send_event(type="go", payload="late")
    message = await world.run_through(instance)
    assert "'w'" in message
    assert "'go'" in message
    assert step_of(await instance.status(), "w").status == "errored"
    assert "wait.timed_out" in world.order(instance)


async def test_a_timed_out_waiter_takes_no_event(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        try:
            await step.wait_for_event("first", type="go", timeout=1)
        except WorkflowTimeoutError:
            return (await step.wait_for_event("second", type="go")).payload

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(1)
    await world.parked(instance, 2)
    await instance.send_event(type="go", payload="for the second")
    assert await instance.result(timeout=DEADLINE) == "for the second"


async def test_a_deadline_that_passed_while_the_engine_was_down_wins_over_a_later_event(world: World) -> None:
    async def run(event: Any, step: Any) -> str:
        try:
            await step.wait_for_event("w", type="go", timeout=100)
        except WorkflowTimeoutError:
            return "timed out"
        return "event"

    late, early = await world.start(run, id="late"), await world.register(run).create(id="early")
    await world.parked(late)
    await world.parked(early)
    world.advance(99)
    await early.send_event(type="go")
    await world.__aexit__()
    world.advance(2)
    await world.__aenter__()
    late, early = [await world.engine.binding("run").get(id_) for id_ in ("late", "early")]
    with contextlib.suppress(
        IllegalMoveError
    ):  # sent before the timeout was noticed it is buffered, else refused
        await late.send_event(type="go")
    assert await late.result(timeout=DEADLINE) == "timed out"
    assert await early.result(timeout=DEADLINE) == "event"


@pytest.mark.parametrize("limit", [0, -1, "soon", "366 days"])
async def test_a_wrong_event_timeout_is_refused(world: World, limit: Any) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.wait_for_event("w", type="go", timeout=limit)

    with pytest.raises(WorkflowFatalError, match="timeout"):
        await world.result(run)


@pytest.mark.parametrize("event_type", ["", "a b", "-x", "x" * 101, None, 7, "a\n"])
async def test_a_wrong_event_type_is_refused_on_both_sides(world: World, event_type: Any) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.wait_for_event("w", type=event_type)

    instance = await world.start(run)
    with pytest.raises(WorkflowFatalError, match="event type"):
        await instance.result(timeout=DEADLINE)
    other = await world.start(one_event)
    with pytest.raises(InvalidArgumentError, match="event type"):
        await other.send_event(type=event_type)


async def test_a_finished_instance_takes_no_event(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        pass

    instance = await world.start(run)
    await instance.result(timeout=DEADLINE)
    with pytest.raises(IllegalMoveError, match="complete"):
        await instance.send_event(type="go")


async def test_an_event_for_a_branch_reaches_it_while_another_branch_works(world: World) -> None:
    gate = Gate()
    got = asyncio.Event()

    async def run(event: Any, step: Any) -> Any:
        async def branch() -> Any:
            received = await step.wait_for_event("w", type="go")
            got.set()
            return received.payload

        return await asyncio.gather(branch(), step.do("gate", gate))

    instance = await world.start(run)
    await gate.reached()
    await world.saw(instance, "wait.started")
    await instance.send_event(type="go", payload="now")
    await asyncio.wait_for(got.wait(), DEADLINE)
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == ["now", "through"]
    assert world.kinds(instance)["workflow.waiting"] == 0


async def test_events_racing_with_parking_are_neither_lost_nor_doubled(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return [(await step.wait_for_event("w", type="go")).payload for _ in range(30)]

    binding = world.register(run)
    instances = [await binding.create() for _ in range(20)]

    async def send(instance: Any, spins: int) -> None:
        for number in range(30):
            for _ in range((spins * number) % 7):  # meet the segment at each stage of its parking
                await asyncio.sleep(0)
            await instance.send_event(type="go", payload=number)

    await asyncio.gather(*(send(instance, spins) for spins, instance in enumerate(instances)))
    for instance in instances:
        assert await instance.result(timeout=DEADLINE) == list(range(30))


# --- hibernation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sleep", "sleep_until", "event", "retry", "pause"])
async def test_a_waiting_instance_holds_nothing(world: World, how: str) -> None:
    alive = []
    seen: list[str] = []

    class Held:
        pass

    async def run(event: Any, step: Any) -> str:
        held = Held()
        alive.append(held)
        try:
            if how in {"sleep", "pause"}:
                await step.sleep("w", 60)
            elif how == "sleep_until":
                await step.sleep_until("w", world.clock.now() + timedelta(seconds=60))
            elif how == "event":
                await step.wait_for_event("w", type="go")
            else:
                config = {"retries": {"limit": 1, "delay": 60}}
                await step.do("w", config, lambda ctx: 1 // (ctx.attempt - 1))
        except BaseException as error:
            seen.append(repr(error))
            raise
        finally:
            seen.append("finally")
        return "done"

    async def earlier(event: Any, step: Any) -> None:
        await step.sleep("w", 0)

    await world.result(earlier)  # what an engine opens once is open
    tasks, threads = len(asyncio.all_tasks()), threading.active_count()
    process = psutil.Process()
    files, children = process.num_fds(), process.children()
    instance = await world.start(run)
    await world.parked(instance)
    if how == "pause":
        await instance.pause()
        await world.status(instance, "paused")
    reference = __import__("weakref").ref(alive.pop())
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert reference() is None  # the coroutine and all it held are gone
    assert seen == []  # and it did not notice
    await fewer_tasks(tasks)
    assert threading.active_count() == threads
    assert process.num_fds() <= files
    assert process.children() == children
    if how == "pause":
        await instance.resume()
    if how == "event":
        await instance.send_event(type="go")
    else:
        world.advance(60)
    assert await instance.result(timeout=DEADLINE) == "done"
    assert seen == ["finally"]


async def test_catch_alls_task_groups_and_context_managers_do_not_see_the_suspension(world: World) -> None:
    seen: list[str] = []

    class Manager:
        async def __aenter__(self) -> None:
            seen.append("enter")

        async def __aexit__(self, *exc_info: object) -> None:
            seen.append("exit")

    async def branch(step: Any, name: str) -> str:
        try:
            await step.sleep(name, 10)
        except BaseException as error:  # noqa: BLE001 - a tenant's catch-all
            seen.append(f"caught {error!r}")
        finally:
            seen.append(f"{name} woke")
        return name

    async def generator(step: Any) -> Any:
        try:
            yield 1
            await step.sleep("in a generator", 10)
            yield 2
        finally:
            seen.append("generator ended")

    async def run(event: Any, step: Any) -> Any:
        async with Manager(), asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch(step, name)) for name in ("a", "b")]
        return [task.result() for task in tasks] + [item async for item in generator(step)]

    instance = await world.start(run)
    await world.parked(instance)
    gc.collect()
    assert seen == ["enter"]
    world.advance(10)
    await world.parked(instance, 2)
    gc.collect()
    assert sorted(seen[1:]) == ["a woke", "b woke", "enter", "exit"]
    world.advance(10)
    assert await instance.result(timeout=DEADLINE) == ["a", "b", 1, 2]
    assert seen.count("generator ended") == 1
    assert not [line for line in seen if line.startswith("caught")]


async def test_an_instance_does_not_hibernate_while_a_step_runs(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        return await asyncio.gather(step.sleep("nap", 60), step.do("gate", gate))

    instance = await world.start(run)
    await gate.reached()
    world.advance(60)
    await world.saw(instance, "sleep.completed")
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == [None, "through"]
    assert world.kinds(instance)["workflow.waiting"] == 0
    assert gate.times == 1


async def test_many_waiting_instances_cost_rows_only(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.do("one", lambda: 1)
        return (await step.wait_for_event("w", type="go")).payload

    binding, parked = world.register(run), asyncio.Queue[str]()

    def heard(ref: Any, event: Any) -> None:
        if event.type == "workflow.waiting":
            parked.put_nowait(ref.id)

    world.engine.add_listener(heard)

    async def wave(count: int) -> list[Any]:
        made: list[Any] = []
        while len(made) < count:
            made += await binding.create_batch([{}] * min(100, count - len(made)))
        async with asyncio.timeout(DEADLINE):
            for _ in range(count):
                await parked.get()
        world.history.clear()
        world.told.clear()
        gc.collect()
        return made

    await wave(world.many)  # what the process allocates once
    tasks, objects = len(asyncio.all_tasks()), len(gc.get_objects())
    before = psutil.Process().memory_info().rss
    instances = await wave(world.many)
    await fewer_tasks(tasks)
    # The handles that this test holds, and the manual clock's cancelled timers: seven small objects each. And what
    # the loop and the caches have of the last calls.
    assert len(gc.get_objects()) - objects < 7 * world.many + 1000
    # Most of it are pages that SQLite caches; segments that stayed would take twice as much.
    assert psutil.Process().memory_info().rss - before < 20 * 2**20
    await instances[-1].send_event(type="go", payload="woken")
    assert await instances[-1].result(timeout=DEADLINE) == "woken"


# --- pauses and crashes between an event and its waiter --------------------------------------------


async def test_events_to_a_paused_instance_survive_a_crash(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return [(await step.wait_for_event("w", type="go")).payload for _ in range(3)]

    instance = await world.start(run)
    await world.parked(instance)
    await instance.pause()
    for number in range(3):
        await instance.send_event(type="go", payload=number)
    await world.reopen()
    instance = await world.engine.binding("run").get(instance.id)
    assert (await instance.status()).status == "paused"
    await instance.resume()
    assert await instance.result(timeout=DEADLINE) == [0, 1, 2]


async def test_no_pause_crash_or_wake_loses_or_redelivers_an_event(world: World) -> None:
    """Each event is consumed in one transaction with the end of its wait, whatever comes between."""

    async def run(event: Any, step: Any) -> Any:
        return [(await step.wait_for_event("w", type="go")).payload for _ in range(40)]

    instance = await world.start(run)
    for number in range(40):
        await instance.send_event(type="go", payload=number)
        if number % 4 == 1:
            await instance.pause()
        if number % 4 == 3:
            await instance.resume()
        if number % 5 == 0:
            await world.reopen()
            instance = await world.engine.binding("run").get(instance.id)
    await instance.resume()
    assert await instance.result(timeout=DEADLINE) == list(range(40))


async def test_an_event_goes_to_one_waiter(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        first = asyncio.ensure_future(step.wait_for_event("first", type="go"))
        second = asyncio.ensure_future(step.wait_for_event("second", type="go", timeout=10))
        results = await asyncio.gather(first, second, return_exceptions=True)
        return [getattr(result, "payload", type(result).__name__) for result in results]

    instance = await world.start(run)
    await world.parked(instance)
    await instance.send_event(type="go", payload="one")
    await world.saw(instance, "wait.completed")
    assert await world.run_through(instance) == ["one", "WorkflowTimeoutError"]


async def test_a_wait_whose_type_is_only_buffered_twice_takes_the_older(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.wait_for_event("start", type="start")
        first = await step.wait_for_event("w", type="go")
        await step.sleep("nap", 5)
        return [first.payload, first.timestamp, (await step.wait_for_event("w", type="go")).payload]

    instance = await world.start(run)
    sent = world.clock.now()
    await instance.send_event(type="go", payload="older")
    world.advance(1)
    await instance.send_event(type="go", payload="newer")
    await instance.send_event(type="start")
    assert await world.run_through(instance) == ["older", sent, "newer"]
