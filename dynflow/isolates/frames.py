"""Frames: four bytes of length and a JSON array, cut out of a stream whose bytes are hostile. Stdlib only."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from dynflow.errors import ValueTooLargeError

_HEADER = struct.Struct(">I")
# A parsed list or object takes 64 bytes and more where the JSON took three: this bounds what 8 MiB can become.
_MAX_ITEMS = 500_000
_ITEM = 60  # bytes of one of them, about
# Looked for before a frame is looked through. Written otherwise it is an unknown tag, and refused.
_STUB = b'["stub"'


class ProtocolError(Exception):
    """The other side sent what it never may send."""


class OversizeError(ProtocolError):
    """The other side sent a frame over the limit."""


def encode_frame(frame: list[Any], limit: int | None = None) -> bytes:
    """Return `frame`, which holds packed values, as bytes. Raises ValueTooLargeError above `limit` bytes."""
    data = _ENCODER.encode(frame).encode()
    if limit is not None and len(data) > limit:
        raise ValueTooLargeError(f"the message is {len(data):,} bytes; the limit is {limit:,} bytes")
    if _items(data) > _MAX_ITEMS:
        raise ValueTooLargeError(f"the message has more than {_MAX_ITEMS:,} items")
    return _HEADER.pack(len(data)) + data


def decode_frame(data: bytes) -> list[Any]:
    """Return the frame, its values still packed. Raises ProtocolError."""
    if _items(data) > _MAX_ITEMS:
        raise OversizeError(f"the message has more than {_MAX_ITEMS:,} items")
    try:
        frame = _DECODER.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame is not JSON: {type(error).__name__}") from None
    if type(frame) is not list or not frame or type(frame[0]) is not str:
        raise ProtocolError("a frame is not an array that starts with its kind")
    return frame


def _items(data: bytes) -> int:
    # Commas and brackets inside of strings count too: cheap and on the safe side.
    return data.count(b",") + data.count(b"[") + data.count(b"{") if len(data) > _MAX_ITEMS else 0


def _refuse_constant(text: str) -> Any:
    raise ValueError(text)


# Made once: `json.dumps` and `json.loads` make theirs at every call with options.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class FrameReader:
    """Cuts a stream into frames."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.has_stubs = False
        """Whether the frame that was yielded last may hold stubs."""
        self.weight = 0
        """Bytes of memory that the values of that frame may take here."""
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """Add `data`; yield the frames that are complete. Raises ProtocolError."""
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(buffer, start)
            if size > self.limit:
                raise OversizeError(f"a message of {size:,} bytes came; the limit is {self.limit:,} bytes")
            end = start + _HEADER.size + size
            if len(buffer) < end:
                break
            body = bytes(buffer[start + _HEADER.size : end])
            start = end
            self.has_stubs = _STUB in body
            self.weight = size + _ITEM * (body.count(b",") + body.count(b"[") + body.count(b"{"))
            yield decode_frame(body)
        del buffer[:start]
