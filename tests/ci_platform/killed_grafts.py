"""More for `killed_workspaces`: submodules, files of LFS, lazy trees, commands with caches; made, used, collected.

python -m tests.ci_platform.killed_grafts FOLDER SCENARIO [EVERY]
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

import anyio
import psutil

from ci_platform import copy_on_write, layers
from ci_platform.fetching import Remote
from ci_platform.garbage import Allowance, Collectable
from ci_platform.garbage.caches import CacheEntries
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.lfs import LfsFiles
from ci_platform.garbage.mirrors import Mirrors
from ci_platform.garbage.planning import Need
from ci_platform.garbage.trees import Trees
from ci_platform.garbage.wanted import Wanted
from ci_platform.hydration.plan import Threshold
from ci_platform.lfs_pointers import Pointed, Pointer
from ci_platform.source import GitFolder, Source
from ci_platform.source.lfs_store import check
from ci_platform.source.names import module_mirror
from ci_platform.source.own_lfs import OwnLfs
from ci_platform.submodules import Module
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.clock import SystemClock
from tests.ci_platform import cache_desk
from tests.ci_platform.killed_workspaces import REPO, SCENARIOS, Place, committed, main, seen

NOTHING_AT_ALL = Allowance(1, timedelta())
URL = "https://example.org/lib.git"
KEPT = (b"first content\n", b"#!/bin/sh\necho second\n")
KEPT_BY_GIT, FORK = "*/*.git/lfs/objects/??/??/*", "bob/engine"
CONFIG = GitFolder("0" * 40).config()


def below(root: Path) -> list[psutil.Process]:
    """Processes that work below a folder, by what they were started with: not this one, nor whoever started it."""
    family = {each.pid for each in (psutil.Process(), *psutil.Process().parents())}
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(root) in " ".join(process.info["cmdline"] or ()) and process.pid not in family
    ]


async def nobody_is_left(root: Path) -> None:
    """Wait until what was killed has taken along what belongs to it."""
    with anyio.fail_after(30):
        while below(root):  # noqa: ASYNC110 - processes set no event
            await anyio.sleep(0.02)
    assert str(root) not in await anyio.Path("/proc/self/mountinfo").read_text()


@dataclass
class Grafts:
    """A layer with files of LFS, and one with a submodule, from nothing."""

    store: str = module_mirror(REPO, URL, trusted=True)

    def forget(self, place: Place) -> None:
        place.forget("source/trees", "source/lfs", "source/mirrors", "workspaces")
        place.forget(f"source/git/{REPO}.git/lfs", f"source/git/{FORK}.git")
        self.mirror(place)

    def mirror(self, place: Place) -> None:
        """Have the submodule here, as whoever fetches it does."""
        mirror = place.root / "source/mirrors" / f"{self.store}.git"
        if not mirror.exists():
            shutil.copytree(place.root / "source/git" / f"{REPO}.git", mirror)

    async def before(self, place: Place) -> None:
        self.forget(place)

    def files(self) -> list[Pointed]:
        pointers = [Pointer(hashlib.sha256(each).hexdigest(), len(each)) for each in KEPT]
        blob = bytes.fromhex("ce013625030ba8dba906f756967f9e9ca394464a")
        names = (b"README.md", b"run.sh")
        return [
            Pointed(name, blob, name == b"run.sh", each) for name, each in zip(names, pointers, strict=True)
        ]

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        source, folder = workspaces._source, GitFolder(place.shas[0])
        for content, each in zip(KEPT, self.files(), strict=True):

            def write(file: IO[bytes], content: bytes = content) -> None:
                file.write(content)

            if source.lfs.missing(REPO, [each.pointer], trusted=True):
                source.lfs.put(REPO, each.pointer, write, trusted=True)
            self.push(place, content, each.pointer)
        if not await source.exists(FORK):
            await source.fork(REPO, FORK)
        await source.lfs_layer(REPO, folder, CONFIG, self.files())
        await source.module_layer(REPO, [self.module(place)], folder, CONFIG)

    def push(self, place: Place, content: bytes, pointer: Pointer) -> None:
        """Have a file in the repository itself, as `git lfs push` does."""
        own = OwnLfs(place.root / "source/git" / f"{REPO}.git")
        part = own.begin()
        part.write_bytes(content)
        own.keep(part, pointer.oid)

    def module(self, place: Place) -> Module:
        return Module(
            "lib", "vendor/lib", "modules/lib", "", URL, self.store, place.shas[1], registered=False
        )

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        source, folder = workspaces._source, GitFolder(place.shas[0])
        assert not list((place.root / "source/lfs").glob(".incoming/*"))
        for path in (
            *(place.root / "source/lfs").glob("_*/*/*/*"),
            *(place.root / "source/git").glob(KEPT_BY_GIT),
        ):
            check(path, Pointer(path.name, path.stat().st_size))
        self.mirror(place)
        await self.act(place, workspaces)
        lfs = await source.lfs_layer(REPO, folder, CONFIG)
        assert lfs is not None
        assert len(list((place.root / "source/git").glob(KEPT_BY_GIT))) == 2 * len(KEPT)
        assert ((lfs / "README.md").read_bytes(), (lfs / "run.sh").read_bytes()) == KEPT
        modules = await source.module_layer(REPO, [self.module(place)], folder, CONFIG)
        assert (modules / "vendor/lib/src/a.py").read_bytes() == b"changed\n"
        git = ["git", "-c", "safe.directory=*", "-C", str(modules / "vendor/lib")]
        environment = {"PATH": os.environ["PATH"], "GIT_OPTIONAL_LOCKS": "0"}
        for command in (["fsck", "--no-dangling", "--full"], ["diff-index", "--exit-code", "HEAD"]):
            await anyio.run_process([*git, *command], env=environment)


class GraftsCollected(Grafts):
    """The same, collected: layers first, then what they were made of."""

    async def before(self, place: Place) -> None:
        self.forget(place)
        await super().act(place, await place.workspaces())
        for pattern in ("trees/[!.]*/*/*", "mirrors/*/*"):
            for path in (place.root / "source").glob(pattern):
                os.utime(path, (time.time() - 50_000,) * 2)

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        async def wanted() -> Wanted:
            return Wanted()

        async def none() -> set[str]:
            return set()

        async def somewhere(_repo: str) -> Remote:
            return Remote(URL)

        source = workspaces._source
        stores: list[Collectable] = [
            Trees(source, NOTHING_AT_ALL, in_use=workspaces.in_use, wanted=wanted),
            LfsFiles(source.lfs, NOTHING_AT_ALL, safe_for=-60),
            Mirrors(source, NOTHING_AT_ALL, wanted=none, remote_of=somewhere),
        ]
        for _ in range(2):
            await Collector(stores, SystemClock()).collect(lambda: Need(1 << 40))

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        for held in await workspaces._source.mirrors():
            assert await workspaces._source.read_file(held.repo, place.shas[1], "src/a.py") == b"changed\n"
        grafts = Grafts()
        grafts.mirror(place)
        await grafts.after(place, workspaces)


class Lazy:
    """A tree that is used before it is on disk, and is written meanwhile; and the next commit's upon it."""

    async def before(self, place: Place) -> None:
        place.forget("source/trees", "workspaces")

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        source = Source(place.root / "source", lazy=Threshold(files=1))
        workspaces = Workspaces(
            place.root / "workspaces", source, copy_on_write.Method("overlay", {}), durable=False
        )
        try:
            await workspaces.fork("run0.build", REPO, place.shas[0])
            tree = await workspaces.prepare("run0.build", LayerAuthor("test", 1, 1), lazy=True)
            if tree.lazy is not None:
                mounted = tree.lazy.mount()
                reader = os.open("README.md", os.O_RDONLY, dir_fd=mounted)
                assert os.read(reader, 100) == b"hello\n"
                os.close(reader)
                os.close(mounted)
            (tree.upper / "made").write_text("made")
            await workspaces.check(tree)
            await workspaces.commit(tree)
            await workspaces.fork("run1.build", REPO, place.shas[1])
            await source.hydration.written(REPO)
        finally:
            await source.close()

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        await nobody_is_left(place.root / "source/trees")
        assert not list((place.root / "source/trees").glob(".lazy/*"))
        for number, sha in enumerate(place.shas):
            await workspaces.fork(f"run{number}.build", REPO, sha)
            assert await seen(workspaces, f"run{number}.build", "0") == committed(place, sha)
        names = [each.name for each in await workspaces.snapshots("run0.build")]
        if "1" in names:
            assert (await seen(workspaces, "run0.build", "1"))["made"] == b"made"


