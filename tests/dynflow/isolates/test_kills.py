"""kill -9 of isolates and zygotes at any moment: calls end with a result or an isolate's error, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from pathlib import Path

import psutil
import pytest

from dynflow.errors import IsolateError
from dynflow.isolates import Capability, ProcessLoader, WorkerCode, cgroup

# ISOLATE_KILL_ROUNDS=1000 is the whole of it; it takes a minute.
ROUNDS = int(os.environ.get("ISOLATE_KILL_ROUNDS", "150"))

SOURCE = """
import asyncio
async def fetch(request, env):
    total = 0
    async for number in env_numbers(env):
        total += number
    return total
async def env_numbers(env):
    for number in range(5):
        await asyncio.sleep(0.001)
        yield await env.ECHO.back(number)
"""


class Echo(Capability):
    async def back(self, value: int) -> int:
        return value


def counted() -> dict[str, int]:
    homes = {*cgroup._homes_v1(), *cgroup._homes_v2()}
    return {
        "processes": len(psutil.Process().children(recursive=True)),
        "descriptors": psutil.Process().num_fds(),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "groups": sum(1 for home in homes for _ in home.glob(f"isolates-{os.getpid()}-*")),
    }


async def nothing_more_than(before: dict[str, int]) -> None:
    """Wait until as much is left as there was: the kernel takes its time with the groups of killed processes."""
    for _ in range(300):
        if all(count <= before[what] for what, count in counted().items()):
            break
        await asyncio.sleep(0.1)
    now = counted()
    assert {what: count for what, count in now.items() if count > before[what]} == {}, (before, now)


def kill_one(chosen: random.Random) -> None:
    """Kill an isolate, now and then the zygote or what is around it."""
    family = psutil.Process().children(recursive=True)
    wanted = family[2:] if chosen.random() > 0.03 else family[:2]
    if wanted:
        with contextlib.suppress(psutil.NoSuchProcess):
            chosen.choice(wanted).kill()


async def test_nothing_is_left_of_what_was_killed_at_any_moment() -> None:
    chosen = random.Random(7)
    code = WorkerCode("index.py", {"index.py": SOURCE}, env={"ECHO": Echo()})
    ended = {"result": 0, "error": 0}
    async with ProcessLoader():  # what is made once and stays, such as the child watcher, is there before
        pass
    before = counted()
    async with ProcessLoader(ready=1, warm=2) as loader:
        for number in range(ROUNDS):
            stub = loader.get(f"w{number % 3}", lambda: code).get_entrypoint()
            call = asyncio.ensure_future(stub.call("fetch"))
            await asyncio.sleep(chosen.random() * 0.02)
            kill_one(chosen)
            try:
                async with asyncio.timeout(60):
                    assert await call == 10
                ended["result"] += 1
            except IsolateError:
                ended["error"] += 1
        assert await loader.load(code).get_entrypoint().fetch() == 10
        assert loader.isolates <= 3
    await nothing_more_than(before)
    assert min(ended.values()) > ROUNDS / 20, ended


@pytest.mark.parametrize("whose", [0, 1])
async def test_the_death_of_the_zygote_is_told_to_who_waits_for_an_isolate(whose: int) -> None:
    code = WorkerCode("index.py", {"index.py": SOURCE}, env={"ECHO": Echo()})
    async with ProcessLoader(ready=0) as loader:
        stub = loader.load(code).get_entrypoint()
        calls = [asyncio.ensure_future(stub.call("fetch")) for _ in range(5)]
        await asyncio.sleep(0)
        psutil.Process().children(recursive=True)[whose].kill()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(result == 10 or isinstance(result, IsolateError) for result in results), results
        assert await stub.fetch() == 10
