"""What goes by reference between host and isolate: callbacks, bindings, handles, async iterators, byte streams."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

from dynflow.errors import InvalidArgumentError, IsolateCrashedError, IsolateLimitError, UnserializableError
from dynflow.isolates import (
    CallLimits,
    Capability,
    IsolateLimits,
    ProcessLoader,
    TrustedLoader,
    WorkerCode,
    WorkerLoader,
    WrappedBinding,
    binding,
)


@pytest.fixture(params=["process", "trusted"])
async def loader(request: pytest.FixtureRequest) -> AsyncIterator[WorkerLoader]:
    made: WorkerLoader = ProcessLoader() if request.param == "process" else TrustedLoader()
    async with made:
        yield made


@pytest.fixture
async def confined() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(ready=0) as made:
        yield made


def stub_of(loader: WorkerLoader, source: str, entrypoint: str | None = None, **env: Any) -> Any:
    return loader.load(WorkerCode("index.py", {"index.py": source}, env=env)).get_entrypoint(entrypoint)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the state of another process
            await asyncio.sleep(0)


async def test_a_callback_of_the_host_is_called_by_the_tenant(loader: WorkerLoader) -> None:
    source = "async def go(callback, *, on): return [await callback(1), await on['end'](n=2)]"

    async def double(value: int) -> int:
        return value * 2

    assert await stub_of(loader, source).go(double, on={"end": lambda n: -n}) == [2, -2]


async def test_a_callback_of_the_tenant_is_called_by_the_host(loader: WorkerLoader) -> None:
    class Each(Capability):
        async def each(self, items: list[int], callback: Any) -> list[Any]:
            return list(await asyncio.gather(*(callback(item) for item in items)))

    source = """
import asyncio
async def fetch(request, env):
    async def later(item):
        await asyncio.sleep(0)
        return item + 1
    return [await env.EACH.each([1, 2], later), await env.EACH.each([3], lambda item: str(item))]
"""
    assert await stub_of(loader, source, EACH=Each()).fetch() == [[2, 3], ["3"]]


async def test_an_error_of_a_callback_comes_back_as_itself(loader: WorkerLoader) -> None:
    class Try(Capability):
        async def attempt(self, callback: Any) -> str:
            try:
                await callback()
            except KeyError as error:
                return f"caught {error}"
            return "nothing"

    source = """
async def fetch(request, env):
    def fail(): raise KeyError("k")
    return await env.TRY.attempt(fail)
async def other(callback):
    try:
        await callback()
    except ValueError as error:
        return str(error)
"""

    async def fail() -> None:
        raise ValueError("of the host")

    stub = stub_of(loader, source, TRY=Try())
    assert await stub.fetch() == "caught 'k'"
    assert await stub.other(fail) == "of the host"


async def test_an_async_iterator_of_the_host_is_read_as_slowly_as_the_tenant_likes(
    loader: WorkerLoader,
) -> None:
    made: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    source = """
async def take(items, count):
    taken = []
    async for item in items:
        taken.append(item)
        if len(taken) == count:
            await items.aclose()
            return taken
"""
    assert await stub_of(loader, source).take(numbers(), 3) == [0, 1, 2]
    assert made == [0, 1, 2]


async def test_an_async_iterator_of_the_tenant_outlives_the_call_that_returned_it(
    loader: WorkerLoader,
) -> None:
    source = """
async def fetch(request, env):
    async def count():
        for number in range(request.json()):
            yield await env.ECHO.back(number)
    return {"items": count()}
"""

    class Echo(Capability):
        async def back(self, value: int) -> int:
            return value

    answer = await stub_of(loader, source, ECHO=Echo()).fetch(4)
    assert [item async for item in answer["items"]] == [0, 1, 2, 3]


async def test_a_byte_stream_goes_both_ways(loader: WorkerLoader) -> None:
    class Upper(Capability):
        async def upper(self, stream: Any) -> Any:
            reader = asyncio.StreamReader()
            async for chunk in stream:
                reader.feed_data(chunk.upper())
            reader.feed_eof()
            return reader

    source = """
import io
class Stream:
    def __init__(self, data): self.data = io.BytesIO(data)
    async def read(self, size): return self.data.read(size)
