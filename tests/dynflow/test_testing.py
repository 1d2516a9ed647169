"""dynflow.testing: scripts for instances, and time that stands still (workflows.md section 9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest

from dynflow import DynamicWorkflowBinding, WorkflowEntrypoint, create_dynamic_workflow_entrypoint
from dynflow.errors import (
    InvalidArgumentError,
    InvalidInstanceIdError,
    NonRetryableError,
    UnserializableError,
    WorkflowTimeoutError,
)
from dynflow.isolates import ProcessLoader, TrustedLoader, WorkerCode
from dynflow.testing import InstanceScript, TestingEngine

DEADLINE = 10
RETRIES = {"retries": {"limit": 2, "delay": "1 hour"}}


class Order(WorkflowEntrypoint):
    """Charges, sleeps a day, waits for an approval, ships."""

    calls: list[str] = []  # noqa: RUF012 - what the steps really did

    async def run(self, event: Any, step: Any) -> Any:
        charged = await step.do("charge", RETRIES, lambda ctx: self.really(f"charge {ctx.attempt}"))
        await step.sleep("cool down", "1 day")
        await step.sleep_until("new year", 4102444800 if event.payload else 0)
        try:
            approval = (await step.wait_for_event("approval", type="approve", timeout="30 days")).payload
        except WorkflowTimeoutError:
            return [charged, "nobody"]
        return [charged, approval, await step.do("ship", lambda: self.really("ship"))]

    def really(self, what: str) -> str:
        self.calls.append(what)
        return what


@pytest.fixture
async def engine() -> AsyncIterator[TestingEngine]:
    Order.calls.clear()
    engine = TestingEngine()
    engine.register("orders", Order)
    async with engine:
        yield engine


@pytest.fixture
def script(engine: TestingEngine) -> InstanceScript:
    return engine.script("orders", "o")


async def result(engine: TestingEngine) -> Any:
    return await (await engine.binding("orders").create(id="o")).result(timeout=DEADLINE)


async def test_without_a_script_nothing_changes_and_time_is_moved_by_hand(engine: TestingEngine) -> None:
    instance = await engine.binding("orders").create(id="o")
    script = engine.script("orders", "o")
    status = await script.wait_for_status("waiting")
    assert [(step.name, step.status) for step in status.steps] == [
        ("charge", "complete"),
        ("cool down", "waiting"),
    ]
    engine.clock.advance(86_400)
    await script.wait_for_step_result("new year")
    await script.wait_for_status("waiting")
    await instance.send_event(type="approve", payload="yes")
    assert await instance.result(timeout=DEADLINE) == ["charge 1", "yes", "ship"]


async def test_sleeps_are_over_at_once(engine: TestingEngine, script: InstanceScript) -> None:
    script.disable_sleeps()
    instance = await engine.binding("orders").create(id="o", params={"far": True})
    before = engine.clock.now()
    await script.wait_for_step_result("new year")
    assert engine.clock.now() == before
    await instance.send_event(type="approve")
    assert (await instance.result(timeout=DEADLINE))[2] == "ship"


async def test_one_sleep_by_its_name(engine: TestingEngine, script: InstanceScript) -> None:
    script.disable_sleeps("new year")
    await engine.binding("orders").create(id="o", params={"far": True})
    status = await script.wait_for_status("waiting")
    assert status.steps[-1].name == "cool down"


async def test_a_mocked_result_takes_the_place_of_the_callback(
    engine: TestingEngine, script: InstanceScript
) -> None:
    script.disable_sleeps()
    script.mock_step_result("charge", {"id": 7})
    script.mock_event(type="approve", payload="yes")
    assert await result(engine) == [{"id": 7}, "yes", "ship"]
    assert Order.calls == ["ship"]
    assert await script.wait_for_step_result("charge") == {"id": 7}


async def test_a_mocked_error_is_retried_like_any_other(
    engine: TestingEngine, script: InstanceScript
) -> None:
    script.disable_sleeps()
    script.disable_retry_delays()
    script.mock_step_error("charge", ConnectionError("down"), times=2)
    script.mock_event(type="approve")
    before = engine.clock.now()
    assert (await result(engine))[0] == "charge 3"
    assert engine.clock.now() == before
    charge = (await script.wait_for_status("complete")).steps[0]
    assert [attempt.error and attempt.error.name for attempt in charge.attempts] == [
        "ConnectionError",
        "ConnectionError",
        None,
    ]
    assert charge.attempts[0].retry_delay is not None
    assert charge.attempts[0].retry_delay.total_seconds() == 3600


@pytest.mark.parametrize("error", [ConnectionError("down"), NonRetryableError("no")])
async def test_an_error_without_an_end_fails_the_step(
    engine: TestingEngine, script: InstanceScript, error: Exception
) -> None:
    script.disable_retry_delays("charge")
    script.mock_step_error("charge", error)
    with pytest.raises(type(error)):
        await result(engine)
    assert Order.calls == []
    with pytest.raises(AssertionError, match=f"'charge' is errored with {type(error).__name__}"):
        await script.wait_for_step_result("charge")


async def test_the_faults_of_a_mocked_step_end_in_its_mocked_result(
    engine: TestingEngine, script: InstanceScript
) -> None:
    script.disable_sleeps()
    script.disable_retry_delays()
    script.mock_step_error("charge", ValueError("once"), times=1)
    script.mock_step_result("charge", "mocked", count=1)
    script.mock_event(type="approve")
    assert (await result(engine))[0] == "mocked"


async def test_a_forced_timeout_is_an_attempt_that_timed_out(
    engine: TestingEngine, script: InstanceScript
) -> None:
    script.disable_sleeps()
    script.disable_retry_delays()
    script.force_step_timeout("charge", times=1)
    script.mock_event(type="approve")
    assert (await result(engine))[0] == "charge 2"
    charge = (await script.wait_for_status("complete")).steps[0]
    assert charge.attempts[0].error is not None
    assert charge.attempts[0].error.name == "WorkflowTimeoutError"


async def test_a_forced_event_timeout(engine: TestingEngine, script: InstanceScript) -> None:
    script.disable_sleeps()
    script.force_event_timeout("approval")
    assert await result(engine) == ["charge 1", "nobody"]


async def test_mocks_hold_after_a_crash(engine: TestingEngine, script: InstanceScript) -> None:
    script.mock_step_result("ship", "mocked")
    await engine.binding("orders").create(id="o")
    await script.wait_for_status("waiting")
    await engine.reopen()
    engine.clock.advance(86_400)
    await script.wait_for_step_result("cool down")
    await (await engine.binding("orders").get("o")).send_event(type="approve")
    await script.wait_for_status("complete")
    assert await script.wait_for_step_result("ship") == "mocked"
    assert Order.calls == ["charge 1"]


async def test_other_instances_are_left_alone(engine: TestingEngine, script: InstanceScript) -> None:
    script.mock_step_result("charge", "mocked")
    await engine.binding("orders").create(id="other")
    assert await engine.script("orders", "other").wait_for_step_result("charge") == "charge 1"


async def test_waits_may_begin_before_the_instance_is_there(
    engine: TestingEngine, script: InstanceScript
) -> None:
    waiting = asyncio.ensure_future(script.wait_for_step_result("charge"))
    await asyncio.sleep(0)
    await engine.binding("orders").create(id="o")
    assert await waiting == "charge 1"


async def test_what_never_comes_is_said_with_what_is(engine: TestingEngine, script: InstanceScript) -> None:
    with pytest.raises(TimeoutError, match="'o' was not created"):
        await script.wait_for_status("complete", timeout=0.01)
    await engine.binding("orders").create(id="o")
    await script.wait_for_status("waiting")
    with pytest.raises(TimeoutError, match=r"'o' is waiting .*cool down waiting"):
        await script.wait_for_step_result("ship", timeout=0.01)
    await (await engine.binding("orders").get("o")).terminate()
    with pytest.raises(AssertionError, match="'o' is terminated"):
        await script.wait_for_step_result("ship")
    with pytest.raises(AssertionError, match="never had"):
        await script.wait_for_status("complete")


async def test_wrong_scripts_are_refused(engine: TestingEngine, script: InstanceScript) -> None:
    with pytest.raises(InvalidArgumentError, match="times"):
        script.mock_step_error("charge", ValueError(), times=0)
    with pytest.raises(InvalidArgumentError, match="exception"):
        script.mock_step_error("charge", KeyboardInterrupt())
    with pytest.raises(InvalidArgumentError, match="event type"):
        script.mock_event(type="a b")
    with pytest.raises(InvalidInstanceIdError):
        engine.script("orders", "-no id")
    name: Any
    for name in ("", "x" * 257, "a\nb", 7, None):
        for say in (
            script.disable_sleeps,
            script.disable_retry_delays,
            script.force_step_timeout,
            script.force_event_timeout,
            lambda name: script.mock_step_result(name, 1),
            lambda name: script.mock_step_error(name, ValueError()),
        ):
            with pytest.raises(InvalidArgumentError, match="step name"):
                say(name)
        with pytest.raises(InvalidArgumentError, match="step name"):
            await script.wait_for_step_result(name)
    for count in (0, -1, "1", True):
        with pytest.raises(InvalidArgumentError, match="count"):
            script.mock_step_result("charge", 1, count=count)  # type: ignore[arg-type]
    with pytest.raises(UnserializableError):
        script.mock_step_result("charge", object())
    for wanted in ((), ("completed",), ("complete", "done")):
        with pytest.raises(InvalidArgumentError, match="'complete', 'errored'"):
            await script.wait_for_status(*wanted)
    await engine.binding("orders").create(id="o")
    with pytest.raises(InvalidArgumentError, match="send_event"):
        script.mock_event(type="approve")


async def test_tenants_workflows_behind_the_router_follow_scripts_too(engine: TestingEngine) -> None:
    async def load_runner(context: Any) -> Any:
        return Order(None, None)

    engine.register("dynamic", create_dynamic_workflow_entrypoint(load_runner))
    script = engine.script("dynamic", "o")
    script.disable_sleeps()
    script.mock_step_result("charge", "mocked")
    script.mock_event(type="approve", payload="yes")
    params = {"__dispatcher_metadata": {"tenant_id": "t"}, "params": {}}
    instance = await engine.binding("dynamic").create(id="o", params=params)
    assert await instance.result(timeout=DEADLINE) == ["mocked", "yes", "ship"]


# --- workflows in isolates -----------------------------------------------------------------------

TENANT = """
from dynflow import WorkflowEntrypoint, WorkflowTimeoutError

