"""Tails: what tenants print, log, warn of and fail with reaches the listeners of their worker, live."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dynflow.isolates import Capability, ProcessLoader, TailEvent, WorkerCode
from dynflow.isolates.tails import Tails

MANY = 3_000


@pytest.fixture
async def loader() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader() as made:
        yield made


def code(source: str, *tails: Callable[[TailEvent], Any], **env: Any) -> WorkerCode:
    return WorkerCode("index.py", {"index.py": source}, env=env, tails=tails)


class Heard:
    """A tail that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[TailEvent] = []
        self.changed = asyncio.Event()

    async def __call__(self, event: TailEvent) -> None:
        self.events.append(event)
        self.changed.set()

    async def of(self, source: str) -> TailEvent:
        """Wait for the first event of a source."""
        async with asyncio.timeout(5):
            while True:
                for event in self.events:
                    if event.source == source:
                        return event
                self.changed.clear()
                await self.changed.wait()


TALKER = """
import logging, sys, warnings
log = logging.getLogger("tenant.work")

def talk():
    print("printed")
    print("to err", file=sys.stderr)
    log.info("informed %s", "well")
    log.debug("not said")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("failed")
    warnings.warn("careful")
    log.error("%d", "no number")
"""


async def test_everything_that_is_said_comes_with_source_and_level(loader: ProcessLoader) -> None:
    heard = Heard()
    before = datetime.now(UTC)
    await loader.get("talker", lambda: code(TALKER, heard)).get_entrypoint().talk()
    await heard.of("warnings")
    told = [(event.source, event.level, event.text.splitlines()[0]) for event in heard.events]
    assert told[:4] == [
        ("stdout", logging.INFO, "printed"),
        ("stderr", logging.WARNING, "to err"),
        ("tenant.work", logging.INFO, "informed well"),
        ("tenant.work", logging.ERROR, "failed"),
    ]
    assert ("warnings", logging.WARNING, "index.py:14: UserWarning: careful") in told
    assert "ZeroDivisionError: division by zero" in heard.events[3].text
    assert {event.worker_id for event in heard.events} == {"talker"}
    assert len({event.isolate for event in heard.events}) == 1
    assert all(before <= event.time <= before + timedelta(minutes=1) for event in heard.events)


async def test_uncaught_exceptions_are_told_with_the_tenants_traceback(loader: ProcessLoader) -> None:
    heard = Heard()
    source = "def outer(): inner()\ndef inner(): raise ValueError('bad')"
    with pytest.raises(ValueError, match="bad"):
        await loader.load(code(source, heard)).get_entrypoint().outer()
    event = await heard.of("uncaught")
    assert event.level == logging.ERROR
    assert 'File "index.py", line 2, in inner' in event.text
    assert "ValueError: bad" in event.text


async def test_a_task_that_fails_unseen_is_told_too(loader: ProcessLoader) -> None:
    heard = Heard()
    source = """
import asyncio
async def fetch(request, env):
    async def fail(): raise ValueError("unseen")
    asyncio.ensure_future(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
"""
    await loader.load(code(source, heard)).get_entrypoint().fetch()
    assert "unseen" in (await heard.of("asyncio")).text


async def test_tails_hear_while_the_call_goes_on(loader: ProcessLoader) -> None:
    heard = Heard()

    class Gate(Capability):
        async def wait(self) -> str:
            return (await heard.of("stdout")).text

    source = "async def fetch(request, env):\n    print('before the wait')\n    return await env.GATE.wait()"
    worker = loader.load(code(source, heard, GATE=Gate()))
    assert await worker.get_entrypoint().fetch() == "before the wait\n"


async def test_a_tail_that_waits_holds_up_nobody_and_is_told_what_it_lost(loader: ProcessLoader) -> None:
    stuck, drained, last = asyncio.Event(), asyncio.Event(), asyncio.Event()
    told: list[TailEvent] = []

    async def slow_tail(event: TailEvent) -> None:
        told.append(event)
        if len(told) > 1_000:
            drained.set()
        if event.text == "the last\n":
            last.set()
        await stuck.wait()

    source = "def say(count):\n    for n in range(count): print(n)\ndef end(): print('the last')"
    stub = loader.get("w", lambda: code(source, slow_tail)).get_entrypoint()
    await stub.say(MANY)
    assert len(told) == 1
    stuck.set()
    async with asyncio.timeout(5):
        await drained.wait()
        await stub.end()
        await last.wait()
    lost = [int(event.text.partition(" ")[0]) for event in told if event.source == "dynflow"]
    said = [event.text for event in told if event.source == "stdout" and event.text != "the last\n"]
    assert len(said) >= 1_000
    assert sum(lost) + len(said) == MANY


async def test_long_events_do_not_pile_up_before_a_tail_that_waits() -> None:
    stuck, told = asyncio.Event(), 0

    async def slow_tail(event: TailEvent) -> None:
        nonlocal told
        told += len(event.text)
        await stuck.wait()

    running: set[asyncio.Task[None]] = set()
    tails = Tails([slow_tail], running)
    for _ in range(100):
        tails.tell("w", "i", logging.INFO, "stdout", "x" * 1024 * 1024)
    stuck.set()
    await asyncio.gather(*running)
    assert 4 * 1024 * 1024 <= told <= 9 * 1024 * 1024


async def test_a_tail_that_fails_is_told_the_next_event_all_the_same(
    loader: ProcessLoader, caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str] = []

    def fails(event: TailEvent) -> None:
        texts.append(event.text)
        raise OSError("the disk of the tail is full")

    source = "def say():\n    print('one')\n    print('two')"
    async with ProcessLoader(ready=0) as other:
        await other.load(code(source, fails)).get_entrypoint().say()
    assert texts == ["one\n", "two\n"]
    assert "the disk of the tail is full" in caplog.text


async def test_what_was_said_last_is_heard_before_the_loader_has_closed() -> None:
    heard = Heard()
    async with ProcessLoader(ready=0) as loader:
        await loader.load(code("def say(): print('last', end='')", heard)).get_entrypoint().say()
    assert [event.text for event in heard.events] == ["last"]


async def test_who_sets_up_logging_gets_what_they_set_up(loader: ProcessLoader) -> None:
    heard = Heard()
    source = """
import logging
def say():
    logging.basicConfig(level="DEBUG", format="%(levelname)s:%(message)s")
    logging.debug("in detail")
"""
    await loader.load(code(source, heard)).get_entrypoint().say()
    assert (await heard.of("stderr")).text == "DEBUG:in detail\n"
