"""What looking after the room costs while there is too little of it: a share of the time, whatever the stores hold."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ci_platform.garbage import Allowance, Item
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.room import Room
from ci_platform.garbage.room_keeper import RoomKeeper
from ci_platform.source.folders import Sizes, initialise
from dynflow.clock import ManualClock
from tests.dynflow.disks import Disk, memory_disk

MEBIBYTE = 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "disk", 32)


class Slow:
    """Things of which each frees less than it says, behind a listing that takes its time."""

    kind = "things"
    allowance = Allowance(1 << 40, timedelta())

    def __init__(self, clock: ManualClock, takes: timedelta, count: int = 0) -> None:
        self.clock, self.takes, self.listed = clock, takes, 0
        self.here = [f"thing{number}" for number in range(count)]

    async def items(self) -> list[Item]:
        self.listed += 1
        self.clock.advance(self.takes)
        long_ago = datetime(2020, 1, 1, tzinfo=UTC)
        return [Item(name, None, 10, long_ago) for name in self.here]

    async def collect(self, name: str) -> bool:
        self.here.remove(name)
        return True


def keeper(disk: Disk, store: Slow) -> RoomKeeper:
    disk.fill(leave=4 * MEBIBYTE)
    room = Room([disk.folder], min_free=8 * MEBIBYTE)
    return RoomKeeper(Collector([store], store.clock), room, store.clock, lambda: None)


async def listings(keeper: RoomKeeper, store: Slow, seconds: int) -> int:
    """How often all is looked through in so many seconds, in which the keeper looks every two."""
    before, until = store.listed, store.clock.now() + timedelta(seconds=seconds)
    while store.clock.now() < until:
        await keeper.look()
        store.clock.advance(timedelta(seconds=2))
    return store.listed - before


async def test_while_nothing_can_be_collected_all_is_looked_through_once_a_minute(disk: Disk) -> None:
    store = Slow(ManualClock(), timedelta())
    assert await listings(keeper(disk, store), store, 600) == 10


async def test_looking_through_much_takes_a_share_of_the_time_also_where_something_goes_each_time(
    disk: Disk,
) -> None:
    store = Slow(ManualClock(), timedelta(seconds=10))
    short = keeper(disk, store)
    for _ in range(3):
        store.here.append(f"ended{store.listed}")
        assert await listings(short, store, 205) == 1
    assert store.here == []
    store.takes = timedelta(minutes=5)
    assert await listings(short, store, 3600) == 4, "never less often than every ten minutes"


async def test_where_looking_costs_nothing_what_has_become_garbage_goes_at_the_next_look(disk: Disk) -> None:
    store = Slow(ManualClock(), timedelta(), count=1)
    short = keeper(disk, store)
    await short.look()
    store.here.append("another")
    await short.look()
    assert store.here == []


def test_a_mirror_is_measured_again_when_its_packs_have_changed_or_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "o" / "r.git"
    initialise(repository, "main")
    sizes = Sizes()
    (first,) = sizes.held(tmp_path)
    (repository / "objects/info/large").write_bytes(bytes(100_000))
    (same,) = sizes.held(tmp_path)
    assert same == first, "not walked through"
    (repository / "objects/pack/pack-1.pack").write_bytes(bytes(100_000))
    (later,) = sizes.held(tmp_path)
    assert later.size >= first.size + 200_000
    (repository / "objects/info/larger").write_bytes(bytes(100_000))
    monkeypatch.setattr("ci_platform.source.folders._MEASURED_FOR", 0.0)
    (last,) = sizes.held(tmp_path)
    assert last.size >= later.size + 100_000
