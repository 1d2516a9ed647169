"""Calls of `step.do` that lack something say what, instead of failing in Python's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynflow import WorkflowEntrypoint, WorkflowFatalError
from dynflow.engines.embedded import EmbeddedEngine


class _Later:
    """Awaitable, as the coroutine of a function that was called by mistake."""

    def __await__(self) -> Any:
        raise AssertionError("nobody awaits it")

    def __repr__(self) -> str:
        return "<later>"


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda step: step.do(lambda: 1), "is not a step name: give a string"),
        (lambda step: step.do("a"), "step 'a': the callback must be callable, not None"),
        (lambda step: step.do("a", _Later()), "step 'a': the callback must be callable, not <later>"),
        (lambda step: step.do("a", {}, 5), "step 'a': the callback must be callable, not 5"),
    ],
    ids=["no name", "no callback", "a called function", "a number"],
)
async def test_a_call_that_lacks_something_says_what(
    tmp_path: Path, misuse: Callable[[Any], Any], message: str
) -> None:
    class Misused(WorkflowEntrypoint):
        async def run(self, event: Any, step: Any) -> Any:
            return await misuse(step)

    engine = EmbeddedEngine(tmp_path / "flow.db")
    engine.register("misused", Misused)
    async with engine:
        instance = await engine.binding("misused").create()
        with pytest.raises(WorkflowFatalError, match=message):
            await instance.result(timeout=30)
