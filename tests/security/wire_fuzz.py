"""The host's side of a wire without a process behind it: hostile bytes go in; what always holds is checked.

`frames` makes messages that are nearly right, `mutated` breaks their bytes. Used by test_fuzz.py for seconds and by
scripts/fuzz_wire.py for as long as one likes.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

from dynflow.errors import IsolateCrashedError, IsolateError, IsolateLimitError
from dynflow.isolates import Caller, Capability, IsolateLimits, binding
from dynflow.isolates.bindings import make_bindings
from dynflow.isolates.process import Isolate
from dynflow.isolates.session import Session
from dynflow.isolates.tails import Tails
from dynflow.outbound import HttpRequest, HttpResponse

LIMITS = IsolateLimits(message=65_536, outstanding=50, output=200_000, subrequests=500)
# A case is a handful of frames; the slowest honest one takes milliseconds, on a busy machine some tens.
MOST_SECONDS = 2.0


class _Process:
    """A process that is none."""

    gone = asyncio.Event()

    def cpu_clock(self) -> None:
        """Return no clock."""

    def kill(self) -> None:
        """Do nothing."""


class _Transport:
    """Takes what the host sends, and forgets it."""

    def get_write_buffer_size(self) -> int:
        """Return nothing."""
        return 0

    def write(self, data: bytes) -> None:
        """Forget it."""

    def abort(self) -> None:
        """Do nothing."""

    pause_reading = resume_reading = abort

    def is_closing(self) -> bool:
        """Return no."""
        return False


class _Store(Capability):
    """What a tenant is given: it takes everything, and gives everything that goes by reference."""

    async def echo(self, value: Any = None, **more: Any) -> Any:
        return [value, more] if more else value

    async def callback(self) -> Any:
        return self.echo

    async def items(self) -> Any:
        async def numbers() -> AsyncIterator[int]:
            for number in range(3):
                yield number

        return numbers()

    async def use(self, callback: Any) -> Any:
        return await callback(1)


class _Outbound:
    """Answers every request."""

    async def fetch(self, request: HttpRequest) -> HttpResponse:
        assert "\r" not in request.url + "".join(request.headers.values())
        return HttpResponse(200, dict(request.headers), request.body)


class FuzzedHost:
    """One isolate's host, in the middle of a call."""

    def __init__(self) -> None:
        env = {"STORE": _Store(), "SOME": binding(_Store(), methods={"echo"})}
        _, bindings = make_bindings(env, {}, _Outbound())
        self.isolate = Isolate(_Process(), lambda caller, text: None)  # type: ignore[arg-type]  # what it uses
        self.isolate._transport = _Transport()  # type: ignore[assignment]
        telling: set[asyncio.Task[None]] = set()
        loaded = self.isolate.load("index.py", {"index.py": ""}, {}, None, LIMITS, Tails((), telling))
        loaded.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        self.session = Session(self.isolate, bindings, Caller("w"), LIMITS)
        self.call = asyncio.ensure_future(self.session.call("call", "fetch", [None, None, [], {}]))

    async def feed(self, data: bytes) -> None:
        """Take `data` in, and let everything that comes of it happen."""
        await asyncio.sleep(0)
        started = time.perf_counter()
        self.isolate.data_received(data)
        for _ in range(8):
            await asyncio.sleep(0)
        took = time.perf_counter() - started
        assert took < MOST_SECONDS, f"{took:.1f} s for {len(data)} bytes: {data[:300]!r}"

    async def close(self) -> None:
        """End it, and check that it ended as isolates may."""
        failed = self.isolate.failed
        assert failed is None or isinstance(failed, (IsolateCrashedError, IsolateLimitError)), failed
        self.isolate.kill()
        result = (await asyncio.gather(self.call, return_exceptions=True))[0]
        assert not isinstance(result, (AssertionError, SystemExit, MemoryError, RecursionError)), result
        if failed is not None and self.call.exception() is not None and isinstance(result, IsolateError):
            assert str(result)
        self.session.close()
        performing = list(self.isolate.peer.performing.values())
        await asyncio.gather(*performing, return_exceptions=True)
        await asyncio.sleep(0)
        assert not self.isolate.peer.performing
        self.isolate.watchdog.close()


