"""Which steps a pipeline's code calls: with other code than before, some that are recorded may not be among them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from dynflow.loop import outside
from dynflow.router import Runner
from dynflow.workflow import StepCall, WorkflowStep

Called = Collection[tuple[str, str, int]]
"""Steps by kind, name and count."""


class NotingRunner:
    """Runs a pipeline, and tells `note` at its end which steps it has called, replayed ones too."""

    def __init__(self, runner: Runner, note: Callable[[Called], Awaitable[None]]) -> None:
        self._runner, self._note = runner, note

    async def run(self, event: Any, step: Any) -> Any:
        """Run it. What ends the segment alone (a wait, a crash) is no end."""
        port = _NotingPort(step.port)
        try:
            result = await self._runner.run(event, WorkflowStep(port))
        except Exception:
            await outside(self._note(port.called))
            raise
        await outside(self._note(port.called))
        return result


class _NotingPort:
    """The port of a step object, which takes down what is called."""

    def __init__(self, port: Any) -> None:
        self._port = port
        self.called: set[tuple[str, str, int]] = set()

    def call(self, call: StepCall) -> Awaitable[Any]:
        """Note the call and pass it on."""
        if isinstance(call.name, str):
            self.called.add((call.kind, call.name, call.count))
        answer: Awaitable[Any] = self._port.call(call)
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)
