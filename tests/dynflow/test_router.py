"""The router: workflows.md section 7, one registered workflow for the code of many tenants."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynflow import (
    DynamicWorkflowBinding,
    IllegalMoveError,
    InstanceNotFoundError,
    InvalidArgumentError,
    MissingDispatcherMetadataError,
    create_dynamic_workflow_entrypoint,
    dispatch_workflow,
    wrap_workflow_binding,
)
from dynflow.clock import ManualClock
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import TrustedLoader, WorkerCode
from dynflow.types import Schedule, WorkflowEvent
from dynflow.workflow import WorkflowEntrypoint, WorkflowStep
from tests.engine_world import DEADLINE, World

ENVELOPE = "__dispatcher_metadata"


@dataclass
class Recorder:
    """A binding that notes what reaches it."""

    calls: list[tuple[str, Any]] = field(default_factory=list)

    async def create(self, **options: Any) -> str:
        self.calls.append(("create", options))
        return f"handle of {options.get('id')}"

    async def create_batch(self, batch: list[Any]) -> list[str]:
        self.calls.append(("create_batch", batch))
        return ["handles"]

    async def get(self, id: str) -> str:  # noqa: A002
        self.calls.append(("get", id))
        return f"handle of {id}"

    async def delete_batch(self, ids: list[str]) -> list[str]:
        self.calls.append(("delete_batch", ids))
        return ids


# --- the wrapped binding -------------------------------------------------------------------------


async def test_create_reaches_the_engine_in_an_envelope_and_keeps_id_and_options() -> None:
    recorder, metadata = Recorder(), {"tenant_id": "t"}
    wrapped = DynamicWorkflowBinding(recorder, metadata)
    assert await wrapped.create(id="a", params={"x": 1}, retention="1 hour") == "handle of a"
    assert await wrapped.create() == "handle of None"
    assert recorder.calls == [
        ("create", {"id": "a", "retention": "1 hour", "params": {ENVELOPE: metadata, "params": {"x": 1}}}),
        ("create", {"params": {ENVELOPE: metadata, "params": None}}),
    ]


async def test_batch_items_each_get_the_envelope_and_the_callers_options_are_not_mutated() -> None:
    recorder = Recorder()
    batch: list[dict[str, Any]] = [{"id": "a", "params": {"x": 1}}, {"retention": 5}]
    before = copy.deepcopy(batch)
    assert await DynamicWorkflowBinding(recorder, "m").create_batch(batch) == ["handles"]
    assert batch == before
    assert recorder.calls == [
        (
            "create_batch",
            [
                {"id": "a", "params": {ENVELOPE: "m", "params": {"x": 1}}},
                {"retention": 5, "params": {ENVELOPE: "m", "params": None}},
            ],
        )
    ]


@pytest.mark.parametrize("batch", ["ab", {"id": "a"}, [None], [["id"]]])
async def test_a_batch_of_no_dicts_is_refused(batch: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="batch"):
        await DynamicWorkflowBinding(Recorder(), "m").create_batch(batch)


async def test_get_and_delete_are_forwarded() -> None:
    recorder = Recorder()
    wrapped = DynamicWorkflowBinding(recorder, "m")
    assert await wrapped.get("a") == "handle of a"
    assert await wrapped.delete_batch(["a"]) == ["a"]
    assert recorder.calls == [("get", "a"), ("delete_batch", ["a"])]


async def test_the_underlying_binding_is_looked_up_at_every_call() -> None:
    recorders = [Recorder(), Recorder()]
    upcoming = iter(recorders)
    wrapped = DynamicWorkflowBinding(lambda: next(upcoming), "m")
    await wrapped.get("a")
    await wrapped.get("b")
    assert [recorder.calls for recorder in recorders] == [[("get", "a")], [("get", "b")]]


async def test_a_tenants_forged_envelope_stays_inside_of_its_own() -> None:
    recorder = Recorder()
    forged = {ENVELOPE: {"tenant_id": "other"}, "params": {}}
    await DynamicWorkflowBinding(recorder, {"tenant_id": "me"}).create(params=forged)
    assert recorder.calls[0][1]["params"] == {ENVELOPE: {"tenant_id": "me"}, "params": forged}


# --- dispatch ------------------------------------------------------------------------------------


def event_with(payload: Any) -> WorkflowEvent:
    clock = ManualClock()
    return WorkflowEvent(payload, clock.now(), "a", "flow", Schedule("* * * * *", clock.now()))


class Runner:
    def __init__(self, outcome: Any = "output") -> None:
        self.outcome, self.seen = outcome, []  # type: ignore[var-annotated]

    async def run(self, event: Any, step: Any) -> Any:
        self.seen.append((event, step))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_dispatch_opens_the_envelope_loads_and_runs(asynchronous: bool) -> None:  # noqa: FBT001
    runner, loaded = Runner(), []

    def load(context: Any) -> Any:
        loaded.append(context)
        return runner

    async def load_later(context: Any) -> Any:
        return load(context)

    context = SimpleNamespace(env={"LOADER": 1}, ctx="ctx")
    event = event_with({ENVELOPE: {"tenant_id": "t"}, "params": {"x": 1}})
    step: Any = object()
    assert await dispatch_workflow(context, event, step, load_later if asynchronous else load) == "output"
    ((seen, seen_step),) = runner.seen
    assert seen_step is step  # untouched
    assert seen.payload == {"x": 1}
    assert (seen.timestamp, seen.instance_id, seen.workflow_name, seen.schedule) == (
        event.timestamp,
        "a",
        "flow",
        event.schedule,
    )
    assert [(each.metadata, each.env, each.ctx) for each in loaded] == [
        ({"tenant_id": "t"}, {"LOADER": 1}, "ctx")
    ]


async def test_missing_params_are_an_empty_dict() -> None:
    runner = Runner()
    context = SimpleNamespace(env={}, ctx=None)
    await dispatch_workflow(context, event_with({ENVELOPE: "m", "params": None}), object(), lambda _: runner)  # type: ignore[arg-type]
    assert runner.seen[0][0].payload == {}


@pytest.mark.parametrize("payload", [None, {}, {"params": 1}, [ENVELOPE], "text", 7])
async def test_a_payload_without_an_envelope_is_refused_with_what_to_do(payload: Any) -> None:
    context = SimpleNamespace(env={}, ctx=None)
    with pytest.raises(MissingDispatcherMetadataError, match="wrap_workflow_binding"):
        await dispatch_workflow(context, event_with(payload), object(), lambda _: Runner())  # type: ignore[arg-type]


async def test_errors_of_loader_and_run_pass_through_unchanged() -> None:
    error = LookupError("mine")
    context = SimpleNamespace(env={}, ctx=None)
    event = event_with({ENVELOPE: "m", "params": {}})

    def refuses(_: Any) -> Any:
        raise error

    for load in (refuses, lambda _: Runner(error)):
        with pytest.raises(LookupError) as caught:
            await dispatch_workflow(context, event, object(), load)  # type: ignore[arg-type]
        assert caught.value is error


# --- on an engine --------------------------------------------------------------------------------

CODE = """
from dynflow import WorkflowEntrypoint

