"""The workload on Restate: a worker of HTTP/2 handlers in this process, and a client of its server's HTTP ingress."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import aiohttp
import restate
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server

from scripts.peers.workload import CALLERS, Peer, main

runs = restate.Service("runs")
waits = restate.Workflow("waits", inactivity_timeout=timedelta(milliseconds=200))


async def run(ctx: restate.Context, steps: int) -> int:
    """Run trivial steps."""
    for _ in range(steps):
        await ctx.run_typed("step", lambda: 1)
    return steps


def begin() -> int:
    """Count who has begun; a handler that goes on after its wait does not come here again."""
    RestatePeer.waiting_now += 1
    return 1


def clock() -> float:
    """Tell when it runs."""
    return time.perf_counter()


async def wait(ctx: restate.WorkflowContext) -> float:
    """Run a step, wait for a promise, run a step."""
    await ctx.run_typed("one", begin)
    await ctx.promise("go").value()
    return await ctx.run_typed("woken", clock)


async def go(ctx: restate.WorkflowSharedContext) -> None:
    """Keep the promise."""
    await ctx.promise("go").resolve("now")


runs.handler("run")(run)
waits.main("run")(wait)
waits.handler("go")(go)


class RestatePeer(Peer):
    """A worker of a server whose ingress and administration listen at `server`, two addresses with a comma."""

    name = "Restate"
    settings = (
        "one node; waiting handlers are suspended after 200 ms in place of a minute; the worker is served by granian; "
        "what is created runs at once, since nothing holds it back"
    )
    waiting_now = 0

    async def open(self) -> None:
        self.ingress, admin = self.server.split(",")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.worker = Server(
            restate.app([runs, waits]),
            address="127.0.0.1",
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http2,
        )
        self.serving = asyncio.create_task(self.worker.serve())
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CALLERS))
        await asyncio.sleep(1)
        async with self.http.post(
            f"{admin}/deployments", json={"uri": f"http://127.0.0.1:{port}", "force": True}
        ) as answer:
            if answer.status >= 300:
                raise RuntimeError(f"Restate refuses the worker: {await answer.text()}")

    async def post(self, path: str, body: Any = None) -> Any:
        """Call the ingress."""
        content: dict[str, Any] = {"skip_auto_headers": ["Content-Type"]} if body is None else {"json": body}
        async with self.http.post(f"{self.ingress}/{path}", **content) as answer:
            if answer.status >= 300:
                raise RuntimeError(f"{path}: {answer.status} {await answer.text()}")
            return await answer.json(content_type=None)

    async def create(self) -> None:
        await self.post("runs/run/send", 0)

    async def run(self, steps: int) -> None:
        await self.post("runs/run", steps)

    async def park(self, count: int) -> list[str]:
        wanted, left, made = RestatePeer.waiting_now + count, iter(range(count)), []

        async def starter() -> None:
            for _ in left:
                made.append(uuid.uuid4().hex)
                await self.post(f"waits/{made[-1]}/run/send")

        await asyncio.gather(*(starter() for _ in range(min(count, CALLERS))))
        while RestatePeer.waiting_now < wanted:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # until it is suspended
        return made

    async def wake(self, waiting: str) -> float:
        await self.post(f"waits/{waiting}/go")
        async with self.http.get(f"{self.ingress}/restate/workflow/waits/{waiting}/attach") as answer:
            woken: float = await answer.json(content_type=None)
        return woken


if __name__ == "__main__":
    main(RestatePeer)
