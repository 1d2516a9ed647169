"""What every WorkerLoader does: the confined one and the one for trusted code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dynflow.errors import (
    InstanceNotFoundError,
    InvalidArgumentError,
    NonRetryableError,
    StepFailedError,
    WorkerLoadError,
)
from dynflow.failure import Failure, RemoteError
from dynflow.isolates import (
    Caller,
    Capability,
    ProcessLoader,
    TrustedLoader,
    WorkerCode,
    WorkerLoader,
    WrappedBinding,
    binding,
    current_caller,
)
from dynflow.loop import WorkflowLoop
from dynflow.types import RollbackContext, StepContext, StepInfo, WorkflowEvent
from dynflow.workflow import Attempt, StepCall, WorkflowStep, current_attempt, invoke


@pytest.fixture(params=["process", "trusted"])
async def loader(request: pytest.FixtureRequest) -> AsyncIterator[WorkerLoader]:
    made: WorkerLoader = ProcessLoader() if request.param == "process" else TrustedLoader()
    async with made:
        yield made


def code(source: str, env: Mapping[str, Any] | None = None, **more: Any) -> Callable[[], WorkerCode]:
    return lambda: WorkerCode(
        "index.py", {"index.py": source, **more}, env=env or {}, metadata={"tenant": "t"}
    )


class Segment:
    """A segment for one run: performs `do` steps, leaves waits unanswered, notes what it is told."""

    instance_id, workflow_name, is_over = "i-1", "flow", False

    def __init__(self) -> None:
        self.calls: list[StepCall] = []
        self.pinned: Mapping[str, str] | None = None
        self.is_idle = asyncio.Event()
        self.waits = asyncio.Event()
        self.attempts = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._host = asyncio.get_running_loop()
        self.answers: dict[str, Any] = {}

    def activity(self) -> Segment:
        return self

    def active(self) -> None:
        self.is_idle.clear()

    def idle(self) -> None:
        self.is_idle.set()

    close = idle

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        assert digest.startswith("sha256:")
        self.pinned = self.pinned or modules
        return self.pinned

    def call(self, call: StepCall) -> asyncio.Future[Any]:
        self.calls.append(call)
        if call.kind != "do":
            self.waits.set()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if call.kind == "do" or call.name in self.answers:
            task = self._host.create_task(self._perform(call, future))
            self._tasks.add(task)
        return future

    async def _perform(self, call: StepCall, future: asyncio.Future[Any]) -> None:
        if call.kind != "do":
            future.set_result(self.answers[call.name])
            return
        assert call.callback is not None
        self.attempts += 1
        ctx = StepContext(StepInfo(call.name, call.count), self.attempts, {})
        current_attempt.set(Attempt(ctx))
        try:
            future.set_result(await invoke(call.callback, ctx))
        except Exception as error:  # noqa: BLE001 - as a real segment does
            failure = error.failure if isinstance(error, RemoteError) else Failure.of(error)
            final: Any = failure.as_step_error(call.name, 1)
            final.failure, final.step, final.attempts = failure, call.name, 1
            future.set_exception(final)

    async def run(
        self, worker: Any, entrypoint: str | None = None, payload: Any = None, props: Any = None
    ) -> Any:
        """Run the workflow on a loop of its own, as an engine does."""
        loop = WorkflowLoop.inside(self._host, on_idle=lambda: None, on_active=lambda: None)
        event = WorkflowEvent(payload, datetime(2026, 1, 1, tzinfo=UTC), "i-1", "flow")
        stub = worker.get_entrypoint(entrypoint, props=props)
        step = WorkflowStep(self)

        async def main() -> Any:
            return await stub.run(event, step)

        task = loop.create_task(main())
        done = asyncio.Event()
        task.add_done_callback(lambda _: self._host.call_soon(done.set))
        try:
            await done.wait()
            if task.exception() is not None:
                for call in reversed(self.calls):
                    if call.rollback is not None:
                        ctx = StepContext(StepInfo(call.name, call.count), 1, {})
                        await invoke(call.rollback, RollbackContext(ctx, "it failed", call.name.upper()))
        finally:
            await asyncio.gather(*loop.discard(), return_exceptions=True)
        return task.result()


async def test_fetch_gets_the_request_and_answers(loader: WorkerLoader) -> None:
    source = (
        "async def fetch(request, env):\n    return {'hello': request.json()['name'], 'region': env.REGION}"
    )
    stub = loader.get("w", code(source, {"REGION": ("eu", 1)})).get_entrypoint()
    assert await stub.fetch({"name": "Alice"}) == {"hello": "Alice", "region": ("eu", 1)}


async def test_other_functions_and_entrypoints_are_called_by_name(loader: WorkerLoader) -> None:
    source = """
