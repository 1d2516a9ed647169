"""What a tenant can do to use up the host, and how it ends: the isolate is stopped, the host goes on."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from dynflow.errors import InstanceFailedError, IsolateCrashedError, IsolateLimitError, ValueTooLargeError
from dynflow.isolates import CallLimits, Capability, IsolateLimits, ProcessLoader, WorkerCode
from dynflow.isolates.confinement import WALLS
from tests.dynflow.isolates.support import hostile

MEBIBYTE = 1024 * 1024
SHORT = timedelta(milliseconds=300)


@pytest.fixture
async def loader() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader() as made:
        yield made
        # Whatever happened, the next tenant is served.
        source = "def fine(): return 'fine'"
        stub = made.get("innocent", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
        assert await stub.fine() == "fine"


@pytest.mark.parametrize("attack", ["spin", "spin_while_claiming_to_wait"])
async def test_code_that_does_not_come_back_to_its_loop_is_stopped(
    loader: ProcessLoader, attack: str
) -> None:
    with pytest.raises(IsolateLimitError, match=r"ran for 0\.3 seconds without coming back"):
        await hostile(loader, busy=SHORT).get_entrypoint().call(attack, {})


SPIN = """
import asyncio, time
async def fetch(request, env):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        await asyncio.sleep(0)
def lie():
    from dynflow.isolates.wire import encode_frame
    import os
    while True:
        os.write(3, encode_frame(["idle", 2, False, 1000]))
        for _ in range(100_000): pass
"""


@pytest.mark.parametrize("method", ["fetch", "lie"])
@pytest.mark.parametrize("whose", ["code", "call", "both"])
async def test_cpu_time_of_a_call_has_an_end(loader: ProcessLoader, method: str, whose: str) -> None:
    high = 10_000 if whose == "both" else 300_000
    code = WorkerCode(
        "index.py", {"index.py": SPIN}, limits=IsolateLimits(cpu_ms=100 if whose == "code" else high)
    )
    limits = None if whose == "code" else CallLimits(cpu_ms=100)
    stub = loader.load(code).get_entrypoint(limits=limits)
    with pytest.raises(IsolateLimitError, match="used more than 100 ms of CPU") as caught:
        await stub.call(method)
    assert (caught.value.limit, caught.value.value) == ("cpu_ms", 100)


async def test_cpu_time_of_an_isolates_life_has_an_end(loader: ProcessLoader) -> None:
    source = """
import os, time
def work():
    end = time.process_time() + 0.12
    while time.process_time() < end: pass
    return os.getpid(), time.process_time()
"""
    code = WorkerCode("index.py", {"index.py": source}, limits=IsolateLimits(isolate_cpu_ms=400))
    stub = loader.load(code).get_entrypoint()
    lives = [await stub.work() for _ in range(6)]
    assert max(cpu for _, cpu in lives) < 0.4  # another isolate goes on before it is used up
    short = WorkerCode("index.py", {"index.py": source}, limits=IsolateLimits(isolate_cpu_ms=50))
    with pytest.raises(IsolateLimitError) as caught:
        await loader.load(short).get_entrypoint().work()
    assert (caught.value.limit, caught.value.value) == ("isolate_cpu_ms", 50)


async def test_a_call_takes_no_longer_than_its_wall_time(loader: ProcessLoader) -> None:
    source = "import asyncio\nasync def fetch(request, env): await asyncio.sleep(100)\ndef quick(): return 1"
    stub = loader.load(WorkerCode("index.py", {"index.py": source})).get_entrypoint(
        limits=CallLimits(wall=timedelta(milliseconds=200))
    )
    assert await stub.quick() == 1
    with pytest.raises(IsolateLimitError, match=r"took more than 0\.2 seconds") as caught:
        await stub.fetch()
    assert caught.value.limit == "wall"


async def test_calls_of_bindings_are_counted_for_each_call(loader: ProcessLoader) -> None:
    class Echo(Capability):
        async def back(self, value: int) -> int:
            return value

    source = """
async def fetch(request, env):
    for number in range(request.json()):
        try:
            await env.ECHO.back(number)
        except Exception:
            pass
