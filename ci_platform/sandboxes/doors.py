"""Sockets in folders: how programs that outlive the platform are found again, or find it. Stdlib only."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_LISTENING = 8
"""Callers that may wait: each of ours has one, and a later platform."""


def listen(folder: Path, name: str) -> socket.socket:
    """Return the socket called `name` in `folder`, made anew."""
    (folder / name).unlink(missing_ok=True)
    place = _open(folder)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_address(place, name))
        listener.listen(_LISTENING)
    except OSError:
        listener.close()
        raise
    finally:
        os.close(place)
    return listener


def connect(folder: Path, name: str, within: float) -> socket.socket:
    """Return a connection to who listens there, each call on which takes so many seconds; OSError without one."""
    place = _open(folder)
    channel = socket.socket(socket.AF_UNIX)
    channel.settimeout(within)
    try:
        channel.connect(_address(place, name))
    except OSError:
        channel.close()
        raise
    finally:
        os.close(place)
    return channel


def _open(folder: Path) -> int:
    return os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _address(place: int, name: str) -> str:
    # By way of the descriptor: the address of such a socket is at most 107 bytes long.
    return f"/proc/self/fd/{place}/{name}"