_KINDS = ["call", "return", "error", "release", "cancel", "idle", "output", "load", ""]
_WEIGHTS = [60, 3, 3, 10, 10, 10, 20, 1, 1]  # what is mostly the end of it comes seldom
_TARGETS = [
    "env:STORE",
    "env:SOME",
    "env:",
    "env:NO",
    "outbound",
    "stub",
    "step",
    "callback",
    "run",
    "load",
    "",
]
_METHODS = [
    "echo",
    "callback",
    "items",
    "use",
    "fetch",
    "call",
    "next",
    "close",
    "read",
    "__init__",
    "find",
    "",
]
_TAGS = [
    "tuple",
    "set",
    "dict",
    "data",
    "int",
    "float",
    "bytes",
    "datetime",
    "timedelta",
    "decimal",
    "uuid",
    "stub",
]
_CLASSES = ["Failure", "HttpRequest", "HttpResponse", "WorkflowEvent", "Event", "StepContext", "Isolate"]
_FIELDS = [
    "name",
    "message",
    "type",
    "args",
    "traceback",
    "retry",
    "url",
    "method",
    "headers",
    "body",
    "status",
]
_TEXTS = [
    "", "x", "$", "\0", "\ud800", "\r\nX: y", "mine", "yours", "env", "function", "iterator", "stream", "object",
    "instance", "STORE", "ff", "AAAA", "1e999999999", "nan", "-inf", "2026-01-01T00:00:00+00:00", "2026-01-01", "GET",
    "http://a/", "builtins:SystemExit", "builtins:MemoryError", "builtins:KeyError", "dynflow.errors:LeaseLostError",
    "dynflow.errors:WorkerLoadError", "\x1b[2J", "stdout",
]  # fmt: skip
_NUMBERS = [
    0,
    1,
    2,
    3,
    4,
    -1,
    2**31,
    2**53 - 1,
    2**53,
    2**61 - 1,
    2**64,
    10**30,
    0.5,
    1e308,
    -1e308,
    True,
    False,
]


_RIGHT: list[Any] = [
    *[
        None,
        1,
        "x",
        [1, "x"],
        {"a": {}},
        {"$": ["tuple", 1, 2]},
        {"$": ["set", 1, 2]},
        {"$": ["int", "0xff"]},
    ],
    *[
        {"$": ["float", "inf"]},
        {"$": ["bytes", "AAAA"]},
        {"$": ["decimal", "1e9"]},
        {"$": ["timedelta", 1, 2, 3]},
    ],
    *[{"$": ["dict", {"$": 1}]}, {"$": ["datetime", "2026-01-01T00:00:00"]}, {"$": ["date", "2026-01-01"]}],
    {"$": ["data", "HttpRequest", {"url": "http://a/", "method": "GET", "headers": {"A": "b"}}]},
    {"$": ["data", "Failure", {"name": "KeyError", "message": "k", "type": "builtins:KeyError"}]},
    *[{"$": ["stub", "env", "object", "STORE", None]}, {"$": ["stub", "yours", "function", 2, None]}],
]


_LIKELY = [
    *[("env:STORE", name) for name in ("echo", "callback", "items", "use")],
    *[("env:SOME", "echo"), ("outbound", "fetch"), ("stub", "call"), ("stub", "next"), ("stub", "close")],
]
_UNLIKELY = [(target, method) for target in _TARGETS for method in _METHODS]


def right(chosen: random.Random) -> Any:
    """Return something that unpacks; a stub in it has a number that hardly another one has."""
    if chosen.random() < 0.2:
        kind = chosen.choice(["function", "iterator", "stream", "instance", "object"])
        return {"$": ["stub", "mine", kind, chosen.randrange(10**6), "i"]}
    return chosen.choice(_RIGHT)


def value(chosen: random.Random, depth: int = 0) -> Any:
    """Return something that JSON can say, and that looks like packed data."""
    kind = chosen.randrange(10 if depth < 5 else 4)
    if kind < 2:
        return chosen.choice(_NUMBERS)
    if kind < 4:
        return chosen.choice([*_TEXTS, None])
    if kind == 4:
        return [value(chosen, depth + 1) for _ in range(chosen.randrange(4))]
    if kind == 5:
        return {
            chosen.choice([*_FIELDS, "$", "value"]): value(chosen, depth + 1)
            for _ in range(chosen.randrange(4))
        }
    if kind == 6:
        fields = {name: value(chosen, depth + 1) for name in chosen.sample(_FIELDS, chosen.randrange(6))}
        return {"$": ["data", chosen.choice(_CLASSES), fields]}
    if kind == 7:
        whose, what = chosen.choice(["mine", "yours", "env"]), chosen.choice(_TEXTS[9:14])
        return {
            "$": [
                "stub",
                whose,
                what,
                chosen.choice([*range(6), "STORE", "SOME"]),
                chosen.choice([None, "i"]),
            ]
        }
    return {"$": [chosen.choice(_TAGS), *(value(chosen, depth + 1) for _ in range(chosen.randrange(3)))]}


