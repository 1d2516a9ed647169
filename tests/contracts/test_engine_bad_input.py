"""Every call of the instance API with what it cannot take, on every engine: a clear error, and nothing has changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from dynflow.binding import WorkflowBinding, WorkflowInstance
from dynflow.errors import (
    DynflowError,
    IllegalMoveError,
    InstanceExistsError,
    InstanceNotFoundError,
    InvalidArgumentError,
    InvalidInstanceIdError,
    UnserializableError,
    WorkflowInternalError,
)
from dynflow.router import DynamicWorkflowBinding
from dynflow.types import HISTORY_TYPES, InstanceStatus
from tests.engine_world import DEADLINE, World

LONG = "x" * 3_000_000
MALICIOUS = [
    "", "-", "-a", "a b", "a/b", "../../etc/passwd", "a\n", "\na", "a\x00b", "'; DROP TABLE instances;--", "ä",
    "\u0661", "a\u202eb", "\ud800", "a.b", "a:b", "%s", "{0}", LONG,
]  # fmt: skip
NO_TEXT: list[Any] = [7, 1.5, True, b"a", ("a",), ["a"], {"a": 1}, object()]
NO_PLAIN_DATA: list[Any] = [
    object(), {1: 2}, {"a": {"b": object()}}, [lambda: 1], (x for x in "ab"), ValueError("x"), 1j, range(3),
    frozenset({1}), bytearray(b"x"), type,
]  # fmt: skip
NO_DURATION: list[Any] = [
    "soon", "1 h", "", -1, "-1 hours", True, float("nan"), float("inf"), 1e300, 10**400, b"1 hour", [1], object(),
    timedelta(seconds=-1), LONG,
]  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """An engine with one instance that waits."""

    world: World
    binding: WorkflowBinding
    instance: WorkflowInstance

    async def seen(self) -> tuple[InstanceStatus, list[str], int]:
        """What must not change: status, history, and how many instances have ever been heard of."""
        return await self.instance.status(), self.world.order(self.instance), len(self.world.history)


@pytest.fixture
async def scene(world: World) -> AsyncIterator[Scene]:
    async def waits(event: Any, step: Any) -> Any:
        first = await step.do("first", lambda: 1)
        return [first, (await step.wait_for_event("w", type="go")).payload]

    binding = world.register(waits)
    instance = await binding.create(id="there", params={"n": 1})
    await world.parked(instance)
    scene = Scene(world, binding, instance)
    yield scene
    if (await instance.status()).status == "waiting":  # and it still works
        await instance.send_event(type="go", payload="still here")
        assert await instance.result(timeout=DEADLINE) == [1, "still here"]


def shown(value: Any) -> str:
    """What an error says of a value."""
    return repr(value)[:80]


async def refused(
    scene: Scene, call: Callable[[Scene], Any], error: type[DynflowError], value: Any = None
) -> DynflowError:
    """Call; it must raise this error, name the value, be short, and change nothing."""
    before = await scene.seen()
    with pytest.raises(error) as caught:
        await call(scene)
    message = str(caught.value)
    assert len(message) < 1_000
    if value is not None:
        assert shown(value) in message
    assert await scene.seen() == before
    return caught.value


def listed(*groups: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "value", [value for group in groups for value in group], ids=lambda value: repr(value)[:20]
    )


# --- ids -----------------------------------------------------------------------------------------


@listed(MALICIOUS, NO_TEXT)
async def test_what_is_no_id_is_refused_by_every_call_that_takes_one(scene: Scene, value: Any) -> None:
    calls: list[Callable[[Scene], Any]] = [
        lambda s: s.binding.create(id=value),
        lambda s: s.binding.get(value),
        lambda s: s.binding.delete_batch(["there", value]),
        lambda s: s.binding.create_batch([{"id": "fine"}, {"id": value}]),
    ]
    for call in calls:
        await refused(scene, call, InvalidInstanceIdError, value)
    with pytest.raises(InstanceNotFoundError):
        await scene.binding.get("fine")


async def test_unknown_and_taken_ids_are_told_by_name(scene: Scene) -> None:
    await refused(scene, lambda s: s.binding.get("nobody"), InstanceNotFoundError, "nobody")
    await refused(scene, lambda s: s.binding.create(id="there"), InstanceExistsError, "there")
    assert await scene.binding.delete_batch(["nobody"]) == []
    assert await scene.binding.create_batch([{"id": "there"}]) == []


CALLS: dict[str, Callable[[WorkflowInstance], Any]] = {
    "status": lambda instance: instance.status(),
    "pause": lambda instance: instance.pause(),
    "resume": lambda instance: instance.resume(),
    "terminate": lambda instance: instance.terminate(),
    "terminate with rollback": lambda instance: instance.terminate(rollback=True),
    "restart": lambda instance: instance.restart(),
    "restart from a step": lambda instance: instance.restart(from_step=("first", 1)),
    "send_event": lambda instance: instance.send_event(type="go"),
    "delete": lambda instance: instance.delete(),
    "subscribe": lambda instance: anext(instance.subscribe()),
    "result": lambda instance: instance.result(timeout=DEADLINE),
}


@pytest.mark.parametrize("name", CALLS)
async def test_every_call_of_an_instance_that_is_gone_says_so(scene: Scene, name: str) -> None:
    gone = await scene.binding.create(id="gone")
    await scene.world.parked(gone)
    await gone.delete()
    await refused(scene, lambda _: CALLS[name](gone), InstanceNotFoundError, "gone")


# --- create --------------------------------------------------------------------------------------


@listed(NO_PLAIN_DATA)
async def test_params_that_cannot_be_stored_are_refused_with_the_path(scene: Scene, value: Any) -> None:
    error = await refused(
        scene, lambda s: s.binding.create(id="new", params={"deep": [0, value]}), UnserializableError
    )
    assert "params['deep'][1]" in str(error)
    await refused(scene, lambda s: s.binding.create_batch([{}, {"params": value}]), UnserializableError)
    with pytest.raises(InstanceNotFoundError):
        await scene.binding.get("new")


async def test_too_large_params_and_payloads_are_refused_with_size_and_limit(scene: Scene) -> None:
    calls: list[Callable[[Scene], Any]] = [
        lambda s: s.binding.create(params={"text": LONG}),
        lambda s: s.binding.create_batch([{}, {"params": LONG}]),
        lambda s: s.instance.send_event(type="go", payload=[LONG]),
    ]
    for call in calls:
        error = await refused(scene, call, WorkflowInternalError)
        assert "3,000,0" in str(error)
        assert "1,048,576" in str(error)


@listed(NO_DURATION, [{"finished": 1}, {"complete": "x"}, {"complete": None}, {1: 2}, {"errored": -1}])
async def test_a_wrong_retention_is_refused(scene: Scene, value: Any) -> None:
    named = None if isinstance(value, dict) else value
    for call in (
        lambda s: s.binding.create(id="new", retention=value),
        lambda s: s.binding.create_batch([{"id": "new", "retention": value}]),
    ):
        error = await refused(scene, call, InvalidArgumentError, named)
        assert "retention" in str(error)
    with pytest.raises(InstanceNotFoundError):
        await scene.binding.get("new")


@listed([None, 7, "ab", b"ab", {}, {"id": "a"}, object(), iter([{}]), {1}])
async def test_a_batch_that_is_no_list_is_refused(scene: Scene, value: Any) -> None:
    await refused(scene, lambda s: s.binding.create_batch(value), InvalidArgumentError, value)
    await refused(scene, lambda s: s.binding.delete_batch(value), InvalidArgumentError, value)
    tenant = DynamicWorkflowBinding(scene.binding, {"tenant_id": "t"})
    await refused(scene, lambda _: tenant.create_batch(value), InvalidArgumentError, value)


async def test_batches_of_none_and_of_too_many_are_refused(scene: Scene) -> None:
    for count in (0, 101):
        ids = [f"i{n}" for n in range(count)]
        for call in (
            lambda s, ids=ids: s.binding.create_batch([{"id": id_} for id_ in ids]),
            lambda s, ids=ids: s.binding.delete_batch(ids),
        ):
            error = await refused(scene, call, InvalidArgumentError)
            assert "1 to 100" in str(error)
            assert str(count) in str(error)


@listed([None, 7, "id", ["id"], {"ids": "a"}, {"id": "a", "schedule": 1}, {1: 2}, {"params ": 1}])
async def test_an_item_with_unknown_options_is_refused_and_nothing_of_its_batch_is_made(
    scene: Scene, value: Any
) -> None:
    call = lambda s: s.binding.create_batch([{"id": "first"}, value])  # noqa: E731
    error = await refused(scene, call, InvalidArgumentError, value)
    assert "'retention'" in str(error)  # what it takes
    with pytest.raises(InstanceNotFoundError):
        await scene.binding.get("first")


async def test_errors_of_a_tenants_batch_do_not_show_its_metadata(scene: Scene) -> None:
    tenant = DynamicWorkflowBinding(scene.binding, {"tenant_id": "t", "plan": "confidential"})
    for batch in ([{"name": 1}], [{}, {"params": object()}], [{"id": "-"}]):
        with pytest.raises(DynflowError) as caught:
            await tenant.create_batch(batch)
        assert "confidential" not in str(caught.value)


# --- the handle ----------------------------------------------------------------------------------


@listed(MALICIOUS, NO_TEXT, [None, "x" * 101])
async def test_a_wrong_event_type_is_refused(scene: Scene, value: Any) -> None:
    error = await refused(scene, lambda s: s.instance.send_event(type=value), InvalidArgumentError, value)
    assert "event type" in str(error)


@listed(NO_PLAIN_DATA)
async def test_a_payload_that_cannot_be_stored_is_refused(scene: Scene, value: Any) -> None:
    error = await refused(
        scene, lambda s: s.instance.send_event(type="go", payload={"a": value}), UnserializableError
    )
    assert "payload['a']" in str(error)


@listed(
    [
        "first", b"first", 7, True, {}, {"name": "first"}, (), ("first",), ("first", 1, "do", 4), (1, "first"),
        ("first", "1"), ("first", 1.0), ("first", True), ("first", None), (None, 1), ("first", 1, "step"),
        ("first", 1, None), ("first", 1, ["do"]), ("first", 1, "rollback"), (b"first", 1), object(), {"first"},
        ("first", 0), ("first", -1), ("first", 2), ("first", 2**70), ("first", 1, "sleep"), ("First", 1),
        ("nobody", 1), ("w", 1), ("\ud800", 1), ("\x00", 1), ("' OR 1=1", 1), (LONG, 1), ["first"], [("first", 1)],
    ]
)  # fmt: skip
async def test_restart_from_what_is_no_step_is_refused(scene: Scene, value: Any) -> None:
    error = await refused(scene, lambda s: s.instance.restart(from_step=value), InvalidArgumentError)
    named = value[0] if isinstance(value, tuple) and value and isinstance(value[0], str) else value
    assert shown(named)[:70] in str(error)


@listed([-1, "1", 1.5, True, b"1", [1], object(), {}, LONG])
async def test_a_wrong_cursor_is_refused_at_the_call(scene: Scene, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="cursor"):
        scene.instance.subscribe(value)
    await refused(scene, lambda s: anext(s.instance.subscribe(value)), InvalidArgumentError, value)


@listed(
    [
        "step.completed", b"x", 7, object(), [7], [None], [["step.completed"]], ["step"], ["step.finished"], [LONG],
        ["step.completed", "Step.completed"], {"workflow.*"}, {"step.completed": 1, "nope": 2},
    ]
)  # fmt: skip
async def test_unknown_types_of_history_are_refused_at_the_call_naming_the_known(
    scene: Scene, value: Any
) -> None:
    error = await refused(scene, lambda s: anext(s.instance.subscribe(types=value)), InvalidArgumentError)
    if isinstance(value, list | set) and isinstance(next(iter(value)), str):
        assert "'step.completed'" in str(error)
        assert "'wait.timed_out'" in str(error)
    with pytest.raises(InvalidArgumentError):
        scene.instance.subscribe(types=value)


@pytest.mark.parametrize("make", [list, tuple, set, frozenset, dict.fromkeys, iter])
async def test_types_may_be_any_collection(scene: Scene, make: Any) -> None:
    await scene.instance.terminate()
    found = [
        event.type
        async for event in scene.instance.subscribe(types=make(["workflow.queued", "sleep.started"]))
    ]
    assert found == ["workflow.queued"]


@listed(NO_DURATION)
async def test_a_wrong_timeout_of_a_result_is_refused(scene: Scene, value: Any) -> None:
    error = await refused(scene, lambda s: s.instance.result(timeout=value), InvalidArgumentError, value)
    assert "timeout" in str(error)


@listed([None, 1, 0, "yes", "", [], object()])
async def test_rollback_is_yes_or_no(scene: Scene, value: Any) -> None:
    await refused(scene, lambda s: s.instance.terminate(rollback=value), InvalidArgumentError, value)


# --- wrong states --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["complete", "errored", "terminated"])
async def test_what_has_ended_can_neither_be_ended_nor_told_anything(world: World, status: str) -> None:
    async def ends(event: Any, step: Any) -> Any:
        await step.do("first", lambda: 1)
        if status == "errored":
            raise ValueError("no")
        if status == "terminated":
            await step.sleep("nap", 100)

    instance = await world.start(ends, id="ended")
    if status == "terminated":
        await world.parked(instance)
        await instance.terminate()
    await world.status(instance, status)
    before = await instance.status(), world.order(instance)
    calls: list[Callable[[], Any]] = [
        instance.terminate,
        lambda: instance.terminate(rollback=True),
        lambda: instance.send_event(type="go"),
    ]
    for call in calls:
        with pytest.raises(IllegalMoveError, match=f"'ended' is {status}"):
            await call()
    await instance.pause()
    await instance.resume()
    assert (await instance.status(), world.order(instance)) == before


async def test_moves_that_make_no_sense_change_nothing(scene: Scene) -> None:
    before = await scene.seen()
    await scene.instance.resume()  # nothing is paused
    assert await scene.seen() == before
    await scene.instance.pause()
    paused = await scene.seen()
    await scene.instance.pause()
    assert await scene.seen() == paused
    await scene.instance.resume()
    await scene.world.status(scene.instance, "waiting")


async def test_many_wrong_calls_at_once_leave_the_engine_alone(scene: Scene) -> None:
    before = await scene.seen()
    results = await asyncio.gather(
        *(scene.binding.create(id=value) for value in MALICIOUS),
        *(scene.binding.get(f"nobody{n}") for n in range(100)),
        *(scene.instance.restart(from_step=("nobody", n)) for n in range(100)),
        return_exceptions=True,
    )
    assert all(isinstance(result, DynflowError) for result in results)
    assert await scene.seen() == before


# --- the engine ----------------------------------------------------------------------------------


async def run(event: Any, step: Any) -> int:
    return 1


async def test_a_workflow_is_registered_once(world: World) -> None:
    world.register(run)
    entrypoint = world._registered["run"][0]
    with pytest.raises(InvalidArgumentError, match="'run' is registered already"):
        world.engine.register("run", entrypoint)
    assert await (await world.engine.binding("run").create()).result(timeout=DEADLINE) == 1


@listed([*MALICIOUS, "x" * 65, None], NO_TEXT)
async def test_a_wrong_workflow_name_is_refused(world: World, value: Any) -> None:
    world.register(run)
    entrypoint = world._registered["run"][0]
    with pytest.raises(InvalidArgumentError, match="workflow name") as caught:
        world.engine.register(value, entrypoint)
    assert shown(value) in str(caught.value)
    with pytest.raises(InvalidArgumentError) as caught:
        world.engine.binding(value)
    assert shown(value)[:70] in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    "options",
    [
        {"step_defaults": {"retires": 1}}, {"step_defaults": {"timeout": 0}}, {"step_defaults": 7},
        {"step_defaults": {"retries": {"limit": 1, "delay": lambda ctx, error: 1}}},
        {"concurrency": 0}, {"concurrency": "2"}, {"binding": 7}, {"binding": ""}, {"binding": "a b"},
    ],
)  # fmt: skip
async def test_wrong_options_of_a_registration_are_refused_and_leave_the_name_free(
    world: World, options: dict[str, Any]
) -> None:
    with pytest.raises(DynflowError):
        world.register(run, **options)
    world._registered.clear()
    assert await world.result(run) == 1


async def test_the_known_types_of_history_are_those_that_happen(scene: Scene) -> None:
    assert {event.type for _, event in scene.world.history} <= HISTORY_TYPES
