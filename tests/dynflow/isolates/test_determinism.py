"""Authors are told, once, where `run` reads the clock or randomness outside of a step."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynflow import create_dynamic_workflow_entrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import ProcessLoader, TailEvent, WorkerCode

SOURCE = """\
import asyncio, datetime, helper, logging, random, secrets, time, uuid
from datetime import datetime as dt
from random import randint
from dynflow import WorkflowEntrypoint

class Careless(WorkflowEntrypoint):
    async def run(self, event, step):
        for _ in range(3):
            time.time()
        random.random(); uuid.uuid4()
        randint(1, 2)
        secrets.token_hex()
        datetime.datetime.now()
        await asyncio.gather(helper.later(), helper.later())
        return datetime.date.today().isoformat()

class Careful(WorkflowEntrypoint):
    async def run(self, event, step):
        def inner():
            return [time.time(), random.random(), str(uuid.uuid4()), datetime.datetime.now()]
        logging.getLogger().info("it reads the clock itself")
        await asyncio.sleep(0)
        random.Random(7).random()
        asyncio.get_running_loop().time()
        datetime.datetime(2026, 1, 1).today
        got = await step.do("a", inner)
        await step.do("b", lambda: dt.now().isoformat())
        await step.do("c", helper.later)
        return len(got)

def fetch(request, env):
    return time.time() > random.random()
"""
HELPER = "import time\nasync def later():\n    return time.time()\n"


class World:
    def __init__(self, engine: EmbeddedEngine, loader: ProcessLoader) -> None:
        self.heard: list[TailEvent] = []
        self.loader, self.engine = loader, engine
        modules = {"index.py": SOURCE, "helper.py": HELPER}
        self.code = WorkerCode("index.py", modules, tails=[self.heard.append])

        async def load_runner(context: Any) -> Any:
            return loader.get("w", lambda: self.code).get_entrypoint(context.metadata)

        engine.register("flows", create_dynamic_workflow_entrypoint(load_runner))

    async def run(self, name: str) -> Any:
        params = {"__dispatcher_metadata": name, "params": None}
        return await (await self.engine.binding("flows").create(params=params)).result(timeout=30)

    @property
    def told(self) -> list[str]:
        return [event.text.partition(" outside")[0] for event in self.heard if event.source == "dynflow"]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with ProcessLoader(ready=0) as loader:
        engine = EmbeddedEngine(tmp_path / "flow.db", synchronous="NORMAL")
        made = World(engine, loader)
        async with engine:
            yield made


async def test_each_line_is_told_once(world: World) -> None:
    await world.run("Careless")
    assert sorted(world.told) == [
        "helper.py:3: time.time()",
        "index.py:10: random.random()",
        "index.py:11: random.randint()",
        "index.py:12: secrets.token_hex()",
        "index.py:13: datetime.datetime.now()",
        "index.py:15: datetime.date.today()",
        "index.py:9: time.time()",
    ]


async def test_steps_and_fetch_may_read_them(world: World) -> None:
    assert await world.run("Careful") == 4
    assert await world.loader.get("w", lambda: world.code).get_entrypoint().fetch() is True
    assert world.told == []
