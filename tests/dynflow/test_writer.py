"""The embedded engine's file: one writer, groups, refusals, and storage that fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynflow.clock import ManualClock
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.engines.embedded.database import SCHEMA_VERSION
from dynflow.engines.embedded.rows import MASK
from dynflow.engines.embedded.writer import Writer
from dynflow.errors import EngineClosedError, StorageError, WorkflowInternalError
from dynflow.workflow import WorkflowEntrypoint
from tests.engine_world import DEADLINE, Gate, World


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Writer]:
    writer = Writer(tmp_path / "flow.db", "FULL", asyncio.get_running_loop())
    yield writer
    await writer.close()


def insert(key: int) -> Any:
    return lambda db: db.execute("INSERT INTO code VALUES (?, x'00')", (str(key),)).rowcount


async def count(writer: Writer) -> int:
    return await writer.submit(lambda db: db.execute("SELECT count(*) FROM code").fetchone()[0])


async def hold(writer: Writer) -> threading.Event:
    """Keep the writer's thread busy until the event is set, so that what follows becomes one group."""
    held, reached = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait(_: Any) -> None:
        loop.call_soon_threadsafe(reached.set)
        held.wait(DEADLINE)

    writer.submit(wait)
    await reached.wait()
    return held


async def test_what_is_submitted_during_a_commit_is_committed_together(writer: Writer) -> None:
    held = await hold(writer)
    commits: list[str] = []
    writer._db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    futures = [writer.submit(insert(key)) for key in range(60)]
    held.set()
    assert await asyncio.gather(*futures) == [1] * 60
    writer._db.set_trace_callback(None)
    assert len(commits) == 2  # the one that was held up, and the group


async def test_half_of_many_is_committed_while_the_other_half_goes_on(writer: Writer) -> None:
    """The first half's callers are told when the second has only to be flushed: neither earlier nor later."""
    held = await hold(writer)
    loop, done = asyncio.get_running_loop(), list[str]()
    writer._db.set_trace_callback(lambda sql: done.append(sql) if sql == "COMMIT" else None)
    resolve = loop.call_soon_threadsafe

    def told(callback: Any, *args: Any) -> Any:
        done.append(f"told {len(args[0])}")
        return resolve(callback, *args)

    futures = [writer.submit(insert(key)) for key in range(200)]
    loop.call_soon_threadsafe = told  # type: ignore[assignment] # the writer's only way to its callers
    try:
        held.set()
        assert await asyncio.gather(*futures) == [1] * 200
    finally:
        del loop.call_soon_threadsafe
        writer._db.set_trace_callback(None)
    # 1: what was held up; 100 of 200, 64 of what is left, the rest.
    assert done == [
        "COMMIT", "told 1", "COMMIT", "told 100", "COMMIT", "told 64", "COMMIT", "told 36"
    ]  # fmt: skip


async def test_one_bad_operation_does_not_fail_the_others(writer: Writer) -> None:
    def misuse(_: Any) -> None:
        raise ValueError("mine")

    held = await hold(writer)
    operations = [
        insert(1),
        misuse,
        insert(2),
        insert(1),
        lambda db: db.execute("SELECT nonsense"),
        insert(3),
    ]
    futures = [writer.submit(operation) for operation in operations]
    held.set()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(result).__name__ for result in results] == [
        "int", "ValueError", "int", "StorageError", "StorageError", "int",
    ]  # fmt: skip
    assert await count(writer) == 3


async def test_a_cancelled_caller_harms_nobody(writer: Writer) -> None:
    held = await hold(writer)
    first, second = writer.submit(insert(1)), writer.submit(insert(2))
    first.cancel()
    held.set()
    assert await second == 1
    assert await count(writer) == 2  # a cancelled call may still take effect


async def test_closing_commits_what_was_submitted_and_refuses_the_rest(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "flow.db", "FULL", asyncio.get_running_loop())
    held = await hold(writer)
    future = writer.submit(insert(1))
    closing = asyncio.ensure_future(writer.close())
    await asyncio.sleep(0)
    with pytest.raises(EngineClosedError):
        writer.submit(insert(2))
    held.set()
    await closing
    assert await future == 1
    again = Writer(tmp_path / "flow.db", "FULL", asyncio.get_running_loop())
    assert await count(again) == 1
    await again.close()


async def test_a_second_engine_on_the_file_is_refused(writer: Writer, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="in use"):
        Writer(tmp_path / "flow.db", "FULL", asyncio.get_running_loop())
    assert await count(writer) == 0


async def test_an_engine_can_be_opened_again_in_the_same_process(tmp_path: Path) -> None:
    engine = EmbeddedEngine(tmp_path / "flow.db")
    for _ in range(3):
        async with engine:
            with pytest.raises(EngineClosedError, match="open already"):
                await engine.__aenter__()


async def test_an_engine_that_cannot_start_leaves_no_lock_and_no_thread(tmp_path: Path) -> None:
    engine = EmbeddedEngine(tmp_path / "flow.db")

    async def fails() -> None:
        raise StorageError("no recovery")

    start, engine._scheduler.start = engine._scheduler.start, fails  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="no recovery"):
        await engine.__aenter__()
    assert "dynflow-writer" not in {thread.name for thread in threading.enumerate()}
    engine._scheduler.start = start  # type: ignore[method-assign]
    async with engine:
        pass


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()


def newer(path: Path) -> None:
    made(path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()


def made(path: Path) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(Writer(path, "FULL", loop).close())
    loop.close()


def damaged(path: Path) -> None:
    made(path)
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 12] = b"\xa5" * (4096 * 10)
    path.write_bytes(data)


def no_database(path: Path) -> None:
    path.write_text("dear diary " * 1000)


