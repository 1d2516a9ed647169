"""What goes wrong without anybody's ill will: told at once, in words that help."""

from __future__ import annotations

import asyncio
import gc
import warnings
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dynflow.errors import (
    InvalidArgumentError,
    WorkflowFatalError,
    WorkflowInternalError,
    WorkflowTimeoutError,
)
from dynflow.router import METADATA_KEY, dispatch_workflow
from dynflow.types import WorkflowEvent
from dynflow.workflow import WorkflowEntrypoint
from tests.engine_world import DEADLINE, NO_RETRIES, Gate, World, step_of


async def test_an_oversize_result_fails_its_step_at_once(world: World) -> None:
    attempts: list[int] = []

    async def run(event: Any, step: Any) -> Any:
        def big(ctx: Any) -> str:
            attempts.append(ctx.attempt)
            return "x" * 2_000_000

        return await step.do("big", big)

    instance = await world.register(run).create()
    with pytest.raises(WorkflowInternalError, match="1,048,576"):
        await instance.result(timeout=30)
    assert attempts == [1]


async def test_a_sync_callback_over_its_timeout_has_failed(world: World) -> None:
    async def run(event: Any, step: Any) -> Any:
        config = {"timeout": 1, "retries": {"limit": 0, "delay": 0}}
        return await step.do("slow", config, lambda: world.clock.advance(2))

    instance = await world.register(run).create()
    with pytest.raises(WorkflowTimeoutError, match="0:00:01"):
        await instance.result(timeout=30)


async def test_a_loader_that_returns_no_runner_is_told_so() -> None:
    event = WorkflowEvent({METADATA_KEY: {}, "params": None}, datetime.now(UTC), "i", "w")
    context, step, nothing = (
        SimpleNamespace(env=None, ctx=None),
        cast("Any", None),
        cast("Any", lambda _: None),
    )
    with pytest.raises(InvalidArgumentError, match="load_runner returned None"):
        await dispatch_workflow(context, event, step, nothing)


# --- calls of `step` with what it cannot take ------------------------------------------------------

