"""A tenant that speaks to the host past the guest's program: forged, replayed, giant, countless, misleading frames."""

# ruff: noqa: E501 - frames in one line each

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import psutil
import pytest

from dynflow.errors import (
    DynflowError,
    InstanceFailedError,
    InvalidArgumentError,
    IsolateCrashedError,
    IsolateLimitError,
)
from dynflow.failure import RemoteError
from dynflow.isolates import Capability, IsolateLimits, ProcessLoader
from dynflow.serialization import MEBIBYTE, unpack
from tests.security.support import RAW, tenant

_PRIME = 2**61 - 1  # all multiples of it have the hash 0


@pytest.fixture(scope="module")
async def loader() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(ready=0) as made:
        yield made


class Notes(Capability):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def tell(self, value: Any = None) -> None:
        self.told.append(value)

    async def much(self) -> str:
        return "x" * MEBIBYTE


# --- forged and replayed ---

_NEVER = {
    "an answer to nobody": 'frame("return", 999, None)',
    "an answer twice": 'frame("return", 1, None)',
    "an error to nobody": 'frame("error", 7, {"$": ["data", "Failure", {"name": "", "message": "", "type": ""}]}, 0, 0)',
    "an answer with a number that is none": 'frame("return", True and "2", None)',
    "a call id twice": 'frame("call", 50, "env:NOTES", "wait", [], {}, scope()) * 2',
    "a call id out of all bounds": 'frame("call", 2**61 - 1, "env:NOTES", "tell", [], {}, scope())',
    "a call id below one": 'frame("call", -1, "env:NOTES", "tell", [], {}, scope())',
    "a call id that is a truth": 'frame("call", True, "env:NOTES", "tell", [], {}, scope())',
    "a scope that is no number": 'frame("call", 51, "env:NOTES", "tell", [], {}, "2")',
    "a kind of frame that only hosts could want": 'frame("load", 1, "x")',
    "more read than was sent": 'frame("idle", 10**6, True, None)',
    "an idle time without end": 'frame("idle", 2, False, 10**400)',
    "a level that is a text": 'frame("output", "x", "high", "stdout")',
    "an unknown dataclass": 'frame("call", 52, "env:NOTES", "tell", [{"$": ["data", "Isolate", {}]}], {}, scope())',
    "a dataclass with other fields": 'frame("call", 52, "env:NOTES", "tell", [{"$": ["data", "Event", {"a": 1}]}], {}, scope())',
    "a pickle": "(lambda data: len(data).to_bytes(4, 'big') + data)(__import__('pickle').dumps(print))",
    "a tag of pickle": 'frame("call", 53, "env:NOTES", "tell", [{"$": ["pickle", "gASVHAAAAAAAAACMCGJ1aWx0aW5z"]}], {}, scope())',
    "a method that is a list": 'frame("call", 54, "env:NOTES", ["tell"], [], {}, scope())',
    "keyword arguments that are none": 'frame("call", 55, "env:NOTES", "tell", [], [["value", 1]], scope())',
    "a stub that is data's key": 'frame("call", 56, "env:NOTES", "tell", [{"$": ["dict", {"$": ["stub", "mine", "object", 9, None]}]}], {}, scope())',
    "the same stub twice": 'frame("call", 57, "env:NOTES", "tell", [[{"$": ["stub", "mine", "object", 9, None]}] * 2], {}, scope())',
    "a release of what is no number": 'frame("release", [1])',
    "a cancel of what is no number": 'frame("cancel", {})',
    "an array nested without end": "(lambda data: len(data).to_bytes(4, 'big') + data)(b'[' * 100_000)",
    "text that is no UTF-8": "(lambda data: len(data).to_bytes(4, 'big') + data)(b'[\"output\",\"\\xff\"]')",
    "a number of ten thousand digits": "(lambda data: len(data).to_bytes(4, 'big') + data)(b'[\"idle\",' + b'9' * 10_000 + b']')",
    "a set of colliding numbers": 'frame("call", 58, "env:NOTES", "tell", [{"$": ["set", *(k * (2**61 - 1) for k in range(200_000))]}], {}, scope())',
}