"""
    code = WorkerCode(
        "index.py", {"index.py": source}, env={"ECHO": Echo()}, limits=IsolateLimits(subrequests=5)
    )
    stub = loader.load(code).get_entrypoint(limits=CallLimits(subrequests=50))
    await stub.fetch(5)
    await stub.fetch(5)
    with pytest.raises(IsolateLimitError, match="more than 5 calls of bindings"):
        await stub.fetch(6)


async def test_printing_fast_has_an_end(loader: ProcessLoader) -> None:
    with pytest.raises(IsolateLimitError, match="printed more than 50,000 bytes in a second"):
        await hostile(loader, output_rate=50_000).get_entrypoint().print_without_end({})


async def test_code_that_spins_while_it_is_loaded_is_stopped(loader: ProcessLoader) -> None:
    code = WorkerCode("index.py", {"index.py": "while True: pass"}, limits=IsolateLimits(busy=SHORT))
    with pytest.raises(IsolateLimitError, match="without coming back"):
        await loader.get("w", lambda: code).get_entrypoint().fetch()


async def test_code_that_waits_for_nothing_is_stopped(loader: ProcessLoader) -> None:
    source = "import asyncio\nasync def fetch(request, env): await asyncio.Event().wait()"
    stub = loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    with pytest.raises(IsolateLimitError, match="waits for what can never happen"):
        await stub.fetch()


async def test_waiting_is_not_being_busy(loader: ProcessLoader) -> None:
    class Slow(Capability):
        async def answer(self) -> int:
            await asyncio.sleep(0.5)
            return 1

    source = """
import asyncio
async def fetch(request, env):
    await asyncio.sleep(0.5)
    return await env.SLOW.answer()
"""
    code = WorkerCode(
        "index.py", {"index.py": source}, env={"SLOW": Slow()}, limits=IsolateLimits(busy=SHORT)
    )
    assert await loader.get("w", lambda: code).get_entrypoint().fetch() == 1


@pytest.mark.parametrize("attack", ["take_memory", "recurse"])
async def test_memory_has_an_end(loader: ProcessLoader, attack: str) -> None:
    with pytest.raises((IsolateLimitError, RecursionError)):
        await hostile(loader, memory=64 * MEBIBYTE).get_entrypoint().call(attack, {})


@pytest.mark.parametrize("walls", [set(WALLS), set(WALLS) - {"cgroup"}])
async def test_the_limit_of_memory_is_named_with_its_value(walls: set[str]) -> None:
    source = "def take(): return len(b'x' * (1 << 30))\ndef little(): return len(b'x' * (8 << 20))"
    code = WorkerCode("index.py", {"index.py": source}, limits=IsolateLimits(memory=64 * MEBIBYTE))
    async with ProcessLoader(ready=0, walls=walls) as loader:
        stub = loader.load(code).get_entrypoint()
        assert await stub.little() == 8 * MEBIBYTE
        with pytest.raises(IsolateLimitError) as caught:
            await stub.take()
        assert (caught.value.limit, caught.value.value) == ("memory", 64 * MEBIBYTE)
        assert loader.isolates == 0
        assert await stub.little() == 8 * MEBIBYTE


async def test_a_tenant_that_hides_its_memory_errors_gets_no_more_memory(loader: ProcessLoader) -> None:
    taken = await hostile(loader, memory=64 * MEBIBYTE).get_entrypoint().take_memory_and_hide_it({})
    assert 16 <= taken <= 80


async def test_printing_has_an_end(loader: ProcessLoader) -> None:
    with pytest.raises(IsolateLimitError, match="printed more than 100,000 bytes"):
        await hostile(loader, output=100_000).get_entrypoint().print_without_end({})


async def test_what_is_printed_reaches_the_host_with_who_printed_it() -> None:
    printed: list[tuple[str, str]] = []
    async with ProcessLoader(
        on_output=lambda caller, text: printed.append((caller.worker_id, text))
    ) as loader:
        source = "import sys\ndef say():\n    print('to', 'out')\n    print('to err', file=sys.stderr)"
        await loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint().say()
    assert {worker_id for worker_id, _ in printed} == {"w"}
    assert "".join(text for _, text in printed) == "to out\nto err\n"


async def test_a_giant_answer_is_refused_inside_and_cut_off_outside(loader: ProcessLoader) -> None:
    with pytest.raises(ValueTooLargeError, match="the limit is"):
        await hostile(loader).get_entrypoint().answer_with_a_giant({"size": 9 * MEBIBYTE})
    with pytest.raises(IsolateLimitError, match="a message of") as caught:
        await hostile(loader).get_entrypoint().write_to_the_host({"bytes": struct.pack(">I", 2**31)})
    assert (caught.value.limit, caught.value.value) == ("message", 8 * MEBIBYTE)


async def test_a_message_of_countless_items_is_cut_off(loader: ProcessLoader) -> None:
    source = """