class WithCache:
    """A command that finds a cache, changes files and leaves another cache; then the caches are collected."""

    SCRIPT = "cat deps/count >>seen 2>/dev/null || true; echo x >>seen; echo 2 >deps/count; cat seen"

    async def before(self, place: Place) -> None:
        place.forget("desk")
        (place.root / "desk").mkdir()
        async with cache_desk.opened_desk(place.root / "desk") as desk:
            await desk.run("echo 1 >deps/count", cache_desk.spec("key-1"), step="first")

    async def command(self, desk: cache_desk.CacheDesk, attempt: int) -> str:
        spec = cache_desk.spec("key-2", restore=("key-1",))
        return (await desk.run(self.SCRIPT, spec, step="second", attempt=attempt)).output

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        async with cache_desk.opened_desk(place.root / "desk") as desk:
            await self.command(desk, 1)
            await self.collect(desk)

    async def collect(self, desk: cache_desk.CacheDesk) -> None:
        store = CacheEntries(desk.caches, NOTHING_AT_ALL)
        await Collector([store], SystemClock()).collect(lambda: Need(1 << 40))

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        """Whatever was killed: the next attempt of the step has it done once."""
        async with cache_desk.opened_desk(place.root / "desk") as desk:
            for entry in desk.caches.entries():
                (file,) = desk.caches._entries.folder(entry).glob("files/0/*")
                assert file.read_text() == {"key-1": "1\n", "key-2": "2\n"}[entry.key]
            kept = {entry.key for entry in desk.caches.entries()}
            output = await self.command(desk, 2)
            assert output.split() in (["1", "x"], ["2", "x"], ["x"]), (output, kept)
            await desk.execution.see_off(none_open)
            await self.collect(desk)
            assert desk.caches.entries() == []
            assert desk.leftovers() == []
            snapshots = await desk.workspaces.snapshots("main.fork")
            steps = [each.step for each in snapshots if each.step and each.outcome != "failed"]
            assert steps == ["second"], (steps, output, kept)
        await nobody_is_left(place.root / "desk")
        assert not list((place.root / "desk/commands").iterdir())


async def none_open() -> set[str]:
    return set()


SCENARIOS.update(
    {"grafts": Grafts, "grafts-collected": GraftsCollected, "lazy": Lazy, "with-cache": WithCache}
)

if __name__ == "__main__":
    root, name, *every = sys.argv[1:]
    layers.remove_tree(Path(root) / "desk")
    sys.stdout.write(f"{main(Path(root), name, *map(int, every))}\n")