@pytest.mark.parametrize("sent", _NEVER.values(), ids=_NEVER)
async def test_what_no_guest_sends_stops_the_isolate(loader: ProcessLoader, sent: str) -> None:
    notes = Notes()
    source = f"""{RAW}
async def fetch(request, env):
    send({sent})
    await __import__("asyncio").sleep(20)
"""
    async with asyncio.timeout(5):
        with pytest.raises(IsolateCrashedError, match="sent what it never may"):
            await tenant(loader, source, env={"NOTES": notes}).call("fetch")
    assert notes.told == []


async def test_numbers_that_collide_in_a_set_do_not_keep_the_host_busy() -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match="collide"):
        unpack({"$": ["set", *(number * _PRIME for number in range(300_000))]})
    assert len(unpack({"$": ["set", *range(300_000)]})) == 300_000
    assert time.perf_counter() - started < 3


async def test_a_replayed_call_is_a_call_of_its_own_and_is_counted(loader: ProcessLoader) -> None:
    notes = Notes()
    source = f"""{RAW}
async def fetch(request, env):
    for number in range(1_000, 1_100):
        send(frame("call", number, "env:NOTES", "tell", [number], {{}}, scope()))
    await env.NOTES.tell("mine")
"""
    limits = IsolateLimits(subrequests=50)
    with pytest.raises(IsolateLimitError, match="more than 50 calls of bindings"):
        await tenant(loader, source, limits=limits, env={"NOTES": notes}).call("fetch")
    assert len(notes.told) <= 50


async def test_a_call_cannot_be_made_in_the_name_of_another_call(loader: ProcessLoader) -> None:
    notes = Notes()
    source = f"""{RAW}
async def fetch(request, env):
    for number, forged in enumerate([None, 0, -1, 1, 3, scope() - 1, scope() + 1, 2**53]):
        send(frame("call", 2_000 + number, "env:NOTES", "tell", ["forged"], {{}}, forged))
    await __import__("asyncio").sleep(20)
"""
    # The answers are errors, to calls that the guest's own program never made; it ends of them.
    with pytest.raises(DynflowError):
        await tenant(loader, source, env={"NOTES": notes}).call("fetch")
    assert notes.told == []


# --- floods ---


async def test_what_is_not_read_does_not_pile_up_in_the_host(loader: ProcessLoader) -> None:
    source = f"""{RAW}
async def fetch(request, env):
    for number in range(1_000, 2_500):  # one and a half gibibytes of answers
        send(frame("call", number, "env:NOTES", "much", [], {{}}, scope()))
    while True:
        pass
"""
    before = psutil.Process().memory_info().rss
    most = before
    limits = IsolateLimits(busy=timedelta(seconds=8))
    call = asyncio.ensure_future(tenant(loader, source, limits=limits, env={"NOTES": Notes()}).call("fetch"))
    while not call.done():
        most = max(most, psutil.Process().memory_info().rss)
        await asyncio.sleep(0)
    with pytest.raises(IsolateLimitError, match="does not read"):
        await call
    assert most - before < 300 * MEBIBYTE


async def test_frames_that_are_dear_to_read_do_not_take_the_host_from_others(loader: ProcessLoader) -> None:
    source = f"""{RAW}
async def fetch(request, env):
    one = frame("call", 1, "env:NOTES", "nothing", [[[]] * 490_000], {{}}, None)
    head, rest = one[:4], one[4:]
    number = 1_000
    while True:
        number += 1
        body = rest.replace(b'"call",1,', b'"call",%d,' % number, 1)
        send(len(body).to_bytes(4, "big") + body)
"""
    limits = IsolateLimits(busy=timedelta(seconds=3), cpu_ms=3_000)
    flood = asyncio.ensure_future(tenant(loader, source, limits=limits, env={"NOTES": Notes()}).call("fetch"))
    innocent = tenant(loader, "def f(): return 1")
    busy = 0.0
    began = time.perf_counter()
    while time.perf_counter() - began < 2:
        started = time.perf_counter()
        assert await innocent.call("f") == 1
        busy = max(busy, time.perf_counter() - started)
    flood.cancel()
    await asyncio.wait([flood])
    assert busy < 1.0


