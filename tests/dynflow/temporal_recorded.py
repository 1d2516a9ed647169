"""Histories of the interpreter, as releases have recorded them: `python -m tests.dynflow.temporal_recorded FOLDER`.

They are recorded anew only beside the old ones: each says what an instance that sleeps now will have to replay.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from dynflow.engines.temporal import TemporalEngine, interpreter
from dynflow.workflow import WorkflowEntrypoint
from tests.temporal_server import new_queue, require_program, serving

RECORDINGS = sorted((Path(__file__).parents[1] / "data" / "temporal_histories").glob("*.json"))


class Recorded(WorkflowEntrypoint):
    """A bit of everything."""

    async def run(self, event: Any, step: Any) -> Any:
        """Return what came."""
        await step.do("first", lambda: "x" * 10, rollback=lambda ctx: None)
        await step.sleep("nap", timedelta(milliseconds=10))
        found = (await step.wait_for_event("w", type="go")).payload
        if found == "fail":
            raise ValueError("as told")
        for number in range(20 if found == "long" else 1):
            await step.do("more", lambda number=number: number)
            await step.sleep("nap", timedelta(milliseconds=1))
        return found


async def record(folder: Path) -> None:
    """Record what becomes of some instances."""
    interpreter._MOST_EVENTS = 100  # so that one goes on as a new run
    with serving(require_program(), Path(tempfile.mkdtemp())) as server:
        client = await server.client(identity="recorder")
        engine = TemporalEngine(client, task_queue=new_queue())
        engine.register("recorded", Recorded)
        async with engine:
            binding = engine.binding("recorded")
            kept = {
                name: await binding.create(id=name)
                for name in ("waiting", "plain", "long", "failing", "paused", "restarted", "terminated")
            }
            for name, payload in (
                ("plain", "ok"),
                ("long", "long"),
                ("failing", "fail"),
                ("restarted", "ok"),
            ):
                await kept[name].send_event(type="go", payload=payload)
            for name in ("plain", "long", "restarted"):
                await kept[name].result(timeout=30)
            await kept["paused"].pause()
            await kept["paused"].resume()
            await kept["restarted"].restart(from_step=("more", 1))
            await kept["restarted"].result(timeout=30)
            await kept["terminated"].terminate(rollback=True)
            for name, instance in kept.items():
                handle = client.get_workflow_handle(engine._names.workflow_id(instance._ref))
                history = await handle.fetch_history()
                (folder / f"{name}.json").write_text(history.to_json())


if __name__ == "__main__":
    asyncio.run(record(Path(sys.argv[1])))
