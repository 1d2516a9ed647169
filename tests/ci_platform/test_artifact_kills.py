"""kill -9 before each change of a file that uploading, replacing and deleting make: an artifact is whole, or gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from ci_platform.artifacts import Artifacts
from ci_platform.artifacts.asking import Upload
from ci_platform.artifacts.shelf import Shelf
from ci_platform.capabilities import RunIdentity
from ci_platform.copy_on_write import Method
from ci_platform.source import Source
from ci_platform.stacks import LayerAuthor
from ci_platform.store import Store
from ci_platform.workspaces import Workspaces
from dynflow.clock import SystemClock
from tests.ci_platform.artifact_desk import opened_desk
from tests.ci_platform.cache_desk import REPO
from tests.ci_platform.killed_workspaces import apart, die_at

METHOD = Method("overlay" if os.geteuid() == 0 else "user-overlay", {})
CONTENTS = {"first": "0\n", "second": "0\n", "third": "3\n"}
MOST = 400
# All of them take half a minute.
EVERY = 9 if os.environ.get("CI") else 1


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Artifacts]:
    """Start over the folder, without what takes long and is not looked at here."""
    store = Store(f"sqlite:///{root / 'platform.db'}")
    await store.open(look_only=True)
    workspaces = Workspaces(root / "workspaces", Source(root / "source"), METHOD)
    artifacts = Artifacts(Shelf(root / "artifacts"), store, SystemClock(), workspaces)
    await artifacts.sweep()
    yield artifacts
    await store.close()


async def upload(artifacts: Artifacts, name: str, attempt: int, *patterns: str) -> None:
    identity = RunIdentity("main", REPO, "0" * 40, None, trusted=True)
    wanted = Upload(name, {each: (each,) for each in patterns}, (), artifacts.limits.retentions.default)
    await artifacts.upload(identity, LayerAuthor(f"keep {name}", 1, attempt), "main.fork", wanted)


async def work(artifacts: Artifacts, attempt: int) -> None:
    """Upload two artifacts that share a file, the first in the place of an earlier one; delete the second."""
    await upload(artifacts, "kept", attempt, "first", "second", "third")
    await upload(artifacts, "gone", attempt, "third")
    await artifacts.forget(
        [row.id for row in await artifacts.records.of_run("main") if row.name == "gone"], "x"
    )


async def check(root: Path) -> None:
    """Look at what is there after a start."""
    async with opened(root) as artifacts:
        rows = await artifacts.records.live()
        assert [row.name for row in rows] in (["kept"], ["kept", "gone"], ["gone", "kept"])
        for row in rows:
            async with artifacts.opened("main", row.name) as found:
                shown = {each.path: b"".join(found.pieces(each)).decode() for each in found.entries}
                assert shown == {name: CONTENTS[name] for name in shown}
                assert len(shown) == row.files == (3 if row.name == "kept" else 1)
        shelf = root / "artifacts"
        assert sorted(path.name for path in shelf.glob("[!.]*/[!.]*")) == sorted(row.id for row in rows)
        assert [*shelf.glob(".new/*"), *shelf.glob(".trash/*")] == []
        linked = {path.stat().st_ino for path in shelf.glob("*/*/files/*")}
        assert {path.stat().st_ino for path in shelf.glob("*/.objects/*")} <= linked


async def prepare(root: Path) -> None:
    async with opened_desk(root) as desk:
        await desk.make("".join(f"printf '{content}' >{name};" for name, content in CONTENTS.items()))
    async with opened(root) as artifacts:
        await upload(artifacts, "kept", 1, "first", "second", "third")


def main(root: Path) -> int:
    """Kill at every change until the work ends by itself; return how many there are."""
    anyio.run(prepare, root)
    for number in range(1, MOST, EVERY):

        async def act(number: int = number) -> None:
            async with opened(root) as artifacts:
                die_at(number)
                await work(artifacts, 1 + number)

        ended = apart(act)
        assert ended in {0, -signal.SIGKILL}, ended
        assert apart(lambda: check(root)) == 0, f"killed before change {number}"
        if ended == 0:
            return number - 1
    raise AssertionError(f"it goes on after {MOST} changes")


@pytest.mark.slow
async def test_a_kill_before_any_change_leaves_whole_artifacts_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ci_platform.test_artifact_kills", str(tmp_path / "kills")]
    done = subprocess.run(  # noqa: ASYNC221 - nothing else runs here
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 30


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir()
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
