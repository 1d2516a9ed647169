"""A program that kills itself before the nth request to the engine of containers, while it makes and collects images.

    python -m tests.ci_platform.killed_images FOLDER [EVERY]

In the manner of `killed_workspaces`; prints how many requests there are.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ci_platform import copy_on_write, layers
from ci_platform.errors import ImageNotFoundError
from ci_platform.garbage import Allowance
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.images import MadeImages
from ci_platform.image_making import ImageMaking, Maker
from ci_platform.images import PinnedImages
from ci_platform.logs import Logs
from ci_platform.model import Repository, Run, RunImage
from ci_platform.sandboxes import SandboxLimits
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.source import Source
from ci_platform.store import Store, Transaction
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.clock import SystemClock
from pipelines.contract import Command
from tests.ci_platform.git_repositories import working_copy
from tests.ci_platform.killed_workspaces import apart
from tests.docker_engine import IMAGE
from tests.tiny_image import docker

REPO, RUN = "ada/engine", "1" * 32
MOST = 400


@dataclass
class Bench:
    making: ImageMaking
    sandbox: ContainerSandbox
    garbage: MadeImages
    store: Store
    workspaces: Workspaces
    sha: str

    async def snapshot(self) -> str:
        workspace = await self.workspaces.fork(f"{RUN}.fork", REPO, self.sha)
        command = Command(workspace, ("sh", "-c", "echo installed >/it"), "container")
        return await self.making.snapshot(Maker(RUN, REPO, LayerAuthor("install", 1, 1)), command, "key")

    async def collect(self) -> None:
        await self.store.write(lambda tx: tx.remove(RunImage))
        await Collector([self.garbage], SystemClock()).collect()


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Bench]:
    """Start what of a platform makes images, as one that may have been killed before."""
    home, clock = (root / "home").read_text(), SystemClock()
    source, store = Source(root / "source"), Store(f"sqlite:///{root / 'platform.db'}")
    await source.sweep()
    workspaces = Workspaces(root / "workspaces", source, copy_on_write.probe(root / "workspaces"))
    await workspaces.sweep()
    await store.open()
    sandbox, pinned = ContainerSandbox(image=IMAGE, home=home), PinnedImages(store, clock)
    making = ImageMaking(
        store,
        clock,
        workspaces=workspaces,
        logs=Logs(root / "logs"),
        images=pinned,
        sandbox=sandbox,
        limits=SandboxLimits(),
    )

    async def runs() -> set[str]:
        return {RUN}

    garbage = MadeImages(sandbox, pinned, store, Allowance(1, timedelta()), still_open=runs)
    try:
        yield Bench(making, sandbox, garbage, store, workspaces, (root / "sha").read_text())
    finally:
        await sandbox.close()
        await store.close()


async def prepare(root: Path) -> None:
    """Make the repository and the run."""
    remote, source = working_copy(root / "remote"), Source(root / "source")
    (root / "sha").write_text(remote.commit({"a": b"1"}))
    (root / "home").write_text(secrets.token_hex(6))
    await source.create(REPO)
    remote.git("push", "--quiet", str(source.path(REPO)), "main")
    async with opened(root) as bench:

        def add(tx: Transaction) -> None:
            now = SystemClock().now()
            tx.add(Repository(name=REPO, forge="local", created_at=now))
            tx.add(
                Run(
                    id=RUN, repo=REPO, number=1, event="push", action="push", sha=bench.sha, ref="refs/heads/main",
                    branch="main", created_at=now,
                )
            )  # fmt: skip

        await bench.store.write(add)


async def act(root: Path, number: int) -> None:
    """Make a snapshot, have it given again, collect it."""
    async with opened(root) as bench:
        die_at_request(number)
        assert await bench.snapshot() == await bench.snapshot()
        await bench.collect()


async def check(root: Path) -> None:
    """Start anew: what is given is there, whoever asks again has it, and nothing stays for ever."""
    async with opened(root) as bench:
        await bench.sandbox.sweep()
        home = (root / "home").read_text()
        assert containers(root) == []
        for row in await bench.store.read(lambda tx: tx.all(RunImage)):
            if not row.asked.startswith("sha256:"):
                continue
            try:
                await bench.sandbox.resolve(row.exact, print)
            except ImageNotFoundError:
                # Held, and killed before it was looked for: who asks by the key gets one that is there.
                assert await bench.snapshot() != row.exact
        exact = await bench.snapshot()
        assert exact in docker("images", "--quiet", "--no-trunc", f"dynflow-made/{home}-*")
        items = {item.name: item.pinned for item in await bench.garbage.items()}
        assert items.pop(exact) is not None
        assert not any(items.values()), "what a killed platform has made and told nobody is garbage"
        await bench.collect()
        assert await bench.garbage.items() == []
    assert containers(root) == []


def containers(root: Path) -> list[str]:
    """The containers that were given something of this folder."""
    found = docker("ps", "--all", "--quiet", "--no-trunc").split()
    mounts = [docker("inspect", "--format", "{{json .HostConfig.Binds}}", each) for each in found]
    return [text for text in mounts if str(root) in text]


def die_at_request(number: int) -> None:
    """Have this process killed before its `number`th request to the engine."""
    left = number

    def hook(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "http.client.send":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(root: Path, every: int = 1) -> int:
    """Kill before every request until the work ends by itself; return how many there are."""
    layers.remove_tree(root)
    root.mkdir()
    assert apart(lambda: prepare(root)) == 0
    for number in range(1, MOST, every):
        ended = apart(lambda number=number: act(root, number))  # type: ignore[misc]
        assert ended in {0, -signal.SIGKILL}, ended
        assert apart(lambda: check(root)) == 0, f"killed before request {number}"
        if ended == 0:
            return number - 1
    raise AssertionError(f"it goes on after {MOST} requests")


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]), *map(int, sys.argv[2:]))}\n")
