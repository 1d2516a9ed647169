"""Calls of `step.do` that lack something say what, instead of failing in Python's words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from dynflow import WorkflowEntrypoint, WorkflowError, WorkflowFatalError, create_dynamic_workflow_entrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import ProcessLoader, TrustedLoader, WorkerCode


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


TENANT = """
import functools
from dynflow import WorkflowEntrypoint

class NotAsync(WorkflowEntrypoint):
    def run(self, event, step):
        return 7

def noted(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

class Decorated(WorkflowEntrypoint):
    @noted
    async def run(self, event, step):
        return await step.do("one", lambda: 1)

class Delegating(WorkflowEntrypoint):
    def run(self, event, step):
        return step.do("one", lambda: 1)

class Forgets(WorkflowEntrypoint):
    async def run(self, event, step):
        step.do("forgotten", lambda: 1)
        step.sleep("forgotten too", 1)
        later = step.do("later", lambda: "in time")
        await step.sleep("nap", 0.05)
        return await later

class Odd(BaseException):
    pass

ODD = {"Odd": Odd, "GeneratorExit": GeneratorExit, "SystemExit": SystemExit}

class Leaves(WorkflowEntrypoint):
    async def run(self, event, step):
        def leave():
            raise ODD[event.payload[1]]("odd")
        if event.payload[0] == "run":
            leave()
        await step.do("leaves", {"retries": {"limit": 0, "delay": 0}}, leave)

class Wrong(WorkflowEntrypoint):
    async def run(self, event, step):
        answers = []
        for expression in event.payload:
            try:
                await eval(expression, {"step": step, "LONG": "x" * 3_000_000, "print": print})
                answers.append(None)
            except Exception as error:
                answers.append([type(error).__name__, str(error)])
        return answers, await step.do("after", lambda: "went on")

class NoName(WorkflowEntrypoint):
    async def run(self, event, step):
        await step.do(lambda: 1)
"""


class Tenants:
    """An engine that runs classes of TENANT, in isolates of a kind; keeps what they print."""

    def __init__(self, folder: Path, loader: Any, printed: list[str]) -> None:
        self.engine = EmbeddedEngine(folder / "flow.db", synchronous="NORMAL")
        self.printed = printed

        async def load_runner(context: Any) -> Any:
            code = WorkerCode("index.py", {"index.py": TENANT})
            return loader.get("tenant", lambda: code).get_entrypoint(context.metadata)

        self.engine.register("tenants", create_dynamic_workflow_entrypoint(load_runner))

    async def result(self, name: str, given: Any = None) -> Any:
        params = {"__dispatcher_metadata": name, "params": given}
        instance = await self.engine.binding("tenants").create(params=params)
        return await instance.result(timeout=30)


@pytest.fixture(params=["trusted", "process"])
async def tenants(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tenants]:
    printed: list[str] = []
    loader: Any = (
        TrustedLoader()
        if request.param == "trusted"
        else ProcessLoader(on_output=lambda _, text: printed.append(text))
    )
    tenants = Tenants(tmp_path, loader, printed)
    async with loader, tenants.engine:
        yield tenants


async def test_a_tenants_run_that_is_not_async_is_told_so(tenants: Tenants) -> None:
    with pytest.raises(WorkflowFatalError, match=r"NotAsync\.run\(event, step\) must be `async def`"):
        await tenants.result("NotAsync")


@pytest.mark.parametrize("name", ["Decorated", "Delegating"])
async def test_a_tenants_run_may_be_whatever_can_be_awaited(tenants: Tenants, name: str) -> None:
    assert await tenants.result(name) == 1


async def test_tenants_are_told_of_calls_that_they_never_awaited(
    tenants: Tenants, recwarn: pytest.WarningsRecorder
) -> None:
    assert await tenants.result("Forgets") == "in time"
    told = "".join(tenants.printed) + "".join(str(warning.message) for warning in recwarn)
    assert "step.do('forgotten') was never awaited" in told
    assert "step.sleep('forgotten too') was never awaited" in told
    assert "later" not in told


async def test_a_step_without_a_name_is_told_so(tenants: Tenants) -> None:
    with pytest.raises(WorkflowFatalError, match=r"is not a step name|not plain data"):
        await tenants.result("NoName")


@pytest.mark.parametrize("name", ["Odd", "GeneratorExit", "SystemExit"])
@pytest.mark.parametrize("where", ["run", "step"])
async def test_whatever_leaves_a_tenants_code_is_told_at_once(
    tenants: Tenants, where: str, name: str
) -> None:
    """Classes that are no Exception too: nobody waits for an answer that was swallowed."""
    with pytest.raises(WorkflowError, match=rf"{name}.*odd|sys.exit\('odd'\)"):
        await tenants.result("Leaves", [where, name])


WRONG = [
    "step.do('', lambda: 1)",
    "step.do(LONG, lambda: 1)",
    "step.do('a\\nb', lambda: 1)",
    "step.do(7, lambda: 1)",
    "step.do(None, lambda: 1)",
    "step.do(object(), lambda: 1)",
    "step.do('\\ud800', lambda: 1)",
    "step.do('a', 7)",
    "step.do('a', {}, 'text')",
    "step.do('a')",
    "step.do('a', {'retires': 1}, lambda: 1)",
    "step.do('a', {LONG: 1}, lambda: 1)",
    "step.do('a', {7: 1}, lambda: 1)",
    "step.do('a', ['timeout'], lambda: 1)",
    "step.do('a', {'timeout': LONG}, lambda: 1)",
    "step.do('a', {'timeout': object()}, lambda: 1)",
    "step.do('a', {'retries': {'limit': 1}}, lambda: 1)",
    "step.do('a', {'retries': {'limit': -1, 'delay': lambda ctx, error: 1}}, lambda: 1)",
    "step.do('a', {'retries': {'limit': 1, 'delay': '1 h'}}, lambda: 1)",
    "step.do('a', {'sensitive': True}, lambda: 1)",
    "step.do('a', lambda: 1, rollback=7)",
    "step.do('a', lambda: 1, rollback=print, rollback_config={'timeout': 0})",
    "step.sleep('a', 'soon')",
    "step.sleep('a', -1)",
    "step.sleep('', 1)",
    "step.sleep('a', object())",
    "step.sleep_until('a', 'tomorrow')",
    "step.sleep_until('a', float('nan'))",
    "step.wait_for_event('a', type='a b')",
    "step.wait_for_event('a', type=LONG)",
    "step.wait_for_event('a', type=7)",
    "step.wait_for_event('a', type='go', timeout=0)",
    "step.wait_for_event(LONG, type='go')",
]


async def test_wrong_calls_of_step_are_fatal_errors_in_isolates_too(tenants: Tenants) -> None:
    answers, after = await tenants.result("Wrong", WRONG)
    assert after == "went on"
    for expression, answer in zip(WRONG, answers, strict=True):
        assert answer is not None, expression
        assert answer[0] == "WorkflowFatalError", (expression, answer)
        assert len(answer[1]) < 1_000, expression