async def fetch(request, env):
    stream = await env.UPPER.upper(Stream(b"abc" * 200_000))
    first = await stream.read(4)
    return [first, len(await stream.read()), await stream.read(10)]
async def back(stream): return Stream(await stream.read())
"""
    stub = stub_of(loader, source, UPPER=Upper())
    assert await stub.fetch() == [b"ABCA", 599_996, b""]
    reader = asyncio.StreamReader()
    reader.feed_data(b"hello")
    reader.feed_eof()
    assert await (await stub.back(reader)).read(100) == b"hello"


async def test_a_binding_comes_as_a_result_and_goes_back_as_what_it_is(loader: WorkerLoader) -> None:
    class Room(Capability):
        def __init__(self, name: str) -> None:
            self.name = name

        async def say(self, text: str) -> str:
            return f"{self.name}: {text}"

    class Rooms(Capability):
        def __init__(self) -> None:
            self.rooms: list[Any] = []

        async def enter(self, name: str) -> Room:
            room = Room(name)
            self.rooms.append(room)
            return room

        async def leave(self, room: Any) -> bool:
            return any(room is one for one in self.rooms)

    source = """
async def fetch(request, env):
    room = await env.ROOMS.enter("kitchen")
    try:
        await room.name()
    except ValueError as error:
        hidden = str(error)
    return [await room.say("hi"), hidden, await env.ROOMS.leave(room)]
"""
    said, hidden, left = await stub_of(loader, source, ROOMS=Rooms()).fetch()
    assert said == "kitchen: hi"
    assert "no method 'name'" in hidden
    assert left is isinstance(loader, ProcessLoader)  # in this process it is a stub of the stub


async def test_a_binding_of_the_env_can_be_passed_on(confined: ProcessLoader) -> None:
    class Store(Capability):
        async def get(self) -> int:
            return 7

    class Use(Capability):
        async def use(self, other: Any) -> list[Any]:
            return [type(other).__name__, await other.get()]

    source = "async def fetch(request, env): return await env.USE.use(env.STORE)"
    assert await stub_of(confined, source, USE=Use(), STORE=Store()).fetch() == ["Store", 7]
    ordinary = stub_of(confined, source, USE=binding(Use()), STORE=Store())
    assert await ordinary.fetch() == ["Store", 7]


class Handle:
    """The handle of an instance."""

    def __init__(self, id: str) -> None:  # noqa: A002
        self.id = id

    async def status(self) -> str:
        return f"status of {self.id}"

    async def send_event(self, *, type: str, payload: Any) -> Any:  # noqa: A002
        return [type, payload]

    async def secret(self) -> str:
        return "reached"

    pause = resume = terminate = restart = delete = result = status


class Workflows:
    """A workflow binding."""

    def __init__(self, metadata: Any) -> None:
        del metadata

    async def get(self, instance_id: str) -> Handle:
        return Handle(instance_id)


async def test_a_handle_of_an_instance_goes_both_ways(loader: WorkerLoader) -> None:
    class Runs(Capability):
        async def newest(self) -> Handle:
            return Handle("i-9")

        async def follow(self, handle: Any) -> list[Any]:
            return [handle.id, await handle.status()]

    source = """
async def fetch(request, env):
    newest = await env.RUNS.newest()
    try:
        await newest.secret()
    except (ValueError, AttributeError) as error:
        hidden = str(error)
    return [newest.id, await newest.send_event(type="t", payload=1), hidden, await env.RUNS.follow(newest)]
async def own(env=None):
    from dynflow.workflow import current_env
    env = current_env.get()
    return await env.RUNS.follow(await env.WORKFLOWS.get("i-1"))
"""
    loader.bind("WORKFLOWS", Workflows)
    stub = stub_of(loader, source, RUNS=Runs(), WORKFLOWS=WrappedBinding(1))
    newest, sent, hidden, followed = await stub.fetch()
    assert (newest, sent, followed) == ("i-9", ["t", 1], ["i-9", "status of i-9"])
    assert "no method 'secret'" in hidden
    assert await stub.own() == ["i-1", "status of i-1"]


async def test_an_object_of_the_tenant_is_called_by_its_public_methods(loader: WorkerLoader) -> None:
    source = """