LONG = "x" * 3_000_000
WRONG: dict[str, tuple[Any, Any]] = {
    f"{kind} named {name!r:.15}": (
        lambda step, kind=kind, name=name: {
            "do": lambda: step.do(name, lambda: 1),
            "sleep": lambda: step.sleep(name, 1),
            "sleep_until": lambda: step.sleep_until(name, 1),
            "wait_for_event": lambda: step.wait_for_event(name, type="go"),
        }[kind](),
        name,
    )
    for kind in ("do", "sleep", "sleep_until", "wait_for_event")
    for name in (
        "",
        LONG,
        "x" * 257,
        "a\nb",
        "\x00",
        "\x7f",
        "\x85",
        "\ud800",
        None,
        7,
        b"a",
        ["a"],
        object(),
    )
} | {
    "do without a callback": (lambda step: step.do("a"), None),
    "do of a number": (lambda step: step.do("a", 5), 5),
    "do of text": (lambda step: step.do("a", {}, LONG), LONG),
    "a config that is none": (lambda step: step.do("a", ["timeout"], lambda: 1), ["timeout"]),
    "an unknown config": (lambda step: step.do("a", {"retires": 1}, lambda: 1), "retires"),
    "a huge unknown config": (lambda step: step.do("a", {LONG: 1}, lambda: 1), LONG),
    "a key that is no text": (lambda step: step.do("a", {7: 1}, lambda: 1), 7),
    "a timeout": (lambda step: step.do("a", {"timeout": LONG}, lambda: 1), LONG),
    "a zero timeout": (lambda step: step.do("a", {"timeout": 0}, lambda: 1), 0),
    "half of retries": (lambda step: step.do("a", {"retries": {"limit": 1}}, lambda: 1), {"limit": 1}),
    "retries that are none": (lambda step: step.do("a", {"retries": 3}, lambda: 1), 3),
    "too many retries": (
        lambda step: step.do("a", {"retries": {"limit": 10_001, "delay": 0}}, lambda: 1),
        10_001,
    ),
    "retries without a number": (
        lambda step: step.do("a", {"retries": {"limit": "3", "delay": 0}}, lambda: 1),
        "3",
    ),
    "a delay": (lambda step: step.do("a", {"retries": {"limit": 1, "delay": "1 h"}}, lambda: 1), "1 h"),
    "a backoff": (
        lambda step: step.do("a", {"retries": {"limit": 1, "delay": 1, "backoff": ["x"]}}, lambda: 1),
        ["x"],
    ),
    "sensitive": (lambda step: step.do("a", {"sensitive": True}, lambda: 1), True),
    "a list for sensitive": (lambda step: step.do("a", {"sensitive": ["output"]}, lambda: 1), ["output"]),
    "a handler": (lambda step: step.do("a", lambda: 1, rollback="undo"), "undo"),
    "a handler's config": (
        lambda step: step.do("a", lambda: 1, rollback=print, rollback_config={"timeout": -1}),
        -1,
    ),
    "a duration": (lambda step: step.sleep("a", LONG), LONG),
    "a negative duration": (lambda step: step.sleep("a", -1), -1),
    "no duration": (lambda step: step.sleep("a", None), None),
    "a naive time": (lambda step: step.sleep_until("a", datetime(2030, 1, 1)), "2030"),  # noqa: DTZ001
    "no time": (lambda step: step.sleep_until("a", LONG), LONG),
    "a time beyond time": (lambda step: step.sleep_until("a", 10**400), None),
    "an event type": (lambda step: step.wait_for_event("a", type="a b"), "a b"),
    "a huge event type": (lambda step: step.wait_for_event("a", type=LONG), LONG),
    "no event type": (lambda step: step.wait_for_event("a", type=None), None),
    "a wait's timeout": (lambda step: step.wait_for_event("a", type="go", timeout="soon"), "soon"),
    "a wait's endless timeout": (lambda step: step.wait_for_event("a", type="go", timeout=10**12), None),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_call_of_step_is_a_fatal_error_that_tenants_can_catch_and_leaves_no_trace(
    world: World, wrong: str
) -> None:
    call, value = WRONG[wrong]

    async def run(event: Any, step: Any) -> Any:
        try:
            await call(step)
        except WorkflowFatalError as error:
            return [str(error), await step.do("after", lambda: "went on")]

    instance = await world.start(run)
    message, after = await instance.result(timeout=DEADLINE)
    assert after == "went on"
    assert len(message) < 1_000
    if value is not None:
        assert (value if value == "2030" else repr(value)[:60]) in message
    assert [step.name for step in (await instance.status()).steps] == ["after"]
    assert world.order(instance) == [
        "workflow.queued", "workflow.started", "workflow.running",
        "step.started", "attempt.started", "attempt.completed", "step.completed", "workflow.completed",
    ]  # fmt: skip


# --- what is forgotten -----------------------------------------------------------------------------


class NotAsync(WorkflowEntrypoint):
    def run(self, event: Any, step: Any) -> Any:
        return 7


async def test_a_run_that_is_not_async_is_told_so(world: World) -> None:
    world.engine.register("not-async", NotAsync)
    instance = await world.engine.binding("not-async").create()
    with pytest.raises(WorkflowFatalError, match=r"NotAsync\.run\(event, step\) must be `async def`.*7"):
        await instance.result(timeout=DEADLINE)


CALLS = {
    "do": lambda step: step.do("forgotten", lambda: 1),
    "sleep": lambda step: step.sleep("forgotten", 1),
    "sleep_until": lambda step: step.sleep_until("forgotten", 1),
    "wait_for_event": lambda step: step.wait_for_event("forgotten", type="go"),
    "do, decorated": lambda step: step.do("forgotten")(lambda: 1)(),
}


@pytest.mark.parametrize("kind", CALLS)
async def test_a_call_that_is_never_awaited_warns_naming_its_step(world: World, kind: str) -> None:
    async def run(event: Any, step: Any) -> str:
        CALLS[kind](step)
        return await step.do("awaited", lambda: "done")  # type: ignore[no-any-return]

    method = kind.partition(",")[0]
    with pytest.warns(RuntimeWarning, match=rf"step\.{method}\('forgotten'\) was never awaited") as told:
        assert await world.result(run, id="one") == "done"
    assert [warning.filename for warning in told] == [__file__]
    status = await (await world.engine.binding("run").get("one")).status()
    assert [step.name for step in status.steps] == ["awaited"]


async def test_calls_that_their_workflow_had_no_time_to_await_do_not_warn(world: World) -> None:
    """Put to rest, terminated, deleted, cut off, failed: what is dropped then was not forgotten."""
    gate = Gate()

    async def run(event: Any, step: Any) -> list[Any]:
        later = [step.do("later", lambda: 1), step.sleep("later", 1), step.wait_for_event("later", type="x")]
        in_a_task = asyncio.ensure_future(step.do("gate", gate) if event.payload else step.sleep("nap", 60))
        await asyncio.gather(in_a_task)
        return later

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        binding = world.register(run)
        waiting, terminated, restarted, deleted = [await binding.create() for _ in range(4)]
        for instance in (waiting, terminated, restarted, deleted):
            await world.parked(instance)
        await terminated.terminate()
        await restarted.restart()
        await world.parked(restarted, 2)
        await deleted.delete()
        for way in ("terminate", "restart", "delete"):
            gate.entered.clear()
            instance = await binding.create(params=1)
            await gate.reached()
            await getattr(instance, way)()
        await world.reopen()
        gc.collect()
    assert [str(warning.message) for warning in told] == []


async def test_cancelled_and_closed_calls_do_not_warn(world: World) -> None:
    async def run(event: Any, step: Any) -> str:
        step.do("closed", lambda: 1).close()
        task = asyncio.ensure_future(step.do("cancelled", lambda: 1))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "done"

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert await world.result(run) == "done"
        gc.collect()
    assert [str(warning.message) for warning in told] == []


async def test_a_config_that_says_nothing_of_sensitivity_keeps_the_workflows_default(world: World) -> None:
    async def run(event: Any, step: Any) -> None:
        await step.do("default", lambda: "secret")
        await step.do("timed", {"timeout": 5}, lambda: "secret")
        await step.do("open", {"sensitive": None}, lambda: "no secret")

    instance = await world.start(run, step_defaults={"sensitive": "output"} | NO_RETRIES)
    await instance.result(timeout=DEADLINE)
    status = await instance.status()
    outputs = [step_of(status, name).output for name in ("default", "timed", "open")]
    assert outputs == ["[REDACTED]", "[REDACTED]", "no secret"]
