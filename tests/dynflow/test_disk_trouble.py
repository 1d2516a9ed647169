"""Disks that are full, read-only or break: what is said, what is kept, and how it goes on."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynflow.binding import WorkflowInstance
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import StorageError
from tests.dynflow import recorded
from tests.dynflow.disks import BlockDisk, Disk, block_disk, memory_disk
from tests.dynflow.test_recorded_histories import go_on
from tests.engine_world import DEADLINE, Gate, World

# Larger than what a log that was used before has room for without growing.
LARGE = "x" * 400_000


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "memory")


@pytest.fixture
def block(tmp_path: Path) -> Iterator[BlockDisk]:
    yield from block_disk(tmp_path / "block")


def world_over(file: Path) -> World:
    return World(partial(EmbeddedEngine, file))


class Order:
    """A workflow that waits for the test, then for an event."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.effects: list[str] = []

    async def __call__(self, event: Any, step: Any) -> Any:
        """Run it."""
        first = await step.do("first", lambda: self.note("first"))
        await step.do("gate", self.gate)
        large = await step.do("large", lambda: LARGE)
        last = await step.do("last", lambda: self.note("last"))
        others = (await step.wait_for_event("w", type="go")).payload
        got = [(await step.wait_for_event("others", type="other")).payload for _ in range(others)]
        return [first, len(large), last, got]

    def note(self, what: str) -> str:
        self.effects.append(what)
        return what


async def fill_with_events(instance: WorkflowInstance, kept: list[int]) -> None:
    """Send until storage refuses: a full disk may have room for a little."""
    for number in range(10_000):
        await instance.send_event(type="other", payload=number)
        kept.append(number)


async def order(world: World, run: Order) -> WorkflowInstance:
    binding = world.register(run, "order")
    return await binding.create(id="it")


async def ended(world: World, instance: WorkflowInstance) -> Any:
    """The instance's output; storage is tried again each second."""
    result = asyncio.ensure_future(instance.result(timeout=DEADLINE))
    while not result.done():
        world.advance(1)
        await asyncio.wait({result}, timeout=0.01)
    return result.result()


# --- while it runs -------------------------------------------------------------------------------


@dataclass
class Trouble:
    """What befalls the disk, what the error says of it, and how it ends."""

    file: Path
    said: str
    begin: Callable[[], None]
    end: Callable[[], None]


@pytest.fixture(params=["full", "refusing"])
def trouble(request: pytest.FixtureRequest) -> Trouble:
    if request.param == "full":
        disk = request.getfixturevalue("memory")
        return Trouble(disk.folder / "flow.db", r"full; make room on its disk", disk.fill, disk.empty)
    disk = request.getfixturevalue("block")
    said = r"I/O error; look whether its disk is full, read-only or failing"
    return Trouble(disk.folder / "flow.db", said, disk.lock_files, disk.unlock_files)


async def test_it_is_said_nothing_is_lost_and_it_goes_on_by_itself_when_it_is_over(trouble: Trouble) -> None:
    run = Order()
    async with world_over(trouble.file) as world:
        instance = await order(world, run)
        await run.gate.reached()
        binding, kept = world.engine.binding("order"), list[int]()
        trouble.begin()
        run.gate.opened.set()
        for number in range(20):
            with pytest.raises(StorageError, match=rf"{trouble.file} cannot be used: .*{trouble.said}"):
                await binding.create(id=f"refused-{number}", params=LARGE)
            world.advance(1)
        assert (await instance.status()).status in {"running", "queued"}  # what is stored can be read
        with pytest.raises(StorageError, match=trouble.said):
            await fill_with_events(instance, kept)
        trouble.end()
        await instance.send_event(type="go", payload=len(kept))
        assert await ended(world, instance) == ["first", len(LARGE), "last", kept]
        assert run.effects == ["first", "last"]
        assert run.gate.times <= 2  # again where what it gave could not be stored
    async with world_over(trouble.file) as world:
        world.register(run, "order")
        assert (await (await world.engine.binding("order").get("it")).status()).output is not None


async def test_an_engine_that_is_closed_in_trouble_goes_on_when_it_is_opened_after_it(
    trouble: Trouble,
) -> None:
    run = Order()
    async with world_over(trouble.file) as world:
        instance = await order(world, run)
        await run.gate.reached()
        trouble.begin()
        run.gate.opened.set()
        with pytest.raises(StorageError):
            await world.engine.binding("order").create(params=LARGE)
    with pytest.raises(StorageError, match=str(trouble.file)):
        async with world_over(trouble.file):
            pass
    trouble.end()
    async with world_over(trouble.file) as world:
        world.register(run, "order")
        instance = await world.engine.binding("order").get("it")
        await instance.send_event(type="go", payload=0)
        assert await ended(world, instance) == ["first", len(LARGE), "last", []]
    assert run.effects == ["first", "last"]