@pytest.mark.parametrize("spoil", [foreign, newer, damaged, no_database])
async def test_a_file_that_is_not_ours_to_use_is_refused_untouched(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "flow.db"
    await asyncio.to_thread(spoil, path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"flow\.db"):
        async with EmbeddedEngine(path):
            pytest.fail("it opened")
    assert path.read_bytes() == before
    with pytest.raises(StorageError, match=r"flow\.db"):  # and no lock was left behind
        async with EmbeddedEngine(path):
            pytest.fail("it opened")


async def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is .* there and writable"):
        async with EmbeddedEngine(tmp_path / "nowhere" / "flow.db"):
            pytest.fail("it opened")


# --- storage that fails under way ----------------------------------------------------------------


class FullDisk:
    """Lets the file grow no further, as a full disk does, until it is lifted."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def fill(self) -> None:
        await self._limit("(SELECT 1)")

    async def _limit(self, _: str) -> None:
        pages = await self._engine._storage.submit(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        await self._engine._storage.submit(
            lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone()
        )

    async def lift(self) -> None:
        await self._engine._storage.submit(
            lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone()
        )


async def test_a_full_disk_is_said_loses_nothing_and_work_goes_on_when_there_is_room(tmp_path: Path) -> None:
    gate = Gate()

    async def run(event: Any, step: Any) -> Any:
        first = await step.do("first", lambda: "kept")
        await step.do("gate", lambda ctx: gate() if ctx.attempt == 1 else "again")
        big = await step.do("big", lambda: "x" * 200_000)
        return [first, len(big)]

    async with World(lambda **options: EmbeddedEngine(tmp_path / "flow.db", **options)) as world:
        instance = await world.start(run)
        await gate.reached()
        disk = FullDisk(world.engine)
        await disk.fill()
        with pytest.raises(StorageError, match="full"):
            await world.engine.binding("run").create(params="x" * 200_000)
        gate.opened.set()
        started = asyncio.ensure_future(instance.result(timeout=DEADLINE))
        await world.saw(instance, "step.started", 3)
        for _ in range(50):  # the segment fails, and is tried again, each second
            world.advance(1)
            await asyncio.sleep(0)
        assert (await instance.status()).status in {"running", "queued"}
        await disk.lift()
        while not started.done():
            world.advance(1)
            await asyncio.wait({started}, timeout=0.01)
        assert started.result() == ["kept", 200_000]
        assert gate.times == 1


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5])
async def test_an_instance_whose_history_is_full_ends_and_touches_no_other(tmp_path: Path, room: int) -> None:
    async def run(event: Any, step: Any) -> Any:
        await step.wait_for_event("w", type="go")
        for _ in range(50):
            await step.sleep("nap", 0.001)

    async with World(lambda **options: EmbeddedEngine(tmp_path / "flow.db", **options)) as world:
        full, next_ = [await world.register(run).create() for _ in range(2)]
        for instance in (full, next_):
            await world.parked(instance)
        neighbour = await next_.status()
        await world.engine._storage.submit(
            lambda db: db.execute("UPDATE instances SET events = ? WHERE id = ?", (MASK - 64 - room, full.id))
        )
        await full.send_event(type="go")
        with pytest.raises(WorkflowInternalError, match="history"):
            await world.run_through(full)
        assert (await full.status()).status == "errored"
        assert await next_.status() == neighbour


async def test_clocks_that_jump_wake_what_is_due(tmp_path: Path) -> None:
    class Jumping(ManualClock):
        def jump_back(self) -> None:
            self._now_us -= 3600 * 1_000_000

    clock = Jumping()

    class Naps(WorkflowEntrypoint):
        async def run(self, event: Any, step: Any) -> str:
            await step.sleep("nap", 60)
            return "awake"

    engine = EmbeddedEngine(tmp_path / "flow.db", clock=clock)
    engine.register("naps", Naps)
    async with engine:
        binding = engine.binding("naps")
        first = await binding.create()
        async for event in first.subscribe():
            if event.type == "workflow.waiting":
                break
        clock.jump_back()
        second = await binding.create()
        async for event in second.subscribe():
            if event.type == "workflow.waiting":
                break
        clock.advance(60)
        assert await second.result(timeout=DEADLINE) == "awake"
        assert (await first.status()).status == "waiting"
        clock.advance(3600)
        assert await first.result(timeout=DEADLINE) == "awake"


async def test_the_file_is_its_owners_alone(writer: Writer, tmp_path: Path) -> None:
    await writer.submit(insert(1))
    modes = [(tmp_path / f"flow.db{end}").stat().st_mode & 0o777 for end in ("", "-wal", "-shm", ".lock")]
    assert modes == [0o600] * 4


async def test_an_operation_that_raises_after_it_changed_something_is_undone_alone(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "flow.db", "FULL", asyncio.get_running_loop())

    def half(db: Any) -> None:
        db.execute("INSERT INTO code VALUES ('half', x'00')")
        db.leases.grant(1, 0, 0, None)
        raise KeyError("half")

    def whole(name: str) -> Any:
        return lambda db: db.execute("INSERT INTO code VALUES (?, x'00')", (name,)).rowcount

    futures = [writer.submit(whole("before")), writer.submit(half), writer.submit(whole("after"))]
    done = await asyncio.gather(*futures, return_exceptions=True)
    assert done[0] == done[2] == 1
    assert isinstance(done[1], KeyError)
    stored, lease = await writer.submit(
        lambda db: (
            [row[0] for row in db.execute("SELECT digest FROM code ORDER BY digest")],
            db.leases.of(1),
        )
    )
    assert stored == ["after", "before"]
    assert lease is None
    await writer.close()