class TenantWorkflow(WorkflowEntrypoint):
    async def run(self, event, step):
        first = await step.do("first", lambda: "{version}")
        if event.payload.get("wait"):
            await step.wait_for_event("w", type="go")
        return [first, "{version}", event.payload, self.ctx.metadata]

async def fetch(request, env):
    options = request.json()
    return (await env.WORKFLOWS.create(**options)).id

async def control(env_id, method, *args, **options):
    from dynflow.workflow import current_env
    instance = await current_env.get().WORKFLOWS.get(env_id)
    return await getattr(instance, method)(*args, **options)
"""


class Tenants(World):
    """An engine whose one workflow loads each tenant's code by a TrustedLoader."""

    def __init__(self, folder: Path) -> None:
        self.versions: dict[str, str] = {}
        self.loads: list[str] = []
        self.folder = folder

        def make(**options: Any) -> EmbeddedEngine:
            self.loader = TrustedLoader()
            engine = EmbeddedEngine(folder / "flow.db", synchronous="NORMAL", **options)
            entrypoint = create_dynamic_workflow_entrypoint(self.load_runner)
            engine.register("dynamic", entrypoint, env={"LOADER": self.loader}, binding="WORKFLOWS")
            return engine

        super().__init__(make)

    def stub(self, tenant: str) -> Any:
        async def code() -> WorkerCode:
            source = CODE.replace("{version}", self.versions.get(tenant, "v1"))
            env = {"WORKFLOWS": wrap_workflow_binding({"tenant_id": tenant})}
            return WorkerCode("index.py", {"index.py": source}, env=env, metadata=tenant)

        return self.loader.get(f"{tenant}@{self.versions.get(tenant, 'v1')}", code)

    async def load_runner(self, context: Any) -> Any:
        self.loads.append(context.metadata["tenant_id"])
        return self.stub(context.metadata["tenant_id"]).get_entrypoint("TenantWorkflow")

    async def create(self, tenant: str, **options: Any) -> str:
        created: str = await self.stub(tenant).get_entrypoint().fetch(options)
        return created

    def bound(self, tenant: str) -> DynamicWorkflowBinding:
        return DynamicWorkflowBinding(self.engine.binding("dynamic"), {"tenant_id": tenant})


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[Tenants]:
    async with Tenants(tmp_path) as tenants:
        yield tenants


