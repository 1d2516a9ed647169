"""Limits and tails, as every WorkerLoader has them: what was developed in this process meets the same in isolates."""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import InstanceFailedError, IsolateLimitError, ValueTooLargeError, WorkerLoadError
from dynflow.isolates import (
    CallLimits,
    Capability,
    IsolateLimits,
    ProcessLoader,
    TailEvent,
    TrustedLoader,
    WorkerCode,
    WorkerLoader,
)
from dynflow.router import DynamicWorkflowBinding, create_dynamic_workflow_entrypoint
from tests.contracts.test_isolate import Segment

pytestmark = pytest.mark.filterwarnings("default")  # tenants' warnings are not errors of this suite


@pytest.fixture(params=["process", "trusted"])
async def loader(request: pytest.FixtureRequest) -> AsyncIterator[WorkerLoader]:
    made: WorkerLoader = ProcessLoader() if request.param == "process" else TrustedLoader()
    async with made:
        yield made


class Heard:
    """A tail that keeps what it hears, and prints it, as tails do."""

    def __init__(self) -> None:
        self.events: list[TailEvent] = []
        self.changed = asyncio.Event()

    async def __call__(self, event: TailEvent) -> None:
        print("heard:", event.text)  # noqa: T201 - tails do that
        self.events.append(event)
        self.changed.set()

    async def count(self, most: int) -> list[tuple[str, int, str]]:
        """Return source, level and first line of the first events, once there are so many."""
        async with asyncio.timeout(10):
            while len(self.events) < most:
                self.changed.clear()
                await self.changed.wait()
        return [(event.source, event.level, event.text.partition("\n")[0]) for event in self.events[:most]]


def stub_of(
    loader: WorkerLoader,
    source: str,
    *tails: Callable[[TailEvent], Any],
    limits: IsolateLimits | None = None,
    call: CallLimits | None = None,
    **env: Any,
) -> Any:
    code = WorkerCode(
        "index.py", {"index.py": source}, env=env, limits=limits or IsolateLimits(), tails=tails
    )
    return loader.load(code).get_entrypoint(limits=call)


class Echo(Capability):
    async def back(self, value: Any) -> Any:
        print("said by the host")  # noqa: T201
        return value

    async def never(self) -> None:
        await asyncio.Event().wait()


# --- tails ---


TALKER = """
import logging, sys, warnings
print("while it is loaded")
log = logging.getLogger(__name__)

def talk():
    print("printed")
    print("to err", file=sys.stderr)
    sys.stdout.write("by hand\\n")
    log.warning("careful %s", "now")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("failed")
    warnings.warn("old")
    print("no end", end="")
"""


async def test_everything_that_is_said_is_told_to_the_tails(loader: WorkerLoader) -> None:
    heard = Heard()
    before = sys.stdout, sys.stderr, warnings.showwarning
    await stub_of(loader, TALKER, heard).talk()
    assert await heard.count(8) == [
        ("stdout", logging.INFO, "while it is loaded"),
        ("stdout", logging.INFO, "printed"),
        ("stderr", logging.WARNING, "to err"),
        ("stdout", logging.INFO, "by hand"),
        ("index", logging.WARNING, "careful now"),
        ("index", logging.ERROR, "failed"),
        ("warnings", logging.WARNING, "index.py:15: UserWarning: old"),
        ("stdout", logging.INFO, "no end"),
    ]
    assert "ZeroDivisionError: division by zero" in heard.events[5].text
    assert {event.worker_id[:7] for event in heard.events} == {"loaded:"}
    assert len({event.isolate for event in heard.events}) == 1
    await loader.__aexit__(None, None, None)
    await loader.__aenter__()
    assert (sys.stdout, sys.stderr, warnings.showwarning) == before


async def test_what_ends_a_call_is_told_with_the_tenants_traceback(loader: WorkerLoader) -> None:
    heard = Heard()
    with pytest.raises(ValueError, match="bad"):
        await stub_of(loader, "def outer(): inner()\ndef inner(): raise ValueError('bad')", heard).outer()
    with pytest.raises(WorkerLoadError):
        await stub_of(loader, "1 / 0", heard).outer()
    (one, level, _), (other, _, _) = await heard.count(2)
    assert (one, other, level) == ("uncaught", "uncaught", logging.ERROR)
    assert 'File "index.py", line 2, in inner' in heard.events[0].text
    assert "dynflow/isolates" not in heard.events[0].text
    assert "ZeroDivisionError" in heard.events[1].text