from dynflow import WorkerEntrypoint

def double(value, *, plus=0):
    return value * 2 + plus

class Greeter(WorkerEntrypoint):
    async def greet(self, name):
        return f"{self.env.GREETING}, {name} of {self.ctx.metadata['tenant']} via {self.ctx.props}"

    def sync(self):
        return {1, 2}
"""
    worker = loader.get("w", code(source, {"GREETING": "Hello"}))
    assert await worker.get_entrypoint().double(4, plus=1) == 9
    greeter = worker.get_entrypoint("Greeter", props={"via": "test"})
    assert await greeter.greet("Bob") == "Hello, Bob of t via {'via': 'test'}"
    assert await greeter.sync() == {1, 2}


async def test_private_and_missing_names_are_refused(loader: WorkerLoader) -> None:
    source = (
        "from dynflow import WorkerEntrypoint\nclass A(WorkerEntrypoint):\n    def _hidden(self): return 1\n"
    )
    worker = loader.get("w", code(source))
    with pytest.raises(AttributeError):
        getattr(worker.get_entrypoint("A"), "_hidden")  # noqa: B009
    with pytest.raises(WorkerLoadError, match="not public"):
        await worker.get_entrypoint("A").call("_hidden")
    with pytest.raises(WorkerLoadError, match="there is no function 'fetch'; there is: A"):
        await worker.get_entrypoint().fetch()
    with pytest.raises(WorkerLoadError, match="there is no WorkerEntrypoint class 'B'; there is: A"):
        await worker.get_entrypoint("B").anything()
    with pytest.raises(WorkerLoadError, match="no public method 'other'"):
        await worker.get_entrypoint("A").other()


async def test_modules_import_each_other_by_name(loader: WorkerLoader) -> None:
    modules = {
        ".dynflow/ci.py": "import helper\nfrom pkg.mod import value\nfrom pkg import mod\nimport json\n"
        "def both(): return [helper.value, value, mod.value, json.dumps(1)]",
        ".dynflow/helper.py": "value = 'beside'",
        "pkg/mod.py": "from . import deep\nvalue = deep.value",
        "pkg/deep.py": "value = 'from the top'",
    }
    worker = loader.get("w", lambda: WorkerCode(".dynflow/ci.py", modules))
    assert await worker.get_entrypoint().both() == ["beside", "from the top", "from the top", "1"]


async def test_text_json_and_bytes_are_modules_with_a_value(loader: WorkerLoader) -> None:
    modules = {
        "index.py": """