async def test_each_tenants_workflow_runs_its_own_code(tenants: Tenants) -> None:
    tenants.versions = {"a": "of a", "b": "of b"}
    for tenant in ("a", "b"):
        id_ = await tenants.create(tenant, params={"for": tenant})
        instance = await tenants.engine.binding("dynamic").get(id_)
        assert await instance.result(timeout=DEADLINE) == [
            f"of {tenant}",
            f"of {tenant}",
            {"for": tenant},
            tenant,
        ]


async def test_load_runner_is_called_for_every_run(tenants: Tenants) -> None:
    await tenants.create("a", id="one", params={"wait": True})
    instance = await tenants.bound("a").get("one")
    await tenants.parked(instance)
    await instance.send_event(type="go")
    await instance.result(timeout=DEADLINE)
    assert tenants.loads == ["a", "a"]


async def test_the_same_id_in_two_tenants_is_two_instances(tenants: Tenants) -> None:
    for tenant in ("a", "b"):
        await tenants.create(tenant, id="same", params={"for": tenant})
    for tenant in ("a", "b"):
        instance = await tenants.bound(tenant).get("same")
        assert instance.id == "same"
        assert (await instance.result(timeout=DEADLINE))[2] == {"for": tenant}
    with pytest.raises(InvalidArgumentError, match="several tenants"):
        await tenants.engine.binding("dynamic").get("same")


async def test_tenants_cannot_reach_each_others_instances(tenants: Tenants) -> None:
    await tenants.create("a", id="private", params={"wait": True})
    other = tenants.bound("b")
    with pytest.raises(InstanceNotFoundError):
        await other.get("private")
    assert await other.delete_batch(["private"]) == []
    assert len(await other.create_batch([{"id": "private"}])) == 1  # their own, beside it
    assert await (await other.get("private")).result(timeout=DEADLINE)
    assert await other.delete_batch(["private"]) == ["private"]
    assert (await (await tenants.bound("a").get("private")).status()).status != "complete"


async def test_metadata_without_the_tenant_key_is_a_tenant_of_its_own(tenants: Tenants) -> None:
    raw = tenants.engine.binding("dynamic")
    one, two = DynamicWorkflowBinding(raw, {"shop": 1}), DynamicWorkflowBinding(raw, {"shop": 2})
    await one.create(id="x")
    with pytest.raises(InstanceNotFoundError):
        await two.get("x")
    with pytest.raises(InvalidArgumentError, match="empty"):
        await DynamicWorkflowBinding(raw, {"tenant_id": ""}).get("x")


