"""Steps on every engine: workflows.md sections 1, 2 and 3."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from dynflow.errors import (
    InstanceFailedError,
    NonRetryableDelayError,
    NonRetryableError,
    UnserializableError,
    WorkflowFatalError,
    WorkflowInternalError,
    WorkflowTimeoutError,
)
from dynflow.types import StepContext
from dynflow.workflow import current_step
from tests.engine_world import DEADLINE, NO_RETRIES, Gate, World, noting, quick, step_of


async def test_the_output_is_what_run_returns(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return {"hello": event.payload["name"], "step": await step.do("one", lambda: 1)}

    assert await world.result(run, {"name": "Ada"}) == {"hello": "Ada", "step": 1}


async def test_the_event_tells_why_the_instance_exists(world: World) -> None:
    seen = []

    async def tell(event: Any, step: Any) -> None:
        seen.append(event)

    instance = await world.start(tell, id="me")
    await instance.result(timeout=DEADLINE)
    (event,) = seen
    assert (event.payload, event.instance_id, event.workflow_name, event.schedule) == ({}, "me", "tell", None)
    assert event.timestamp == world.clock.now()
    assert event.timestamp.tzinfo is UTC


async def test_mutating_the_event_changes_nothing_durable(world: World) -> None:
    seen = []

    async def run(event: Any, step: Any) -> None:
        seen.append(dict(event.payload))
        event.payload["name"] = "changed"
        await step.sleep("nap", 1)

    instance = await world.start(run, {"name": "kept"})
    await world.run_through(instance)
    assert seen == [{"name": "kept"}] * 2


async def test_a_step_runs_once_however_often_run_is_replayed(world: World) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        first = await step.do("first", noting(calls, "first", "a"))
        await step.sleep("nap", 60)
        second = await step.do("second", noting(calls, "second", "b"))
        await step.sleep("nap", 60)
        return first + second

    assert await world.run_through(await world.start(run)) == "ab"
    assert calls == ["first", "second"]


async def test_callbacks_are_sync_or_async_and_take_no_argument_or_the_context(world: World) -> None:
    async def async_plain() -> str:
        return "async"

    async def async_context(ctx: StepContext) -> Any:
        return [ctx.step.name, ctx.step.count, ctx.attempt]

    def sync_optional(ctx: Any = "default") -> Any:
        return ctx

    async def run(event: Any, step: Any) -> Any:
        return [
            await step.do("a", async_plain),
            await step.do("b", async_context),
            await step.do("c", {"timeout": 5}, lambda ctx: ctx.config["timeout"]),
            await step.do("d", sync_optional),
            await step.do("e", lambda *args: len(args)),
            await step.do("f", dict),
        ]

    assert await world.result(run) == ["async", ["b", 1, 1], timedelta(seconds=5), "default", 1, {}]


async def test_the_decorator_form_runs_when_it_is_awaited(world: World) -> None:
    calls = []

    async def run(event: Any, step: Any) -> Any:
        @step.do("decorated")  # type: ignore[untyped-decorator]
        async def plain() -> int:
            calls.append("plain")
            return 1

        @step.do("configured", NO_RETRIES)  # type: ignore[untyped-decorator]
        def with_arguments(left: int, right: int) -> int:
            return left + right

        assert calls == []
        return [await plain, await plain(), await with_arguments(2, 3), plain.__name__]

    assert await world.result(run) == [1, 1, 5, "plain"]
    assert calls == ["plain", "plain"]  # two awaits are two steps: decorated 1 and 2


async def test_the_context_has_a_private_copy_of_the_merged_config(world: World) -> None:
    seen = []

    def look(ctx: StepContext) -> None:
        seen.append(ctx.config)
        ctx.config["retries"]["limit"] = 0
        raise ValueError("again")

    async def run(event: Any, step: Any) -> None:
        await step.do("look", {"retries": {"limit": 2, "delay": "1 second"}}, look)

    with pytest.raises(ValueError, match="again"):
        await world.run_through(await world.start(run))
    expected = {
        "retries": {"limit": 2, "delay": timedelta(seconds=1), "backoff": "exponential"},
        "timeout": timedelta(minutes=10),
        "sensitive": None,
    }
    seen_limits = [config.pop("retries") for config in seen]
    assert len(seen_limits) == 3
    assert all(config == {"timeout": expected["timeout"], "sensitive": None} for config in seen)


async def test_the_defaults_are_five_retries_from_ten_seconds_doubling(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.do("fails", lambda: 1 / 0)

    instance = await world.start(run)
    with pytest.raises(ZeroDivisionError):
        await world.run_through(instance)
    attempts = step_of(await instance.status(), "fails").attempts
    assert [attempt.retry_delay for attempt in attempts] == [
        *(timedelta(seconds=10 * 2**n) for n in range(5)),
        None,
    ]
    assert [attempt.number for attempt in attempts] == [1, 2, 3, 4, 5, 6]
    assert all(attempt.error and attempt.error.name == "ZeroDivisionError" for attempt in attempts)


@pytest.mark.parametrize(
    ("backoff", "seconds"),
    [("constant", [3, 3, 3]), ("linear", [3, 6, 9]), ("exponential", [3, 6, 12])],
)
async def test_backoff(world: World, backoff: str, seconds: list[int]) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.do("fails", quick(3, 3, backoff), lambda: 1 / 0)

    instance = await world.start(run)
    with pytest.raises(ZeroDivisionError):
        await world.run_through(instance)
    delays = [attempt.retry_delay for attempt in step_of(await instance.status(), "fails").attempts]
    assert delays[:-1] == [timedelta(seconds=each) for each in seconds]


async def test_a_retry_does_not_start_before_its_delay_is_over(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        return await step.do("flaky", quick(1, 30), lambda ctx: 1 // (ctx.attempt - 1))

    instance = await world.start(run)
    await world.parked(instance)
    world.advance(29.999)
    assert (await instance.status()).status == "waiting"
    world.advance(0.001)
    assert await instance.result(timeout=DEADLINE) == 1


@pytest.mark.parametrize("answer", [7, "7 seconds", timedelta(seconds=7)])
async def test_a_delay_function_decides(world: World, answer: Any) -> None:
    asked = []

    async def delay(ctx: StepContext, error: Exception) -> Any:
        asked.append((ctx.attempt, str(error)))
        return answer

    def fails(ctx: StepContext) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    async def run(event: Any, step: Any) -> None:
        await step.do("fails", {"retries": {"limit": 1, "delay": delay}}, fails)

    instance = await world.start(run)
    with pytest.raises(ValueError, match="attempt 2"):
        await world.run_through(instance)
    assert asked == [(1, "attempt 1")]
    assert step_of(await instance.status(), "fails").attempts[0].retry_delay == timedelta(seconds=7)


@pytest.mark.parametrize("answer", ["soon", None, -1, 1 / 3 * 1j])
async def test_a_delay_function_that_answers_nonsense_fails_the_step(world: World, answer: Any) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.do("pay", {"retries": {"limit": 3, "delay": lambda ctx, error: answer}}, lambda: 1 / 0)

    with pytest.raises(NonRetryableDelayError, match="pay"):
        await world.result(run)


async def test_a_delay_function_that_raises_or_hangs_fails_the_step(world: World) -> None:
    gate = Gate()

    async def hangs(ctx: Any, error: Any) -> None:
        await gate()

    async def run(event: Any, step: Any) -> Any:
        names = []
        for delay in (lambda ctx, error: 1 / 0, hangs):
            try:
                await step.do("pay", {"retries": {"limit": 3, "delay": delay}}, lambda: 1 / 0)
            except NonRetryableDelayError as error:
                names.append(str(error))
        return names

    instance = await world.start(run)
    await gate.reached()
    world.advance(5)
    raised, hung = await instance.result(timeout=DEADLINE)
    assert "ZeroDivisionError" in raised
    assert "WorkflowTimeoutError" in hung
    assert gate.cancelled == 1


async def test_a_timed_out_attempt_is_cancelled_and_retried(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        config = quick(1, 1) | {"timeout": "2 minutes"}
        return await step.do("slow", config, lambda ctx: gate() if ctx.attempt == 1 else "fast")

    instance = await world.start(run)
    await gate.reached()
    world.advance(119)
    assert gate.cancelled == 0
    world.advance(1)
    assert await world.run_through(instance) == "fast"
    assert gate.cancelled == 1
    first = step_of(await instance.status(), "slow").attempts[0]
    assert first.error is not None
    assert first.error.name == "WorkflowTimeoutError"
    assert "slow" in first.error.message


async def test_a_callback_that_swallows_its_timeout_has_timed_out_all_the_same(world: World) -> None:
    gate = Gate()

    async def stubborn() -> str:
        try:
            return await gate()
        except asyncio.CancelledError:
            return "I was not cancelled"

    async def run(event: Any, step: Any) -> Any:
        await step.do("stubborn", NO_RETRIES | {"timeout": 1}, stubborn)

    instance = await world.start(run)
    await gate.reached()
    world.advance(1)
    with pytest.raises(WorkflowTimeoutError):
        await instance.result(timeout=DEADLINE)


async def test_a_callback_cancelled_from_inside_fails_its_step(world: World) -> None:
    async def cancels() -> None:
        raise asyncio.CancelledError

    async def run(event: Any, step: Any) -> None:
        await step.do("odd", cancels)

    with pytest.raises(WorkflowFatalError, match=r"odd.*CancelledError"):
        await world.result(run)


@pytest.mark.parametrize(
    "config",
    [
        {"retires": {}},
        {"retries": {"limit": 1}},
        {"retries": {"delay": 1}},
        {"retries": {"limit": -1, "delay": 1}},
        {"retries": {"limit": 10_001, "delay": 1}},
        {"retries": {"limit": True, "delay": 1}},
        {"retries": {"limit": 1, "delay": "1 h"}},
        {"retries": {"limit": 1, "delay": 1, "backoff": "random"}},
        {"retries": {"limit": 1, "delay": 1, "jitter": 1}},
        {"timeout": 0},
        {"timeout": "soon"},
        {"sensitive": "input"},
        ["timeout"],
    ],
)
async def test_a_wrong_config_is_refused_before_the_first_attempt(world: World, config: Any) -> None:
    calls: list[int] = []

    async def run(event: Any, step: Any) -> None:
        await step.do("pay", config, lambda: calls.append(1))

    instance = await world.start(run)
    with pytest.raises(WorkflowFatalError, match="pay"):
        await instance.result(timeout=DEADLINE)
    assert calls == []
    assert (await instance.status()).steps == ()


async def test_the_config_is_pinned_when_the_step_first_starts(world: World) -> None:
    limits = iter([1, 9, 9, 9])

    async def run(event: Any, step: Any) -> None:
        await step.do("fails", quick(next(limits), 5), lambda: 1 / 0)

    instance = await world.start(run)
    with pytest.raises(ZeroDivisionError):
        await world.run_through(instance)
    assert len(step_of(await instance.status(), "fails").attempts) == 2


@pytest.mark.parametrize("name", ["", "x" * 257, "line\nbreak", "bell\x07", None, 7, "\ud800"])
async def test_an_invalid_step_name_is_refused(world: World, name: Any) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.do(name, lambda: 1)

    with pytest.raises(WorkflowFatalError, match="name"):
        await world.result(run)


async def test_long_and_foreign_step_names_are_names(world: World) -> None:
    names = ["x" * 256, "Größe in m²", "步骤", "a b/c:d"]

    async def run(event: Any, step: Any) -> Any:
        return [await step.do(name, lambda ctx: ctx.step.name) for name in names]

    assert await world.result(run) == names


@pytest.mark.parametrize("callback", [7, "text", None])
async def test_a_callback_must_be_callable(world: World, callback: Any) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.do("bad", {}, callback) if callback is not None else await step.do("bad", {})(None)

    with pytest.raises(WorkflowFatalError, match="bad"):
        await world.result(run)


async def test_same_named_parallel_steps_keep_their_numbers_on_replay(world: World) -> None:
    gates = [Gate(), Gate(), Gate()]
    seen: list[Any] = []

    async def run(event: Any, step: Any) -> Any:
        async def work(ctx: StepContext) -> int:
            await gates[ctx.step.count - 1]()
            return ctx.step.count

        results = await asyncio.gather(*(step.do("same", work) for _ in range(3)))
        seen.append(results)
        await step.sleep("nap", 1)
        return results

    instance = await world.start(run)
    for gate in reversed(gates):  # they end in the opposite order
        await gate.reached()
        gate.opened.set()
    await world.parked(instance)
    assert await world.run_through(instance) == [1, 2, 3]
    assert seen == [[1, 2, 3]] * 2
    assert [gate.times for gate in gates] == [1, 1, 1]


async def test_parallel_steps_have_their_own_attempts_and_timeouts(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            flaky = group.create_task(step.do("flaky", quick(3, 1), lambda ctx: 1 // (ctx.attempt // 3)))
            slow = group.create_task(step.do("slow", {"timeout": 1000}, gate))
        return [flaky.result(), slow.result()]

    instance = await world.start(run)
    await gate.reached()
    for expected in (1, 2):
        await world.saw(instance, "attempt.errored", expected)
        world.advance(1)
    await world.saw(instance, "step.completed")
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == [1, "through"]
    status = await instance.status()
    assert [len(step_of(status, name).attempts) for name in ("flaky", "slow")] == [3, 1]


async def test_steps_nest(world: World) -> None:
    calls: list[str] = []

    async def run(event: Any, step: Any) -> Any:
        async def outer() -> Any:
            return 1 + await step.do("inner", noting(calls, "inner", 20))

        result = await step.do("outer", outer)
        await step.sleep("nap", 1)
        return result

    assert await world.run_through(await world.start(run)) == 21
    assert calls == ["inner"]


PLAIN = [
    None,
    True,
    0,
    -(10**400),
    1.5,
    float("inf"),
    "text \ud800 \x00",
    b"\x00\xff",
    [1, [2]],
    (1, (2,)),
    {1, 2},
    {"$": 1, "nested": {"$": ["bytes", "x"]}},
    {"$": 5},
    datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    datetime(2026, 1, 2),  # noqa: DTZ001
    date(2026, 1, 2),
    timedelta(days=-1, microseconds=3),
    Decimal("1.10"),
    UUID(int=7),
]


async def test_results_keep_their_types_through_a_replay(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        results = [await step.do("make", lambda value=value: value) for value in PLAIN]
        await step.sleep("nap", 1)
        return results

    results = await world.run_through(await world.start(run))
    assert results == PLAIN
    assert [type(result) for result in results] == [type(value) for value in PLAIN]


async def test_an_unserialisable_result_fails_its_step_at_once_naming_the_path(world: World) -> None:
    calls: list[int] = []

    async def run(event: Any, step: Any) -> Any:
        try:
            await step.do("bad", noting(calls, 1, {"deep": [1, object()]}))
        except UnserializableError as error:
            return str(error)

    message = await world.result(run)
    assert "bad" in message
    assert "['deep'][1]" in message
    assert calls == [1]


async def test_a_result_over_the_limit_fails_its_step_naming_size_and_limit(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        fits = await step.do("fits", lambda: "x" * (1024 * 1024 - 2))
        try:
            await step.do("big", NO_RETRIES, lambda: "x" * (1024 * 1024 - 1))
        except WorkflowInternalError as error:
            return [len(fits), str(error)]

    size, message = await world.result(run)
    assert size == 1024 * 1024 - 2
    for part in ("big", "1,048,577", "1,048,576"):
        assert part in message


async def test_an_output_that_cannot_be_stored_fails_the_instance(world: World) -> None:
    async def unserialisable(event: Any, step: Any) -> Any:
        return {"a": object()}

    async def too_large(event: Any, step: Any) -> Any:
        return "x" * (1024 * 1024)

    with pytest.raises(UnserializableError, match="object"):
        await world.result(unserialisable)
    with pytest.raises(WorkflowInternalError, match="output"):
        await world.result(too_large)


class RefusedError(NonRetryableError):
    """A tenant's own."""