import os
def bomb():
    data = b"[" + b"[]," * 600_000 + b"[]]"
    message = len(data).to_bytes(4, "big") + data
    while message:
        message = message[os.write(3, message):]
"""
    stub = loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    with pytest.raises(IsolateLimitError, match="more than 500,000 items"):
        await stub.bomb()


def frame(text: str) -> bytes:
    return struct.pack(">I", len(text)) + text.encode()


@pytest.mark.parametrize(
    "sent",
    [
        frame("not json"),
        frame("{}"),
        frame("[]"),
        frame("[1]"),
        frame('["unknown"]'),
        frame('["call"]'),
        frame('["call", 1, "step", "do", {}, {}, null]'),
        frame('["call", true, "step", "do", [], {}, null]'),
        frame('["call", 1, "step", "do", [{"$": ["nothing"]}], {}, null]'),
        frame('["call", 1, "step", "do", [{"$": ["dict", 5]}], {}, null]'),
        frame('["call", 1, "step", "do", [{"$": ["data", "Failure", 5]}], {}, null]'),
        frame('["call", 1, "step", "do", [{"$": ["decimal", "x"]}], {}, null]'),
        frame('["call", 1, "step", "do", [NaN], {}, null]'),
        frame('["call", 1, "step", "do", [' + "9" * 5000 + "], {}, null]"),
        frame("[" * 5000 + "]" * 5000),
        frame('["return", 99, null]'),
        frame('["return", [], null]'),
        frame('["return", {}, null]'),
        frame('["error", 2, null, null, null]'),
        frame('["error", 2, {"$": ["data", "Failure", {"name": 1, "message": 2, "type": 3}]}, null, null]'),
        frame('["idle", 1000, true, null]'),
        frame('["idle", "1", true, null]'),
        frame('["cancel", []]'),
        frame('["output", 5]'),
        frame('["load", 1]'),
    ],
)
async def test_malformed_messages_stop_the_isolate_and_nothing_else(
    loader: ProcessLoader, sent: bytes
) -> None:
    with pytest.raises(IsolateCrashedError, match="sent what it never may"):
        await hostile(loader).get_entrypoint().write_to_the_host({"bytes": list(sent)})


@pytest.mark.parametrize(
    "call",
    [
        '["call", 7, "step", "do", [], {}, null]',
        '["call", 7, "step", "do", ["do", "x", 1, null, null, null, null, {}], {}, 2]',
        '["call", 7, "env:NOTHING", "x", [], {}, 2]',
        '["call", 7, "env:NOTHING", "x", [], {}, 999]',
        '["call", 7, "elsewhere", "x", [], {}, null]',
    ],
)
async def test_calls_of_what_is_not_there_are_answered_with_an_error(
    loader: ProcessLoader, call: str
) -> None:
    source = """
import os
def call(sent):
    os.write(3, bytes(sent))
    return "went on"
"""
    stub = loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    # The answer is to a call that the guest's own program never made; where that comes first the program ends.
    with contextlib.suppress(IsolateCrashedError):
        assert await stub.call("call", list(frame(call))) == "went on"


async def test_too_many_unanswered_calls_are_cut_off(loader: ProcessLoader) -> None:
    class Never(Capability):
        async def answer(self) -> None:
            await asyncio.Event().wait()

    source = """
import asyncio
async def fetch(request, env):
    await asyncio.gather(*(env.NEVER.answer() for _ in range(50)))
"""
    limits = IsolateLimits(outstanding=20)
    code = WorkerCode("index.py", {"index.py": source}, env={"NEVER": Never()}, limits=limits)
    with pytest.raises(IsolateLimitError, match="more than 20 calls"):
        await loader.get("w", lambda: code).get_entrypoint().fetch()


async def test_a_flood_of_messages_does_not_starve_the_host(loader: ProcessLoader) -> None:
    source = """
import os
def flood():
    frame = b'["output",""]'
    data = (len(frame).to_bytes(4, "big") + frame) * 1000
    while True:
        os.write(3, data)
