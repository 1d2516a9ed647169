"""What tenants give the instance API through `env.WORKFLOWS`, across the wire: the errors are the host's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynflow import DynamicWorkflowBinding, create_dynamic_workflow_entrypoint, wrap_workflow_binding
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import ProcessLoader, TrustedLoader, WorkerCode
from tests.engine_world import DEADLINE, World

TENANT = """
from dynflow import WorkflowEntrypoint

class Waits(WorkflowEntrypoint):
    async def run(self, event, step):
        await step.do("first", lambda: 1)
        return (await step.wait_for_event("w", type="go")).payload

LONG = "x" * 3_000_000
CALLS = {
    "an id": lambda w, i: w.create(id="../x"),
    "a number for an id": lambda w, i: w.get(7),
    "a long id": lambda w, i: w.get(LONG),
    "an unknown id": lambda w, i: w.get("nobody"),
    "a taken id": lambda w, i: w.create(id="there"),
    "params that are no data": lambda w, i: w.create(params={"a": object()}),
    "params that are too large": lambda w, i: w.create(params=LONG),
    "a retention": lambda w, i: w.create(retention="soon"),
    "a retention by no outcome": lambda w, i: w.create(retention={"done": 1}),
    "no batch": lambda w, i: w.create_batch("ab"),
    "an empty batch": lambda w, i: w.create_batch([]),
    "a large batch": lambda w, i: w.create_batch([{}] * 101),
    "an item": lambda w, i: w.create_batch([{}, {"name": 1}]),
    "no ids": lambda w, i: w.delete_batch(7),
    "an event type": lambda w, i: i.send_event(type="a b"),
    "a payload": lambda w, i: i.send_event(type="go", payload=lambda: 1),
    "a large payload": lambda w, i: i.send_event(type="go", payload=LONG),
    "an event without a type": lambda w, i: i.send_event(payload=1),
    "no step": lambda w, i: i.restart(from_step=7),
    "an unknown step": lambda w, i: i.restart(from_step=("nobody", 1)),
    "a rollback": lambda w, i: i.terminate(rollback="yes"),
    "a timeout": lambda w, i: i.result(timeout="soon"),
    "an unknown option": lambda w, i: i.pause(now=True),
}

async def attempt(what):
    from dynflow.workflow import current_env
    workflows = current_env.get().WORKFLOWS
    try:
        await CALLS[what](workflows, await workflows.get("there"))
    except Exception as error:
        return [type(error).__name__, str(error)]
"""
EXPECTED = {
    "an id": "InvalidInstanceIdError",
    "a number for an id": "InvalidInstanceIdError",
    "a long id": "InvalidInstanceIdError",
    "an unknown id": "InstanceNotFoundError",
    "a taken id": "InstanceExistsError",
    "params that are no data": "UnserializableError",
    "params that are too large": "ValueTooLargeError",
    "a retention": "InvalidArgumentError",
    "a retention by no outcome": "InvalidArgumentError",
    "no batch": "InvalidArgumentError",
    "an empty batch": "InvalidArgumentError",
    "a large batch": "InvalidArgumentError",
    "an item": "InvalidArgumentError",
    "no ids": "InvalidArgumentError",
    "an event type": "InvalidArgumentError",
    "a payload": "UnserializableError",
    "a large payload": "ValueTooLargeError",
    "an event without a type": "TypeError",
    "no step": "InvalidArgumentError",
    "an unknown step": "InvalidArgumentError",
    "a rollback": "InvalidArgumentError",
    "a timeout": "InvalidArgumentError",
    "an unknown option": "TypeError",
}


class Tenants(World):
    """An engine with one tenant, and one instance of it that waits."""

    def __init__(self, folder: Path, loader: Any) -> None:
        self.loader = loader

        def make(**options: Any) -> EmbeddedEngine:
            engine = EmbeddedEngine(folder / "flow.db", synchronous="NORMAL", **options)
            entrypoint = create_dynamic_workflow_entrypoint(lambda _: self.stub().get_entrypoint("Waits"))
            engine.register("waits", entrypoint, env={"LOADER": loader}, binding="WORKFLOWS")
            return engine

        super().__init__(make)

    def stub(self) -> Any:
        env = {"WORKFLOWS": wrap_workflow_binding({"tenant_id": "t", "plan": "confidential"})}
        return self.loader.get("t", lambda: WorkerCode("index.py", {"index.py": TENANT}, env=env))

    async def attempt(self, what: str) -> Any:
        return await self.stub().get_entrypoint().attempt(what)


@pytest.fixture(params=[TrustedLoader, ProcessLoader], ids=["trusted", "process"])
async def tenants(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tenants]:
    async with request.param() as loader, Tenants(tmp_path, loader) as tenants:
        yield tenants


async def test_wrong_calls_of_a_tenant_are_refused_and_change_nothing(tenants: Tenants) -> None:
    metadata = {"tenant_id": "t", "plan": "confidential"}
    binding = DynamicWorkflowBinding(tenants.engine.binding("waits"), metadata)
    instance = await binding.create(id="there")
    await tenants.parked(instance)
    before = await instance.status(), len(tenants.history)
    for what, name in EXPECTED.items():
        answer = await tenants.attempt(what)
        assert answer is not None, what
        assert answer[0] == name, (what, answer)
        assert len(answer[1]) < 1_000, what
        assert "confidential" not in answer[1], answer
        assert (await instance.status(), len(tenants.history)) == before, what
    await instance.send_event(type="go", payload="fine")
    assert await instance.result(timeout=DEADLINE) == "fine"
