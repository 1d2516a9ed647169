"""Messages between the platform, the launcher and its children: length, JSON, and open files. Stdlib only."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Any

_HEADER = 4
_MOST_FILES = 8


def send(channel: socket.socket, message: dict[str, Any], files: Sequence[int] = ()) -> None:
    """Send one message with open files; the receiver gets copies of them."""
    body = json.dumps(message).encode()
    data = len(body).to_bytes(_HEADER, "big") + body
    sent = socket.send_fds(channel, [data], list(files))
    if sent < len(data):
        channel.sendall(data[sent:])


def nudge(channel: socket.socket) -> None:
    """Send an empty message, or none where the receiver has many to read or is gone."""
    with contextlib.suppress(OSError):
        channel.send(b"\0\0\0\2{}", socket.MSG_DONTWAIT)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Wait for one message and its files; None when the other side is gone."""
    try:
        header, files, _, _ = socket.recv_fds(channel, _HEADER, _MOST_FILES)
    except ConnectionError:
        return None
    if len(header) < _HEADER:
        # Four bytes are sent in one piece with what follows, so a short read is the end.
        return None
    body = bytearray()
    wanted = int.from_bytes(header, "big")
    while len(body) < wanted:
        piece = channel.recv(wanted - len(body))
        if not piece:
            return None
        body += piece
    return json.loads(body), files