@pytest.mark.parametrize(
    "error", [NonRetryableError("no"), RefusedError("no"), NonRetryableError("no", "Mine"), RefusedError()]
)
async def test_a_non_retryable_error_of_any_class_and_name_ends_the_step(
    world: World, error: Exception
) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise error

    async def run(event: Any, step: Any) -> None:
        try:
            await step.do("pay", fail)
        except NonRetryableError:
            await step.sleep("nap", 1)
            raise

    instance = await world.start(run)
    with pytest.raises(type(error)):
        await world.run_through(instance)
    assert calls == [1]  # memoised like every final failure
    shown = (await instance.status()).error
    assert shown is not None
    assert shown.name == (getattr(error, "name", None) or type(error).__name__)


async def test_a_caught_failure_does_not_fail_the_instance_and_is_raised_again_on_replay(
    world: World,
) -> None:
    caught: list[str] = []

    def fail() -> None:
        caught.append("called")
        raise KeyError("missing", 7)

    async def run(event: Any, step: Any) -> str:
        try:
            await step.do("fails", NO_RETRIES, fail)
        except KeyError as error:
            caught.append(f"{error.args} {error.__notes__}")
        await step.sleep("nap", 1)
        return "went on"

    instance = await world.start(run)
    assert await world.run_through(instance) == "went on"
    note = "('missing', 7) [\"step 'fails' failed after 1 attempt(s)\"]"
    assert caught == ["called", note, note]
    assert step_of(await instance.status(), "fails").status == "errored"