async def test_names_of_methods_are_not_kept_by_the_host(loader: ProcessLoader) -> None:
    service = tenant(loader, "def known(): return 1")
    source = """
async def fetch(request, env):
    for number in range(200):
        try:
            await getattr(env.OTHER, "m%d" % number + "x" * 100_000)()
        except Exception as error:
            last = str(error)[:60]
    return [last, await env.OTHER.known()]
"""
    before = psutil.Process().memory_info().rss
    last, known = await tenant(loader, source, env={"OTHER": service}).call("fetch")
    assert "there is no function" in last
    assert known == 1
    assert psutil.Process().memory_info().rss - before < 15 * MEBIBYTE


async def test_a_message_of_the_largest_size_passes_and_one_byte_more_does_not(loader: ProcessLoader) -> None:
    source = f"""{RAW}
async def fetch(request, env):
    size = request.json()
    body = b'["output","' + b"x" * 10 + b'"]'
    send(size.to_bytes(4, "big") + body + b" " * (min(size, 9_000_000) - len(body)))
    return "went on"
"""
    limits = IsolateLimits(message=100_000)
    assert await tenant(loader, source, limits=limits).call("fetch", 100_000) == "went on"
    with pytest.raises(IsolateLimitError, match=r"a message of 100,001 bytes"):
        await tenant(loader, source, limits=limits).call("fetch", 100_001)
    with pytest.raises(IsolateLimitError, match=r"a message of 4,294,967,295 bytes"):
        await tenant(loader, source, limits=limits).call("fetch", 2**32 - 1)


async def test_a_frame_that_never_ends_holds_no_more_than_the_limit(loader: ProcessLoader) -> None:
    source = f"""{RAW}
def fetch(request, env):
    send((8 << 20).to_bytes(4, "big") + b'["output","')
    while True:
        pass
"""
    with pytest.raises(IsolateLimitError, match="without coming back"):
        await tenant(loader, source, limits=IsolateLimits(busy=timedelta(seconds=1))).call("fetch")


# --- errors as a weapon ---

_ERRORS = {
    "SystemExit": "SystemExit",
    "KeyboardInterrupt": "KeyboardInterrupt",
    "GeneratorExit": "GeneratorExit",
    "BaseException": "BaseException",
    "CancelledError": "__import__('asyncio').CancelledError",
    "StopIteration": "StopIteration",
    "LeaseLostError": "__import__('dynflow.errors').errors.LeaseLostError",
}


@pytest.mark.parametrize("name", _ERRORS)
async def test_no_error_of_a_tenant_ends_the_hosts_loop(loader: ProcessLoader, name: str) -> None:
    source = f"def fetch(request, env): raise {_ERRORS[name]}()"
    try:
        await tenant(loader, source).call("fetch")
    except Exception as error:  # noqa: BLE001 - the point is that it is an Exception
        assert type(error).__name__ != "LeaseLostError"  # noqa: PT017 - any class but that one
    else:
        pytest.fail("it raised nothing")
    assert await tenant(loader, "def f(): return 1").call("f") == 1


