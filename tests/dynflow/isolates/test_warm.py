"""Isolates that have finished are used again: while they are fresh, small, few, and have done nothing wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynflow.errors import IsolateLimitError
from dynflow.isolates import ProcessLoader, WorkerCode, warm

SOURCE = """
import asyncio, os
held = []
def pid(): return os.getpid(), id(held), len(held)
def hold(size): held.append(bytearray(os.urandom(1)) * size)
def leave(): os._exit(1)
async def forever(): await asyncio.sleep(1000)
async def tell_and_wait(begun):
    await begun()
    await asyncio.sleep(1000)
seen = []
def count():
    seen.append(1)
    return len(seen)
"""


@pytest.fixture
async def loader() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(ready=0, warm=2) as made:
        yield made


def stub(loader: ProcessLoader, worker_id: str = "w") -> Any:
    return loader.get(worker_id, lambda: WorkerCode("index.py", {"index.py": SOURCE})).get_entrypoint()


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_LOOK_EVERY", 0.01)


async def until_none_is_kept(loader: ProcessLoader) -> None:
    async with asyncio.timeout(10):
        while loader.isolates:  # noqa: ASYNC110 - a timer of the loader's changes it
            await asyncio.sleep(0.01)


async def test_the_next_call_of_the_same_code_finds_the_isolate(loader: ProcessLoader) -> None:
    assert [await stub(loader).count() for _ in range(3)] == [1, 2, 3]
    assert loader.isolates == 1


async def test_another_worker_never_does(loader: ProcessLoader) -> None:
    assert await stub(loader, "a").count() == 1
    assert await stub(loader, "b").count() == 1


async def test_no_more_are_kept_than_the_loader_says(loader: ProcessLoader) -> None:
    for name in "abcd":
        await stub(loader, name).count()
    assert loader.isolates == 2
    assert await stub(loader, "a").count() == 1
    assert await stub(loader, "d").count() == 2


async def test_the_idle_ones_go(
    loader: ProcessLoader, monkeypatch: pytest.MonkeyPatch, looks_often: None
) -> None:
    monkeypatch.setattr(warm, "_IDLE", 0.05)
    await stub(loader).count()
    await until_none_is_kept(loader)


async def test_the_old_ones_go_although_they_are_used(
    loader: ProcessLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "_OLD", 0.3)
    async with asyncio.timeout(10):
        await stub(loader).count()
        while await stub(loader).count() != 1:
            pass


async def test_the_grown_ones_go(
    loader: ProcessLoader, monkeypatch: pytest.MonkeyPatch, looks_often: None
) -> None:
    monkeypatch.setattr(warm, "_GROWN", 30 * 1024 * 1024)
    await stub(loader, "small").count()
    await stub(loader, "large").hold(40 * 1024 * 1024)
    async with asyncio.timeout(10):
        while loader.isolates > 1:  # noqa: ASYNC110 - a timer of the loader's changes it
            await asyncio.sleep(0.01)
    assert await stub(loader, "small").count() == 2


async def test_all_go_where_memory_is_short_and_then_the_largest(
    loader: ProcessLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stub(loader, "idle").count()
    calls = [asyncio.ensure_future(stub(loader, name).forever()) for name in ("a", "b")]
    monkeypatch.setattr(warm, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(warm, "available_memory", lambda: 0.01)
    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    monkeypatch.setattr(warm, "available_memory", lambda: 0.5)
    error = next(iter(done)).exception()
    assert isinstance(error, IsolateLimitError)
    assert "short of memory" in str(error)
    assert error.limit == "memory"
    for call in calls:
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, IsolateLimitError):
            await call


async def test_one_that_has_misbehaved_is_not_used_again(loader: ProcessLoader) -> None:
    await stub(loader).count()
    with pytest.raises(Exception, match="exited with 1"):
        await stub(loader).leave()
    assert await stub(loader).count() == 1
    begun = asyncio.Event()
    call = asyncio.ensure_future(stub(loader).tell_and_wait(begun.set))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await stub(loader).count() == 1  # it was cancelled: who knows in what state it is