class Order(WorkflowEntrypoint):
    async def run(self, event, step):
        retries = {"retries": {"limit": 2, "delay": "1 hour"}}
        charged = await step.do("charge", retries, lambda ctx: f"charge {ctx.attempt}")
        await step.sleep("cool down", "1 day")
        await step.sleep_until("new year", 4102444800 if event.payload else 0)
        try:
            approval = (await step.wait_for_event("approval", type="approve", timeout="30 days")).payload
        except WorkflowTimeoutError:
            return [charged, "nobody"]
        return [charged, approval, await step.do("ship", lambda: "ship")]
"""


Tell = Callable[[InstanceScript], None]


async def in_isolates(loader: Any, says: list[Tell], params: Any = None) -> Any:
    """Run one instance of TENANT under a script; return its status and how far the clock has moved."""

    async def load_runner(context: Any) -> Any:
        return loader.get("t", lambda: WorkerCode("index.py", {"index.py": TENANT})).get_entrypoint("Order")

    engine = TestingEngine()
    engine.register("orders", create_dynamic_workflow_entrypoint(load_runner))
    async with loader, engine:
        before = engine.clock.now()
        script = engine.script("orders", "o")
        for tell in says:
            tell(script)
        await DynamicWorkflowBinding(engine.binding("orders"), {"tenant_id": "t"}).create(
            id="o", params=params
        )
        status = await script.wait_for_status("complete", "waiting", "errored", timeout=30)
        return status, engine.clock.now() - before


CHARGE = "charge"


def steps_of(status: Any) -> dict[str, Any]:
    return {step.name: step for step in status.steps}


SCRIPTS: dict[str, tuple[list[Tell], Callable[[Any], bool]]] = {
    "disable_sleeps": (
        [lambda script: script.disable_sleeps()],
        lambda status: steps_of(status)["approval"].status == "waiting",
    ),
    "disable_sleeps of one": (
        [lambda script: script.disable_sleeps("new year")],
        lambda status: steps_of(status)["cool down"].status == "waiting",
    ),
    "disable_retry_delays and mock_step_error": (
        [
            lambda script: script.disable_retry_delays(),
            lambda script: script.mock_step_error(CHARGE, ConnectionError("down"), times=2),
        ],
        lambda status: (
            [each.error and each.error.name for each in steps_of(status)[CHARGE].attempts]
            == ["ConnectionError", "ConnectionError", None]
        ),
    ),
    "mock_step_result": (
        [lambda script: script.mock_step_result(CHARGE, {"mocked": (1,)})],
        lambda status: steps_of(status)[CHARGE].output == {"mocked": (1,)},
    ),
    "force_step_timeout": (
        [lambda script: script.force_step_timeout(CHARGE, times=1)],
        lambda status: steps_of(status)[CHARGE].attempts[0].error.name == "WorkflowTimeoutError",
    ),
    "mock_event": (
        [
            lambda script: script.disable_sleeps(),
            lambda script: script.mock_event(type="approve", payload="yes"),
        ],
        lambda status: status.output == ["charge 1", "yes", "ship"],
    ),
    "force_event_timeout": (
        [lambda script: script.disable_sleeps(), lambda script: script.force_event_timeout("approval")],
        lambda status: status.output == ["charge 1", "nobody"],
    ),
}


@pytest.mark.parametrize("make_loader", [TrustedLoader, ProcessLoader])
@pytest.mark.parametrize("name", SCRIPTS)
async def test_every_name_of_a_script_holds_for_workflows_in_isolates(make_loader: Any, name: str) -> None:
    tell, holds = SCRIPTS[name]
    status, passed = await in_isolates(
        make_loader(), tell, params={"far": True} if "sleeps" in name else None
    )
    assert holds(status), status
    assert passed < timedelta(seconds=1)


@pytest.mark.parametrize("make_loader", [TrustedLoader, ProcessLoader])
async def test_results_of_steps_in_isolates_are_waited_for_over_a_crash(make_loader: Any) -> None:
    loader = make_loader()

    async def load_runner(context: Any) -> Any:
        return loader.get("t", lambda: WorkerCode("index.py", {"index.py": TENANT})).get_entrypoint("Order")

    engine = TestingEngine()
    engine.register("orders", create_dynamic_workflow_entrypoint(load_runner))
    async with loader, engine:
        script = engine.script("orders", "o")
        script.mock_step_result("ship", "mocked")
        orders = DynamicWorkflowBinding(engine.binding("orders"), {"tenant_id": "t"})
        await orders.create(id="o")
        assert await script.wait_for_step_result("charge") == "charge 1"
        await script.wait_for_status("waiting")
        await engine.reopen()
        engine.clock.advance(86_400)
        await script.wait_for_step_result("new year")
        await (await orders.get("o")).send_event(type="approve", payload="yes")
        assert await script.wait_for_step_result("ship", timeout=30) == "mocked"
        assert (await script.wait_for_status("complete")).output == ["charge 1", "yes", "mocked"]
