"""The workload on our engine."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from dynflow.binding import WorkflowInstance
from dynflow.engines import InstanceRef
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.types import HistoryEvent
from dynflow.workflow import WorkflowEntrypoint
from scripts.peers.workload import Peer, main


class Run(WorkflowEntrypoint):
    """As many trivial steps as it is told."""

    async def run(self, event: Any, step: Any) -> Any:
        """Run them."""
        for _ in range(event.payload):
            await step.do("step", lambda: 1)
        return event.payload


class Waits(WorkflowEntrypoint):
    """A step, a wait, a step."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.do("one", lambda: 1)
        await step.wait_for_event("w", type="go")
        return await step.do("woken", time.perf_counter)


class Blocks(WorkflowEntrypoint):
    """In the middle of a step for ever."""

    async def run(self, _event: Any, step: Any) -> Any:
        """Run it."""
        await step.do("block", self.block)

    async def block(self) -> None:
        """Stay."""
        self.env["inside"]()
        await asyncio.Event().wait()


class DynflowPeer(Peer):
    """The embedded engine, trusted workflows in this process."""

    name = "dynflow"
    settings = "SQLite, WAL, synchronous=FULL (defaults)"

    async def open(self) -> None:
        self.parked, self.changed = 0, asyncio.Event()
        self.engine = EmbeddedEngine(self.folder / "dynflow.db", concurrency=max(500, self.interrupted))
        self.engine.register("run", Run)
        self.engine.register("waits", Waits)
        self.engine.register("blocks", Blocks, env={"inside": self.inside})
        self.engine.add_listener(self.heard)
        await self.engine.__aenter__()

    async def prepare(self, part: str) -> None:
        if part == "create":  # what is created stays queued where the only slot is taken
            await self.engine.__aexit__()
            self.engine = EmbeddedEngine(self.folder / "dynflow.db", concurrency=1)
            self.engine.register("blocks", Blocks, env={"inside": self.inside})
            await self.engine.__aenter__()

    def heard(self, _ref: InstanceRef, event: HistoryEvent) -> None:
        """Count who was parked."""
        if event.type == "workflow.waiting":
            self.parked += 1
            self.changed.set()

    async def create(self) -> None:
        await self.engine.binding("blocks").create()

    async def run(self, steps: int) -> None:
        await (await self.engine.binding("run").create(params=steps)).result()

    async def park(self, count: int) -> list[WorkflowInstance]:
        wanted = self.parked + count
        made: list[WorkflowInstance] = []
        for first in range(0, count, 100):
            made += await self.engine.binding("waits").create_batch([{}] * min(100, count - first))
        while self.parked < wanted:
            self.changed.clear()
            await self.changed.wait()
        return made

    async def wake(self, waiting: WorkflowInstance) -> float:
        await waiting.send_event(type="go")
        woken: float = await waiting.result()
        return woken

    async def block(self) -> None:
        for _ in range(0, self.interrupted, 100):
            await self.engine.binding("blocks").create_batch([{}] * min(100, self.interrupted))


if __name__ == "__main__":
    main(DynflowPeer)