async def test_an_error_whose_class_is_not_importable_is_a_step_failed_error(world: World) -> None:
    class Local(Exception):  # noqa: N818
        pass

    def fail() -> None:
        raise Local("here only")

    async def run(event: Any, step: Any) -> Any:
        try:
            await step.do("fails", quick(1, 0), fail)
        except Exception as error:  # noqa: BLE001
            return [type(error).__name__, error.args, error.step, error.attempts, error.cause, str(error)]  # type: ignore[attr-defined]

    assert await world.run_through(await world.start(run)) == [
        "StepFailedError",
        ("fails", 2, "Local: here only"),
        "fails",
        2,
        "Local: here only",
        "step 'fails' failed after 2 attempt(s): Local: here only",
    ]


async def test_the_instance_keeps_name_and_message_of_what_was_not_caught(world: World) -> None:
    class Local(Exception):  # noqa: N818
        pass

    async def run(event: Any, step: Any) -> None:
        raise Local("gone wrong")

    instance = await world.start(run)
    with pytest.raises(InstanceFailedError, match="Local: gone wrong"):
        await instance.result(timeout=DEADLINE)
    status = await instance.status()
    assert status.status == "errored"
    assert status.error is not None
    assert (status.error.name, status.error.message) == ("Local", "gone wrong")


