"""What a run that waits for days will want again, though nobody has it elsewhere any more by then."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ci_platform import layers
from ci_platform.fetching import Remote
from ci_platform.garbage import Allowance, Collectable
from ci_platform.garbage.collector import Collector, Report
from ci_platform.garbage.lfs import LfsFiles
from ci_platform.garbage.mirrors import Mirrors
from ci_platform.garbage.planning import Need
from ci_platform.garbage.trees import Trees
from ci_platform.garbage.wanted import Wanted, wanted_by, without_lfs_layer
from ci_platform.source.names import is_module_mirror
from dynflow.clock import ManualClock
from tests.ci_platform.grafting import REPO, Platform, opened_platform
from tests.ci_platform.test_lfs import Lfs
from tests.ci_platform.test_submodules import CLEAN, add

NOTHING_AT_ALL = Allowance(1, timedelta())
LATER = datetime.now(UTC) + timedelta(days=30)


@dataclass
class Machine:
    """A platform that is short of room, and runs that have not ended."""

    world: Platform
    lfs: Lfs
    root: Path
    still_open: set[str] = field(default_factory=set)

    async def wanted(self) -> Wanted:
        return await wanted_by(self.world.workspaces, self._open)

    async def _open(self) -> set[str]:
        return self.still_open

    async def collect(self) -> Report:
        """Collect all that may be, a month later."""
        source = self.world.source
        for pattern in ("trees/*/*/*", "mirrors/*/*"):
            for folder in (self.root / "source").glob(pattern):
                os.utime(folder, (time.time() - 2_600_000,) * 2)

        async def mirrors() -> set[str]:
            found = await self.wanted()
            return found.mirrors | {repo for repo, _ in found.commits}

        async def repos() -> set[str]:
            return await without_lfs_layer(source, await self.wanted())

        async def remote_of(_repo: str) -> Remote:
            return Remote("https://example.org/x")

        stores: list[Collectable] = [
            Mirrors(source, NOTHING_AT_ALL, wanted=mirrors, remote_of=remote_of),
            LfsFiles(source.lfs, NOTHING_AT_ALL, wanted=repos, safe_for=-60),
            Trees(source, NOTHING_AT_ALL, in_use=self.world.workspaces.in_use, wanted=self.wanted),
        ]
        return await Collector(stores, ManualClock(LATER)).collect(lambda: Need(1 << 40))

    async def forked(self) -> str:
        """A workspace with a submodule, and files that LFS keeps, of a run that has not ended."""
        one = self.world.forge.repository("bob/lib").commit({"lib.txt": b"lib"})
        app = await self.world.register(REPO)
        app.commit({"data": self.lfs.pointer(b"kept"), "plain": b"plain"})
        workspace = await self.world.fork(add(app, "lib", "../../bob/lib.git", one), lfs=True)
        self.still_open = {workspace.partition(".")[0]}
        return workspace

    def drop_upstream(self) -> None:
        """Have neither the submodule's commit nor LFS's files anywhere else."""
        next(iter((self.root / "forge").glob("bob/lib*"))).rename(self.root / "dropped")
        self.lfs.keeps.clear()

    def kinds(self) -> set[str]:
        found = (self.root / "source/trees").glob("[!.]*/*/*")
        return {path.name.partition("-")[0] for path in found}


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    async with opened_platform(tmp_path) as world:
        lfs = Lfs(world.forge)
        world.forge.more = lfs.answer
        yield Machine(world, lfs, tmp_path)


SHOW = f"{CLEAN}; cat data plain lib/lib.txt"


async def test_a_parked_run_goes_on_after_garbage_was_collected_and_upstream_has_dropped_its_submodule(
    machine: Machine,
) -> None:
    workspace = await machine.forked()
    machine.drop_upstream()
    report = await machine.collect()
    kept = {why for kind in report.kinds for why in kind.kept}
    assert kept == {"a run that has not ended stands on it", "a tree on disk has it"}
    assert {"base", "lfs", "modules"} <= machine.kinds()
    asked = len(machine.world.forge.asked)
    assert await machine.world.run(workspace, SHOW) == "keptplainlib"
    assert len(machine.world.forge.asked) == asked, "nothing was fetched"


async def test_a_parked_run_goes_on_after_the_machine_was_started_again_too(machine: Machine) -> None:
    """Then no tree counts any more: what they are made of stays as well."""
    workspace = await machine.forked()
    layers.remove_tree(machine.root / "source/trees" / REPO)
    machine.drop_upstream()
    report = await machine.collect()
    assert "a run that has not ended may need it" in {why for kind in report.kinds for why in kind.kept}
    assert any(is_module_mirror(each.repo) for each in await machine.world.source.mirrors())
    assert await machine.world.run(workspace, SHOW) == "keptplainlib"
    assert {"base", "lfs", "modules"} <= machine.kinds()
    await machine.collect()
    assert {"base", "lfs", "modules"} <= machine.kinds(), "what was made again stays as well"


async def test_nothing_of_it_stays_for_a_run_that_has_ended(machine: Machine) -> None:
    await machine.forked()
    machine.still_open.clear()
    await machine.collect()
    assert machine.kinds() == set()
    assert await machine.world.source.mirrors() == []
    await machine.collect()
    assert [path for path in (machine.root / "source/lfs").glob("_*/*/*/*") if path.is_file()] == []


async def test_a_record_of_an_earlier_release_has_no_layer_and_finds_it_all_the_same(
    machine: Machine,
) -> None:
    workspace = await machine.forked()
    record = machine.root / "workspaces" / workspace / "workspace.json"
    told = record.read_text()
    assert '"layer": "modules-' in told
    record.write_text(told.replace('"layer": ', '"unknown": '))
    assert await machine.world.run(workspace, SHOW) == "keptplainlib"
    assert (await machine.wanted()).layers == set()
