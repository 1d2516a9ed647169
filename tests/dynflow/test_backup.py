"""Backup and restore of an engine's file: online, whole or not at all."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynflow.engines.embedded import EmbeddedEngine
from dynflow.engines.embedded.backup import back_up, copy_database, restore
from dynflow.errors import StorageError
from tests.engine_world import DEADLINE, World

CONFIG: dict[str, Any] = {"retries": {"limit": 0, "delay": 0}}


async def waits(event: Any, step: Any) -> Any:
    first = await step.do("first", CONFIG, lambda: "kept")
    return [first, (await step.wait_for_event("w", type="go")).payload]


def beginning(folder: Path, name: str) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(name)]


def world_over(file: Path) -> World:
    return World(partial(EmbeddedEngine, file, synchronous="NORMAL"))


async def test_a_backup_of_a_busy_engine_goes_on_elsewhere(tmp_path: Path) -> None:
    copies = [tmp_path / f"copy-{number}.db" for number in range(3)]
    async with world_over(tmp_path / "flow.db") as world:
        await world.parked(await world.start(waits, id="before"))
        binding, stop = world.engine.binding("waits"), asyncio.Event()

        async def keep_writing() -> int:
            made = 0
            while not stop.is_set():
                await binding.create(id=f"busy-{made}")
                made += 1
            return made

        writing = asyncio.create_task(keep_writing())
        for copy in copies:
            await asyncio.to_thread(back_up, tmp_path / "flow.db", copy)
        stop.set()
        assert await writing > 0
    for copy in copies:
        assert copy.stat().st_mode & 0o777 == 0o600
        await asyncio.to_thread(restore, copy, tmp_path / "restored.db")
        async with world_over(tmp_path / "restored.db") as world:
            world.register(waits)
            instance = await world.engine.binding("waits").get("before")
            await instance.send_event(type="go", payload=copy.name)
            assert await instance.result(timeout=DEADLINE) == ["kept", copy.name]
        for left in beginning(tmp_path, "restored.db"):
            left.unlink()


async def test_what_is_in_the_log_of_the_file_alone_is_in_the_backup(tmp_path: Path) -> None:
    async with world_over(tmp_path / "flow.db") as world:
        await world.parked(await world.start(waits, id="one"))
        # As after a kill: the file and its log, with nobody having written one into the other.
        for name in ("flow.db", "flow.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / f"killed-{name}")
    await asyncio.to_thread(back_up, tmp_path / "killed-flow.db", tmp_path / "copy.db")
    with sqlite3.connect(tmp_path / "copy.db") as db:
        assert db.execute("SELECT id, status FROM instances").fetchall() == [("one", "waiting")]
    db.close()


async def make(file: Path) -> None:
    async with world_over(file) as world:
        await world.parked(await world.start(waits, id="one", params={"filler": "x" * 100_000}))


@pytest.mark.parametrize("copying", [back_up, restore])
async def test_nothing_is_overwritten(tmp_path: Path, copying: Any) -> None:
    await make(tmp_path / "flow.db")
    for taken in ("copy.db", "copy.db-wal"):
        (tmp_path / taken).write_text("mine")
        with pytest.raises(StorageError, match="exists"):
            copying(tmp_path / "flow.db", tmp_path / "copy.db")
        assert (tmp_path / taken).read_text() == "mine"
        (tmp_path / taken).unlink()


@pytest.mark.parametrize("copying", [back_up, restore])
@pytest.mark.parametrize("what", ["missing", "text", "other", "newer", "damaged"])
async def test_what_is_no_good_engine_file_is_refused(tmp_path: Path, copying: Any, what: str) -> None:
    source = tmp_path / "flow.db"
    if what == "text":
        source.write_text("no database, " * 1000)
    elif what == "other":
        sqlite3.connect(source).execute("CREATE TABLE t (x)").connection.close()
    elif what != "missing":
        await make(source)
    if what == "newer":
        sqlite3.connect(source).execute("PRAGMA user_version = 999").connection.close()
    if what == "damaged":
        data = bytearray(source.read_bytes())
        data[8192 : len(data) // 2] = b"\xa5" * (len(data) // 2 - 8192)
        source.write_bytes(data)
    before = source.read_bytes() if source.exists() else None
    with pytest.raises(StorageError, match=r"flow\.db"):
        copying(source, tmp_path / "copy.db")
    assert beginning(tmp_path, "copy.db") == []
    assert (source.read_bytes() if source.exists() else None) == before


async def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    await make(tmp_path / "flow.db")
    with pytest.raises(StorageError, match="could not be copied"):
        back_up(tmp_path / "flow.db", tmp_path / "missing" / "copy.db")


def test_other_databases_are_copied_as_they_are(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "other.db")
    db.executescript("CREATE TABLE t (x); INSERT INTO t VALUES (7);")
    copy_database(tmp_path / "other.db", tmp_path / "copy.db")
    db.close()
    with sqlite3.connect(tmp_path / "copy.db") as copy:
        assert copy.execute("SELECT x FROM t").fetchall() == [(7,)]
    copy.close()