"""
    limits = IsolateLimits(busy=timedelta(seconds=2))
    stub = loader.get(
        "w", lambda: WorkerCode("index.py", {"index.py": source}, limits=limits)
    ).get_entrypoint()
    flood = asyncio.create_task(stub.call("flood"))
    innocent = loader.get(
        "i", lambda: WorkerCode("index.py", {"index.py": "def f(): return 1"})
    ).get_entrypoint()
    slowest = 0.0
    for _ in range(20):
        started = time.perf_counter()
        assert await innocent.f() == 1
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 1.5
    with pytest.raises(IsolateLimitError):
        await flood


@pytest.mark.parametrize(("attack", "message"), [("crash", "SIGSEGV"), ("leave", "exited with 7")])
async def test_a_crash_says_how_the_process_ended(loader: ProcessLoader, attack: str, message: str) -> None:
    with pytest.raises(IsolateCrashedError, match=message):
        await hostile(loader).get_entrypoint().call(attack, {})


async def test_code_that_ignores_signals_and_cancellation_is_stopped_within_two_seconds(
    loader: ProcessLoader,
) -> None:
    class Signal(Capability):
        def __init__(self) -> None:
            self.here = asyncio.Event()

        async def arrive(self) -> None:
            self.here.set()

    arrived = Signal()
    source = """
import asyncio, signal
async def fetch(request, env):
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    await env.SIGNAL.arrive()
    while True:
        try:
            await asyncio.sleep(0.01)
        except BaseException:
            pass
"""
    code = WorkerCode("index.py", {"index.py": source}, env={"SIGNAL": arrived})
    call: asyncio.Task[Any] = asyncio.create_task(
        loader.get("w", lambda: code).get_entrypoint().call("fetch")
    )
    await arrived.here.wait()
    call.cancel()
    async with asyncio.timeout(2):
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_an_error_class_of_the_host_cannot_be_forged(loader: ProcessLoader) -> None:
    source = """
def fail():
    class LeaseLostError(Exception): pass
    LeaseLostError.__module__ = "dynflow.errors"
    raise LeaseLostError("give it up")
"""
    stub = loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    with pytest.raises(InstanceFailedError, match="LeaseLostError: give it up"):
        await stub.fail()


async def test_a_giant_error_is_cut_to_the_size_of_an_error(loader: ProcessLoader) -> None:
    source = """
from dynflow import failure
def fail():
    failure._MAX_TEXT = 1 << 30
    class Own(Exception): pass
    raise Own("x" * 1_000_000)
"""
    stub = loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    with pytest.raises(InstanceFailedError) as caught:
        await stub.fail()
    assert len(caught.value.message) == 16_000


async def test_what_is_printed_cannot_forge_lines_of_a_log(
    loader: ProcessLoader, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = "def say(): print('one\\r\\x1b[2Jtwo\\nthree')"
    await loader.get("w", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint().say()
    lines = [record.getMessage() for record in caplog.records if record.name == "dynflow.output"]
    assert lines == ["w: one", "w: \ufffd[2Jtwo", "w: three"]


RAW = """
import json, os
from dynflow.isolates.guest_steps import current_scope
def send(kind, *items):
    data = json.dumps([kind, *items], separators=(",", ":")).encode()
    message = memoryview(len(data).to_bytes(4, "big") + data)
    while message:
        message = message[os.write(3, message):]
"""


async def test_arguments_of_calls_that_wait_do_not_pile_up(loader: ProcessLoader) -> None:
    class Never(Capability):
        async def wait(self, value: str) -> None:
            await asyncio.Event().wait()

    source = f"""{RAW}
async def fetch(request, env):
    for number in range(100, 300):
        send("call", number, "env:NEVER", "wait", ["x" * 4_000_000], {{}}, current_scope.get())
"""
    code = WorkerCode("index.py", {"index.py": source}, env={"NEVER": Never()})
    with pytest.raises(IsolateLimitError, match="take more than 134,217,728 bytes") as caught:
        await loader.load(code).get_entrypoint().fetch()
    assert caught.value.limit == "outstanding"


async def test_one_isolate_does_not_take_all_of_the_hosts_time(loader: ProcessLoader) -> None:
    class Ignores(Capability):
        async def take(self, value: object) -> None:
            pass

    source = f"""{RAW}
import time
async def fetch(request, env):
    lists = [[] for _ in range(150_000)]
    end = time.monotonic() + 2
    number = 100
    while time.monotonic() < end:
        send("call", number, "env:IGNORES", "take", [lists], {{}}, current_scope.get())
        number += 1
    return number - 100
"""
    code = WorkerCode("index.py", {"index.py": source}, env={"IGNORES": Ignores()})
    busy_before, started = time.thread_time(), time.monotonic()
    flood = asyncio.ensure_future(loader.load(code).get_entrypoint().call("fetch"))
    with contextlib.suppress(
        IsolateCrashedError
    ):  # its program ends at answers to calls that it did not make
        async with asyncio.timeout(30):
            await flood
    share = (time.thread_time() - busy_before) / (time.monotonic() - started)
    assert share < 0.6  # of this thread's time; without the brake it is nearly all of it
