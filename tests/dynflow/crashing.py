"""Processes that run one workflow and kill themselves at a chosen journal operation, before or after its commit.

They are forked from one that has imported everything: there are hundreds of them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dynflow.binding import WorkflowInstance
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.engines.embedded.writer import Job, Operation, Writer
from dynflow.errors import IllegalMoveError
from dynflow.types import RollbackContext
from dynflow.workflow import WorkflowEntrypoint

Moment = Literal["before", "after"]
WAITS = 20.0  # seconds until a process gives up

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, the operations it made, and the workflow's outcome if it came to that."""

    code: int
    operations: int
    outcome: str
    said: str


async def run(folder: Path, scenario: str, number: int, moment: Moment) -> Ended:
    """Run a scenario over what is in `folder`; die around its operation `number` (0: never)."""
    process = _FORKING.Process(target=_process, args=(folder, scenario, number, moment))
    process.start()
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(process.sentinel)
    process.join()
    code = process.exitcode
    process.close()
    answer = (folder / "answer").read_text() if code == 0 else "0 "
    operations, _, outcome = answer.partition(" ")
    return Ended(code or 0, int(operations), outcome, (folder / "said").read_text())


def _process(folder: Path, scenario: str, number: int, moment: Moment) -> None:
    with (folder / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    effects.path = folder / "effects"
    counting = Counting(number, moment)
    counting.install()
    try:
        outcome = asyncio.run(SCENARIOS[scenario](folder / "flow.db"))
    except BaseException:  # noqa: BLE001 - told to the test, and the process ends
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (folder / "answer").write_text(f"{counting.count} {outcome}")


class _Ran(Job):
    """Runs something else than a job of the writer's, which gets the outcome."""

    def __init__(self, operation: Operation[Any], job: Job | None) -> None:
        self.operation, self.job = operation, job

    def run(self, db: Any) -> Any:
        """Run it."""
        job = self.job or self
        job.error = None
        try:
            job.result = self.operation(db)
        except Exception as error:
            job.error = error
            raise
        return job.result

    def tell(self) -> None:
        """Nobody is told but the writer's own job."""


class Counting:
    """Counts operations that change something, and kills the process around the transaction of the chosen one.

    Operations and not transactions: how many of them a transaction takes is a matter of timing.
    """

    def __init__(self, number: int, moment: Moment) -> None:
        self.number, self.moment, self.count = number, moment, 0

    def install(self) -> None:
        """Wrap the writer's transaction."""
        original = Writer._transaction

        def transaction(writer: Writer, group: list[Job]) -> None:
            before = self.count
            # The last of the group: what is about to be committed when it is called.
            last = _Ran(lambda _: self.kill_if("before", before), None)
            original(writer, [*(_Ran(self.counted(each.run), each) for each in group), last])
            self.kill_if("after", before)

        setattr(Writer, "_transaction", transaction)  # noqa: B010 - a method replaced by a function

    def counted(self, operation: Operation[Any]) -> Operation[Any]:
        """Return the operation, which counts itself if it changes something."""

        def call(db: Any) -> Any:
            changes = db.total_changes
            result = operation(db)
            self.count += db.total_changes != changes
            return result

        return call

    def kill_if(self, moment: Moment, before: int) -> None:
        """Die if the chosen operation is one of those after `before`, and this is the time."""
        if before < self.number <= self.count and moment == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)


# --- workflows -----------------------------------------------------------------------------------


class Effects:
    """The file of side effects: a line for each, with the name of what had it and its attempt."""

    path: Path

    def add(self, name: str, attempt: int, result: Any = None) -> Any:
        """Append in one write; returns `result`."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{name} {attempt}\n".encode())
        os.close(descriptor)
        return result


effects = Effects()


def failing(ctx: Any) -> None:
    """Have an effect and fail."""
    effects.add("fails", ctx.attempt)
    raise ZeroDivisionError


def flaky(ctx: Any) -> str:
    """Have an effect, and fail the first time that it does."""
    effects.add("flaky", ctx.attempt)
    if effects.path.read_text().count("flaky") == 1:
        raise ValueError("once")
    return "b"


class Saga(WorkflowEntrypoint):
    """Steps in sequence, in parallel, nested; a retry, a sleep, an event, a caught failure."""

    async def run(self, event: Any, step: Any) -> Any:
        """Run it."""
        first = await step.do("first", lambda ctx: effects.add("first", ctx.attempt, "a"))

        async def outer(ctx: Any) -> Any:
            effects.add("outer", ctx.attempt)
            return await step.do("inner", lambda ctx: effects.add("inner", ctx.attempt, "c"))

        second, third = await asyncio.gather(
            step.do("flaky", {"retries": {"limit": 3, "delay": 0}}, flaky), step.do("outer", outer)
        )
        await step.sleep("nap", 0.01)
        fourth = "not reached"
        try:
            await step.do("fails", {"retries": {"limit": 0, "delay": 0}}, failing)
        except ZeroDivisionError:
            fourth = "d"
        got = [(await step.wait_for_event("w", type="go")).payload for _ in range(2)]
        last = await step.do("last", lambda ctx: effects.add("last", ctx.attempt, "e"))
        return [first, second, third, fourth, got, last]


async def drive_saga(database: Path) -> str:
    """Create the instance where it is not there, send what has not been acknowledged, wait for the end."""
    engine = EmbeddedEngine(database)
    engine.register("saga", Saga)
    async with engine:
        binding = engine.binding("saga")
        await binding.create_batch([{"id": "one"}])
        instance = await binding.get("one")
        async for happened in instance.subscribe(types={"wait.started"}):
            # A sender whose answer was lost looks first whether its event has arrived.
            payload = happened.data["count"] - 1
            status = await instance.status()
            taken = [step.output for step in status.steps if step.kind == "wait_for_event"]
            if taken[payload] is None:
                await instance.send_event(type="go", payload=payload)
        return repr(await instance.result(timeout=WAITS))


class Undone(WorkflowEntrypoint):
    """A saga that fails after it was paused, and undoes what it did."""

    async def run(self, event: Any, step: Any) -> Any:
        """Run it."""

        def undo(rollback: RollbackContext) -> None:
            effects.add(f"undo-{rollback.ctx.step.name}", rollback.ctx.attempt)

        def book(name: str) -> Any:
            return step.do(name, lambda ctx: effects.add(name, ctx.attempt, name), rollback=undo)

        await book("flight")
        await asyncio.gather(book("hotel"), book("car"))
        go = await step.wait_for_event("w", type="go")
        raise ValueError(f"no taxi, {go.payload}")


async def drive_undone(database: Path) -> str:
    """Create the instance, pause it while it waits, send it the event, let it go on to its end."""
    engine = EmbeddedEngine(database)
    engine.register("undone", Undone)
    async with engine:
        binding = engine.binding("undone")
        await binding.create_batch([{"id": "one"}])
        instance = await binding.get("one")
        async for _ in instance.subscribe(types={"wait.started"}):
            await _pause_and_send(instance)
        try:
            await instance.result(timeout=WAITS)
        except ValueError as error:
            status = await instance.status()
            return f"{error}, rollback {status.rollback and status.rollback.outcome}"
        return "it went through"


async def _pause_and_send(instance: WorkflowInstance) -> None:
    status = await instance.status()
    if status.steps[-1].kind != "wait_for_event" or status.steps[-1].output is not None:
        return
    await instance.pause()
    try:
        await instance.send_event(type="go", payload="pity")
    except IllegalMoveError:
        return  # what was sent before the process died has led to the end
    await instance.resume()


SCENARIOS = {"saga": drive_saga, "undone": drive_undone}
