"""The workload on Temporal: one workflow task after the other, each step an activity of this process."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow
from temporalio.client import Client, WorkflowHandle
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from scripts.peers.workload import Peer, main

_LONG = timedelta(minutes=10)
_QUEUE, _NOBODYS_QUEUE = "bench", "nobody"


@activity.defn
async def one() -> int:
    """Do nothing much."""
    return 1


@activity.defn
async def clock() -> float:
    """Tell when it runs."""
    return time.perf_counter()


@workflow.defn
class Run:
    """As many trivial steps as it is told."""

    @workflow.run
    async def run(self, steps: int) -> int:
        """Run them."""
        for _ in range(steps):
            await workflow.execute_activity(one, start_to_close_timeout=_LONG)
        return steps


@workflow.defn
class Waits:
    """A step, a wait, a step."""

    def __init__(self) -> None:
        self.told = False

    @workflow.run
    async def run(self) -> float:
        """Run it."""
        await workflow.execute_activity(clock, start_to_close_timeout=_LONG)
        await workflow.wait_condition(lambda: self.told)
        return await workflow.execute_activity(clock, start_to_close_timeout=_LONG)

    @workflow.signal
    def go(self) -> None:
        """Let it go on."""
        self.told = True


class TemporalPeer(Peer):
    """A worker of a development server that listens at `server`."""

    name = "Temporal"
    settings = (
        "development server on SQLite (WAL, synchronous=FULL) with its transfer and timer queues polled 5,000 times a "
        "second in place of 20, one partition a task queue; at most 50 workflows cached; a step is an activity"
    )
    steps = (2, 22)
    waiting = 2_000

    async def open(self) -> None:
        self.client = await Client.connect(self.server)
        self.worker = Worker(
            self.client,
            task_queue=_QUEUE,
            workflows=[Run, Waits],
            activities=[one, clock],
            workflow_runner=UnsandboxedWorkflowRunner(),
            max_cached_workflows=50,
        )
        self.serving = asyncio.create_task(self.worker.run())

    async def create(self) -> None:
        await self.client.start_workflow(Run.run, 3, id=uuid.uuid4().hex, task_queue=_NOBODYS_QUEUE)

    async def run(self, steps: int) -> None:
        await self.client.execute_workflow(Run.run, steps, id=uuid.uuid4().hex, task_queue=_QUEUE)

    async def park(self, count: int) -> list[Any]:
        left, handles = iter(range(count)), []

        async def starter() -> None:
            for _ in left:
                handle = await self.client.start_workflow(Waits.run, id=uuid.uuid4().hex, task_queue=_QUEUE)
                await self.is_waiting(handle)
                handles.append(handle)

        await asyncio.gather(*(starter() for _ in range(min(count, 16))))
        return handles

    async def is_waiting(self, handle: WorkflowHandle[Any, Any]) -> None:
        """Return when the first step of an instance has ended and its workflow has taken note."""
        while True:
            events = [event.event_type async for event in handle.fetch_history_events()]
            if (
                len(events) >= 10
            ):  # started, 3 of a workflow task, 3 of the activity, 3 of the next workflow task
                return
            await asyncio.sleep(0.02)

    async def wake(self, waiting: Any) -> float:
        await waiting.signal(Waits.go)
        woken: float = await waiting.result()
        return woken


if __name__ == "__main__":
    main(TemporalPeer)