@pytest.mark.parametrize(
    "leave",
    [SystemExit(3), asyncio.CancelledError(), KeyError("x"), BaseException("odd"), GeneratorExit("x")],
)
async def test_whatever_leaves_run_ends_the_instance_and_nothing_else(
    world: World, leave: BaseException
) -> None:
    async def leaves(event: Any, step: Any) -> None:
        raise leave

    async def fine(event: Any, step: Any) -> int:
        return await step.do("one", lambda: 1)  # type: ignore[no-any-return]

    instance = await world.start(leaves)
    assert (await world.status(instance, "errored")).error is not None
    assert await world.result(fine) == 1


@pytest.mark.parametrize("kind", [SystemExit, asyncio.CancelledError, BaseException, GeneratorExit])
@pytest.mark.parametrize("where", ["sync", "async", "delay", "rollback"])
async def test_whatever_leaves_a_callback_is_its_failure(
    world: World, kind: type[BaseException], where: str
) -> None:
    def fails() -> None:
        raise kind("odd")

    async def fails_later() -> None:
        await asyncio.sleep(0)
        raise kind("odd")

    async def run(event: Any, step: Any) -> Any:
        config = NO_RETRIES if where != "delay" else {"retries": {"limit": 1, "delay": lambda *_: fails()}}
        if where == "rollback":
            await step.do("a", lambda: 1, rollback=fails_later, rollback_config=NO_RETRIES)
            raise KeyError("roll back")
        await step.do("a", config, {"sync": fails, "async": fails_later}.get(where, lambda: 1 / 0))

    instance = await world.start(run)
    status = await world.status(instance, "errored")
    error = status.error if status.rollback is None else status.rollback.error
    assert error is not None
    assert error.name == ("NonRetryableDelayError" if where == "delay" else "WorkflowFatalError")
    assert f"raised {kind.__name__}(odd)" in error.message


