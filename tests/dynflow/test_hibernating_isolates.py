"""An instance of a tenant that only waits has no isolate: the process is gone, and its code has noticed nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynflow import create_dynamic_workflow_entrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import ProcessLoader, WorkerCode
from dynflow.loop import outside
from dynflow.types import WorkflowEvent
from dynflow.workflow import StepCall, WorkflowStep
from tests.engine_world import DEADLINE, World

TENANT = """
import asyncio
from dynflow import WorkflowEntrypoint

class Waits(WorkflowEntrypoint):
    async def run(self, event, step):
        seen = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.wait(step, event.payload, seen))
        except BaseException as error:
            print("caught", repr(error))
            raise
        finally:
            print("finally of run")
        return seen

    async def wait(self, step, how, seen):
        try:
            if how == "sleep":
                await step.sleep("w", 60)
            elif how == "event":
                await step.wait_for_event("w", type="go")
            else:
                config = {"retries": {"limit": 1, "delay": 60}}
                await step.do("w", config, lambda ctx: 1 // (ctx.attempt - 1))
            seen.append("woke")
        except BaseException as error:
            print("caught", repr(error))
            raise
        finally:
            print("finally of wait")
"""


def processes() -> set[int]:
    """What this process has started, and what that has started."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("how", ["sleep", "event", "retry"])
async def test_a_waiting_tenant_has_no_process_and_notices_nothing(tmp_path: Path, how: str) -> None:
    printed: list[str] = []
    loader = ProcessLoader(ready=0, on_output=lambda _, text: printed.append(text))

    async def load_runner(_: Any) -> Any:
        return loader.get("tenant", lambda: WorkerCode("index.py", {"index.py": TENANT})).get_entrypoint(
            "Waits"
        )

    def make(**options: Any) -> EmbeddedEngine:
        engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL", **options)
        engine.register("waits", create_dynamic_workflow_entrypoint(load_runner))
        return engine

    async with loader, World(make) as world:
        without = processes()
        params = {"__dispatcher_metadata": {"tenant_id": "t"}, "params": how}
        instances = [await world.engine.binding("waits").create(params=params) for _ in range(3)]
        for instance in instances:
            await world.parked(instance)
        async with asyncio.timeout(DEADLINE):
            while processes() != without:  # noqa: ASYNC110 - the dead are buried a moment later
                await asyncio.sleep(0.01)
        assert printed == []
        for instance in instances:
            if how == "event":
                await instance.send_event(type="go")
        world.advance(60)
        for instance in instances:
            assert await instance.result(timeout=DEADLINE) == ["woke"]
    assert sorted("".join(printed).splitlines()) == ["finally of run"] * 3 + ["finally of wait"] * 3


async def test_who_says_that_it_waits_while_its_answer_is_on_its_way_is_not_stuck(tmp_path: Path) -> None:
    async def run(event: WorkflowEvent, step: WorkflowStep) -> Any:
        port: Any = step.port
        activity = port.activity()

        async def ask() -> Any:
            call = port.call(StepCall("do", "work", 1, callback=lambda: "done"))
            call.add_done_callback(lambda _: activity.idle())  # before it is told of the answer
            answer = await call
            activity.active()
            return answer

        return await outside(ask(), keeps_awake=False)  # on the host's loop, as the session of an isolate

    async with World(lambda **options: EmbeddedEngine(tmp_path / "flow.db", **options)) as world:
        assert await world.result(run) == "done"
