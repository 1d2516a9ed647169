"""The stores of a data folder: what they list, what they hold on to, and what is made again."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError, UnavailableError
from ci_platform.fetching import Remote
from ci_platform.garbage import Allowance, Collectable, Item
from ci_platform.garbage.caches import CacheEntries
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.logs import RunLogs
from ci_platform.garbage.mirrors import Mirrors
from ci_platform.garbage.planning import NOTHING, Need
from ci_platform.garbage.trees import Trees
from ci_platform.garbage.wanted import wanted_by
from ci_platform.garbage.workspaces import EndedRuns, Failures
from ci_platform.logs import LogKey, Logs
from ci_platform.workspaces import LayerAuthor
from dynflow.clock import ManualClock
from tests.ci_platform import cache_desk
from tests.ci_platform.workspace_desk import REPO, Desk, opened_desk

NOTHING_AT_ALL = Allowance(1, timedelta())
OLD = time.time() - 50_000


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened_desk(tmp_path) as desk:
        yield desk


class OpenRuns:
    """Which runs have not ended."""

    def __init__(self, *run_ids: str) -> None:
        self.run_ids = set(run_ids)

    async def __call__(self) -> set[str]:
        return self.run_ids


def age(desk: Desk) -> None:
    for folder in (desk.root / "source").glob("trees/*/*/*"):
        os.utime(folder, (OLD, OLD))
    for folder in (desk.root / "source").glob("mirrors/*/*"):
        os.utime(folder, (OLD, OLD))


async def pins(store: Collectable) -> dict[str, str | None]:
    return {item.name: item.pinned for item in await store.items()}


def trees(desk: Desk, still_open: OpenRuns) -> Trees:
    return Trees(
        desk.source,
        NOTHING_AT_ALL,
        in_use=desk.workspaces.in_use,
        wanted=lambda: wanted_by(desk.workspaces, still_open),
    )


async def test_trees_stay_while_a_run_needs_them_and_are_made_again(desk: Desk) -> None:
    sha = desk.remote.commit({"a": b"1" * 10_000, "b": b"2"})
    await desk.fork(sha)
    still_open = OpenRuns("run1")
    store = trees(desk, still_open)
    assert set((await pins(store)).values()) == {"used a short while ago"}
    age(desk)
    base = next(item for item in await store.items() if "base-" in item.name)
    assert (base.repo, base.pinned) == (REPO, "a run that has not ended stands on it")
    assert (base.size > 10_000, base.files) == (True, 2)
    tree = await desk.workspaces.prepare("run1.build", LayerAuthor("step", 1, 1))
    age(desk)
    still_open.run_ids.clear()
    assert set((await pins(store)).values()) == {"a command or a reader stands on it"}
    assert [await store.collect(item.name) for item in await store.items()] == [False, False]
    await desk.workspaces.drop(tree)
    age(desk)
    report = await Collector([store], ManualClock(datetime.now(UTC))).collect()
    assert len(report.items) == 2
    assert await store.items() == []
    assert await desk.run("cat b") == "2"


async def test_mirrors_stay_while_a_run_needs_them_or_nobody_has_them(desk: Desk) -> None:
    sha = desk.remote.commit({"a": b"1"})
    await desk.source.fetch(REPO, sha, Remote(desk.remote.url))
    still_open, remotes = OpenRuns(REPO), [Remote(desk.remote.url)]

    async def remote_of(_repo: str) -> Remote | None:
        return next(iter(remotes), None)

    store = Mirrors(desk.source, NOTHING_AT_ALL, wanted=still_open, remote_of=remote_of)
    assert await pins(store) == {REPO: "a run that has not ended stands on it"}
    assert await store.collect(REPO) is False
    still_open.run_ids.clear()
    assert await pins(store) == {REPO: "used a short while ago"}
    assert await store.collect(REPO) is False
    age(desk)
    assert await pins(store) == {REPO: None}
    remotes.clear()
    assert await pins(store) == {REPO: "it could not be fetched again"}
    assert await store.collect(REPO) is True
    assert await store.items() == []


async def test_a_workspace_that_is_taken_apart_meanwhile_keeps_no_other_from_being_collected(
    desk: Desk,
) -> None:
    sha = desk.remote.commit({"a": b"1"})
    await desk.fork(sha)
    await desk.run("echo x > x")
    await desk.fork(sha, "run2.build")
    # As they are found between the listing and the reading of what was listed.
    (desk.root / "workspaces/run1.build/layers/00000002").mkdir()
    (desk.root / "workspaces/run1.build/kept/1").mkdir(parents=True)
    ended = EndedRuns(desk.workspaces, NOTHING_AT_ALL, still_open=OpenRuns())
    assert await pins(ended) == {"run2": None}
    assert await Failures(desk.workspaces, NOTHING_AT_ALL, kept_for=timedelta()).items() == []


async def test_workspaces_of_an_ended_run_go_together_and_say_so(desk: Desk) -> None:
    sha = desk.remote.commit({"a": b"1"})
    await desk.fork(sha)
    await desk.fork(sha, "run1.other")
    await desk.run("head -c 30000 /dev/zero > zeros")
    still_open = OpenRuns("run1")
    store = EndedRuns(desk.workspaces, NOTHING_AT_ALL, still_open=still_open)
    (item,) = await store.items()
    assert (item.name, item.repo, item.size, item.pinned) == ("run1", REPO, 30_000, "the run has not ended")
    assert await store.collect("run1") is False
    still_open.run_ids.clear()
    async with desk.workspaces.view("run1.build", "1"):
        assert await store.collect("run1") is False, "somebody looks at it"
    assert await store.collect("run1") is True
    assert await store.items() == []
    for ask in (desk.workspaces.snapshots("run1.build"), desk.workspaces.read("run1.build", "a")):
        with pytest.raises(
            NotFoundError, match="its files were collected to make room; rerun the run from the start"
        ):
            await ask
    with pytest.raises(ConflictError, match="collected to make room"):
        async with desk.workspaces.rerunning("run1"):
            raise AssertionError("its layers are gone")
    await desk.workspaces.rewind("run1.build", [("step", 1)])
    await desk.fork(sha)
    assert await desk.run("cat a; ls") == "1a\n", "a rerun from the start makes it anew"
    await desk.workspaces.delete_run("run1")
    assert list(desk.workspaces.root.glob("run1*")) == []


async def test_a_rerun_and_a_collection_at_the_same_moment_take_turns(desk: Desk) -> None:
    await desk.fork(desk.remote.commit({"a": b"1"}))
    still_open = OpenRuns()
    store = EndedRuns(desk.workspaces, NOTHING_AT_ALL, still_open=still_open)
    collected: list[bool] = []
    async with anyio.create_task_group() as group, desk.workspaces.rerunning("run1"):

        async def collect() -> None:
            collected.append(await store.collect("run1"))

        group.start_soon(collect)
        await anyio.wait_all_tasks_blocked()
        assert collected == []
        still_open.run_ids.add("run1")
    assert collected == [False]
    assert await desk.run("cat a") == "1"


async def test_what_failed_commands_left_has_its_time(desk: Desk) -> None:
    await desk.fork(desk.remote.commit({"a": b"1"}))
    with pytest.raises(AssertionError):
        await desk.run("head -c 5000 /dev/zero > zeros; exit 1", keep=True)
    store = Failures(desk.workspaces, NOTHING_AT_ALL, kept_for=timedelta(hours=2))
    (item,) = await store.items()
    assert (item.size, item.repo, item.pinned) == (5000, REPO, None)
    assert item.expires_at == item.used_at + timedelta(hours=2)
    async with desk.workspaces.view("run1.build", f"failed-{item.name.partition('/')[2]}"):
        (looked_at,) = await store.items()
        assert looked_at.pinned == "a reader stands on it"
        assert await store.collect(item.name) is False
    assert await store.collect(item.name) is True
    assert await store.items() == []


async def test_logs_of_ended_runs_go_and_say_so_until_their_time_is_over(tmp_path: Path) -> None:
    clock = ManualClock(datetime.now(UTC))
    logs, still_open = Logs(tmp_path, clock=clock), OpenRuns("open")

    async def repos() -> dict[str, str]:
        return {"open": "o/r", "ended": "o/r"}

    store = RunLogs(
        logs, NOTHING_AT_ALL, clock, kept_for=timedelta(days=9), still_open=still_open, repos=repos
    )
    (tmp_path / "lost+found").mkdir(0)  # as a file system of its own has
    for run_id in ("open", "ended"):
        writer = logs.writer(LogKey(run_id, "test"))
        writer.write(b"x" * 5000 + b"\n")
        writer.finish()
    assert await pins(store) == {"open": "the run has not ended", "ended": None}
    assert {item.repo for item in await store.items()} == {"o/r"}
    assert [await store.collect(name) for name in ("open", "ended", "nothing")] == [False, True, True]
    assert await pins(store) == {"open": "the run has not ended"}
    (said,) = (await logs.read(LogKey("ended", "test"))).lines
    assert (said.kind, said.text) == ("notice", "this log was deleted to make room")
    clock.advance(timedelta(days=10))
    still_open.run_ids.clear()
    report = await Collector([store], clock).collect()
    assert {item.why for item in report.items} == {"its time is over"}
    assert [path.name for path in logs.root.glob("*")] == ["lost+found"]


async def test_caches_go_but_for_what_a_repository_may_have_in_any_case(tmp_path: Path) -> None:
    async with cache_desk.opened_desk(tmp_path) as desk:
        store = CacheEntries(desk.caches, replace(NOTHING_AT_ALL, of_repository=30_000))
        for number in range(3):
            await desk.run("head -c 20000 /dev/zero > deps/zeros", cache_desk.spec(f"key-{number}"))
        items = await store.items()
        assert [(item.repo, item.size >= 20_000, item.pinned) for item in items] == [(REPO, True, None)] * 3
        report = await Collector([store], ManualClock(datetime.now(UTC) + timedelta(days=1))).collect()
        (kept,) = await store.items()
        assert len(report.items) == 2
        assert kept.used_at == max(item.used_at for item in items)
        assert await store.collect("nothing") is True


class Shelf:
    """Items that can be collected, but for those that are `taken` or `stuck`."""

    kind = "things"
    allowance = NOTHING_AT_ALL

    def __init__(self, *items: Item) -> None:
        self.here = {item.name: item for item in items}
        self.taken, self.stuck = set[str](), set[str]()
        self.trouble: Exception = OSError(5, "I/O error")

    async def items(self) -> list[Item]:
        if not self.here:
            raise UnavailableError("nothing answers")
        return list(self.here.values())

    async def collect(self, name: str) -> bool:
        if name in self.stuck:
            raise self.trouble
        return name not in self.taken and bool(self.here.pop(name))


def thing(name: str, stands_on: str | None = None) -> Item:
    return Item(name, None, 10, datetime(2020, 1, 1, tzinfo=UTC), stands_on=stands_on)


@pytest.mark.parametrize("trouble", [OSError(5, "I/O error"), InvalidInputError("no name for a repository")])
async def test_what_cannot_be_collected_stays_with_all_that_it_stands_on(trouble: Exception) -> None:
    shelf = Shelf(thing("base"), thing("delta", "base"), thing("taken"), thing("other"))
    shelf.stuck, shelf.taken, shelf.trouble = {"delta"}, {"taken"}, trouble
    collector = Collector([shelf], ManualClock(datetime.now(UTC)))
    would = await collector.look()
    assert (would.dry_run, len(would.items), len(shelf.here)) == (True, 4, 4)
    report = await collector.collect()
    assert [item.name for item in report.items] == ["other"]
    (kind,) = report.kinds
    assert {why: each.items for why, each in kind.kept.items()} == {
        "it cannot be deleted": 1,
        "something that stays stands on it": 1,
        "in use by now": 1,
    }
    assert (kind.collected.size, kind.budget, set(shelf.here)) == (10, 1, {"base", "delta", "taken"})


async def test_room_is_made_until_the_disk_says_that_there_is_enough_whatever_items_say_of_their_size() -> (
    None
):
    shelf = Shelf(*(thing(f"{number}") for number in range(6)))
    shelf.allowance = replace(NOTHING_AT_ALL, budget=1000)
    collector = Collector([shelf], ManualClock(datetime.now(UTC)))
    await collector.collect(lambda: Need(1) if len(shelf.here) > 2 else NOTHING)
    assert sorted(shelf.here) == ["4", "5"], "one byte was missing until four were gone"
    shelf.here.clear()
    (kind,) = (await collector.collect()).kinds
    assert kind.trouble == "nothing answers"
