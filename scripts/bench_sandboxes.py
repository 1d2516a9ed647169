"""How long it takes to run `true`: plainly, in each sandbox, and with `docker run`. A Markdown table.

    .venv/bin/python scripts/bench_sandboxes.py [ROUNDS]

The ways take turns, so that a busy moment of the machine hits all of them alike. `network=none` everywhere.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ci_platform import layers
from ci_platform.errors import PlatformError
from ci_platform.sandboxes import SANDBOX_UID, Sandbox, SandboxJob, Tree
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.sandboxes.isolate import IsolateSandbox

PAUSE = 0.03
"""Seconds between two commands, as between a pipeline's steps; the next sandbox is prepared meanwhile."""

IMAGE = "dynflow/base:latest"
Way = Callable[[], Awaitable[None]]


class Trees:
    """Fresh overlays over one small layer."""

    def __init__(self, home: Path) -> None:
        self.home, self.count = home, 0
        self.lower = self.folder("lower")

    def folder(self, name: str) -> Path:
        """Make a folder that commands may write to."""
        folder = self.home / name
        folder.mkdir()
        if os.geteuid() == 0:
            os.chown(folder, SANDBOX_UID, SANDBOX_UID)
        return folder

    def tree(self) -> Tree:
        """Make an overlay."""
        self.count += 1
        return Tree(self.folder(f"upper{self.count}"), self.folder(f"work{self.count}"), (self.lower,))


def sandboxed(sandbox: Sandbox, trees: Trees, scope: str = "") -> Way:
    """Return a way that runs `true` in a sandbox over an overlay, as part of the run `scope`."""

    async def run() -> None:
        job = SandboxJob("bench", ("true",), trees.tree(), scope=scope)
        outcome = await sandbox.run(job, lambda _: None)
        assert outcome.exit_code == 0

    return run


def plain(*command: str) -> Way:
    """Return a way that runs a command as it is."""

    async def run() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: ASYNC221 - nothing else goes on

    return run


async def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of each way; a way that does not work here is left out."""
    taken: dict[str, list[float]] = {}
    for name, way in ways.items():
        try:
            await way()
            taken[name] = []
        except (PlatformError, OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: not here ({error})", file=sys.stderr)
    for turn in range(rounds):
        for name, times in taken.items():
            if name.startswith("docker") and turn % 10:
                continue  # hundred times slower than the others
            started = time.perf_counter()
            await ways[name]()
            times.append((time.perf_counter() - started) * 1000)
            await anyio.sleep(PAUSE)
    return taken


async def main() -> None:
    """Measure and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    home = Path(tempfile.mkdtemp(prefix="dynflow-bench-"))
    trees = Trees(home)
    isolate, container = IsolateSandbox(), ContainerSandbox(image=IMAGE)
    by_engine = ContainerSandbox(image=IMAGE, warm="engine")
    docker = ("docker", "run", "--rm", "--network=none", IMAGE, "true")
    kept = f"dynflow-bench-{os.getpid()}"
    subprocess.run(  # noqa: ASYNC221 - nothing else goes on
        ["docker", "run", "--detach", "--rm", "--network=none", "--name", kept, IMAGE, "sleep", "3600"],
        check=False,
        stdout=subprocess.DEVNULL,
    )
    ways = {
        "subprocess": plain("true"),
        "isolate sandbox": sandboxed(isolate, trees),
        "warm container": sandboxed(container, trees, "run"),
        "warm container, by `docker exec`": sandboxed(by_engine, trees, "run"),
        "`docker exec`": plain("docker", "exec", kept, "true"),
        "docker sandbox": sandboxed(container, trees),
        "docker run": plain(*docker),
    }
    try:
        await isolate.sweep()
        print("| How `true` runs | median ms | p95 ms | n |\n|---|--:|--:|--:|")
        for name, times in (await measure(ways, rounds)).items():
            times.sort()
            tail = times[min(len(times) - 1, int(len(times) * 0.95))]
            print(f"| {name} | {statistics.median(times):.1f} | {tail:.1f} | {len(times)} |")
    finally:
        await isolate.close()
        await container.close()
        await by_engine.close()
        plain_end = ["docker", "rm", "--force", kept]
        subprocess.run(plain_end, check=False, capture_output=True)  # noqa: ASYNC221 - nothing else goes on
        layers.remove_tree(home)


if __name__ == "__main__":
    anyio.run(main)
