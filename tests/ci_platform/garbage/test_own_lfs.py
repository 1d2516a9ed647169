"""Files of LFS in repositories of our own: what commits name stays, the rest goes when there is too much of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ci_platform.garbage import Allowance
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.own_lfs import PushedLfsFiles
from ci_platform.garbage.wanted import Wanted
from ci_platform.source import Source
from ci_platform.source.own_lfs import OwnLfs, place_of
from dynflow.clock import ManualClock
from tests.ci_platform.git_repositories import working_copy

REPO, FORK = "ada/engine", "bob/engine"
OLD = time.time() - 200_000
NAMED = "a commit names it"


class World:
    """A repository of our own, and what is pushed to it."""

    def __init__(self, root: Path) -> None:
        self.work, self.source = working_copy(root / "work"), Source(root / "source")
        self.wanted = Wanted()
        self.store = self.of(1)

    def of(self, budget: int) -> PushedLfsFiles:
        async def wanted() -> Wanted:
            return self.wanted

        return PushedLfsFiles(self.source, Allowance(budget, timedelta()), wanted=wanted)

    def send(self, content: bytes, *, age: float = OLD) -> str:
        files, oid = OwnLfs(self.source.path(REPO)), hashlib.sha256(content).hexdigest()
        part = files.begin()
        part.write_bytes(content)
        files.keep(part, oid)
        os.utime(place_of(files.repository, oid), (age, age))
        return oid

    def commit(self, **names: bytes) -> str:
        """Commit pointers to contents."""
        return self.work.commit({f"{name}.bin": pointer(content) for name, content in names.items()})

    def push(self, *refs: str) -> None:
        self.work.git("push", "--quiet", "--force", str(self.source.path(REPO)), *refs)

    async def pins(self) -> dict[str, str | None]:
        return {item.name: item.pinned for item in await self.store.items()}


def pointer(content: bytes) -> bytes:
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()


@pytest.fixture
async def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    await world.source.create(REPO)
    return world


async def test_what_a_branch_a_tag_or_an_open_run_leads_to_stays(world: World) -> None:
    names = {
        name: f"{REPO}/{world.send(name.encode())}" for name in ("was", "branch", "tag", "run", "none", "new")
    }
    world.commit(a=b"was", noise=b"not here")
    world.commit(a=b"branch", text=b"x" * 5000)
    world.work.git("checkout", "--quiet", "-b", "other")
    world.commit(a=b"tag")
    world.work.git("tag", "-a", "v1", "-m", "a release")
    last = world.commit(a=b"run")
    world.push("main", "other", "v1")
    kept = {names[each]: NAMED for each in ("was", "branch", "tag", "run")}
    os.utime(place_of(world.source.path(REPO), names["new"].rpartition("/")[2]))
    assert await world.pins() == kept | {names["none"]: None, names["new"]: "used a short while ago"}
    world.push(":other")
    assert (await world.pins())[names["run"]] is None
    assert (await world.pins())[names["tag"]] == NAMED, "the tag leads there still"
    world.wanted.lfs.add((REPO, last))
    world.wanted.lfs.add((REPO, "f" * 40))
    assert (await world.pins())[names["run"]] == NAMED
    world.wanted.lfs.clear()
    report = await Collector([world.store], ManualClock(datetime.now(UTC))).collect()
    assert {item.name for item in report.items} == {names["none"], names["run"]}
    assert set(await world.pins()) == set(names.values()) - {names["none"], names["run"]}


async def test_within_the_budget_all_stay_and_a_dry_run_says_what_would_go(world: World) -> None:
    world.commit(a=b"named" * 100)
    world.send(b"named" * 100)
    world.push("main")
    older, newer = world.send(b"1" * 300, age=OLD - 9), world.send(b"2" * 300)
    collector = Collector([world.of(2000)], ManualClock(datetime.now(UTC)))
    report = await collector.collect()
    assert (report.items, report.kinds[0].kept["within the budget"].items) == ((), 2)
    for _ in range(2):
        report = await Collector([world.of(900)], ManualClock(datetime.now(UTC))).look()
        (item,) = report.items
        assert (item.kind, item.name, item.repo, item.size) == (
            "pushed lfs files",
            f"{REPO}/{older}",
            REPO,
            300,
        )
        assert item.why == "all pushed lfs files may take 900 bytes and take 1.1 KiB"
        assert {why: each.items for why, each in report.kinds[0].kept.items()} == {
            NAMED: 1,
            "within the budget": 1,
        }
    assert (await Collector([world.of(900)], ManualClock(datetime.now(UTC))).collect()).items == report.items
    assert f"{REPO}/{newer}" in await world.pins()


async def test_what_is_announced_or_named_after_the_plan_stays(world: World) -> None:
    announced, named, neither = (world.send(each) for each in (b"announced", b"named", b"neither"))
    await world.store.items()
    files = OwnLfs(world.source.path(REPO))
    assert files.announced(announced) is True
    world.commit(a=b"named")
    world.push("main")
    for oid, gone in ((announced, False), (named, False), (neither, True), (neither, True)):
        assert await world.store.collect(f"{REPO}/{oid}") is gone
        assert place_of(files.repository, oid).exists() is not gone
    assert files.announced(neither) is False, "who announces it is asked to send it"
    assert list((files.repository / "lfs/incoming").iterdir()) == []


async def test_forks_share_a_file_until_the_last_lets_go_of_it(world: World) -> None:
    oid = world.send(b"shared")
    await world.source.fork(REPO, FORK)
    sizes = {item.name: item.size for item in await world.store.items()}
    assert sizes == {f"{REPO}/{oid}": 0, f"{FORK}/{oid}": 0}
    assert await world.store.collect(f"{REPO}/{oid}") is True
    assert [(item.name, item.size) for item in await world.store.items()] == [(f"{FORK}/{oid}", 6)]
    assert place_of(world.source.path(FORK), oid).read_bytes() == b"shared"


async def test_nothing_goes_of_a_repository_that_cannot_be_read(world: World) -> None:
    oid = world.send(b"x")
    world.commit(a=b"x")
    world.push("main")
    path = world.source.path(REPO)
    for folder in path.glob("objects/[0-9a-f][0-9a-f]"):
        shutil.rmtree(folder)
    for pack in path.glob("objects/pack/*"):
        pack.unlink()
    assert await world.pins() == {f"{REPO}/{oid}": "not all of the repository's commits can be read"}
    assert await world.store.collect(f"{REPO}/{oid}") is False
    assert place_of(path, oid).exists()