import pkgutil
import json, settings, limits
from prompts import hello, logo
def all(): return [settings.value, limits.value, hello.value, logo.value, json.dumps(1)]
def read(): return [pkgutil.get_data(__name__, "prompts/hello.txt"), pkgutil.get_data(__name__, "limits.json")]
""",
        "settings.json": '{"region": "eu"}',
        "limits.json": {"jobs": [1, 2]},
        "prompts/hello.txt": "Hello!",
        "prompts/logo.png": b"\x89PNG",
        "json.txt": "does not hide json",
        "README": "not importable",
    }
    worker = loader.get("w", lambda: WorkerCode("index.py", modules)).get_entrypoint()
    assert await worker.all() == [{"region": "eu"}, {"jobs": [1, 2]}, "Hello!", b"\x89PNG", "1"]
    assert await worker.read() == [b"Hello!", b'{"jobs": [1, 2]}']


async def test_a_json_module_that_is_none_says_where(loader: WorkerLoader) -> None:
    modules = {"index.py": "import settings", "settings.json": '{\n"a": }'}
    with pytest.raises(WorkerLoadError) as caught:
        await loader.load(WorkerCode("index.py", modules)).get_entrypoint().fetch()
    assert (caught.value.file, caught.value.line) == ("settings.json", 2)


async def test_what_is_loaded_without_an_id_is_a_worker_of_its_own(loader: WorkerLoader) -> None:
    source = "seen = []\ndef count():\n    seen.append(1)\n    return len(seen)"
    one, two = (loader.load(WorkerCode("index.py", {"index.py": source})).get_entrypoint() for _ in range(2))
    assert await one.count() == 1
    assert await two.count() == 1


def test_a_compatibility_date_is_a_day() -> None:
    assert WorkerCode("a.py", {}, compatibility_date="2026-11-01").compatibility_date == "2026-11-01"
    with pytest.raises(InvalidArgumentError, match="a day such as"):
        WorkerCode("a.py", {}, compatibility_date="tomorrow")


async def test_an_ordinary_object_is_a_binding(loader: WorkerLoader) -> None:
    class GitHub:
        async def stars(self) -> int:
            return 7

        async def delete(self) -> None:
            raise AssertionError

        def sync(self) -> None:
            raise AssertionError

    source = """
async def fetch(request, env):
    told = [await env.GITHUB.stars()]
    for method in ("delete", "sync"):
        try:
            await getattr(env.GITHUB, method)()
        except ValueError as error:
            told.append(str(error))
    return told
"""
    env = {"GITHUB": binding(GitHub(), methods=["stars"])}
    assert await loader.get("w", code(source, env)).get_entrypoint().fetch() == [
        7,
        "GITHUB has no method 'delete'",
        "GITHUB has no method 'sync'",
    ]


async def test_a_worker_can_be_a_service_of_another(loader: WorkerLoader) -> None:
    greeter = "from dynflow import WorkerEntrypoint\nclass G(WorkerEntrypoint):\n"
    greeter += "    async def greet(self, name): return f'Hello, {name}'"
    service = loader.get("greeter", code(greeter)).get_entrypoint("G")
    source = "async def fetch(request, env): return await env.GREETER.greet('Ann')"
    assert await loader.get("w", code(source, {"GREETER": service})).get_entrypoint().fetch() == "Hello, Ann"


async def test_an_error_carries_the_tenants_part_of_the_traceback(loader: WorkerLoader) -> None:
    if isinstance(loader, TrustedLoader):
        pytest.skip("it is raised in this process")
    source = "def outer(): return inner()\ndef inner(): raise ValueError('no\\x1b[2J')"
    with pytest.raises(ValueError, match="no") as caught:
        await loader.get("w", code(source)).get_entrypoint().outer()
    (note,) = caught.value.__notes__
    assert 'File "index.py", line 1, in outer' in note
    assert 'File "index.py", line 2, in inner' in note
    assert "guest.py" not in note
    assert "\x1b" not in note


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("x = 1\ndef f(:\n", 2, "SyntaxError"),
        ("x = 1\n\n1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name\n", 1, "ModuleNotFoundError"),
    ],
)
async def test_code_that_does_not_load_says_file_and_line(
    loader: WorkerLoader, source: str, line: int, message: str
) -> None:
    stub = loader.get("w", code(source)).get_entrypoint()
    for _ in range(2):
        with pytest.raises(WorkerLoadError) as caught:
            await stub.fetch()
        assert (caught.value.file, caught.value.line) == ("index.py", line)
        assert message in caught.value.message


async def test_a_tenants_error_comes_out_as_itself(loader: WorkerLoader) -> None:
    source = """