from dynflow import WorkerEntrypoint
class Counter(WorkerEntrypoint):
    count = 0
    def add(self, by):
        self.count += by
        return self.count
    async def itself(self): return self
"""
    counter = await stub_of(loader, source, "Counter").itself()
    assert [await counter.add(2), await counter.add(3)] == [2, 5]
    with pytest.raises(AttributeError):
        getattr(counter, "_hidden")  # noqa: B009


async def test_many_calls_of_stubs_at_once(loader: WorkerLoader) -> None:
    class Meet(Capability):
        def __init__(self) -> None:
            self.here, self.all_here = 0, asyncio.Event()

        async def meet(self, callback: Any) -> int:
            self.here += 1
            if self.here == 50:
                self.all_here.set()
            await self.all_here.wait()
            return int(await callback())

    source = """
import asyncio
async def fetch(request, env):
    return await asyncio.gather(*(env.MEET.meet(lambda n=n: n) for n in range(50)))
"""
    assert await stub_of(loader, source, MEET=Meet()).fetch() == list(range(50))


async def test_plain_errors_stay_what_they_were(loader: WorkerLoader) -> None:
    source = """
class Own: pass
def bad(): return [1, {'a': Own()}]
def loop():
    a = []
    a.append(a)
    return a
"""
    stub = stub_of(loader, source)
    with pytest.raises(UnserializableError, match=r"value\[1\]\['a'\] is a "):
        await stub.bad()
    with pytest.raises(UnserializableError, match="nested more than"):
        await stub.loop()


# --- what only a wire has ---


async def test_an_isolate_is_kept_until_nothing_of_it_is_held(confined: ProcessLoader) -> None:
    source = """
import os
async def numbers():
    yield os.getpid()
    yield 2
def fetch(request, env): return numbers()
def same(): return 1
"""
    stub = stub_of(confined, source)
    items = await stub.fetch()
    await stub.same()  # another isolate, for the first one is held
    children = len(psutil.Process(os.getpid()).children(recursive=True))
    assert [item async for item in items][1] == 2
    assert len(psutil.Process(os.getpid()).children(recursive=True)) == children
    del items
    gc.collect()
    await asyncio.sleep(0)
    await stub.same()
    assert len(psutil.Process(os.getpid()).children(recursive=True)) == children


async def test_a_stub_ends_with_its_call_and_holds_in_its_isolate_alone(confined: ProcessLoader) -> None:
    source = """
kept = []
def keep(callback): kept.append(callback)
async def use():
    try:
        await kept[0]()
    except ValueError as error:
        return str(error)
"""

    async def callback() -> str:
        raise AssertionError

    stub = stub_of(confined, source)
    await stub.keep(callback)
    assert "this stub has ended" in await stub.use()


async def test_a_stub_that_is_held_ends_when_its_isolate_does(confined: ProcessLoader) -> None:
    source = "import os\ndef fetch(request, env):\n    def end(): os._exit(3)\n    return [end, lambda: 1]"
    end, other = await stub_of(confined, source).fetch()
    assert await other() == 1
    with pytest.raises(IsolateCrashedError, match="exited with 3"):
        await end()
    with pytest.raises(InvalidArgumentError, match="has ended"):
        await other()


@pytest.mark.parametrize(
    "forged",
    [
        '["mine", "function", 999, None]',
        '["yours", "function", 1, None]',
        '["yours", "object", 2, None]',
        '["env", "object", "OTHER", None]',
        '["env", "object", "NOTES", "i-1"]',
    ],
)
async def test_what_was_not_given_cannot_be_named(confined: ProcessLoader, forged: str) -> None:
    class Notes(Capability):
        async def take(self, value: Any) -> str:
            try:
                await value()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                return f"{type(error).__name__}: {error}"
            return "reached"

    source = f"""
from dynflow.isolates import stubs
stubs.Stubs.pack = lambda self, value: {{"$": ["stub", *{forged}]}} if value == "forge" else value
async def fetch(request, env):
    try:
        return await env.NOTES.take("forge")
    except ValueError as error:
        return str(error)
