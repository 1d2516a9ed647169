"""The host's side of the wire takes whatever comes: it never hangs, grows, or raises what is not an isolate's error."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dynflow.isolates.frames import FrameReader, ProtocolError, encode_frame
from dynflow.isolates.wire import Peer, WireLimits
from dynflow.serialization import decode, encode, unpack
from tests.security import wire_fuzz

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(
            lambda tag, rest: {"$": [tag, *rest]},
            st.sampled_from(wire_fuzz._TAGS),
            st.lists(inner, max_size=3),
        )
    ),
    max_leaves=12,
)


async def test_nearly_right_frames_end_a_call_as_isolates_may() -> None:
    ended = Counter([await wire_fuzz.one_case(seed) for seed in range(400)])
    # Not all of it stops at the first check.
    assert min(ended["alive"], ended["answered"], ended["IsolateCrashedError"]) > 3, ended


@settings(max_examples=150, deadline=None)
@given(_JSON)
def test_whatever_unpacks_packs_again(data: Any) -> None:
    try:
        value = unpack(data)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return  # what wire.Peer.feed takes for malformed
    with contextlib.suppress(ValueError, TypeError):  # a dataclass with other fields than it should have
        assert encode(decode(encode(value))) == encode(value)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(wire_fuzz._KINDS), _JSON), min_size=1, max_size=7), st.integers(1, 50)
)
def test_frames_of_any_json_are_performed_or_refused(items: list[Any], step: int) -> None:
    async def feed() -> None:
        async def perform(call: Any) -> Any:
            return call.args

        peer = Peer(lambda data: None, perform, WireLimits(10_000, 5))
        data = encode_frame(items)
        with contextlib.suppress(ProtocolError):
            for start in range(0, len(data), step):
                peer.feed(data[start : start + step])
        await asyncio.gather(*peer.performing.values(), return_exceptions=True)

    asyncio.run(feed())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_bytes_of_any_kind_are_refused_and_not_kept(pieces: list[bytes]) -> None:
    reader = FrameReader(1_000)
    with contextlib.suppress(ProtocolError):
        for piece in pieces:
            list(reader.feed(piece))
            assert len(reader._buffer) <= 1_000 + 4 + 300