from dynflow import NonRetryableError
def builtin(): raise KeyError("k")
def ours(): raise NonRetryableError("no", "Name")
def theirs():
    class Own(Exception): pass
    raise Own("own")
def leave(): raise SystemExit(3)
"""
    stub = loader.get("w", code(source)).get_entrypoint()
    with pytest.raises(KeyError, match="k"):
        await stub.builtin()
    with pytest.raises(NonRetryableError) as caught:
        await stub.ours()
    assert caught.value.name == "Name"
    with pytest.raises(Exception, match="own"):
        await stub.theirs()


async def test_the_source_is_asked_once_and_again_after_an_error(loader: WorkerLoader) -> None:
    asked: list[int] = []

    async def source() -> WorkerCode:
        asked.append(1)
        if len(asked) == 1:
            raise ConnectionError("no source today")
        return code("def f(): return 1")()

    with pytest.raises(ConnectionError):
        await loader.get("w", source).get_entrypoint().f()
    assert await loader.get("w", source).get_entrypoint().f() == 1
    assert await loader.get("w", source).get_entrypoint().f() == 1
    assert len(asked) == 2


async def test_calls_at_the_same_time_ask_the_source_once(loader: WorkerLoader) -> None:
    asked: list[int] = []
    may_answer = asyncio.Event()

    async def source() -> WorkerCode:
        asked.append(1)
        await may_answer.wait()
        return code("def f(): return 1")()

    calls = [asyncio.create_task(loader.get("w", source).get_entrypoint().call("f")) for _ in range(5)]
    for _ in range(3):
        await asyncio.sleep(0)
    calls[0].cancel()  # who asked first need not be who waits last
    await asyncio.sleep(0)
    may_answer.set()
    assert await asyncio.gather(*calls[1:]) == [1, 1, 1, 1]
    assert asked == [1]


async def test_nothing_is_asked_or_loaded_before_the_first_call(loader: WorkerLoader) -> None:
    asked: list[int] = []

    def source() -> WorkerCode:
        asked.append(1)
        return code("1 / 0")()

    stub = loader.get("w", source).get_entrypoint("Anything", props={"a": 1})
    loader.load(code("1 / 0")()).get_entrypoint()
    await asyncio.sleep(0)
    assert asked == []
    with pytest.raises(WorkerLoadError, match="division by zero"):
        await stub.anything()
    assert asked == [1]


async def test_what_was_forgotten_is_asked_for_again_and_no_old_isolate_answers() -> None:
    asked: list[int] = []

    def source() -> WorkerCode:
        asked.append(1)
        return code(f"def f(): return {len(asked)}")()

    async with ProcessLoader(workers=1) as small:
        for _ in range(3):
            assert await small.get("w", source).get_entrypoint().f() == 1
        assert await small.get("other", code("def f(): return 0")).get_entrypoint().f() == 0
        # The same id should be the same code. Where it is not, the new one runs, and never a mixture.
        assert await small.get("w", source).get_entrypoint().f() == 2
    assert asked == [1, 1]


async def test_a_worker_without_an_id_is_nobody_elses(loader: WorkerLoader) -> None:
    made = code("def f(): return 1")()
    assert await loader.load(made).get_entrypoint().f() == 1

    def other() -> WorkerCode:
        return code("def f(): return 'by its id'")()

    assert await loader.get("loaded:1", other).get_entrypoint().f() == "by its id"


async def test_packages_have_their_own_init_and_relative_imports(loader: WorkerLoader) -> None:
    modules = {
        "app/index.py": "from pkg import name, deep\nfrom pkg.sub.leaf import value\n"
        "def all(): return [name, deep.value, value]",
        "app/pkg/__init__.py": "from .names import name",
        "app/pkg/names.py": "name = __name__.rpartition('.')[2]",
        "app/pkg/deep.py": "from .names import name\nvalue = 'deep ' + name",
        "app/pkg/sub/leaf.py": "from ..deep import value as above\nvalue = 'leaf of ' + above",
    }
    stub = loader.get("w", lambda: WorkerCode("app/index.py", modules)).get_entrypoint()
    assert await stub.all() == ["names", "deep names", "leaf of deep names"]


async def test_an_error_below_says_the_tenants_own_file_and_line(loader: WorkerLoader) -> None:
    modules = {"index.py": "import json\nimport helper", "helper.py": "\n\nraise RuntimeError('not today')"}
    worker = loader.load(WorkerCode("index.py", modules))
    with pytest.raises(WorkerLoadError) as caught:
        await worker.get_entrypoint().fetch()
    error = caught.value
    assert (error.file, error.line, error.message) == ("helper.py", 3, "RuntimeError: not today")


class Notes(Capability):
    """A capability that tells who called."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.added: list[str] = []
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.secret = "s3cret"

    async def add(self, text: str, *, times: int = 1) -> str:
        self.callers.append(current_caller.get())
        self.added.append(text)
        return text * times

    async def fail(self, kind: str) -> None:
        if kind == "value":
            raise ValueError("of the wrong kind")
        if kind == "missing":
            raise InstanceNotFoundError("no such instance")
        raise OSError("/var/lib/platform/secret is missing")

    async def forever(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    def not_async(self) -> str:
        return "reached"

    async def _private(self) -> str:
        return "reached"


async def test_a_capability_call_carries_the_callers_identity(loader: WorkerLoader) -> None:
    notes = Notes()
    source = """
from dynflow.workflow import current_env
async def go():
    return await current_env.get().NOTES.add('x', times=2)
"""
    props = object()
    assert await loader.get("w", code(source, {"NOTES": notes})).get_entrypoint(props=props).go() == "xx"
    (caller,) = notes.callers
    assert (caller.worker_id, caller.metadata, caller.instance_id, caller.step) == (
        "w",
        {"tenant": "t"},
        None,
        None,
    )
    assert caller.props is props


@pytest.mark.parametrize(
    "method", ["not_async", "_private", "secret", "__init__", "callers", "nothing", "call"]
)
async def test_only_public_async_methods_of_a_capability_are_reachable(
    loader: WorkerLoader, method: str
) -> None:
    source = "async def fetch(request, env): return await env.NOTES._ask(request.json(), (), {})"
    with pytest.raises(InvalidArgumentError, match="has no method"):
        await loader.get("w", code(source, {"NOTES": Notes()})).get_entrypoint().fetch(method)


async def test_errors_of_capabilities_can_be_caught(loader: WorkerLoader) -> None:
    source = """
async def fetch(request, env):
    try:
        await env.NOTES.fail(request.json())
    except ValueError as error:
        return f"value: {error}"
    except LookupError as error:
        return f"missing: {type(error).__name__}"
async def wrong(env=None):
    from dynflow.workflow import current_env
    await current_env.get().NOTES.add(1, 2, 3)
"""
    stub = loader.get("w", code(source, {"NOTES": Notes()})).get_entrypoint()
    assert await stub.fetch("value") == "value: of the wrong kind"
    assert await stub.fetch("missing") == "missing: InstanceNotFoundError"
    with pytest.raises(InvalidArgumentError, match=r"NOTES\.add"):
        await stub.wrong()


async def test_unexpected_errors_of_the_platform_tell_the_tenant_nothing(
    loader: WorkerLoader, caplog: pytest.LogCaptureFixture
) -> None:
    if isinstance(loader, TrustedLoader):
        pytest.skip("trusted code may know")
    source = """
import traceback
async def fetch(request, env):
    try:
        await env.NOTES.fail("else")
    except Exception as error:
        return [str(error), "".join(traceback.format_exception(error))]
"""
    message, told = await loader.get("w", code(source, {"NOTES": Notes()})).get_entrypoint().fetch()
    assert message == "PlatformError: the platform failed to perform NOTES.fail"
    assert "/var/lib" not in told
    assert "/var/lib/platform/secret" in caplog.text


async def test_env_is_a_copy_and_says_what_it_has(loader: WorkerLoader) -> None:
    shared = {"list": [1]}
    source = """
async def fetch(request, env):
    env.SHARED["list"].append(2)
    try:
        env.NOTHING
    except AttributeError as error:
        return [env.SHARED, str(error)]
"""
    stub = loader.get("w", code(source, {"SHARED": shared})).get_entrypoint()
    value, message = await stub.fetch()
    assert value == {"list": [1, 2]}
    assert message == "env has no binding 'NOTHING'; it has: SHARED"
    assert shared == {"list": [1]}


async def test_a_cancelled_call_is_cancelled_inside_with_its_capability_calls(loader: WorkerLoader) -> None:
    notes = Notes()
    source = "async def fetch(request, env): await env.NOTES.forever()"
    stub = loader.get("w", code(source, {"NOTES": notes})).get_entrypoint()
    task: asyncio.Task[Any] = asyncio.create_task(stub.call("fetch"))
    await notes.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notes.cancelled.is_set()


FLOW = """
import asyncio
from dynflow import WorkflowEntrypoint, StepFailedError, NonRetryableError
from dynflow.workflow import current_step

class OwnError(Exception):
    pass

class Flow(WorkflowEntrypoint):
    async def run(self, event, step):
        return await getattr(self, event.payload["case"])(event, step)

    async def one(self, event, step):
        return await step.do("greet", lambda: f"Hello, {event.payload['name']}!")

    async def parallel(self, event, step):
        async def body(ctx):
            await asyncio.sleep(0)
            return (ctx.step.name, ctx.step.count, current_step.get().step.name)
        return await asyncio.gather(step.do("a", body), step.do("b", body), step.do("a", body))

    async def nested(self, event, step):
        async def outer():
            return await step.do("inner", lambda: 41) + 1
        return await step.do("outer", outer)

    async def configured(self, event, step):
        return await step.do(
            "x", {"retries": {"limit": 1, "delay": lambda ctx, error: str(error) + ctx.step.name}}, self.body
        )

    async def body(self):
        return "configured"

    async def own_error(self, event, step):
        def fail():
            raise OwnError("broken", 7)
        try:
            await step.do("fail", fail)
        except OwnError as error:
            return [error.args, error.__notes__]

    async def uncaught(self, event, step):
        raise NonRetryableError("stop it")

    async def capability(self, event, step):
        outside = await self.env.NOTES.add("run")
        inside = await step.do("note", lambda: self.env.NOTES.add("step"))
        return [outside, inside]

    async def waiting(self, event, step):
        try:
            first = await step.do("first", lambda: 1)
            await step.wait_for_event("gate", type="approval")
        except BaseException as error:
            await self.env.NOTES.add(f"saw {type(error).__name__}")
            raise
        finally:
            await self.env.NOTES.add("finally")

    async def timer(self, event, step):
        await asyncio.sleep(0.02)
        return "woke"

    async def hang(self, event, step):
        await step.do("hang", lambda: self.env.NOTES.forever())

    async def rolled_back(self, event, step):
        async def undo(rollback):
            await self.env.NOTES.add(f"undo {rollback.output} of {current_step.get() or rollback.ctx}")
        await step.do("a", lambda: 1, rollback=undo)
        await step.do("b", lambda: 2, rollback=undo, rollback_config={"retries": {"limit": 1, "delay": lambda c, e: 1}})
        raise ValueError("all is lost")

    async def bad_name(self, event, step):
        try:
            await step.do(object(), lambda: 1)
        except Exception as error:
            return type(error).__name__

    async def catch_cancel(self, event, step):
        pending = asyncio.ensure_future(step.sleep("long", "1 day"))
        await asyncio.sleep(0)
        pending.cancel()
        return "went on"
"""


@pytest.fixture
async def notes() -> Notes:
    return Notes()


async def run(loader: WorkerLoader, case: str, notes: Notes | None = None, **payload: Any) -> Any:
    env = {"NOTES": notes} if notes is not None else {}
    return await Segment().run(loader.get("flow", code(FLOW, env)), "Flow", {"case": case, **payload})


async def test_a_workflow_runs_its_steps(loader: WorkerLoader) -> None:
    assert await run(loader, "one", name="Ann") == "Hello, Ann!"


async def test_parallel_steps_keep_their_numbers_and_contexts(loader: WorkerLoader) -> None:
    assert await run(loader, "parallel") == [("a", 1, "a"), ("b", 1, "b"), ("a", 2, "a")]


async def test_steps_nest(loader: WorkerLoader) -> None:
    assert await run(loader, "nested") == 42


async def test_a_delay_function_reaches_the_segment_as_a_function(loader: WorkerLoader) -> None:
    segment = Segment()
    delays: list[Any] = []
    original = segment._perform

    async def perform(call: StepCall, future: asyncio.Future[Any]) -> None:
        ctx = StepContext(StepInfo(call.name, 1), 1, {})
        answer = call.config["retries"]["delay"](ctx, ValueError("again"))
        delays.append(await answer if asyncio.iscoroutine(answer) else answer)
        await original(call, future)

    segment._perform = perform  # type: ignore[method-assign]
    result = await segment.run(loader.get("flow", code(FLOW)), "Flow", {"case": "configured"})
    assert result == "configured"
    assert delays == ["againx"]


async def test_a_steps_error_comes_back_as_the_tenants_class(loader: WorkerLoader) -> None:
    assert await run(loader, "own_error") == [("broken", 7), ["step 'fail' failed after 1 attempt(s)"]]


async def test_what_run_raises_keeps_its_failure(loader: WorkerLoader) -> None:
    with pytest.raises((NonRetryableError, RemoteError)) as caught:
        await run(loader, "uncaught")
    error = caught.value
    failure = error.failure if isinstance(error, RemoteError) else Failure.of(error)
    assert (failure.name, failure.message, failure.retry) == ("NonRetryableError", "stop it", "no")
    assert 'raise NonRetryableError("stop it")' in failure.traceback
    assert 'index.py", line' in failure.traceback


async def test_a_capability_call_knows_its_step_attempt(loader: WorkerLoader, notes: Notes) -> None:
    assert await run(loader, "capability", notes) == ["run", "step"]
    outside, inside = notes.callers
    assert (outside.instance_id, outside.workflow_name, outside.step) == ("i-1", "flow", None)
    assert inside.step is not None
    assert (inside.step.step, inside.step.attempt) == (StepInfo("note", 1), 1)


async def test_a_suspended_workflow_is_dropped_without_noticing(loader: WorkerLoader, notes: Notes) -> None:
    segment = Segment()
    worker = loader.get("flow", code(FLOW, {"NOTES": notes}))
    task = asyncio.create_task(segment.run(worker, "Flow", {"case": "waiting"}))
    async with asyncio.timeout(10):
        await segment.waits.wait()
        if isinstance(loader, ProcessLoader):
            idle = asyncio.create_task(segment.is_idle.wait())
            await asyncio.wait([idle, task], return_when=asyncio.FIRST_COMPLETED)
            assert idle.done(), task.result()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not notes.callers


async def test_timers_in_run_work(loader: WorkerLoader) -> None:
    assert await run(loader, "timer") == "woke"


async def test_a_cancelled_step_cancels_its_capability_calls(loader: WorkerLoader, notes: Notes) -> None:
    segment = Segment()
    task = asyncio.create_task(
        segment.run(loader.get("flow", code(FLOW, {"NOTES": notes})), "Flow", {"case": "hang"})
    )
    await notes.started.wait()
    for attempt in segment._tasks:
        attempt.cancel()
    await notes.cancelled.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_rollback_handlers_are_reached_after_run_has_failed(loader: WorkerLoader, notes: Notes) -> None:
    with pytest.raises((ValueError, RemoteError), match="all is lost"):
        await run(loader, "rolled_back", notes)
    assert [text.split(" of ")[0] for text in notes.added] == ["undo B", "undo A"]


async def test_a_name_that_is_no_data_is_a_fatal_error(loader: WorkerLoader) -> None:
    if isinstance(loader, TrustedLoader):
        pytest.skip("the segment itself checks names there")
    assert await run(loader, "bad_name") == "WorkflowFatalError"


async def test_tenant_code_can_cancel_a_step_call(loader: WorkerLoader) -> None:
    assert await run(loader, "catch_cancel") == "went on"


async def test_the_code_that_was_pinned_runs(loader: WorkerLoader) -> None:
    segment = Segment()
    segment.pinned = {"index.py": FLOW.replace("Hello", "Good day")}
    payload = {"case": "one", "name": "Ann"}
    assert await segment.run(loader.get("flow", code(FLOW)), "Flow", payload) == "Good day, Ann!"
    assert await Segment().run(loader.get("flow", code(FLOW)), "Flow", payload) == "Hello, Ann!"


async def test_a_workflow_class_need_not_be_named_where_there_is_one(loader: WorkerLoader) -> None:
    assert (
        await Segment().run(loader.get("flow", code(FLOW)), None, {"case": "one", "name": "x"}) == "Hello, x!"
    )


class Workflows:
    """A workflow binding of one tenant."""

    def __init__(self, metadata: Any) -> None:
        self.metadata = metadata
        self.id = "made-1"

    async def create(self, **options: Any) -> Workflows:
        assert options == {"id": None, "params": {"a": 1}, "retention": None}
        return self

    async def create_batch(self, batch: Any) -> list[Workflows]:
        return [self for _ in batch]

    async def get(self, instance_id: str) -> Workflows:
        if instance_id != "made-1":
            raise InstanceNotFoundError(instance_id)
        return self

    async def status(self) -> Any:
        return self.metadata

    async def send_event(self, *, type: str, payload: Any) -> Any:  # noqa: A002
        return [type, payload]


async def test_a_wrapped_binding_creates_instances_and_hands_out_handles(loader: WorkerLoader) -> None:
    source = """
async def fetch(request, env):
    made = await env.WORKFLOWS.create(params={"a": 1})
    batch = await env.WORKFLOWS.create_batch([{}, {}])
    again = await env.WORKFLOWS.get(made.id)
    try:
        await env.WORKFLOWS.get("other")
    except LookupError as error:
        missing = type(error).__name__
    try:
        made._secret
    except AttributeError as error:
        refused = str(error)
    return [made.id, len(batch), await again.status(), await made.send_event(type="t", payload=(1,)), missing]
"""
    loader.bind("OTHER", Workflows)
    worker = loader.get("w", code(source, {"WORKFLOWS": WrappedBinding({"tenant_id": 7}, "OTHER")}))
    answer = await worker.get_entrypoint().fetch()
    assert answer == ["made-1", 2, {"tenant_id": 7}, ["t", (1,)], "InstanceNotFoundError"]


async def test_a_binding_that_nobody_bound_is_named(loader: WorkerLoader) -> None:
    source = "async def fetch(request, env): await env.W.create()"
    with pytest.raises(InvalidArgumentError, match="'WORKFLOWS' is bound"):
        await loader.get("w", code(source, {"W": WrappedBinding(1)})).get_entrypoint().fetch()


async def test_calls_of_one_worker_run_at_the_same_time(loader: WorkerLoader) -> None:
    class Meet(Capability):
        def __init__(self) -> None:
            self.here = 0
            self.all_here = asyncio.Event()

        async def wait(self) -> None:
            self.here += 1
            if self.here == 3:
                self.all_here.set()
            await self.all_here.wait()

    source = "async def fetch(request, env): await env.MEET.wait()"
    stub = loader.get("w", code(source, {"MEET": Meet()})).get_entrypoint()
    async with asyncio.timeout(10):
        await asyncio.gather(stub.fetch(), stub.fetch(), stub.fetch())


def test_values_used_here_are_what_the_contract_says() -> None:
    assert issubclass(StepFailedError, Exception)
    assert timedelta(seconds=30) == WorkerCode("a.py", {}).limits.busy