def nearly_right(chosen: random.Random, number: int) -> list[Any]:
    """Return a frame whose shape is mostly that of one; as a call it has this number."""
    make = right if chosen.random() < 0.9 else value
    kind = chosen.choices(_KINDS, _WEIGHTS)[0]
    items: list[Any] = [kind, *(make(chosen) for _ in range(chosen.randrange(6)))]
    if kind == "call":
        target, method = chosen.choice(_LIKELY if chosen.random() < 0.8 else _UNLIKELY)
        args = [make(chosen) for _ in range(chosen.randrange(3))]
        if target == "stub":
            args.insert(0, chosen.randrange(1, 6))
        kwargs = {chosen.choice([*_FIELDS, "value"]): make(chosen) for _ in range(chosen.randrange(2))}
        items = [kind, number, target, method, args, kwargs, chosen.choice([2, 2, 2, None, 3])]
    elif kind == "return":
        items = [kind, chosen.choice([1, *range(2, 7)]) if chosen.random() < 0.2 else 1, make(chosen)]
    elif kind == "error":
        fields = {name: chosen.choice(_TEXTS) for name in ("name", "message", "type")}
        packed = {"$": ["tuple", make(chosen)]} if chosen.random() < 0.5 else None
        items = [
            kind,
            chosen.choice([1, 2, 3]),
            {"$": ["data", "Failure", {**fields, "args": packed}]},
            None,
            make(chosen),
        ]
    elif kind == "idle":
        items = [kind, chosen.randrange(3), chosen.random() < 0.5, chosen.choice([None, 0, 0.5, 1e308])]
    elif kind == "output":
        items = [
            kind,
            chosen.choice(_TEXTS) * chosen.randrange(50),
            chosen.randrange(60),
            chosen.choice(_TEXTS),
        ]
    elif kind in {"release", "cancel"}:
        items = [kind, chosen.randrange(20)]
    if chosen.random() < 0.03:
        items[chosen.randrange(len(items))] = value(chosen)
    return items


def frames(chosen: random.Random) -> bytes:
    """Return some frames as bytes."""
    found = b""
    for _ in range(chosen.randrange(1, 8)):
        data = json.dumps(nearly_right(chosen, chosen.randrange(1, 10**6)), separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
        found += len(data).to_bytes(4, "big") + data
    return found


def mutated(chosen: random.Random, data: bytes) -> bytes:
    """Return `data` with some bytes broken."""
    broken = bytearray(data)
    for _ in range(chosen.randrange(1, 6)):
        at = chosen.randrange(len(broken) + 1)
        what = chosen.randrange(4)
        if what == 0 and at < len(broken):
            broken[at] = chosen.randrange(256)
        elif what == 1:
            del broken[at : at + chosen.randrange(1, 9)]
        elif what == 2:
            broken[at:at] = chosen.choice(
                [b"[", b"]", b"{", b'"', b",", b"9" * 40, b'{"$":', b"\0", b"\xff", b"e9999"]
            )
        else:
            broken[at:at] = broken[at : at + chosen.randrange(1, 30)] * chosen.randrange(1, 20)
    return bytes(broken)


async def one_case(seed: int) -> str:
    """Feed one host what `seed` makes; return how it ended."""
    chosen = random.Random(seed)
    host = FuzzedHost()
    data = b"".join(frames(chosen) for _ in range(chosen.randrange(1, 4)))
    if chosen.random() < 0.2:
        data = mutated(chosen, data)
    step = chosen.choice([len(data) or 1, 7, 100, 4096])
    for start in range(0, len(data), step):
        if host.isolate.failed is None:
            await host.feed(data[start : start + step])
    ended = "alive" if host.isolate.failed is None else type(host.isolate.failed).__name__
    if host.call.done() and ended == "alive":
        ended = "answered"
    await host.close()
    return ended
