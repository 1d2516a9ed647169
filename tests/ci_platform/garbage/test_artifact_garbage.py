"""Artifacts as garbage: their time, their budget and floor, what holds them; and a disk on which there is no room."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from ci_platform.errors import NotFoundError, UnavailableError
from ci_platform.garbage import Allowance
from ci_platform.garbage.artifacts import KeptArtifacts
from ci_platform.garbage.collector import Collector
from ci_platform.model import ArtifactRow, Repository, RunFork
from ci_platform.store import col
from tests.ci_platform.artifact_desk import ArtifactDesk, opened_desk
from tests.ci_platform.cache_desk import REPO, RUNS
from tests.ci_platform.garbage.test_stores import OpenRuns
from tests.ci_platform.harness import Harness
from tests.ci_platform.test_retention import retention
from tests.ci_platform.test_runs import finish
from tests.dynflow.disks import Disk, memory_disk

NEVER = 1 << 40


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[ArtifactDesk]:
    async with opened_desk(tmp_path) as desk:
        for of in RUNS:
            await desk.change(of, conclusion="success")
        yield desk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "disk")


def collector(
    desk: ArtifactDesk,
    still_open: OpenRuns,
    *,
    own: Allowance | None = None,
    outside: Allowance | None = None,
) -> Collector:
    """Return a collector of artifacts, without budgets where none are given."""
    nothing = Allowance(NEVER, timedelta())
    stores = [
        KeptArtifacts(
            desk.artifacts,
            desk.desk.store,
            desk.clock,
            (outside if is_outside else own) or nothing,
            still_open=still_open,
            outside=is_outside,
        )
        for is_outside in (False, True)
    ]
    return Collector(stores, desk.clock)


async def there(desk: ArtifactDesk) -> list[str]:
    return [f"{row.run_id}/{row.name}" for row in await desk.artifacts.records.live()]


async def test_artifacts_go_when_their_time_is_over_unless_something_needs_them(desk: ArtifactDesk) -> None:
    for of in ("main", "feature", "release", "tag"):
        await desk.upload("x", "README.md", of=of, retention="5 days")
    await desk.upload("y", "README.md", of="tag", step="other", retention="6 days")
    fork = RunFork(run_id="pull", ancestors=["feature"], kept=[], asked_by="a", inputs={}, patched_files=[])
    await desk.desk.store.write(lambda tx: tx.add(fork))
    await desk.change("pull", forked_from="feature", conclusion=None)
    still_open = OpenRuns("main", "pull")
    work = collector(desk, still_open)
    desk.clock.advance(timedelta(days=5, seconds=1))
    async with desk.artifacts.opened("release", "x"):
        would = await work.look()
        assert (len(would.items), len(await there(desk))) == (1, 5), "it is said, and nothing is done"
        report = await work.collect()
    assert [(item.kind, item.name, item.why, item.repo) for item in report.items] == [
        ("artifacts", "tag/x", "its time is over", REPO)
    ]
    kinds = {kind.kind: kind for kind in report.kinds}
    assert {why: some.items for why, some in kinds["artifacts"].kept.items()} == {
        "a run that has not ended may need it": 2,
        "somebody reads it": 1,
        "within the budget": 1,
    }
    assert await there(desk) == ["main/x", "feature/x", "release/x", "tag/y"]
    with pytest.raises(NotFoundError, match=r"deleted at 2026-01-06 00:00 UTC: its time was over"):
        await desk.artifacts.records.named("tag", "x")
    still_open.run_ids.clear()
    await desk.change("pull", conclusion="failure")
    await work.collect()
    assert await there(desk) == ["tag/y"]
    # With its repository it goes at once.
    gone = {"deleted_at": desk.clock.now()}
    await desk.desk.store.write(lambda tx: tx.change(Repository, gone, col(Repository.name) == REPO))
    await work.collect()
    assert (await there(desk), desk.on_disk(), desk.objects()) == ([], [], 0)


async def test_artifacts_of_forks_take_no_room_from_others(desk: ArtifactDesk) -> None:
    await desk.make("head -c 20000 /dev/urandom >a; head -c 20000 /dev/urandom >b")
    await desk.make("head -c 90000 /dev/urandom >f", of="fork")
    for number, name in enumerate(("a", "b", "a")):
        await desk.upload(f"{name}{number}", name, step=name + str(number))
        desk.clock.advance(timedelta(minutes=1))
    for number in range(3):
        await desk.upload(f"f{number}", "f", of="fork", step=str(number))
        desk.clock.advance(timedelta(minutes=1))
    # Of forks' the oldest go down to their own budget; of the others none, though these are older.
    work = collector(
        desk, OpenRuns(), own=Allowance(NEVER, timedelta()), outside=Allowance(120_000, timedelta())
    )
    report = await work.collect()
    assert {item.kind for item in report.items} == {"artifacts of forks"}
    assert await there(desk) == ["main/a0", "main/b1", "main/a2", "fork/f2"]
    # What is used now, and the newest of a repository up to its floor, stay whatever a budget says.
    floor = Allowance(1, timedelta(), of_repository=30_000)
    await collector(desk, OpenRuns(), own=floor).collect()
    assert await there(desk) == ["main/a2", "fork/f2"]
    # A stranger's run that waits for ever holds what it has uploaded for its time, and no longer.
    waits = collector(desk, OpenRuns("fork", "main"), outside=Allowance(1, timedelta()))
    assert len((await waits.collect()).items) == 0
    desk.clock.advance(timedelta(days=31))
    assert [item.name for item in (await waits.collect()).items] == ["fork/f2"]
    with pytest.raises(NotFoundError, match="there was no room for it"):
        await desk.download("b1")
    # The file that both had is whole in the one that is left.
    await desk.download("a2", path="out")
    assert await desk.shown("cmp a out/a && echo same") == "same\n"


async def test_a_run_stays_as_long_as_its_artifacts(platform: Harness) -> None:
    run = await platform.start()
    await finish(platform, run.id)
    now = platform.clock.now()
    row = ArtifactRow(
        id="1", run_id=run.id, repo=run.repo, tenant="t", name="x", step="s", count=1, attempt=1, run_attempt=1,
        outside=False, digest="sha256:", files=1, size=5 << 40, taken=0, created_at=now, expires_at=now,
    )  # fmt: skip
    await platform.store.write(lambda tx: tx.add(row))
    platform.advance(21 * 86_400)
    assert await retention(platform, []).purge() == 0
    assert (await platform.store.read(lambda tx: tx.all(ArtifactRow)))[0].size == 5 << 40
    await platform.store.write(lambda tx: tx.change(ArtifactRow, {"deleted_at": now}))
    assert await retention(platform, []).purge() == 1
    assert await platform.store.read(lambda tx: tx.all(ArtifactRow)) == []


async def test_an_upload_on_a_full_disk_is_our_trouble_and_leaves_nothing(tmp_path: Path, disk: Disk) -> None:
    async with opened_desk(tmp_path, disk=disk.folder) as desk:
        await desk.make("head -c 300000 /dev/urandom >f")
        before = await desk.upload("before", "f")
        disk.fill()
        for _ in range(2):
            with pytest.raises(UnavailableError, match="disk is full"):
                await desk.upload("x", "f", step="other")
            assert await there(desk) == ["main/before"]
            assert list(desk.shelf.glob(".new/*")) == []
        # What is there can be read and deleted all the same.
        assert await desk.download("before", path="out") == before
        await desk.artifacts.forget(
            [row.id for row in await desk.artifacts.records.live()], "there is no room"
        )
        assert desk.on_disk() == []
        disk.empty()
        assert (await desk.upload("x", "f", step="other")).digest == before.digest
