"""Random interleavings of steps, events, pauses, restarts and crashes, against a model of what must come out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import IllegalMoveError, InvalidArgumentError
from tests.engine_world import DEADLINE, World

Event = tuple[str, int]
Program = list[list[str]]
"""Stages, one after another. The calls of a stage run side by side: do, flaky, sleep, or the type of an event."""

EVENTS = ("red", "blue")


class Model:
    """What a program gives depends on its events alone, whatever happened to it in between."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sent: list[Event] = []

    def gives(self) -> tuple[list[list[Any]], bool]:
        """Return what the stages give that end, and whether all do."""
        left = list(self.sent)
        given: list[list[Any]] = []
        for stage in self.program:
            results = [self._gives(call, left) for call in stage]
            if None in results:
                return given, False
            given.append(results)
        return given, True

    @staticmethod
    def _gives(call: str, left: list[Event]) -> Any:
        if call not in EVENTS:
            return call
        taken = next((event for event in left if event[0] == call), None)
        if taken is not None:
            left.remove(taken)
        return taken

    def restart(self, stage: int) -> None:
        """Forget the events that the stages before this one have not taken."""
        taken = [result for results in self.gives()[0][:stage] for result in results]
        self.sent = [event for event in self.sent if event in taken]


# --- the real thing ------------------------------------------------------------------------------

effects: list[tuple[str, int]] = []


async def interpreter(event: Any, step: Any) -> list[list[Any]]:
    """Run a program."""

    def do(name: str, ctx: Any) -> str:
        effects.append((ctx.step.name, ctx.attempt))
        if name == "flaky" and ctx.attempt == 1:
            raise ConnectionError
        return name

    async def call(stage: int, index: int, what: str) -> Any:
        name = f"{stage}.{index}"
        if what in EVENTS:
            return tuple((await step.wait_for_event(name, type=what, timeout="365 days")).payload)
        if what == "sleep":
            await step.sleep(name, 30)
            return what
        return await step.do(name, {"retries": {"limit": 50, "delay": 20}}, partial(do, what))

    return [
        await asyncio.gather(*(call(stage, index, what) for index, what in enumerate(calls)))
        for stage, calls in enumerate(event.payload["program"])
    ]


CALLS = st.sampled_from(["do", "do", "flaky", "sleep", *EVENTS, *EVENTS])


class Interleavings(RuleBasedStateMachine):
    """One instance, to which anything may happen at any time; it is looked at when it has come to rest."""

    @initialize(program=st.lists(st.lists(CALLS, min_size=1, max_size=3), min_size=1, max_size=5))
    def start(self, program: Program) -> None:
        """Create the instance."""
        self.model, self.number, self.cut_off = Model(program), 0, 0
        effects.clear()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.run(self._start(program))

    def run(self, work: Any) -> Any:
        """Run a coroutine on the machine's loop; in between, nothing on it moves."""
        return self.runner.run(asyncio.wait_for(work, 3 * DEADLINE))

    async def _start(self, program: Program) -> None:
        file = Path(self.folder.name) / "flow.db"
        self.world = World(partial(EmbeddedEngine, file, synchronous="NORMAL"))
        await self.world.__aenter__()
        self.instance = await self.world.start(interpreter, {"program": program}, id="it")

    @rule(kind=st.sampled_from(EVENTS))
    def send(self, kind: str) -> None:
        """Send an event; one that has ended, as it may have where the model says so, takes none."""
        self.number += 1
        event = (kind, self.number)
        may_have_ended = self.model.gives()[1]
        try:
            self.run(self.instance.send_event(type=kind, payload=list(event)))
        except IllegalMoveError:
            assert may_have_ended
        else:
            self.model.sent.append(event)

    @rule()
    def pause(self) -> None:
        """Pause, or nothing."""
        self.run(self.instance.pause())

    @rule()
    def resume(self) -> None:
        """Resume, or nothing."""
        self.run(self.instance.resume())

    @rule(seconds=st.integers(1, 40))
    def time_passes(self, seconds: int) -> None:
        """Move the clock."""
        self.run(self._advance(seconds))

    async def _advance(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(looks=st.integers(1, 12))
    def it_goes_on(self, looks: int) -> None:
        """Let the loop and the writer make some turns."""
        self.run(self._look(looks))

    async def _look(self, times: int) -> None:
        for _ in range(times):
            await self.instance.status()

    @rule()
    def crash(self) -> None:
        """Leave everything as it is, and open another engine on the file."""
        self.cut_off += 1
        self.run(self._reopen())

    async def _reopen(self) -> None:
        await self.world.reopen()
        self.instance = await self.world.engine.binding("interpreter").get("it")

    @rule()
    def restart(self) -> None:
        """Start again from the top."""
        self.run(self.instance.restart())
        self.model.restart(0)
        effects.clear()

    @rule(stage=st.integers(0, 4))
    def restart_from(self, stage: int) -> None:
        """Start again from the only call of a stage, if that has been reached."""
        program = self.model.program
        if stage >= len(program) or len(program[stage]) > 1 or program[stage][0] not in {"do", "flaky"}:
            return
        name = f"{stage}.0"
        try:
            self.run(self.instance.restart(from_step=(name, 1)))
        except InvalidArgumentError:
            return  # not reached: nothing changed
        self.model.restart(stage)
        effects[:] = [effect for effect in effects if int(effect[0][0]) < stage]

    @rule()
    def comes_to_rest(self) -> None:
        """Let time pass until only events are missing; then it must be where the model is."""
        self.run(self._rest())

    async def _rest(self) -> None:
        expected, ends = self.model.gives()
        await self.instance.resume()
        while True:
            status = await self.world.status(self.instance, "waiting", "complete", "errored")
            timed = [s for s in status.steps if s.status == "waiting" and s.kind != "wait_for_event"]
            if status.status != "waiting" or not timed:
                break
            self.world.advance(40)
        assert status.status == ("complete" if ends else "waiting")
        if ends:
            assert [list(stage) for stage in status.output] == expected
        outputs = {step.name: step for step in status.steps}
        for stage, results in enumerate(expected):
            for index, result in enumerate(results):
                step = outputs[f"{stage}.{index}"]
                assert step.status == "complete"
                if step.kind == "wait_for_event":
                    assert tuple(step.output.payload) == result
        self._check_effects()

    def _check_effects(self) -> None:
        """Attempt numbers grow, none is used twice; only what was cut off was done again."""
        for name in {name for name, _ in effects}:
            attempts = [attempt for other, attempt in effects if other == name]
            assert attempts == sorted(set(attempts)), effects
            assert len(attempts) <= 2 + self.cut_off, effects

    def teardown(self) -> None:
        """Check a last time, and close."""
        if not hasattr(self, "runner"):
            return
        try:
            self.run(self._rest())
        finally:
            with contextlib.suppress(Exception):
                self.run(self.world.__aexit__())
            self.runner.close()
            self.folder.cleanup()


TestInterleavings = pytest.mark.slow(Interleavings.TestCase)
Interleavings.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    database=None,
    derandomize="CI"
    in os.environ,  # a build fails for its change and not by chance; elsewhere we look further
    suppress_health_check=list(HealthCheck),
)
