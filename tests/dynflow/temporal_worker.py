"""A worker process for tests of the Temporal engine, started with ADDRESS QUEUE.

It runs instances of `counting`. Each line of the file COUNTING_LOG is `started|returned INSTANCE STEP`,
written with one call, so that it is there whole whenever the process is killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from temporalio.client import Client

from dynflow.engines.temporal import TemporalEngine
from dynflow.workflow import WorkflowEntrypoint

STEPS = 6


class Counting(WorkflowEntrypoint):
    """Some steps, a sleep and an event between them."""

    async def run(self, event: Any, step: Any) -> int:
        """Return how many steps there were."""
        for number in range(STEPS):
            await step.do(f"step {number}", lambda number=number: _work(event.instance_id, number))
            _log("returned", event.instance_id, number)
            if number == STEPS // 2:
                await step.sleep("a while", 0.2)
        return STEPS


async def _work(instance: str, number: int) -> int:
    _log("started", instance, number)
    await asyncio.sleep(0.05)
    return number


def _log(what: str, instance: str, number: int) -> None:
    log = os.open(os.environ["COUNTING_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, f"{what} {instance} {number}\n".encode())
    os.close(log)


def engine_of(client: Client, queue: str) -> TemporalEngine:
    """Return the engine that all workers of the test have."""
    engine = TemporalEngine(client, task_queue=queue, heartbeat=2)
    engine.register("counting", Counting)
    return engine


async def main(address: str, queue: str) -> None:
    """Work until killed."""
    client = await Client.connect(address)
    async with engine_of(client, queue):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
