"""The workload on Absurd: workers that poll a queue in PostgreSQL."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextvars import ContextVar
from typing import Any

import absurdctl
import psycopg
from absurd_sdk import AsyncAbsurd

from scripts.peers.workload import CALLERS, Peer, main

# Each worker has one connection and takes the next batch when its last is done, so several of them.
_WORKERS, _BATCH, _POLL = 8, 8, 0.02


# Whether the task that runs has returned: the next thing is that its end is stored. Else it was suspended.
finished: ContextVar[bool] = ContextVar("finished", default=False)


async def one() -> int:
    """Do nothing much."""
    return 1


async def clock() -> float:
    """Tell when it runs."""
    return time.perf_counter()


async def run(params: Any, ctx: Any) -> int:
    """Run trivial steps."""
    steps: int = params["steps"]
    for _ in range(steps):
        await ctx.step("step", one)
    finished.set(True)
    return steps


async def wait(params: Any, ctx: Any) -> float:
    """Run a step, wait for an event, run a step."""

    async def begin() -> int:
        AbsurdPeer.waiting_now += 1
        return 1

    await ctx.step("one", begin)
    await ctx.await_event(params["event"])
    woken: float = await ctx.step("woken", clock)
    finished.set(True)
    return woken


_ended: dict[str, asyncio.Event] = {}


def ended(task: str) -> asyncio.Event:
    """Return what is set when a worker of this process has stored the end of the task."""
    return _ended.setdefault(task, asyncio.Event())


class Worker(AsyncAbsurd):
    """A worker that says which tasks it has brought to their end, so that nobody needs to poll for them."""

    async def _execute_task(self, task: Any, claim_timeout: int) -> None:
        before = finished.set(False)
        await super()._execute_task(task, claim_timeout)
        if finished.get():
            ended(str(task["task_id"])).set()
        finished.reset(before)


class AbsurdPeer(Peer):
    """Workers in this process of the queues in the database at `server`."""

    name = "Absurd"
    settings = (
        f"{_WORKERS} workers that claim {_BATCH} at a time and poll every {1000 * _POLL:.0f} ms in place of one that "
        "polls every 250 ms; the end of a task is told by the worker, not polled for"
    )
    waiting_now = 0

    async def open(self) -> None:
        async with await psycopg.AsyncConnection.connect(self.server, autocommit=True) as connection:
            await connection.execute(absurdctl.BUNDLED_SCHEMA_SQL)
        self.clients = [AsyncAbsurd(self.server, queue_name="bench") for _ in range(CALLERS)]
        for queue in ("bench", "nobody"):
            await self.clients[0].create_queue(queue)
        self.free = asyncio.Queue[AsyncAbsurd]()
        for client in self.clients:
            self.free.put_nowait(client)
        self.working = []
        for _ in range(_WORKERS):
            worker = Worker(self.server, queue_name="bench")
            worker.register_task("run")(run)
            worker.register_task("wait")(wait)
            serving = worker.start_worker(concurrency=_BATCH, batch_size=_BATCH, poll_interval=_POLL)
            self.working.append(asyncio.create_task(serving))

    async def spawn(self, task: str, params: Any, queue: str) -> str:
        """Spawn a task on a free connection."""
        client = await self.free.get()
        try:
            spawned = await client.spawn(task, params, queue=queue)
        finally:
            self.free.put_nowait(client)
        return str(spawned["task_id"])

    async def result(self, task: str) -> Any:
        """Wait until a worker has stored the end of the task; returns its result."""
        await ended(task).wait()
        client = await self.free.get()
        try:
            snapshot = await client.fetch_task_result(task, queue_name="bench")
        finally:
            self.free.put_nowait(client)
        _ended.pop(task)
        return snapshot.result

    async def create(self) -> None:
        await self.spawn("run", {"steps": 3}, "nobody")

    async def run(self, steps: int) -> None:
        await self.result(await self.spawn("run", {"steps": steps}, "bench"))

    async def park(self, count: int) -> list[Any]:
        wanted, left, made = AbsurdPeer.waiting_now + count, iter(range(count)), []

        async def starter() -> None:
            for _ in left:
                event = uuid.uuid4().hex
                made.append((event, await self.spawn("wait", {"event": event}, "bench")))

        await asyncio.gather(*(starter() for _ in range(min(count, CALLERS))))
        while AbsurdPeer.waiting_now < wanted:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # from its step to its wait
        return made

    async def wake(self, waiting: Any) -> float:
        event, task = waiting
        await self.clients[0].emit_event(event, {}, "bench")
        woken: float = await self.result(task)
        return woken


if __name__ == "__main__":
    main(AbsurdPeer)