"""
    try:
        told = await stub_of(confined, source, NOTES=Notes()).fetch()
    except (InvalidArgumentError, IsolateCrashedError) as error:
        told = str(error)
    assert "has ended" in told or "there is no binding" in told or "not callable" in told


@pytest.mark.parametrize("number", ["1", "2", "'x'", "None", "10**30", "[1]"])
async def test_calls_of_forged_stubs_are_errors(confined: ProcessLoader, number: str) -> None:
    source = f"""
from dynflow.workflow import current_env
async def go():
    ask = vars(current_env.get().NOTES)["_ask"].func
    try:
        await ask("stub", "call", [{number}], {{}})
    except ValueError as error:
        return str(error)
"""

    class Notes(Capability):
        pass

    assert "this stub has ended" in await stub_of(confined, source, NOTES=Notes()).go()


@pytest.mark.parametrize(
    "tagged",
    ["[]", "['mine']", "['mine', 'module', 1, None]", "['mine', 'function', 'x', None]", "[1, 2, 3, 4]"],
)
async def test_a_malformed_stub_stops_the_isolate(confined: ProcessLoader, tagged: str) -> None:
    source = f"""
from dynflow.isolates import stubs
def fetch(request, env):
    stubs.Stubs.pack = lambda self, value: {{"$": ["stub", *{tagged}]}}
"""
    with pytest.raises(IsolateCrashedError, match="sent what it never may"):
        await stub_of(confined, source).fetch()


async def test_stubs_given_to_the_host_are_bounded(confined: ProcessLoader) -> None:
    class Keep(Capability):
        async def keep(self, values: list[Any]) -> int:
            return len(values)

    source = """
async def fetch(request, env):
    return await env.KEEP.keep([lambda: n for n in range(request.json())])
"""
    stub = stub_of(confined, source, KEEP=Keep())
    assert await stub.fetch(900) == 900
    assert await stub.fetch(900) == 900
    with pytest.raises((IsolateCrashedError, IsolateLimitError)):
        await stub.fetch(1_100)


async def test_a_step_result_is_data_and_never_a_stub(confined: ProcessLoader) -> None:
    class Port:
        instance_id, workflow_name = "i-1", "flow"

        def activity(self) -> Any:
            return self

        def active(self) -> None: ...

        idle = close = active

        async def pin(self, digest: str, modules: Any) -> Any:
            assert digest
            return modules

    from dynflow.workflow import WorkflowStep

    source = """
from dynflow import WorkflowEntrypoint
class Flow(WorkflowEntrypoint):
    async def run(self, event, step): return lambda: 1
"""
    worker = confined.load(WorkerCode("index.py", {"index.py": source}))
    with pytest.raises(Exception, match="which is not plain data"):
        await worker.get_entrypoint("Flow").run({}, WorkflowStep(Port()))  # type: ignore[arg-type]


async def test_a_call_of_a_callback_is_cancelled_inside(confined: ProcessLoader) -> None:
    class Hold(Capability):
        def __init__(self) -> None:
            self.cancelled = asyncio.Event()
            self.entered = asyncio.Event()

        async def enter(self) -> None:
            self.entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()

        async def go(self, callback: Any) -> str:
            task = asyncio.ensure_future(callback())
            await self.entered.wait()
            task.cancel()
            await self.cancelled.wait()
            return "ended"

    hold = Hold()
    source = "async def fetch(request, env): return await env.HOLD.go(lambda: env.HOLD.enter())"
    async with asyncio.timeout(10):
        assert await stub_of(confined, source, HOLD=hold).fetch() == "ended"


async def test_reading_without_end_stops_at_the_calls_limits(confined: ProcessLoader) -> None:
    async def numbers() -> AsyncIterator[int]:
        while True:
            yield 1

    source = "async def take(items):\n    async for item in items: pass"
    code = WorkerCode("index.py", {"index.py": source}, limits=IsolateLimits(subrequests=100_000))
    stub = confined.load(code).get_entrypoint(limits=CallLimits(subrequests=200))
    with pytest.raises(IsolateLimitError, match="more than 200 calls of bindings"):
        await stub.call("take", numbers())
