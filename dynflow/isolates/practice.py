"""What a zygote practises before it forks: loading a tenant, calling it, running its workflow. Stdlib only."""

from __future__ import annotations

import logging
import socket
import sys
import warnings
from collections.abc import Callable

from dynflow.isolates import guest, wire
from dynflow.isolates.guest_loop import GuestLoop

# What tenants usually do when they are loaded and called: what runs here often enough is specialised before the fork,
# and so is not written, and copied, in each child.
_WARM_UP = """
from __future__ import annotations
import asyncio, enum, json, re
from dataclasses import dataclass, field
from datetime import timedelta
from dynflow import NonRetryableError, WorkerEntrypoint, WorkflowEntrypoint

@dataclass
class Thing:
    name: str
    parts: list = field(default_factory=list)

@dataclass(frozen=True)
class Other:
    name: str = "x"

class Colour(enum.Enum):
    RED = 1

class OwnError(NonRetryableError):
    pass

WORD = re.compile("[a-z]+")
WAIT = timedelta(hours=1)

class Flow(WorkflowEntrypoint):
    async def run(self, event, step):
        async def work():
            return Thing("x").name
        await asyncio.gather(work(), asyncio.ensure_future(work()))
        return event

class Service(WorkerEntrypoint):
    def total(self, items):
        return sum(items)

async def fetch(request, env):
    json.dumps({"a": [1, "b"]})
    return WORD.match(request.json()["name"])[0]
"""
LEAST = """
async def fetch(request, env):
    return request.json()
"""
"""What every tenant does: pages that this needs are worth copying before anybody asks."""
_WARM_UP_ROUNDS = 20  # bytecode is specialised after eight


def _given(sock: socket.socket) -> Callable[[], socket.socket]:
    return lambda: sock


def warm_up() -> None:
    """Be a guest a few times, of a worker that is like most."""
    stdout, stderr, last_resort, show = sys.stdout, sys.stderr, logging.lastResort, warnings.showwarning
    for _ in range(_WARM_UP_ROUNDS):
        ours, theirs = asked(_WARM_UP)
        guest.serve(_given(theirs), guest.Guest(GuestLoop(), until_idle=True))
        ours.close()
        theirs.close()
    sys.stdout, sys.stderr, logging.lastResort, warnings.showwarning = stdout, stderr, last_resort, show
    sys.modules.pop("index", None)


def asked(source: str) -> tuple[socket.socket, socket.socket]:
    """Return a host's end and its isolate's, to whom a load, a fetch, and a run where there is one are on their way."""
    bindings = {"X": ["value", 1], "Y": ["capability", None]}
    load = ["index.py", {"index.py": source}, bindings, {"tenant": "t"}, None, 1 << 20]
    calls = [
        ["call", 1, "load", "", load, {}, None],
        ["call", 2, "call", "fetch", [None, None, [{"name": "x"}], {}], {}, None],
        ["call", 3, "run", "", ["Flow", None, {}], {}, None],
    ]
    ours, theirs = socket.socketpair()
    ours.sendall(b"".join(wire.encode_frame(call) for call in calls[: 3 if "Flow" in source else 2]))
    return ours, theirs
