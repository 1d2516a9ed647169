"""An agent whose plan is a workflow that it wrote: run confined, with tools, and a person's consent where it counts.

    scripts/example agent_plan              # asks you before it deletes anything
    scripts/example agent_plan </dev/null   # nobody answers: the plan waits until you start this again

Kill it wherever you like and start it again: it goes on, and repeats no finished step.
"""

import argparse
import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

from tools import Tools

from dynflow import (
    DynamicWorkflowBinding,
    InstanceNotFoundError,
    LoadContext,
    create_dynamic_workflow_entrypoint,
)
from dynflow.binding import WorkflowInstance
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import ProcessLoader, WorkerCode
from dynflow.types import HistoryEvent

HERE = Path(__file__).parent
SHOWN = {"step.completed", "step.errored", "wait.started", "wait.completed"}


def write_plan(recording: Path) -> str:
    """Return the plan for the goal: Python that a model wrote. Here a recorded answer takes the model's place."""
    return recording.read_text()


async def work(given: argparse.Namespace) -> None:
    """Run the plan to its end, or to the question that nobody answers."""
    given.data.mkdir(parents=True, exist_ok=True)
    tools = Tools(given.data / "files", given.data / "requests")
    loader, engine = ProcessLoader(), EmbeddedEngine(given.data / "plans.db")

    def load(_: LoadContext) -> Any:
        # An instance stays with the plan that it started with: this one is for new instances.
        code = WorkerCode("plan.py", {"plan.py": write_plan(given.plan)}, env={"TOOLS": tools})
        return loader.get("plan", lambda: code).get_entrypoint("Plan")

    engine.register("plan", create_dynamic_workflow_entrypoint(load))
    async with loader, engine:
        plans = DynamicWorkflowBinding(engine.binding("plan"), {"tenant_id": "agent"})
        try:
            plan = await plans.get("clean-up")
            print("The plan was interrupted. It goes on; what is done is not done again:", flush=True)
        except InstanceNotFoundError:
            print("The agent has a plan. It runs in an isolate and reaches only its tools.", flush=True)
            tools.begin()
            plan = await plans.create(id="clean-up")
        if await follow(plan, tools, given.answer):
            await finish(plan)
        else:
            print("Nobody answers. The plan waits, and holds nothing meanwhile: start this again.")


async def follow(plan: WorkflowInstance, tools: Tools, answer: str | None) -> bool:
    """Tell what happens, and ask what the plan asks. False where nobody answers."""
    async for event in plan.subscribe(types=SHOWN):
        tell(event)
        if event.type != "wait.started" or not await is_open(plan):
            continue
        names = tools.asked("clean-up")
        print(f"It asks for your consent to delete {', '.join(names)}.", flush=True)
        said = answer or await ask("Type yes to allow that, no to forbid it: ")
        if said is None:
            return False
        if said == "yes":
            tools.allow("clean-up", names)
        await plan.send_event(type="approval", payload=said)
    return True


def tell(event: HistoryEvent) -> None:
    """Print one line about what happened."""
    words = {"step.completed": "is done", "step.errored": "failed", "wait.started": "waits"}
    print(f"  plan: {event.data['step']} {words.get(event.type, 'is answered')}", flush=True)


async def is_open(plan: WorkflowInstance) -> bool:
    """Return whether the plan still waits for an answer: history tells of answered questions, too."""
    steps = (await plan.status()).steps
    return any(step.kind == "wait_for_event" and step.status == "waiting" for step in steps)


async def ask(question: str) -> str | None:
    """Return what the person types, None at the end of their input."""
    print(question, end="", flush=True)
    loop, typed = asyncio.get_running_loop(), asyncio.Queue[str]()
    # A thread of its own, which does not keep the program from ending as those of `to_thread` do.
    read = threading.Thread(
        target=lambda: loop.call_soon_threadsafe(typed.put_nowait, sys.stdin.readline()), daemon=True
    )
    read.start()
    line = await typed.get()
    return ("yes" if line.strip().lower() == "yes" else "no") if line else None


async def finish(plan: WorkflowInstance) -> None:
    """Say how the plan ended, and forget it, so that the next start is a new one."""
    status = await plan.status()
    await plan.delete()
    if status.error:
        sys.exit(f"The plan failed: {status.error.name}: {status.error.message}")
    print(f"The plan is done: {status.output}.")


def main() -> None:
    """Run the plan that the command line names."""
    parser = argparse.ArgumentParser(description="Run an agent's plan.")
    parser.add_argument("--plan", type=Path, default=HERE / "plan.txt", help="what the agent wrote")
    parser.add_argument("--answer", choices=("yes", "no"), help="answer its question instead of being asked")
    parser.add_argument("--data", type=Path, default=HERE / ".dynflow-data", help="where files and state are")
    try:
        asyncio.run(work(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Start this again to go on.")


if __name__ == "__main__":
    main()
