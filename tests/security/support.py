"""What the hostile suite shares: tenants from source, frames by hand, a deadline."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynflow.isolates import EntrypointStub, IsolateLimits, ProcessLoader, WorkerCode

PROBER = Path(__file__).with_name("prober.py.txt").read_text()

# A tenant that writes frames of its own making, past the guest's program.
RAW = """
import json, os
from dynflow.isolates.guest_steps import current_scope

def frame(*items):
    data = json.dumps(items, separators=(",", ":")).encode()
    return len(data).to_bytes(4, "big") + data

def send(data):
    while data:
        data = data[os.write(3, data):]

def scope():
    return current_scope.get()
"""


def tenant(
    loader: ProcessLoader, source: str, *, limits: IsolateLimits | None = None, **given: Any
) -> EntrypointStub:
    """Return the entrypoint of a worker made of `source`; `given` are fields of WorkerCode."""
    code = WorkerCode("index.py", {"index.py": source}, limits=limits or IsolateLimits(), **given)
    return loader.load(code).get_entrypoint()


def frame(*items: Any) -> bytes:
    """Return a frame as it is on the wire, with nothing checked."""
    data = json.dumps(items, separators=(",", ":")).encode()
    return struct.pack(">I", len(data)) + data


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for what no event tells: the state of another process."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)