async def test_an_instance_stays_pinned_to_the_code_it_started_with(tenants: Tenants) -> None:
    tenants.versions["a"] = "old"
    await tenants.create("a", id="sleeper", params={"wait": True})
    await tenants.parked(await tenants.bound("a").get("sleeper"))
    tenants.versions["a"] = "new"
    await tenants.reopen()
    await tenants.create("a", id="fresh")
    assert (await (await tenants.bound("a").get("fresh")).result(timeout=DEADLINE))[:2] == ["new", "new"]
    sleeper = await tenants.bound("a").get("sleeper")
    await sleeper.send_event(type="go")
    assert (await sleeper.result(timeout=DEADLINE))[:2] == ["old", "old"]


async def test_a_dynamic_workflow_without_an_envelope_says_so(tenants: Tenants) -> None:
    instance = await tenants.engine.binding("dynamic").create()
    with pytest.raises(MissingDispatcherMetadataError):
        await instance.result(timeout=DEADLINE)


async def test_a_host_can_subclass_and_dispatch_by_itself(tmp_path: Path) -> None:
    class Mine(WorkflowEntrypoint):
        async def run(self, event: WorkflowEvent, step: WorkflowStep) -> Any:
            return await dispatch_workflow(self, event, step, lambda context: Runner(context.env["NAME"]))

    engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL")
    engine.register("mine", Mine, env={"NAME": "of the host"})
    async with engine:
        instance = await DynamicWorkflowBinding(engine.binding("mine"), "m").create()
        assert await instance.result(timeout=DEADLINE) == "of the host"


async def test_code_that_no_instance_is_pinned_to_goes_with_the_last_one(tenants: Tenants) -> None:
    async def kept() -> int:
        stored = await tenants.engine._storage.submit(
            lambda db: db.execute("SELECT count(*) FROM code").fetchone()[0]
        )
        return int(stored)

    for id_ in ("one", "two"):
        await tenants.create("a", id=id_)
        await (await tenants.bound("a").get(id_)).result(timeout=DEADLINE)
    assert await kept() == 1
    await tenants.bound("a").delete_batch(["one"])
    assert await kept() == 1
    await tenants.bound("a").delete_batch(["two"])
    assert await kept() == 0


async def test_options_of_a_tenants_handle_are_passed_on(tenants: Tenants) -> None:
    """`env.WORKFLOWS` inside of an isolate controls an instance as the host's own handle does."""
    await tenants.create("a", id="one", params={"wait": True})
    instance = await tenants.bound("a").get("one")
    await tenants.parked(instance)

    async def control(method: str, *args: Any, **options: Any) -> Any:
        return await tenants.stub("a").get_entrypoint().control("one", method, *args, **options)

    assert (await control("status")).status == "waiting"
    await control("pause")
    assert (await instance.status()).status == "paused"
    await control("resume")
    await control("send_event", type="go", payload=[1])
    assert await control("result", timeout=DEADLINE) == await instance.result(timeout=DEADLINE)
    await control("restart", from_step=("w", 1, "wait_for_event"))
    status = await tenants.status(instance, "waiting")
    assert [step.name for step in status.steps] == ["first", "w"]
    with pytest.raises(InvalidArgumentError, match="a step is"):
        await control("restart", from_step=("w",))
    await control("terminate", rollback=True)
    assert (await tenants.status(instance, "terminated")).status == "terminated"
    with pytest.raises(IllegalMoveError, match="terminated"):
        await control("send_event", type="go")
    await control("delete")
    with pytest.raises(InstanceNotFoundError):
        await control("status")


async def test_a_retention_given_through_a_wrapped_binding_holds(tenants: Tenants) -> None:
    instance = await tenants.bound("a").create(id="short", retention="1 hour")
    await instance.result(timeout=DEADLINE)
    tenants.advance(3600)
    async with asyncio.timeout(DEADLINE):
        while await tenants.bound("a").delete_batch(["other"]) == []:
            try:
                await instance.status()
            except InstanceNotFoundError:
                break
