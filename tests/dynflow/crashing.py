"""A process that runs one workflow and kills itself at a chosen journal operation, before or after its commit.

Arguments: database, file of side effects, number of the operation (0: never), `before` or `after`.
The output of the workflow is printed as its repr when it has ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dynflow.engines.embedded import EmbeddedEngine
from dynflow.engines.embedded.writer import Operation, Writer
from dynflow.workflow import WorkflowEntrypoint

database, effects, number, moment = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


def effect(line: str, result: Any = None) -> Any:
    """Append to the file of side effects in one write; returns `result`."""
    descriptor = os.open(effects, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)
    return result


def failing(ctx: Any) -> None:
    """Have an effect and fail."""
    effect(f"fails {ctx.attempt}")
    raise ZeroDivisionError


class Counting:
    """Counts transactions that change something, and kills the process around the chosen one."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        """Wrap the writer's transaction."""
        original = Writer._transaction

        def transaction(writer: Writer, group: list[tuple[Operation[Any], Any]]) -> Any:
            changes = writer._db.total_changes

            def check(db: Any) -> None:
                # The last operation of the group: what it sees is what is about to be committed.
                if db.total_changes != changes:
                    self.count += 1
                    if self.count == number and moment == "before":
                        os.kill(os.getpid(), signal.SIGKILL)

            outcomes = original(writer, [*group, (check, writer._loop.create_future())])
            if self.count == number > 0 and moment == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return outcomes

        setattr(Writer, "_transaction", transaction)  # noqa: B010 - a method replaced by a function


class Saga(WorkflowEntrypoint):
    """Steps in sequence, in parallel, nested; a retry, a sleep, an event, a caught failure."""

    async def run(self, event: Any, step: Any) -> Any:
        """Run it."""
        first = await step.do("first", lambda ctx: effect(f"first {ctx.attempt}", "a"))

        def flaky(ctx: Any) -> str:
            effect(f"flaky {ctx.attempt}")
            if Path(effects).read_text().count("flaky") == 1:
                raise ValueError("once")
            return "b"

        second, third = await asyncio.gather(
            step.do("flaky", {"retries": {"limit": 3, "delay": 0}}, flaky),
            step.do("parallel", lambda ctx: effect(f"parallel {ctx.attempt}", "c")),
        )
        await step.sleep("nap", 0.01)
        fourth = "not reached"
        try:
            await step.do("fails", {"retries": {"limit": 0, "delay": 0}}, failing)
        except ZeroDivisionError:
            fourth = "d"
        got = [(await step.wait_for_event("w", type="go")).payload for _ in range(2)]
        last = await step.do("last", lambda ctx: effect(f"last {ctx.attempt}", "e"))
        return [first, second, third, fourth, got, last]


async def main() -> None:
    """Create the instance where it is not there, send what has not been acknowledged, wait for the end."""
    engine = EmbeddedEngine(database)
    engine.register("saga", Saga)
    counting = Counting()
    counting.install()
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
        print(repr(await instance.result(timeout=20)), counting.count)  # noqa: T201 - read by the test


asyncio.run(main())