async def waits(event: Any, step: Any) -> Any:
    return (await step.wait_for_event("w", type="go")).payload


SCRIPT = Path(__file__).with_name("acknowledging.py")


@pytest.mark.parametrize("written_back", [False, True])
async def test_a_disk_that_fails_under_the_engine_loses_nothing_that_was_acknowledged(
    block: BlockDisk, *, written_back: bool
) -> None:
    file, root = block.folder / "flow.db", Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, file, cwd=root, env={"PYTHONPATH": str(root)}, stdout=PIPE, stderr=PIPE
    )
    assert process.stdout is not None
    acknowledged = [(await process.stdout.readline()).decode().strip() for _ in range(100)]
    if written_back:  # so that writing to the mapped index of SQLite's log needs the disk again
        process.send_signal(signal.SIGSTOP)
        os.sync()
    block.fail()
    process.send_signal(signal.SIGCONT)
    # What comes at the very moment is not asked for: Linux answers an fsync with success where the journal is being
    # aborted and its transaction has just been thrown away (jbd2_complete_transaction finds it no longer there).
    _, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert f"StorageError: {file} cannot be used" in err.decode()
    with pytest.raises(StorageError, match=str(file)):
        async with world_over(file):
            pass
    block.repair()
    async with world_over(file) as world:
        binding = world.register(waits, "order")
        for name in acknowledged:
            await (await binding.get(name)).send_event(type="go", payload=name)
        for name in acknowledged:
            assert await (await binding.get(name)).result(timeout=DEADLINE) == name


# --- at the start --------------------------------------------------------------------------------


async def make(file: Path) -> None:
    async with world_over(file) as world:
        run = Order()
        await order(world, run)
        await run.gate.reached()


async def opens(file: Path) -> None:
    async with world_over(file) as world:
        run = Order()
        world.register(run, "order")
        run.gate.opened.set()
        instance = await world.engine.binding("order").get("it")
        await instance.send_event(type="go", payload=0)
        await ended(world, instance)


async def test_a_read_only_disk_is_said_at_the_start(memory: Disk) -> None:
    file = memory.folder / "flow.db"
    await make(file)
    memory.remount("ro")
    with pytest.raises(StorageError, match=r"flow\.db.*Read-only file system.*writable"):
        await opens(file)
    memory.remount("rw")
    await opens(file)


async def test_a_full_disk_is_said_at_the_start(memory: Disk) -> None:
    memory.fill()
    with pytest.raises(StorageError, match=r"flow\.db.*(full|No space).*make room"):
        await make(memory.folder / "flow.db")
    memory.empty()
    await make(memory.folder / "flow.db")
    await opens(memory.folder / "flow.db")


async def test_a_disk_that_is_full_during_a_migration_leaves_the_file_as_it_was(memory: Disk) -> None:
    file = memory.folder / "flow.db"
    recorded.load(recorded.RECORDINGS[0], file)
    memory.fill()
    with pytest.raises(StorageError, match=r"flow\.db.*full; make room"):
        async with world_over(file):
            pass
    memory.empty()
    db = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    db.close()
    await go_on(file)


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder, and no more rights on it than its owner has: root would not notice."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(folder)


async def test_a_file_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    await opens_once(tmp_path)
    with unprivileged() as folder:
        file = folder / "flow.db"
        await make(file)
        before = file.read_bytes()
        file.chmod(stat.S_IRUSR)
        with pytest.raises(StorageError, match=r"flow\.db: Permission denied; .*writable"):
            await opens(file)
        assert file.read_bytes() == before
        file.chmod(stat.S_IRUSR | stat.S_IWUSR)
        await opens(file)


@pytest.mark.parametrize("locked_before", [True, False])
async def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path, *, locked_before: bool) -> None:
    await opens_once(tmp_path)
    with unprivileged() as folder:
        file = folder / "flow.db"
        await make(file)
        if not locked_before:
            (folder / "flow.db.lock").unlink()
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(StorageError, match=r"flow\.db.*writable"):
            await opens(file)
        folder.chmod(0o700)
        await opens(file)


async def opens_once(folder: Path) -> None:
    """Import what opening imports, while we may."""
    await make(folder / "first.db")
    await opens(folder / "first.db")