async def test_sys_exit_in_a_step_fails_the_step(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.do("exits", NO_RETRIES, lambda: (_ for _ in ()).throw(SystemExit(1)))

    with pytest.raises(WorkflowFatalError, match=r"exits.*SystemExit"):
        await world.result(run)


async def test_a_sensitive_output_is_redacted_for_onlookers_only(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        secret = await step.do("token", {"sensitive": "output"}, lambda: "hunter2")
        await step.sleep("nap", 1)
        try:
            await step.do("bad", NO_RETRIES | {"sensitive": "output"}, lambda: 1 / 0)
        except ZeroDivisionError:
            return len(secret)

    instance = await world.start(run)
    assert await world.run_through(instance) == 7
    status = await instance.status()
    assert step_of(status, "token").output == "[REDACTED]"
    error = step_of(status, "bad").error
    assert error is not None
    assert error.message == "division by zero"
    assert "hunter2" not in repr([event async for event in instance.subscribe()])


async def test_the_step_limit_counts_do_steps_alone(engine_factory: Any) -> None:
    from dynflow.engines import Limits

    async def run(event: Any, step: Any) -> Any:
        for _ in range(3):
            await step.do("work", lambda: 1)
            await step.sleep("nap", 0)
        await step.do("one too many", lambda: 1)

    async with World(engine_factory, limits=Limits(steps=3)) as world:
        with pytest.raises(WorkflowFatalError, match=r"one too many.*3 steps"):
            await world.result(run)


async def test_state_over_its_limit_fails_the_next_step(engine_factory: Any) -> None:
    from dynflow.engines import Limits

    async def run(event: Any, step: Any) -> Any:
        for _ in range(100):
            await step.do("fill", lambda: "x" * 1000)

    async with World(engine_factory, limits=Limits(state=20_000)) as world:
        instance = await world.start(run)
        with pytest.raises(WorkflowInternalError, match="state"):
            await instance.result(timeout=DEADLINE)
        assert 10 < len((await instance.status()).steps) < 20


async def test_a_workflow_cannot_wait_for_what_never_happens(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(WorkflowFatalError, match="never happen"):
        await world.result(run)


async def test_threads_and_sockets_belong_into_steps(world: World) -> None:
    async def threads(event: Any, step: Any) -> None:
        await asyncio.to_thread(int)

    async def sockets(event: Any, step: Any) -> None:
        await asyncio.open_connection("127.0.0.1", 9)

    async def inside(event: Any, step: Any) -> Any:
        async def work() -> int:
            return await asyncio.to_thread(int, "7")

        return await step.do("thread", work)

    for run in (threads, sockets):
        with pytest.raises(RuntimeError, match=r"step\.do"):
            await world.result(run)
    assert await world.result(inside) == 7


async def test_a_loop_that_spins_does_not_stop_the_host(world: World) -> None:
    spinning = True

    async def spins(event: Any, step: Any) -> str:
        while spinning:  # noqa: ASYNC110 - spinning is the point
            await asyncio.sleep(0)
        return "done"

    async def fine(event: Any, step: Any) -> Any:
        return await step.do("one", lambda: 1)

    instance = await world.start(spins)
    assert await world.result(fine) == 1
    spinning = False
    assert await instance.result(timeout=DEADLINE) == "done"


async def test_cancelling_a_step_from_inside_cancels_its_callback_and_the_rest_goes_on(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        task = asyncio.ensure_future(step.do("slow", gate))
        await step.do("meanwhile", gate.reached)
        task.cancel()
        never_started = asyncio.ensure_future(step.do("never", gate))
        never_started.cancel()
        results = await asyncio.gather(task, never_started, return_exceptions=True)
        await step.sleep("nap", 1)
        return [type(result).__name__ for result in results]

    assert await world.run_through(await world.start(run)) == ["CancelledError", "CancelledError"]
    assert gate.cancelled >= 1


async def test_one_call_awaited_twice_at_once_is_refused(world: World) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        call = step.do("once", gate)

        async def await_it() -> Any:
            return await call

        return [
            type(result).__name__
            for result in await asyncio.gather(await_it(), await_it(), return_exceptions=True)
        ]

    instance = await world.start(run)
    await gate.reached()
    gate.opened.set()
    assert await instance.result(timeout=DEADLINE) == ["str", "WorkflowFatalError"]


mine: ContextVar[str] = ContextVar("mine", default="nobody's")


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_callback_runs_in_a_copy_of_the_context_that_calls_its_step(world: World, kind: str) -> None:
    """Retries too; what a callback sets, nobody else has."""
    seen: list[tuple[str, str | None]] = []

    def look(ctx: StepContext) -> None:
        now = current_step.get()
        seen.append((mine.get(), None if now is None else now.step.name))
        mine.set(f"the callback's, attempt {ctx.attempt}")
        if ctx.attempt == 1:
            raise ValueError("once")

    async def look_async(ctx: StepContext) -> None:
        await asyncio.sleep(0)
        look(ctx)

    async def run(event: Any, step: Any) -> None:
        for name in ("first", "second"):
            mine.set(f"the run's, {name}")
            callback = look if kind == "plain" else look_async
            await step.do(name, {"retries": {"limit": 1, "delay": 0}}, callback)
            assert (mine.get(), current_step.get()) == (f"the run's, {name}", None)

    await world.result(run)
    assert [(whose, step) for whose, step in seen if "run" in whose] == [
        ("the run's, first", "first"),
        ("the run's, second", "second"),
    ]
    assert [step for _, step in seen] == ["first", "first", "second", "second"]
