"""An instance that finds room is claimed in the transaction that creates it; no cancellation loses it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from dynflow import WorkflowEntrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import InstanceExistsError


class One(WorkflowEntrypoint):
    """One step."""

    async def run(self, event: Any, step: Any) -> Any:
        return await step.do("one", lambda: event.payload)


async def test_an_instance_whose_creator_is_cancelled_meanwhile_runs_all_the_same(tmp_path: Path) -> None:
    engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL")
    engine.register("one", One)
    async with engine:
        binding = engine.binding("one")
        creators = [asyncio.ensure_future(binding.create(id=f"i{n}", params=n)) for n in range(20)]
        await asyncio.sleep(0)  # all are submitted now, and nothing has answered
        for creator in creators[::2]:
            creator.cancel()
        done = await asyncio.gather(*creators, return_exceptions=True)
        assert sum(isinstance(each, asyncio.CancelledError) for each in done) == 10
        for number in range(20):
            assert await (await binding.get(f"i{number}")).result(timeout=30) == number
        assert engine._scheduler._reserved == 0


async def test_what_is_queued_goes_before_what_is_created_later(tmp_path: Path) -> None:
    order: list[str] = []
    gate = asyncio.Event()

    class Turn(WorkflowEntrypoint):
        async def run(self, event: Any, step: Any) -> Any:
            order.append(event.instance_id)
            await step.do("wait", gate.wait)

    engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL", concurrency=1)
    engine.register("turn", Turn)
    async with engine:
        made = [await engine.binding("turn").create(id=f"i{number}") for number in range(4)]
        gate.set()
        made.append(await engine.binding("turn").create(id="i4"))
        for instance in made:
            await instance.result(timeout=30)
    assert order == [f"i{number}" for number in range(5)]


async def test_a_slot_that_a_failing_creator_had_reserved_is_used_by_whoever_was_woken_meanwhile(
    tmp_path: Path,
) -> None:
    class Waits(WorkflowEntrypoint):
        async def run(self, event: Any, step: Any) -> Any:
            return (await step.wait_for_event("w", type="go")).payload

    engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL", concurrency=1)
    engine.register("waits", Waits)
    async with engine:
        binding = engine.binding("waits")
        for number in range(20):
            waiting = await binding.create(id=f"i{number}")
            async for _ in waiting.subscribe(types={"workflow.waiting"}):
                break
            # It is woken while a creator has the only slot reserved, who then finds that the id exists.
            done = await asyncio.gather(
                waiting.send_event(type="go", payload=number),
                binding.create(id=f"i{number}"),
                return_exceptions=True,
            )
            assert isinstance(done[1], InstanceExistsError)
            assert await waiting.result(timeout=10) == number
