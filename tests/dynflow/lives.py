"""What random lives of instances are made of: programs, the model of what they give, what runs them, troubles."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Sequence
from functools import partial
from typing import Any

from dynflow.clock import ManualClock
from dynflow.engines.embedded.connection import Connection
from dynflow.errors import WorkflowTimeoutError

Event = tuple[str, int]
Program = list[list[str]]
"""Stages, one after another. The calls of a stage run side by side: one of PLAIN, or the type of an event."""

EVENTS = ("red", "blue")
PLAIN = ("do", "flaky", "fails", "nested", "sleep", "late")
UNDONE = ("do", "flaky", "fails")  # with a rollback handler
KINDS = {"sleep": "sleep", "late": "wait_for_event", "red": "wait_for_event", "blue": "wait_for_event"}


class Model:
    """What a program gives depends on its events alone, whatever happened to it in between.

    Of calls side by side, the one that began first comes first. `begun` names those that have begun, in that order: as
    they were called, unless storage failed between them.
    """

    def __init__(self, program: Program, *, raises: bool) -> None:
        self.program, self.raises = program, raises
        self.sent: list[Event] = []
        self.terminated = False

    def stages(self, begun: Sequence[str] = ()) -> list[list[Any]]:
        """Return what the calls of each stage give that begins; None where an event is missing."""
        left, given = list(self.sent), list[list[Any]]()
        for number, stage in enumerate(self.program):
            names = [f"{number}.{index}" for index in range(len(stage))]
            results = {index: self._gives(stage[index], left) for index in _in_order(names, begun)}
            given.append([results[index] for index in range(len(stage))])
            if None in given[-1]:
                break
        return given

    @staticmethod
    def _gives(call: str, left: list[Event]) -> Any:
        if call not in EVENTS:
            return call
        taken = next((event for event in left if event[0] == call), None)
        if taken is not None:
            left.remove(taken)
        return taken

    def rests_as(self) -> str:
        """Return the status in which nothing more happens."""
        if self.terminated:
            return "terminated"
        given = self.stages()
        if len(given) < len(self.program) or None in given[-1]:
            return "waiting"
        return "errored" if self.raises else "complete"

    def restart(self, stage: int, index: int, begun: Sequence[str] = ()) -> None:
        """Forget the events that were not taken by the calls that began before this one."""
        given = self.stages(begun)
        names = [f"{stage}.{other}" for other in range(len(self.program[stage]))]
        order = _in_order(names, begun)
        before = [given[stage][other] for other in order[: order.index(index)]]
        kept = [result for results in given[:stage] for result in results] + before
        self.sent = [event for event in self.sent if event in kept]
        self.terminated = False


def _in_order(names: list[str], begun: Sequence[str]) -> list[int]:
    """Return the indices of `names` as these have begun; those that have not come last, as they are called."""
    return sorted(range(len(names)), key=lambda i: begun.index(names[i]) if names[i] in begun else len(begun))


# --- the real thing ------------------------------------------------------------------------------

# Instance, step, number of the attempt; a step that is undone is there as `undo` and its name.
effects: list[tuple[str, str, int]] = []


class Interpreter:
    """Runs a program."""

    def __init__(self, event: Any, step: Any) -> None:
        self.id, self.step, self.payload = event.instance_id, step, event.payload

    async def run(self) -> list[list[Any]]:
        """Return what each call gave."""
        given = [
            await asyncio.gather(*(self.call(f"{stage}.{index}", what) for index, what in enumerate(calls)))
            for stage, calls in enumerate(self.payload["program"])
        ]
        if self.payload["raises"]:
            raise ArithmeticError("as it was told")
        return given

    async def call(self, name: str, what: str) -> Any:
        """Make one call."""
        if what in EVENTS:
            return tuple((await self.step.wait_for_event(name, type=what, timeout="365 days")).payload)
        if what == "sleep":
            await self.step.sleep(name, 30)
        elif what == "late":
            with contextlib.suppress(WorkflowTimeoutError):
                await self.step.wait_for_event(name, type="never", timeout=60)
                return "came"
        elif what == "nested":
            # Where the clock jumps, the outer step's timeout cuts both off.
            inner = partial(self.step.do, f"{name}.inner", partial(self.do, what))
            return await self.step.do(name, {"retries": {"limit": 50, "delay": 20}}, inner)
        else:
            return await self.with_rollback(name, what)
        return what

    async def with_rollback(self, name: str, what: str) -> str:
        """Run a step that can be undone."""
        config = {"retries": {"limit": 0 if what == "fails" else 50, "delay": 20}}
        done = self.step.do(name, config, partial(self.do, what), rollback=self.undo)
        if what == "fails":
            with contextlib.suppress(ZeroDivisionError):
                await done
            return what
        return await done  # type: ignore[no-any-return]

    def do(self, what: str, ctx: Any) -> str:
        """Have an effect."""
        name, count = ctx.step.name, ctx.step.count
        # An inner step that is called again by the same run of an outer one is another step.
        effects.append((self.id, name if count == 1 else f"{name} {count}", ctx.attempt))
        if what == "flaky" and ctx.attempt == 1:
            raise ConnectionError
        if what == "fails":
            raise ZeroDivisionError
        return what

    def undo(self, rollback: Any) -> None:
        """Have an effect."""
        effects.append((self.id, f"undo {rollback.ctx.step.name}", 1))


async def interpreter(event: Any, step: Any) -> list[list[Any]]:
    """Run a program."""
    return await Interpreter(event, step).run()


class JumpingClock(ManualClock):
    """One that somebody sets back."""

    def jump_back(self, seconds: int) -> None:
        """Be set back; what waits until then is not called back earlier for it."""
        self._now_us -= seconds * 1_000_000


class FailingCommits:
    """Makes transactions fail as a disk does that takes nothing: at their commit, and for a while."""

    def __init__(self) -> None:
        self.left = 0
        self._changes = 0

    def install(self, db: Connection) -> None:
        """Fail in the transactions of this connection."""
        begin, end = db.begin, db.end

        def begin_counting() -> None:
            begin()
            self._changes = db.total_changes

        def end_failing() -> None:
            if self.left and db.total_changes != self._changes:
                self.left -= 1
                raise sqlite3.OperationalError("disk I/O error")
            end()

        db.begin, db.end = begin_counting, end_failing  # type: ignore[method-assign]