@pytest.mark.parametrize(
    "type_",
    [
        "builtins:exec",
        "builtins:SystemExit",
        "os:system",
        "subprocess:Popen",
        "dynflow.errors:LeaseLostError",
        "builtins:open",
    ],
)
async def test_a_forged_class_of_an_error_is_never_called(loader: ProcessLoader, type_: str) -> None:
    source = f"""{RAW}
async def fetch(request, env):
    args = {{"$": ["tuple", "open('/tmp/dynflow_forged', 'w')"]}}
    fields = {{"name": "N", "message": "M", "type": {type_!r}, "args": args}}
    send(frame("error", scope(), {{"$": ["data", "Failure", fields]}}, None, None))
    await __import__("asyncio").sleep(20)
"""
    with pytest.raises(DynflowError, match="N: M"):
        await tenant(loader, source).call("fetch")
    assert not os.path.exists("/tmp/dynflow_forged")  # noqa: ASYNC240, PTH110


async def test_an_error_cannot_forge_lines_of_the_hosts_log(
    loader: ProcessLoader, caplog: pytest.LogCaptureFixture
) -> None:
    class Ask(Capability):
        async def ask(self, callback: Any) -> Any:
            return await callback()

    source = r"""
async def fetch(request, env):
    def fail():
        raise RuntimeError("first\n2026-01-01 CRITICAL the platform is on fire\x1b[2J")
    try:
        await env.ASK.ask(fail)
    except Exception as error:
        return str(error)
"""
    told = await tenant(loader, source, env={"ASK": Ask()}).call("fetch")
    assert told is not None
    assert not [line for line in caplog.text.splitlines() if line.startswith("2026-01-01 CRITICAL")]
    assert "\x1b" not in caplog.text


# --- stubs ---


async def test_a_stub_of_another_isolate_means_nothing(loader: ProcessLoader) -> None:
    reached: list[str] = []
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def secret() -> str:
        reached.append("secret")
        return "secret"

    async def hold(callback: Any) -> Any:
        del callback
        arrived.set()
        await go_on.wait()

    class Gate(Capability):
        async def hold(self) -> None:
            arrived.set()
            await go_on.wait()

    holder = tenant(
        loader,
        "async def fetch(request, env): pass\nasync def keep(cb, env_=None):\n    from dynflow.workflow import current_env\n    await current_env.get().GATE.hold()\n    return await cb()",
        env={"GATE": Gate()},
    )
    thief = tenant(
        loader,
        """
from dynflow.workflow import current_env
async def steal():
    ask = vars(current_env.get().GATE)["_ask"].func
    found = []
    for number in range(200):
        try:
            found.append(await ask("stub", "call", [number], {}))
        except ValueError as error:
            assert "this stub has ended" in str(error)
    return found
""",
        env={"GATE": Gate()},
    )
    keeping = asyncio.ensure_future(holder.call("keep", secret))
    await arrived.wait()
    assert await thief.call("steal") == []
    assert reached == []
    go_on.set()
    assert await keeping == "secret"


async def test_a_stub_is_gone_once_it_was_released(loader: ProcessLoader) -> None:
    calls: list[int] = []

    async def callback() -> None:
        calls.append(1)

    source = f"""{RAW}
async def use(callback):
    await callback()
    number = vars(vars(callback)["_link"])["_number"]
    send(frame("release", number) + frame("release", number) + frame("release", 10**6))
    try:
        await callback()
    except ValueError as error:
        return str(error)
"""
    assert "this stub has ended" in await tenant(loader, source).call("use", callback)
    assert calls == [1]


async def test_what_a_restricted_binding_hides_cannot_be_had_by_passing_it_round(
    loader: ProcessLoader,
) -> None:
    from dynflow.isolates import binding

    class Store(Capability):
        async def get(self) -> int:
            return 1

        async def erase(self) -> str:
            return "erased"

    class Echo(Capability):
        async def echo(self, value: Any) -> Any:
            return value

    source = """
async def fetch(request, env):
    store = await env.ECHO.echo(env.STORE)
    try:
        return await store.erase()
    except Exception as error:
        return [await store.get(), str(error)]
"""
    env = {"STORE": binding(Store(), methods={"get"}), "ECHO": Echo()}
    got, why = await tenant(loader, source, env=env).call("fetch")
    assert got == 1
    assert "no method 'erase'" in why


