"""What writes files goes on while the disk is full, and says what it could not keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from ci_platform.connections import ConnectionLog
from ci_platform.egress import Connection
from ci_platform.errors import UnavailableError
from ci_platform.logs import LogChunk, LogKey, Logs
from ci_platform.patient_file import MOST_WAITING
from ci_platform.workspaces import LayerAuthor
from dynflow.clock import ManualClock
from tests.ci_platform.workspace_desk import REPO, opened_desk
from tests.dynflow.disks import Disk, memory_disk

KEY = LogKey("run-1", "test")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "disk")


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "large", 32)


async def texts(logs: Logs, key: LogKey = KEY) -> list[str]:
    return [line.text for line in (await logs.read(key, limit=10_000)).lines]


async def test_a_log_on_a_full_disk_waits_in_memory_and_has_every_line_then(disk: Disk) -> None:
    logs = Logs(disk.folder / "logs", clock=ManualClock())
    writer = logs.writer(KEY)
    writer.write(b"before\n")
    disk.fill()
    printed = [f"line {number} {'x' * 100}" for number in range(1000)]
    for line in printed:
        writer.write(line.encode() + b"\n")
    on_disk = await texts(logs)
    assert on_disk == ["before", *printed][: len(on_disk)], "whole lines, in order"
    assert len(on_disk) < 1000
    disk.empty()
    writer.write(b"after\n")
    assert await texts(logs) == ["before", *printed, "after"]
    writer.finish()


async def test_what_is_too_much_to_wait_is_dropped_and_said(disk: Disk) -> None:
    logs = Logs(disk.folder / "logs", clock=ManualClock())
    writer = logs.writer(KEY)
    writer.write(b"before\n")
    disk.fill()
    for number in range(3):
        writer.write(b"%d" % number * 1000 + b"\n" + b"y" * (MOST_WAITING // 2) + b"\n")
    disk.empty()
    writer.write(b"after\n")
    writer.finish()
    found = (await logs.read(KEY, limit=10_000)).lines
    assert [line.number for line in found if not line.goes_on] == sorted(
        {line.number for line in found if not line.goes_on}
    )
    said = [line.text for line in found if line.kind == "notice"]
    assert len(said) == 1
    assert said[0].endswith("bytes are missing here: the disk was full")
    assert (found[0].text, found[-1].text) == ("before", "after")


async def test_followers_of_a_log_come_to_its_end_though_no_mark_can_be_made(disk: Disk) -> None:
    logs = Logs(disk.folder / "logs", clock=ManualClock())
    writer = logs.writer(KEY)
    writer.write(b"one\n")
    disk.fill()
    disk.take_inodes()
    chunks: list[LogChunk] = []
    async with anyio.create_task_group() as group:

        async def follow() -> None:
            async for chunk in logs.follow(KEY):
                chunks.append(chunk)  # noqa: PERF401 - looked at while it grows

        group.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        logs.close(KEY)
        writer.finish()
    assert [line.text for chunk in chunks for line in chunk.lines] == ["one"]
    assert chunks[-1].complete
    with pytest.raises(UnavailableError, match="the platform's disk is full"):
        logs.writer(LogKey("run-2", "test"))
    assert await logs.collect("run-1") is True, "deleting needs no room"
    assert await texts(logs) == ["this log was deleted to make room"]


def test_a_connection_that_finds_no_room_tears_none(disk: Disk) -> None:
    log = ConnectionLog(disk.folder / "test.connections")
    one = Connection("example.org", 443, refused="x" * 1000)
    log.append(one)
    disk.fill()
    for _ in range(10):
        log.append(one)
    disk.empty()
    log.append(one)
    found = list(log.read())
    assert 2 <= len(found) < 12
    assert set(found) == {one}


async def test_a_layer_that_finds_no_room_is_the_platforms_fault_and_the_next_attempt_is_whole(
    large: Disk,
) -> None:
    async with opened_desk(large.folder) as desk:
        await desk.fork(desk.remote.commit({"a": b"1"}))
        await desk.run("echo kept > kept", step="first")
        tree = await desk.workspaces.prepare("run1.build", LayerAuthor("second", 1, 1))
        (tree.upper / "half").write_text("half")
        other = desk.remote.commit({"b": b"2" * 100_000})
        await desk.fetch(other)
        large.fill()
        with pytest.raises(UnavailableError, match="the platform's disk is full"):
            await desk.workspaces.commit(tree)
        with pytest.raises(UnavailableError, match="the platform's disk is full"):
            await desk.workspaces.fork("run2.build", REPO, other)
        large.empty()
        assert await desk.run("ls", step="second") == "a\nkept\n", "nothing is left of the first attempt"
