"""A process that creates instances in the file it is given until it cannot, and prints each id once it has it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from dynflow.engines.embedded import EmbeddedEngine
from dynflow.workflow import WorkflowEntrypoint


class Order(WorkflowEntrypoint):
    """Waits for the test."""

    async def run(self, event: Any, step: Any) -> Any:
        """Run it."""
        return (await step.wait_for_event("w", type="go")).payload


async def main() -> None:
    """Create instances one after another."""
    engine = EmbeddedEngine(sys.argv[1])
    engine.register("order", Order)
    async with engine:
        binding = engine.binding("order")
        for number in range(10_000):
            instance = await binding.create(id=f"i-{number}")
            print(instance.id, flush=True)  # noqa: T201 - read by the test


asyncio.run(main())