async def test_a_stream_gives_no_more_than_it_was_asked_for(loader: ProcessLoader) -> None:
    class Read(Capability):
        async def head(self, stream: Any) -> int:
            return len(await stream.read(10))

    source = """
class Body:
    async def read(self, size=-1):
        return b"x" * 1_000_000
async def fetch(request, env):
    return await env.READ.head(Body())
"""
    with pytest.raises(InvalidArgumentError, match="more than it was asked for"):
        await tenant(loader, source, env={"READ": Read()}).call("fetch")


@pytest.mark.parametrize("answer", ["5", "[1]", "[True, 1, 2]", "None"])
async def test_an_iterator_that_answers_nonsense_is_an_error_of_its_tenant(
    loader: ProcessLoader, answer: str
) -> None:
    class Read(Capability):
        async def all(self, items: Any) -> list[Any]:
            return [item async for item in items]

    source = f"""
from dynflow.isolates import stubs
async def nonsense(self): return {answer}
stubs.Kept._next = nonsense
async def items():
    yield 1
async def fetch(request, env):
    try:
        return await env.READ.all(items())
    except Exception as error:
        return type(error).__name__
"""
    async with asyncio.timeout(5):
        told = await tenant(
            loader, source, limits=IsolateLimits(wall=timedelta(seconds=2)), env={"READ": Read()}
        ).call("fetch")
    assert told in {"TypeError", "ValueError", "InvalidArgumentError"}


@pytest.mark.parametrize(
    "method", ["__call__", "_next", "__init__", "__class__", "read", "close", "number_in", "func"]
)
async def test_a_callback_of_the_host_can_be_called_and_nothing_else(
    loader: ProcessLoader, method: str
) -> None:
    async def callback() -> None:
        raise AssertionError

    source = f"""
async def use(callback):
    try:
        return await vars(callback)["_link"].ask({method!r}, (), {{}})
    except ValueError as error:
        return str(error)
"""
    assert "a stub of a function has no method" in await tenant(loader, source).call("use", callback)


async def test_a_tenant_cannot_be_given_stubs_without_end(loader: ProcessLoader) -> None:
    class More(Capability):
        async def more(self) -> Any:
            return lambda: 1

    source = """
kept = []
async def fetch(request, env):
    try:
        while True:
            kept.append(await env.MORE.more())
    except ValueError as error:
        return [len(kept), str(error)]
"""
    count, why = await tenant(loader, source, env={"MORE": More()}).call("fetch")
    assert count == 1_000
    assert "more than 1,000 stubs" in why


@pytest.mark.parametrize("attempts", ["10**300", "-1", "True", "'x'", "2**60"])
async def test_every_text_of_a_forged_error_is_cut_to_a_length(loader: ProcessLoader, attempts: str) -> None:
    source = (
        RAW
        + f"""
def go():
    long = "\\0\\ud800" + "x" * 1_000_000
    failure = {{"name": long, "message": long, "type": long, "traceback": long, "retry": "no", "args": None}}
    send(frame("error", scope(), {{"$": ["data", "Failure", failure]}}, long, {attempts}))
    import time; time.sleep(100)
"""
    )
    with pytest.raises(InstanceFailedError) as caught:
        await tenant(loader, source).call("go")
    error = caught.value.__cause__
    assert isinstance(error, RemoteError)
    told = error.failure
    assert {len(text) for text in (told.name, told.type, error.step or "")} == {300}
    assert {len(told.message), len(told.traceback)} == {16_000}
    assert all("\0" not in text and "\ud800" not in text for text in (told.name, error.step or ""))
    assert error.attempts is None
    assert len(str(caught.value)) + len("".join(caught.value.__notes__)) < 40_000