async def test_what_the_host_says_is_not_the_tenants(
    loader: WorkerLoader, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = Heard()
    source = "async def fetch(request, env):\n    print(await env.ECHO.back('mine'))"
    await stub_of(loader, source, heard, ECHO=Echo()).fetch()
    assert await heard.count(1) == [("stdout", logging.INFO, "mine")]
    assert "said by the host" in capsys.readouterr().out


async def test_a_callback_speaks_as_the_tenant_whose_it_is(loader: WorkerLoader) -> None:
    class Call(Capability):
        async def back(self, callback: Any) -> Any:
            return await callback()

    tenants, other = Heard(), Heard()
    source = "async def fetch(request, env):\n    await env.CALL.back(lambda: print('called back'))"
    caller = (
        "async def fetch(request, env):\n    print('before')\n    await env.OTHER.fetch()\n    print('after')"
    )
    stub = stub_of(loader, source, tenants, CALL=Call())
    await stub_of(loader, caller, other, OTHER=stub).fetch()
    assert await tenants.count(1) == [("stdout", logging.INFO, "called back")]
    assert [text for _, _, text in await other.count(2)] == ["before", "after"]


FLOW = """
from dynflow import WorkflowEntrypoint
class Flow(WorkflowEntrypoint):
    async def run(self, event, step):
        print("run")
        await step.do("work", self.work)
        raise ValueError("at the end")
    async def work(self):
        print("step")
"""


async def test_workflows_and_their_steps_are_heard(loader: WorkerLoader) -> None:
    heard = Heard()
    worker = loader.load(WorkerCode("index.py", {"index.py": FLOW}, tails=[heard]))
    with pytest.raises(Exception, match="at the end"):
        await Segment().run(worker, "Flow")
    assert [(source, text) for source, _, text in await heard.count(3)] == [
        ("stdout", "run"),
        ("stdout", "step"),
        ("uncaught", "Traceback (most recent call last):"),
    ]


async def test_workflows_on_an_engine_are_heard(loader: WorkerLoader, tmp_path: Path) -> None:
    heard = Heard()

    async def load(context: Any) -> Any:
        assert context.metadata == {"tenant": 1}
        worker = loader.get("w", lambda: WorkerCode("index.py", {"index.py": FLOW}, tails=[heard]))
        return worker.get_entrypoint("Flow")

    engine = EmbeddedEngine(tmp_path / "engine.db")
    engine.register("flow", create_dynamic_workflow_entrypoint(load))
    async with engine:
        instance = await DynamicWorkflowBinding(engine.binding("flow"), {"tenant": 1}).create()
        with pytest.raises(ValueError, match="at the end"):
            await instance.result()
    assert [text for source, _, text in await heard.count(2) if source == "stdout"] == ["run", "step"]


# --- limits ---


async def limited(stub: Any, method: str, *args: Any) -> tuple[str, Any]:
    with pytest.raises(IsolateLimitError) as caught:
        await stub.call(method, *args)
    assert str(caught.value)
    return caught.value.limit, caught.value.value


@pytest.mark.parametrize("whose", ["code", "call", "both"])
async def test_wall_time_has_an_end(loader: WorkerLoader, whose: str) -> None:
    source = """
import asyncio
async def fetch(request, env):
    try:
        await asyncio.sleep(100)
    finally:
        print("cleaned up")
def quick(): return 1
"""
    short, long = timedelta(milliseconds=100), timedelta(minutes=5)
    limits = IsolateLimits(wall={"code": short, "call": None, "both": long}[whose])
    stub = stub_of(loader, source, limits=limits, call=None if whose == "code" else CallLimits(wall=short))
    assert await stub.quick() == 1
    assert await limited(stub, "fetch") == ("wall", short)
    assert await stub.quick() == 1


async def test_a_call_may_not_ask_for_more_than_its_code(loader: WorkerLoader) -> None:
    source = "async def fetch(request, env):\n    for _ in range(4): await env.ECHO.back(1)"
    high = CallLimits(subrequests=100)
    stub = stub_of(loader, source, limits=IsolateLimits(subrequests=3), call=high, ECHO=Echo())
    assert await limited(stub, "fetch") == ("subrequests", 3)


async def test_calls_of_bindings_have_an_end_whatever_code_catches(loader: WorkerLoader) -> None:
    source = """
async def fetch(request, env):
    for number in range(request.json()):
        try:
            await env.ECHO.back(number)
        except BaseException:
            pass
    return "done"
"""
    stub = stub_of(loader, source, call=CallLimits(subrequests=5), ECHO=Echo())
    assert await stub.fetch(5) == "done"  # each call has an account of its own
    assert await stub.fetch(5) == "done"
    assert await limited(stub, "fetch", 6) == ("subrequests", 5)


async def test_calls_that_wait_for_an_answer_have_an_end(loader: WorkerLoader) -> None:
    source = """
import asyncio
async def fetch(request, env): await asyncio.gather(*(env.ECHO.never() for _ in range(10)))
"""
    stub = stub_of(loader, source, limits=IsolateLimits(outstanding=5), ECHO=Echo())
    assert await limited(stub, "fetch") == ("outstanding", 5)


SAY = """
def say(count):
    for _ in range(count):
        try:
            print("x" * 99)
        except Exception:
            pass
"""


@pytest.mark.parametrize("heard", [True, False])
async def test_output_has_an_end(loader: WorkerLoader, heard: bool) -> None:  # noqa: FBT001
    tails = [Heard()] if heard else []
    stub = stub_of(loader, SAY, *tails, call=CallLimits(output=1_000))
    await stub.say(9)
    assert await limited(stub, "say", 20) == ("output", 1_000)


async def test_output_in_one_second_has_an_end(loader: WorkerLoader) -> None:
    stub = stub_of(loader, SAY, limits=IsolateLimits(output_rate=1_000))
    assert await limited(stub, "say", 20) == ("output_rate", 1_000)


async def test_output_is_counted_in_bytes(loader: WorkerLoader) -> None:
    stub = stub_of(loader, "def say(text): print(text)", Heard(), call=CallLimits(output=1_000))
    await stub.say("x" * 900)
    assert await limited(stub, "say", "\N{GRINNING FACE}" * 300) == ("output", 1_000)


async def test_messages_have_a_size(loader: WorkerLoader) -> None:
    source = """
def give(size): return "x" * size
def take(text): return len(text)
async def fetch(request, env):
    try:
        await env.ECHO.back("x" * request.json())
    except ValueError as error:
        return [type(error).__name__, str(error)]
"""
    stub = stub_of(loader, source, limits=IsolateLimits(message=100_000), ECHO=Echo())
    assert await stub.take("x" * 90_000) == len(await stub.give(90_000)) == 90_000
    for call in (stub.give(110_000), stub.take("x" * 110_000)):
        with pytest.raises(ValueTooLargeError, match="the limit is 100,000 bytes"):
            await call
    name, told = await stub.fetch(110_000)
    assert (name, "the limit is 100,000 bytes" in told) == ("ValueTooLargeError", True)


async def test_a_workflow_over_a_limit_fails_with_it(loader: WorkerLoader) -> None:
    source = """
import asyncio
from dynflow import WorkflowEntrypoint
class Flow(WorkflowEntrypoint):
    async def run(self, event, step): await asyncio.sleep(100)
"""
    limits = IsolateLimits(wall=timedelta(milliseconds=100))
    worker = loader.load(WorkerCode("index.py", {"index.py": source}, limits=limits))
    with pytest.raises(IsolateLimitError) as caught:
        await Segment().run(worker, "Flow")
    assert (caught.value.limit, caught.value.value) == ("wall", timedelta(milliseconds=100))


async def test_a_call_that_is_cancelled_is_cancelled_and_not_over_a_limit(loader: WorkerLoader) -> None:
    started = asyncio.Event()

    class Gate(Capability):
        async def wait(self) -> None:
            started.set()
            await asyncio.Event().wait()

    source = "async def fetch(request, env): await env.GATE.wait()"
    stub = stub_of(loader, source, call=CallLimits(wall=timedelta(minutes=5)), GATE=Gate())
    call: asyncio.Task[Any] = asyncio.create_task(stub.call("fetch"))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_tenant_that_wants_to_end_its_process_ends_its_call(loader: WorkerLoader) -> None:
    stub = stub_of(loader, "def leave(): raise SystemExit(3)\ndef stay(): return 1")
    with pytest.raises(InstanceFailedError, match="SystemExit: 3"):
        await stub.leave()
    assert await stub.stay() == 1


async def test_events_carry_their_time(loader: WorkerLoader) -> None:
    heard, before = Heard(), datetime.now(UTC)
    await stub_of(loader, SAY, heard).say(1)
    await heard.count(1)
    assert before <= heard.events[0].time <= datetime.now(UTC)
