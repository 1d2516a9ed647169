"""A program that kills itself (SIGKILL) before the nth change of a file, for every n, and looks at what is left.

    python -m tests.ci_platform.killed_workspaces FOLDER SCENARIO [EVERY]

`FOLDER/source` has a repository with two commits. Each round is a fork of this process, in which all is loaded:
one does the work and dies, one starts anew, sweeps and checks. Prints how many places there are to die in; with
EVERY, it died in each so many-th of them alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio

from ci_platform import copy_on_write, layer_views, layers
from ci_platform.errors import NotFoundError
from ci_platform.fetching import Remote
from ci_platform.garbage import Allowance, Collectable
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.logs import RunLogs
from ci_platform.garbage.mirrors import Mirrors
from ci_platform.garbage.planning import Need
from ci_platform.garbage.trees import Trees
from ci_platform.garbage.wanted import Wanted
from ci_platform.garbage.workspaces import EndedRuns, Failures
from ci_platform.lineage import workspace_id_of
from ci_platform.logs import LogKey, Logs
from ci_platform.source import Source
from ci_platform.workspace_forks import Patch, WorkspaceForks
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.clock import SystemClock

REPO, ID = "ada/engine", "run1.build"
CHANGES = {
    "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.utime",
    "os.setxattr", "os.truncate",
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MOST = 3000


@dataclass
class Place:
    """What every round works with."""

    root: Path
    shas: list[str]

    async def workspaces(self) -> Workspaces:
        source = Source(self.root / "source")
        await source.sweep()
        method = copy_on_write.Method("overlay" if os.geteuid() == 0 else "user-overlay", {})
        made = Workspaces(self.root / "workspaces", source, method)
        await made.sweep()
        return made

    def forget(self, *names: str) -> None:
        for name in names:
            layers.remove_tree(self.root / name)


async def commit(workspaces: Workspaces, step: str, files: int = 12, workspace_id: str = ID) -> None:
    tree = await workspaces.prepare(workspace_id, LayerAuthor(step, 1, 1))
    for number in range(files):
        (tree.upper / f"{step}-{number}").write_text(step)
    (tree.upper / "same").write_text(step)
    await workspaces.commit(tree)


async def seen(workspaces: Workspaces, workspace_id: str, name: str) -> dict[str, bytes]:
    output = io.BytesIO()
    async with workspaces.view(workspace_id, name) as view:
        layer_views.write_tar(view.lowers, output)
        check_git(view.lowers)
    output.seek(0)
    with tarfile.open(fileobj=output) as archive:
        files = {
            member.name: archive.extractfile(member) for member in archive.getmembers() if member.isreg()
        }
        return {name: file.read() for name, file in files.items() if file is not None}


def check_git(lowers: tuple[Path, ...]) -> None:
    (git,) = (lower / ".git" for lower in lowers if (lower / ".git" / "HEAD").exists())
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
    environment |= {"GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    for command in (["fsck", "--no-dangling", "--full"], ["diff-index", "--cached", "--exit-code", "HEAD"]):
        done = subprocess.run(
            ["git", "--git-dir", str(git), *command], env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr, done.stdout)


def committed(place: Place, sha: str) -> dict[str, bytes]:
    repository = place.root / "source/git" / f"{REPO}.git"
    packed = subprocess.run(
        ["git", "--git-dir", str(repository), "archive", sha], stdout=subprocess.PIPE, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        files = {
            member.name: archive.extractfile(member) for member in archive.getmembers() if member.isreg()
        }
        return {name: file.read() for name, file in files.items() if file is not None}


def nothing_is_left(place: Place) -> None:
    for folder in ("workspaces/.new", "workspaces/.trash", "source/trees/.building", "source/trees/.trash"):
        assert list((place.root / folder).iterdir()) == [], folder
    assert list((place.root / "workspaces").glob("*/pending/*")) == []
    for layer in (place.root / "workspaces/.layers").glob("*"):
        assert (layer / "layer.json").stat().st_nlink > 1, "a layer that nobody shows"


class Fork:
    """A tree, a delta, a `.git` each and two workspaces, from nothing."""

    async def before(self, place: Place) -> None:
        place.forget("source/trees", "workspaces")

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        for number, sha in enumerate(place.shas):
            await workspaces.fork(f"run{number}.build", REPO, sha)

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        await self.act(place, workspaces)
        for number, sha in enumerate(place.shas):
            assert await seen(workspaces, f"run{number}.build", "0") == committed(place, sha)


class Seal:
    """Two parallel commands, both kept."""

    async def before(self, place: Place) -> None:
        place.forget("workspaces")
        workspaces = await place.workspaces()
        await workspaces.fork(ID, REPO, place.shas[0])
        await commit(workspaces, "first")

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        async with anyio.create_task_group() as tasks:
            for step in ("one", "other"):
                tasks.start_soon(commit, workspaces, step)

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        last = (await workspaces.snapshots(ID))[-1].name
        found = await seen(workspaces, ID, last)
        for step in ("first", "one", "other"):
            count = sum(name.startswith(f"{step}-") for name in found)
            assert count in {0, 12}, (step, count)
            assert count or step != "first", "what was kept is kept"
        # The engine does not know that the step was done: it is done again, from a clean tree.
        await commit(workspaces, "one")
        assert len([each for each in await workspaces.snapshots(ID) if each.step == "one"]) == 1


class Drop:
    """A command that failed: what it left is set aside, the fourth of its kind."""

    async def before(self, place: Place) -> None:
        place.forget("workspaces")
        workspaces = await place.workspaces()
        await workspaces.fork(ID, REPO, place.shas[0])
        for _ in range(3):
            await self._fail(workspaces)

    async def _fail(self, workspaces: Workspaces) -> None:
        tree = await workspaces.prepare(ID, LayerAuthor("test", 1, 1))
        for number in range(12):
            (tree.upper / f"left-{number}").write_text("x")
        await workspaces.drop(tree, keep=True)

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        await self._fail(workspaces)

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        assert await seen(workspaces, ID, "0") == committed(place, place.shas[0])
        failed = [each for each in await workspaces.snapshots(ID) if each.outcome == "failed"]
        assert 3 <= len(failed) <= 4
        for each in failed:
            found = await seen(workspaces, ID, each.name)
            assert sum(name.startswith("left-") for name in found) == 12


class Flatten:
    """A command on so many layers that they are merged first; then they are taken back."""

    async def before(self, place: Place) -> None:
        place.forget("workspaces")
        workspaces = await place.workspaces()
        await workspaces.fork(ID, REPO, place.shas[0])
        for number in range(17):
            await commit(workspaces, f"s{number}", files=1)

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        await workspaces.drop(await workspaces.prepare(ID, LayerAuthor("next", 1, 1)))
        await workspaces.rewind(ID, [("s16", 1), ("s15", 1)])
        await workspaces.drop(await workspaces.prepare(ID, LayerAuthor("next", 1, 1)))

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        live = [each.step for each in await workspaces.snapshots(ID) if each.step]
        assert live[:15] == [f"s{number}" for number in range(15)]
        tree = await workspaces.prepare(ID, LayerAuthor("look", 1, 1))
        output = io.BytesIO()
        layer_views.write_tar(tree.lowers, output)
        output.seek(0)
        with tarfile.open(fileobj=output) as archive:
            names = [name for name in archive.getnames() if name.endswith("-0")]
            same = archive.extractfile("same")
            assert same is not None
            assert same.read().decode() == live[-1]
        assert sorted(names) == sorted(f"{step}-0" for step in live)
        await workspaces.drop(tree)


class Snapshots:
    """A fork of a snapshot, and the end of what it was forked from."""

    async def before(self, place: Place) -> None:
        await Seal().before(place)

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        await workspaces.fork_snapshot("run2.build", ID, "1")
        await workspaces.delete(ID)

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        there = {path.name for path in (place.root / "workspaces").glob("run*")}
        assert there, "one of the two is there at any time"
        for name in there:
            found = await seen(workspaces, name, "1")
            assert sum(each.startswith("first-") for each in found) == 12


class Collect:
    """All that can be collected: a mirror, trees, a workspace, what a failed command left, logs."""

    OTHER = "ada/mirror"

    async def before(self, place: Place) -> None:
        place.forget("source/trees", "source/mirrors", "workspaces", "logs")
        workspaces = await place.workspaces()
        for number, sha in enumerate(place.shas):
            await workspaces.fork(f"run{number}.build", REPO, sha)
        await commit(workspaces, "first")
        tree = await workspaces.prepare(ID, LayerAuthor("test", 1, 1))
        (tree.upper / "left").write_text("x")
        await workspaces.drop(tree, keep=True)
        for step in ("first", "test"):
            writer = Logs(place.root / "logs").writer(LogKey("run1", step))
            writer.write(b"one\ntwo\n")
            writer.finish()
        mirror = place.root / "source/mirrors" / f"{self.OTHER}.git"
        shutil.copytree(place.root / "source/git" / f"{REPO}.git", mirror)
        for path in (mirror, *(place.root / "source/trees").glob("[!.]*/*/*")):
            os.utime(path, (time.time() - 50_000,) * 2)

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        async def none() -> set[Any]:
            return set()

        async def nothing() -> Wanted:
            return Wanted()

        async def no_repos() -> dict[str, str]:
            return {}

        async def somewhere(_repo: str) -> Remote:
            return Remote("https://example.org")

        allowance, source, logs = Allowance(1, timedelta()), workspaces._source, Logs(place.root / "logs")
        stores: list[Collectable] = [
            Mirrors(source, allowance, wanted=none, remote_of=somewhere),
            Failures(workspaces, allowance, kept_for=timedelta(0)),
            EndedRuns(workspaces, allowance, still_open=none),
            Trees(source, allowance, in_use=workspaces.in_use, wanted=nothing),
            RunLogs(logs, allowance, SystemClock(), kept_for=timedelta(1), still_open=none, repos=no_repos),
        ]
        await Collector(stores, SystemClock()).collect(lambda: Need(1 << 40))

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        source, logs = workspaces._source, Logs(place.root / "logs")
        logs.sweep()
        for folder in ("source/trash", "logs"):
            assert list((place.root / folder).glob(".trash-*")) == [], folder
        for step in ("first", "test"):
            lines = [line.text for line in (await logs.read(LogKey("run1", step))).lines]
            assert lines in (["one", "two"], ["this log was deleted to make room"]), lines
        for held in await source.mirrors():
            assert await source.read_file(held.repo, place.shas[1], "src/a.py") == b"changed\n"
        try:
            found = await workspaces.snapshots(ID)
        except NotFoundError as error:
            if "its files were collected" not in str(error):
                raise
            assert [path.name for path in (place.root / "workspaces" / ID).iterdir()] == ["collected.json"]
            assert await source.mirrors() == [], "what came before is gone"
        else:
            assert sum(each.startswith("first-") for each in await seen(workspaces, ID, "1")) == 12
            for each in found[2:]:
                assert (await seen(workspaces, ID, each.name))["left"] == b"x"
        for number, sha in enumerate(place.shas):
            await workspaces.fork(f"run{number}.build", REPO, sha)
            assert await seen(workspaces, f"run{number}.build", "0") == committed(place, sha)


class ForkedRun:
    """The workspaces of a run, made anew for another one, with a patch on top. What is missing is made afterwards."""

    KEPT = (("build", 1), ("one", 1))
    PATCH = "--- a/same\n+++ b/same\n@@ -1 +1 @@\n-one\n\\ No newline at end of file\n+patched\n"

    async def before(self, place: Place) -> None:
        place.forget("workspaces")
        workspaces = await place.workspaces()
        await workspaces.fork(self.of("run1"), REPO, place.shas[0])
        for step in ("one", "other"):
            await commit(workspaces, step, workspace_id=self.of("run1"))

    def of(self, run_id: str) -> str:
        return workspace_id_of(run_id, "build", 1)

    async def act(self, place: Place, workspaces: Workspaces) -> None:
        forks = WorkspaceForks(place.root / "workspaces", workspaces)
        await forks.fork("run1", "run2", self.KEPT, Patch(self.PATCH, self.of("run1")))

    async def after(self, place: Place, workspaces: Workspaces) -> None:
        await self.act(place, workspaces)
        names = [each.name for each in await workspaces.snapshots(self.of("run2"))]
        assert names == ["0", "1", "2"]
        found = await seen(workspaces, self.of("run2"), "2")
        theirs = await seen(workspaces, self.of("run1"), "1")
        assert found.pop("same") == b"patched\n"
        assert theirs.pop("same") == b"one"
        assert found == theirs
        assert sum(name.startswith("one-") for name in found) == 12


SCENARIOS: dict[str, Callable[[], Any]] = {
    "fork": Fork, "seal": Seal, "drop": Drop, "flatten": Flatten, "snapshots": Snapshots, "collect": Collect,
    "forked-run": ForkedRun,
}  # fmt: skip


def die_at(number: int) -> None:
    """Have this process killed before its `number`th change of a file."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in CHANGES or (event == "open" and arguments[2] & WRITES):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def apart(work: Callable[[], Awaitable[None]]) -> int:
    """Do some work in a fork of this process; return how it ended: 0 well, below zero by a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:

            async def main() -> None:
                await work()

            anyio.run(main)
            code = 0
        except BaseException:  # noqa: BLE001 - the fork ends here, whatever it was
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path, name: str, every: int = 1) -> int:
    """Kill at every change until the scenario ends by itself; return how many places there are."""
    place = Place(root, json.loads((root / "shas.json").read_text()))
    scenario = SCENARIOS[name]()

    async def check() -> None:
        workspaces = await place.workspaces()
        nothing_is_left(place)
        await scenario.after(place, workspaces)

    for number in range(1, MOST, every):

        async def act(number: int = number) -> None:
            workspaces = await place.workspaces()
            die_at(number)
            await scenario.act(place, workspaces)

        assert apart(lambda: scenario.before(place)) == 0
        ended = apart(act)
        assert ended in {0, -signal.SIGKILL}, ended
        assert apart(check) == 0, f"killed before change {number} of {name}"
        if ended == 0:
            return number - 1
    raise AssertionError(f"{name} goes on after {MOST} changes")


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))}\n")
