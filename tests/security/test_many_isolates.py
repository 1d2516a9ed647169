"""Workers that call workers: who wants all isolates of a host gets a few."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynflow.errors import InstanceFailedError, IsolateLimitError
from dynflow.isolates import EntrypointStub, ProcessLoader, TrustedLoader, WorkerCode, WorkerLoader
from tests.security.support import until

MOST = 4


@pytest.fixture
async def loader() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(per_tenant=MOST, ready=0) as made:
        yield made


@pytest.fixture(params=["process", "trusted"])
async def any_loader(request: pytest.FixtureRequest) -> AsyncIterator[WorkerLoader]:
    made: WorkerLoader = (
        ProcessLoader(per_tenant=MOST, ready=0)
        if request.param == "process"
        else TrustedLoader(per_tenant=MOST)
    )
    async with made:
        yield made


class Myself(EntrypointStub):
    """The entrypoint of a worker that is given to itself."""

    stub: EntrypointStub

    async def run(self, event: Any, step: Any) -> Any:
        return await self.stub.run(event, step)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await self.stub.call(method, *args, **kwargs)


SELF = """
import asyncio
import gc
from dynflow.workflow import current_env

async def deep(left):
    return 0 if not left else 1 + await current_env.get().SELF.deep(left - 1)

async def wide(count):
    async def one():
        try:
            await current_env.get().SELF.hold()
        except Exception as error:
            return str(error)
    tasks = [asyncio.ensure_future(one()) for _ in range(count)]
    return [await task for task in tasks[3:]]

async def hold():
    await asyncio.sleep(1000)

async def bomb():
    while True:
        asyncio.ensure_future(current_env.get().SELF.bomb())
        await asyncio.sleep(0.001)
"""


def calling_itself(loader: WorkerLoader) -> EntrypointStub:
    myself = Myself()
    code = WorkerCode("index.py", {"index.py": SELF}, env={"SELF": myself})
    myself.stub = loader.get("w", lambda: code).get_entrypoint()
    return myself.stub


async def test_a_worker_that_calls_itself_in_depth_fails_at_its_end(any_loader: WorkerLoader) -> None:
    stub = calling_itself(any_loader)
    assert await stub.call("deep", MOST - 1) == MOST - 1
    with pytest.raises((IsolateLimitError, InstanceFailedError), match="more than the 4 isolates"):
        await stub.call("deep", 100)
    assert await stub.call("deep", 1) == 1


async def test_a_worker_that_calls_itself_many_times_does_not_use_up_the_host(loader: ProcessLoader) -> None:
    stub = calling_itself(loader)
    wide = asyncio.create_task(stub.call("wide", 300))
    bomb = asyncio.create_task(stub.call("bomb"))
    await until(lambda: loader.isolates == MOST)
    source = "def fine(): return 'fine'"
    other = loader.get("other", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    for _ in range(20):
        assert await other.call("fine") == "fine"
        assert loader.isolates <= MOST + 1
    for task in (wide, bomb):
        task.cancel()
    await asyncio.gather(wide, bomb, return_exceptions=True)
    await until(lambda: loader.isolates == 1)  # that of the other one, which is kept for its next call
    assert await stub.call("deep", MOST - 1) == MOST - 1  # all places were given back


async def test_a_call_that_is_cancelled_twice_leaves_no_isolate(loader: ProcessLoader) -> None:
    source = """
import asyncio
async def hold():
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass
"""
    stub = loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    call = asyncio.create_task(stub.call("hold"))
    await until(lambda: loader.isolates == 1)
    for _ in range(2):
        call.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: loader.isolates == 0)


async def test_workers_of_one_tenant_have_their_isolates_together(any_loader: WorkerLoader) -> None:
    leaf = "import asyncio\nasync def hold(): await asyncio.sleep(1000)"
    source = """
import asyncio
import gc
async def fetch(request, env):
    tasks = [asyncio.ensure_future(worker.hold()) for worker in env.__dict__.values()]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    return [str(task.exception()) for task in done]
"""
    leaves = {
        f"LEAF{number}": any_loader.load(
            WorkerCode("index.py", {"index.py": leaf}, tenant="acme")
        ).get_entrypoint()
        for number in range(MOST)
    }
    code = WorkerCode("index.py", {"index.py": source}, env=leaves, tenant="acme")
    (told,) = await any_loader.load(code).get_entrypoint().fetch()
    assert "more than the 4 isolates" in told


async def test_calls_of_the_host_wait_for_a_place(any_loader: WorkerLoader) -> None:
    source = "import os\nasync def who(): return os.getpid()"
    stub = any_loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    assert len(await asyncio.gather(*(stub.who() for _ in range(MOST * 5)))) == MOST * 5


async def test_a_call_that_waits_for_a_place_can_be_cancelled(any_loader: WorkerLoader) -> None:
    source = "import asyncio\nasync def hold(): await asyncio.sleep(1000)\ndef quick(): return 1"
    stub = any_loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    holding = [asyncio.create_task(stub.call("hold")) for _ in range(MOST)]
    waiting = [asyncio.create_task(stub.call("quick")) for _ in range(3)]
    for _ in range(5):
        await asyncio.sleep(0)
    waiting[1].cancel()
    holding[0].cancel()
    assert await waiting[0] == await waiting[2] == 1
    with pytest.raises(asyncio.CancelledError):
        await waiting[1]
    for task in holding:
        task.cancel()
    await asyncio.gather(*holding, return_exceptions=True)
    assert await stub.quick() == 1


async def test_what_is_held_takes_its_place_until_it_is_let_go(
    loader: ProcessLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "async def numbers():\n    yield 1\ndef fetch(request, env): return numbers()"
    stub = loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    held = [await stub.fetch() for _ in range(MOST)]
    monkeypatch.setattr("dynflow.isolates.places._PATIENCE", 0.05)
    with pytest.raises(IsolateLimitError) as caught:
        await stub.fetch()
    assert (caught.value.limit, caught.value.value) == ("isolates", MOST)
    held.clear()
    gc.collect()
    monkeypatch.undo()
    assert [number async for number in await stub.fetch()] == [1]
