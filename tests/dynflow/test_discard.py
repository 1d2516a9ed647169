"""A suspended coroutine can be dropped so that its code notices nothing, and its locals are let go."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import pytest

from dynflow.discard import discard


@types.coroutine
def suspend() -> Generator[None, None, None]:
    yield


class Thing:
    """Something a weak reference can watch."""


async def waits(seen: list[str], thing: Any = None) -> None:
    try:
        await suspend()
    except BaseException as error:
        seen.append(repr(error))
        raise
    finally:
        seen.append("finally")
        del thing


def suspended(coroutine: Any) -> Any:
    coroutine.send(None)
    return coroutine


def dropped(coroutine: Any) -> None:
    """Discard, and let the last reference go with this call."""
    discard(coroutine)


def test_without_discard_python_runs_what_is_left() -> None:
    seen: list[str] = []
    coroutine = suspended(waits(seen))
    del coroutine
    gc.collect()
    assert seen == ["GeneratorExit()", "finally"]


def test_a_discarded_coroutine_notices_nothing_and_lets_its_locals_go() -> None:
    seen: list[str] = []
    thing = Thing()
    watch = weakref.ref(thing)
    coroutine = suspended(waits(seen, thing))
    del thing
    dropped(coroutine)
    del coroutine
    gc.collect()
    assert seen == []
    assert watch() is None


def test_so_does_all_that_it_awaits_and_holds_open() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def managed() -> Iterator[None]:
        try:
            yield
        finally:
            seen.append("with")

    @contextlib.asynccontextmanager
    async def managed_async() -> AsyncIterator[None]:
        try:
            yield
        finally:
            seen.append("async with")

    def numbers() -> Iterator[int]:
        try:
            yield 1
        finally:
            seen.append("generator")

    async def items() -> AsyncIterator[int]:
        try:
            await suspend()
            yield 1
        finally:
            seen.append("async generator")

    async def inner() -> None:
        with managed():
            async with managed_async():
                for _ in numbers():
                    async for _ in items():
                        pass

    async def outer() -> None:
        named = inner()  # a second reference to what is awaited
        try:
            await named
        finally:
            seen.append("outer")

    coroutine = suspended(outer())
    dropped(coroutine)
    del coroutine
    gc.collect()
    assert seen == []


def test_a_coroutine_that_somebody_else_drives_stays_whole() -> None:
    async def other() -> str:
        await suspend()
        return "alive"

    async def holds(held: Any) -> None:
        await suspend()
        del held

    shared = suspended(other())
    coroutine = suspended(holds(shared))
    dropped(coroutine)
    del coroutine
    gc.collect()
    with pytest.raises(StopIteration) as end:
        shared.send(None)
    assert end.value.value == "alive"


def test_discarding_many_leaks_nothing() -> None:
    seen: list[str] = []
    for _ in range(100):
        dropped(suspended(waits(seen)))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        dropped(suspended(waits(seen)))
    gc.collect()
    assert len(gc.get_objects()) - before < 50
    assert seen == []
