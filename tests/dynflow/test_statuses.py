"""The state diagram of docs/reference.md is the code: instances go along every edge of it, and along no other."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from dynflow.binding import WorkflowInstance
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import IllegalMoveError, InstanceNotFoundError
from tests.engine_world import NO_RETRIES, Gate, World

REFERENCE = (Path(__file__).resolve().parents[2] / "docs" / "reference.md").read_text()
EDGES = set(re.findall(r"^    (\S+) --> (\S+)$", REFERENCE, re.MULTILINE))
NOTES = {
    "INSERT": "note('[*]', NEW.status)",
    "UPDATE OF status": "note(OLD.status, NEW.status)",
    "DELETE": "note(OLD.status, '[*]')",
}


class Watched(World):
    """An engine whose writer notes each status that a row changes to; a workflow that does as it is told."""

    def __init__(self, file: Path) -> None:
        super().__init__(partial(EmbeddedEngine, file, synchronous="NORMAL", concurrency=1))
        self.gone: set[tuple[str, str]] = set()
        self.gate = Gate()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.engine._storage.submit(self._watch)
        return self

    def _watch(self, db: Any) -> None:
        db.create_function("note", 2, lambda old, new: self.gone.add((old, new)))
        for number, (change, note) in enumerate(NOTES.items()):
            db.execute(
                f"CREATE TEMP TRIGGER watch_{number} AFTER {change} ON instances BEGIN SELECT {note}; END"
            )

    async def obey(self, event: Any, step: Any) -> None:
        """Do what the params say, one word after another."""
        words = event.payload["words"]
        undo = None if "fail" in words else (lambda: None)  # a handler would wait for the end of a pause
        for word in words:
            if word == "gate":
                await step.do("gate", NO_RETRIES, self.gate, rollback=undo)
            elif word == "sleep":
                await step.sleep("nap", 1000)
            elif word == "do":
                await step.do("another", lambda: 1)
            elif word == "fail":
                raise ValueError("as told")

    async def brought(self, status: str, then: str = "end") -> WorkflowInstance:
        """Return an instance in this status; where a step holds it there, it does what `then` says after it."""
        words = {
            "waiting": ["sleep"],
            "paused": ["sleep"],
            "terminated": ["sleep"],
            "errored": ["fail"],
            "complete": [],
        }
        binding = self.register(self.obey, "obey")
        if status == "queued":
            await self.brought("running")
            return await binding.create(params={"words": ["gate"]})
        instance = await binding.create(params={"words": words.get(status, ["gate", then])})
        if status in {"waiting", "paused", "terminated"}:
            await self.status(instance, "waiting")
            if status != "waiting":
                await (instance.pause if status == "paused" else instance.terminate)()
        elif status in {"running", "waiting_for_pause"}:
            await self.gate.reached()
            if status == "waiting_for_pause":
                await instance.pause()
        await self.status(instance, status)
        return instance


STATUSES = (
    "queued",
    "running",
    "waiting",
    "waiting_for_pause",
    "paused",
    "complete",
    "errored",
    "terminated",
)
MOVES: dict[str, Callable[[WorkflowInstance], Awaitable[Any]]] = {
    "restart": lambda instance: instance.restart(),
    "delete": lambda instance: instance.delete(),
    "terminate": lambda instance: instance.terminate(),
    "terminate with rollback": lambda instance: instance.terminate(rollback=True),
    "pause": lambda instance: instance.pause(),
    "resume": lambda instance: instance.resume(),
}


async def moved(watched: Watched, status: str, move: str) -> None:
    """Bring an instance into a status, and move it from there."""
    instance = await watched.brought(status)
    with contextlib.suppress(IllegalMoveError):
        await MOVES[move](instance)


async def let_go(watched: Watched, status: str, word: str) -> None:
    """Let a step end, after which the run ends too."""
    instance = await watched.brought(status, word)
    watched.gate.opened.set()
    await watched.status(instance, "complete", "errored", "paused")


async def killed(watched: Watched, status: str) -> None:
    """Stop the engine, and start the next one on its file."""
    await watched.brought(status)
    await watched.reopen()


async def time_passes(watched: Watched, status: str, times: int) -> None:
    """Let an instance sleep to its end, or be deleted after it."""
    instance = await watched.brought(status)
    watched.advance(40 * 86_400)
    with contextlib.suppress(InstanceNotFoundError):
        await watched.saw(instance, "workflow.running", times)
        while status == "complete":
            await instance.status()


SCENES: Mapping[str, Callable[[Watched], Awaitable[None]]] = (
    {f"{move} of {status}": partial(moved, status=status, move=move) for move in MOVES for status in STATUSES}
    | {
        f"{status}, then {word}": partial(let_go, status=status, word=word)
        for status in ("running", "waiting_for_pause")
        for word in ("end", "fail", "do")
    }
    | {f"killed while {status}": partial(killed, status=status) for status in STATUSES}
    | {
        f"time passes while {status}": partial(time_passes, status=status, times=times)
        for status, times in (("waiting", 2), ("complete", 1))
    }
)


async def test_instances_go_along_every_edge_of_the_diagram_and_along_no_other(tmp_path: Path) -> None:
    gone: set[tuple[str, str]] = set()
    for number, (name, scene) in enumerate(SCENES.items()):
        async with Watched(tmp_path / f"{number}.db") as watched:
            await scene(watched)
            assert watched.gone - EDGES == set(), name
            gone |= watched.gone
    assert gone == EDGES
