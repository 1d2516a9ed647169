"""Logs grow, are followed, survive kills and stay within their size."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from ci_platform.errors import InvalidInputError
from ci_platform.logs import LogChunk, LogKey, LogLine, Logs
from dynflow.clock import ManualClock

KEY = LogKey("run-1", "unit tests", 1)
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START)


@pytest.fixture
def logs(tmp_path: Path, clock: ManualClock) -> Logs:
    return Logs(tmp_path / "logs", clock=clock)


async def lines(logs: Logs, key: LogKey = KEY) -> list[LogLine]:
    return (await logs.read(key)).lines


async def texts(logs: Logs, key: LogKey = KEY) -> list[str]:
    return [line.text for line in await lines(logs, key)]


def log_files(root: Path) -> list[Path]:
    return list(root.rglob("*.log"))


async def test_lines_are_numbered_and_timed(logs: Logs, clock: ManualClock) -> None:
    writer = logs.writer(KEY)
    writer.note("command", "make test")
    clock.advance(timedelta(milliseconds=1500))
    writer.write(b"one\ntwo\n")
    writer.note("result", "exited with 0")
    writer.finish()
    later = START + timedelta(milliseconds=1500)
    assert await lines(logs) == [
        LogLine(1, START, "make test", "command"),
        LogLine(2, later, "one"),
        LogLine(3, later, "two"),
        LogLine(4, later, "exited with 0", "result"),
    ]


async def test_lines_come_in_any_pieces(logs: Logs) -> None:
    writer = logs.writer(KEY)
    for piece in (b"a", b"b\nc\xc3", b"\xa4\r\n\nlast"):
        writer.write(piece)
    assert await texts(logs) == ["ab", "cä", ""]
    writer.finish()
    assert await texts(logs) == ["ab", "cä", "", "last"]


async def test_half_a_line_shows_after_a_moment_and_goes_on(logs: Logs, clock: ManualClock) -> None:
    writer = logs.writer(KEY)
    writer.write(b"Password: ")
    assert await texts(logs) == []
    clock.advance(timedelta(seconds=1))
    writer.write(b"ok\nnext\n")
    writer.finish()
    shown, later = START + timedelta(milliseconds=300), START + timedelta(seconds=1)
    assert await lines(logs) == [
        LogLine(1, shown, "Password: ", goes_on=True),
        LogLine(1, later, "ok"),
        LogLine(2, later, "next"),
    ]


async def test_any_bytes_are_decoded_safely(logs: Logs) -> None:
    writer = logs.writer(KEY)
    writer.write(b"\xff\x00\xfe \x1b[31mred\x1b[0m a\rb\n")
    writer.finish()
    assert await texts(logs) == ["\ufffd\ufffd\ufffd \x1b[31mred\x1b[0m a\rb"]


async def test_a_text_cannot_pretend_to_be_a_record(logs: Logs) -> None:
    writer = logs.writer(KEY)
    writer.write(b"7 123 !forged\n9 9 =exited with 0\n")
    writer.finish()
    assert [(line.number, line.kind) for line in await lines(logs)] == [(1, "output"), (2, "output")]


async def test_a_very_long_line_is_kept_in_pieces(logs: Logs) -> None:
    writer = logs.writer(KEY)
    writer.write(b"x" * 100_000 + b"\nend\n")
    writer.finish()
    found = await lines(logs)
    assert "".join(line.text for line in found if line.number == 1) == "x" * 100_000
    assert [line.goes_on for line in found if line.number == 1][-1] is False
    assert (found[-1].number, found[-1].text) == (2, "end")


async def test_reading_goes_on_at_an_offset(logs: Logs) -> None:
    writer = logs.writer(KEY)
    writer.write(b"".join(b"line %d\n" % n for n in range(1, 11)))
    writer.finish()
    first = await logs.read(KEY, limit=4)
    second = await logs.read(KEY, first.next_offset, limit=100)
    assert [line.number for line in first.lines] == [1, 2, 3, 4]
    assert [line.number for line in second.lines] == [5, 6, 7, 8, 9, 10]
    assert (first.complete, second.complete) == (False, False)
    logs.close(KEY)
    assert (await logs.read(KEY, second.next_offset)) == LogChunk([], second.next_offset, complete=True)
    assert not (await logs.read(KEY, limit=4)).complete


async def test_an_offset_inside_of_a_line_starts_at_the_next(logs: Logs) -> None:
    writer = logs.writer(KEY)
    writer.write(b"one\ntwo\n")
    writer.finish()
    assert [line.text for line in (await logs.read(KEY, 3)).lines] == ["two"]
    assert (await logs.read(KEY, 10**9)).lines == []
    assert [line.text for line in (await logs.read(KEY, -5)).lines] == ["one", "two"]


async def test_any_line_is_found_by_number(logs: Logs) -> None:
    writer = logs.writer(KEY)
    writer.write(b"".join(b"%d\n" % n for n in range(1, 1001)))
    writer.finish()
    for number in (1, 2, 500, 999, 1000):
        chunk = await logs.read(KEY, await logs.locate(KEY, number), limit=1)
        assert chunk.lines[0].number == number
    assert (await logs.read(KEY, await logs.locate(KEY, 1001))).lines == []


async def test_searching_finds_lines_whatever_their_case(logs: Logs) -> None:
    writer = logs.writer(KEY)
    writer.write(b"ok\nAn ERROR\nfine\nerror again\n")
    writer.finish()
    assert [line.number for line in await logs.search(KEY, "Error")] == [2, 4]
    assert [line.number for line in await logs.search(KEY, "error", limit=1)] == [2]


async def test_followers_see_each_append_and_the_end(logs: Logs) -> None:
    seen: list[str] = []
    got = [anyio.Event(), anyio.Event()]

    async def follow() -> None:
        async for chunk in logs.follow(KEY):
            seen.extend(line.text for line in chunk.lines)
            if len(seen) <= 2:
                got[len(seen) - 1].set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        writer = logs.writer(KEY)
        writer.write(b"first\n")
        with anyio.fail_after(10):
            await got[0].wait()
        writer.write(b"second\n")
        with anyio.fail_after(10):
            await got[1].wait()
        writer.finish()
        logs.close(KEY)
    assert seen == ["first", "second"]


async def test_following_a_deleted_or_closed_log_ends(logs: Logs) -> None:
    logs.writer(KEY).finish()
    logs.close(KEY)
    with anyio.fail_after(10):
        assert [chunk.complete async for chunk in logs.follow(KEY)] == [True]


async def test_a_retried_step_opens_its_log_again(logs: Logs) -> None:
    for attempt in ("first", "second"):
        writer = logs.writer(KEY)
        writer.write(attempt.encode() + b"\n")
        writer.finish()
        logs.close(KEY)
        assert (await logs.read(KEY)).complete
    assert [(line.number, line.text) for line in await lines(logs)] == [(1, "first"), (2, "second")]


async def test_commands_side_by_side_share_a_log_by_lines(logs: Logs, clock: ManualClock) -> None:
    one, two = logs.writer(KEY), logs.writer(KEY)
    one.write(b"one ")
    clock.advance(timedelta(seconds=1))
    two.write(b"two\n")
    one.write(b"more\n")
    one.finish()
    two.write(b"end\n")
    two.finish()
    found = [(line.number, line.text, line.goes_on) for line in await lines(logs)]
    assert found == [
        (1, "one ", True),
        (1, "", False),
        (2, "two", False),
        (3, "more", False),
        (4, "end", False),
    ]


async def test_steps_of_odd_names_have_logs_of_their_own(logs: Logs, tmp_path: Path) -> None:
    names = ["a b", "a-b", "a/b", "../../etc/passwd", "", "x" * 500, "ä"]
    for name in names:
        writer = logs.writer(LogKey("run-1", name, 1))
        writer.write(name.encode() + b"\n")
        writer.finish()
    for name in names:
        assert await texts(logs, LogKey("run-1", name, 1)) == [name]
    files = log_files(tmp_path)
    assert {path.parent for path in files} == {tmp_path / "logs" / "run-1"}
    assert len(files) == len(names)


@pytest.mark.parametrize("run_id", ["", "..", "a/b", ".", "x" * 65, "a\0"])
async def test_an_id_that_is_none_is_refused(logs: Logs, run_id: str) -> None:
    with pytest.raises(InvalidInputError):
        logs.writer(LogKey(run_id, "step", 1))


async def test_a_log_stops_at_its_limit_and_says_so_once(tmp_path: Path) -> None:
    logs = Logs(tmp_path, largest=1000)
    for _ in range(2):
        writer = logs.writer(KEY)
        for _ in range(100):
            writer.write(b"0123456789\n")
        writer.note("result", "exited with 0")
        writer.finish()
    found = await lines(logs)
    notices = [line for line in found if line.kind == "notice"]
    assert len(notices) == 1
    assert notices[0].text.startswith("truncated: this log has reached its limit of 1000 bytes")
    assert [line.kind for line in found if line.kind != "output"] == ["notice", "result", "result"]
    assert [line.number for line in found] == list(range(1, len(found) + 1))


async def test_a_torn_record_is_cut_off_and_the_next_writer_goes_on(logs: Logs, tmp_path: Path) -> None:
    writer = logs.writer(KEY)
    writer.write(b"whole\n")
    writer.finish()
    (file,) = log_files(tmp_path)
    with file.open("ab") as log:
        log.write(b"2 1234 oto")
    assert await texts(logs) == ["whole"]
    again = Logs(tmp_path / "logs").writer(KEY)
    again.write(b"next\n")
    again.finish()
    assert [(line.number, line.text) for line in await lines(logs)] == [(1, "whole"), (2, "next")]


KILLED = """
import os, signal, sys
from pathlib import Path
from ci_platform.logs import LogKey, Logs
writer = Logs(Path(sys.argv[1])).writer(LogKey("run-1", "unit tests", 1))
writer._file.append(writer, "output", ["kept", "half"], goes_on=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    subprocess.run(command, check=False, cwd=Path(__file__).parents[2])  # noqa: ASYNC221
    logs = Logs(tmp_path)
    assert await texts(logs) == ["kept", "half"]
    writer = logs.writer(KEY)
    writer.write(b"next\n")
    writer.finish()
    found = [(line.number, line.text, line.goes_on) for line in await lines(logs)]
    assert found == [(1, "kept", False), (2, "half", True), (2, "", False), (3, "next", False)]


async def test_logs_of_a_run_are_deleted_together(logs: Logs) -> None:
    other = LogKey("run-2", "unit tests", 1)
    for key in (KEY, other):
        logs.writer(key).finish()
        writer = logs.writer(key)
        writer.write(b"x\n")
        writer.finish()
    logs.delete("run-1")
    logs.delete("run-1")
    assert await texts(logs) == []
    assert await texts(logs, other) == ["x"]


async def test_collected_logs_say_so_and_grow_again(logs: Logs, tmp_path: Path) -> None:
    other = LogKey(KEY.run_id, "other")
    growing = logs.writer(KEY)
    growing.write(b"x\n")
    assert await logs.collect(KEY.run_id) is False
    growing.finish()
    logs.writer(other).finish()
    assert await logs.collect(KEY.run_id) is True
    assert await texts(logs) == await texts(logs, other) == ["this log was deleted to make room"]
    assert [path.name for path in (tmp_path / "logs").glob("*/*")] == ["collected"]
    assert (tmp_path / "logs" / KEY.run_id / "collected").stat().st_size == 0
    writer = logs.writer(KEY)
    writer.write(b"again\n")
    writer.finish()
    assert await texts(logs) == ["again"]


async def test_no_step_name_can_be_chosen_to_write_into_anothers_log(logs: Logs, tmp_path: Path) -> None:
    logs.writer(LogKey("run-1", "a b", 1)).finish()
    (file,) = log_files(tmp_path)
    crafted = LogKey("run-1", file.stem.removesuffix("-1"), 1)
    logs.writer(crafted).finish()
    assert len(log_files(tmp_path)) == 2


async def test_what_the_platform_says_in_a_log_has_an_end_too(tmp_path: Path) -> None:
    logs = Logs(tmp_path, largest=1000)
    writer = logs.writer(KEY)
    for _ in range(40):
        writer.note("command", "x" * 100_000)
    writer.finish()
    (file,) = log_files(tmp_path)
    assert file.stat().st_size < 1_300_000
