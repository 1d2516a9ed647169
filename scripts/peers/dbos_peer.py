"""The workload on DBOS, in the form that is quickest there: plain functions on threads, coroutines for what waits."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSClient

from scripts.peers.workload import Peer, main

# DBOS has no bound by default, and was slower with 64 threads than with these.
_THREADS = 16
# How many of our 64 callers call it at once: with more, it is slower on SQLite, where they contend for the lock.
_AT_ONCE, _AT_ONCE_POSTGRES = 4, 16
# How often its notifications are polled for: the default, and in the measurement of wake-ups.
_POLL, _QUICK_POLL = 1.0, 0.01


@DBOS.step()
def one() -> int:
    """Do nothing much."""
    return 1


@DBOS.workflow()
def run(steps: int) -> int:
    """Run trivial steps."""
    for _ in range(steps):
        one()
    return steps


@DBOS.step()
async def clock() -> float:
    """Tell when it runs."""
    return time.perf_counter()


@DBOS.workflow()
async def waits() -> float:
    """Run a step, wait for a message, run a step."""
    await clock()
    DbosPeer.waiting_now += 1
    await DBOS.recv_async("go", timeout_seconds=86_400)
    return await clock()


@DBOS.step()
async def block() -> None:
    """Stay."""
    DbosPeer.call_inside()
    await asyncio.Event().wait()


@DBOS.workflow()
async def blocks() -> None:
    """Be in a step for ever."""
    await block()


class DbosPeer(Peer):
    """DBOS in this process, on SQLite unless there is a server."""

    name = "DBOS"
    waiting_now = 0
    call_inside = staticmethod(lambda: None)

    def __init__(self, folder: Path, server: str) -> None:
        super().__init__(folder, server)
        self.at_once = _AT_ONCE_POSTGRES if server else _AT_ONCE
        self.settings = (
            f"{_THREADS} threads for plain functions, which are quicker there than coroutines; {self.at_once} callers "
            f"at once, as it is quickest; {'' if server else 'WAL set beforehand; '}wake-ups with notifications polled "
            f"for every {1000 * _QUICK_POLL:.0f} ms, the rest with the default of {_POLL:.0f} s"
        )

    async def open(self) -> None:
        DbosPeer.call_inside = staticmethod(self.inside)
        self.url = self.server
        if not self.server:
            file = self.folder / "dbos.db"
            self.url = f"sqlite:///{file}"
            db = sqlite3.connect(file)
            db.execute("PRAGMA journal_mode = WAL")
            db.close()
        self.pool = ThreadPoolExecutor(self.at_once)
        self.client: DBOSClient | None = None
        self.launch(_POLL)

    def launch(self, poll: float) -> None:
        """Start DBOS as the executor that it was before."""
        config = {
            "name": "bench",
            "system_database_url": self.url,
            "executor_id": "bench",
            "application_version": "1",
            "max_executor_threads": _THREADS,
            "notification_listener_polling_interval_sec": poll,
            "log_level": "ERROR",
        }
        DBOS(config=config)
        DBOS.launch()

    async def prepare(self, part: str) -> None:
        if part in {"wake", "waiting"}:
            await self.call(DBOS.destroy)
            self.launch(_QUICK_POLL if part == "wake" else _POLL)

    async def call(self, work: Any, *args: Any) -> Any:
        """Call a function that blocks, on a thread of the callers'."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *args)

    async def create(self) -> None:
        if self.client is None:
            self.client = DBOSClient(system_database_url=self.url)
        # Nobody listens to this queue.
        await self.call(self.client.enqueue, {"queue_name": "queued", "workflow_name": "run"}, 1)

    async def run(self, steps: int) -> None:
        await self.call(lambda: DBOS.start_workflow(run, steps).get_result())

    async def park(self, count: int) -> list[Any]:
        wanted = DbosPeer.waiting_now + count
        handles = [await DBOS.start_workflow_async(waits) for _ in range(count)]
        while DbosPeer.waiting_now < wanted:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # from there to its wait
        return handles

    async def wake(self, waiting: Any) -> float:
        await DBOS.send_async(waiting.get_workflow_id(), "now", "go")
        woken: float = await waiting.get_result()
        return woken

    async def block(self) -> None:
        for _ in range(self.interrupted):
            await DBOS.start_workflow_async(blocks)


if __name__ == "__main__":
    main(DbosPeer)
