"""Frames: cut, checked, counted."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynflow.errors import IsolateLimitError, UnserializableError, ValueTooLargeError
from dynflow.failure import RemoteError
from dynflow.isolates.wire import (
    Call,
    FrameReader,
    OversizeError,
    Peer,
    ProtocolError,
    WireLimits,
    encode_frame,
)


@given(st.lists(st.lists(st.integers() | st.text(), max_size=5), max_size=5), st.integers(1, 40))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[list[Any]], step: int) -> None:
    frames = [["kind", *frame] for frame in frames]
    stream = b"".join(encode_frame(frame) for frame in frames)
    reader = FrameReader(10_000)
    read: list[Any] = []
    for start in range(0, len(stream), step):
        read += reader.feed(stream[start : start + step])
    assert read == frames


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_unexpected(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        list(FrameReader(100).feed(data))


def test_a_frame_over_the_limit_is_refused_by_its_header_alone() -> None:
    with pytest.raises(OversizeError, match=r"101 bytes came; the limit is 100 bytes"):
        list(FrameReader(100).feed((101).to_bytes(4, "big")))
    with pytest.raises(ValueTooLargeError):
        encode_frame(["x" * 100], limit=100)


class Wire:
    """Two peers, joined without a socket."""

    def __init__(self, perform: Any, limits: WireLimits | None = None) -> None:
        limits = limits or WireLimits()
        self.caller = Peer(lambda data: self._later(self.performer, data), _nothing, limits)
        self.performer = Peer(lambda data: self._later(self.caller, data), perform, limits)

    def _later(self, peer: Peer, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(peer.feed, data)


async def _nothing(call: Call) -> None:
    del call


async def test_a_call_is_performed_and_answered() -> None:
    async def perform(call: Call) -> Any:
        return [call.target, call.method, call.args, call.kwargs, call.scope]

    wire = Wire(perform)
    answer = await wire.caller.call("t", "m", [(1, 2), b"x"], {"key": {3}}, scope=7)
    assert answer == ["t", "m", ((1, 2), b"x"), {"key": {3}}, 7]
    assert (wire.caller.seen, wire.caller.sent, wire.caller.unanswered()) == (1, 1, 0)


async def test_errors_keep_their_failure() -> None:
    async def perform(call: Call) -> Any:
        raise KeyError("k")

    with pytest.raises(RemoteError) as caught:
        await Wire(perform).caller.call("t", "m")
    assert (caught.value.failure.name, caught.value.failure.args) == ("KeyError", ("k",))


async def test_a_result_that_is_no_data_is_the_calls_error() -> None:
    async def perform(call: Call) -> Any:
        return object()

    with pytest.raises(RemoteError, match="not plain data"):
        await Wire(perform).caller.call("t", "m")
    with pytest.raises(UnserializableError):
        Wire(perform).caller.call("t", "m", [object()])


async def test_a_cancelled_call_is_cancelled_on_the_other_side_and_answered_all_the_same() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def perform(call: Call) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    wire = Wire(perform)
    future = wire.caller.call("t", "m")
    await begun.wait()
    future.cancel()
    await ended.wait()
    await future.answered
    assert wire.caller.unanswered() == 0
    assert not wire.performer.performing


async def test_a_call_that_is_cancelled_before_it_began_is_answered() -> None:
    async def perform(call: Call) -> Any:
        raise AssertionError("it must not begin")

    wire = Wire(perform)
    future = wire.caller.call("t", "m")
    future.cancel()
    await future.answered
    assert not wire.performer.performing


async def test_closing_fails_what_was_called_and_cancels_what_is_performed() -> None:
    async def perform(call: Call) -> Any:
        await asyncio.Event().wait()

    wire = Wire(perform)
    future = wire.caller.call("t", "m")
    reason = IsolateLimitError("too much")
    wire.caller.close(reason)
    with pytest.raises(IsolateLimitError, match="too much"):
        await future
    with pytest.raises(IsolateLimitError):
        wire.caller.call("t", "m")
    wire.performer.close(reason)
