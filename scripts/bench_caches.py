"""Measure caches: found and mounted for a command, saved, carried on; beside archives of the same files.

    .venv/bin/python scripts/bench_caches.py [--files 50000] [--size 2000] [--rounds 20] [--root /tmp]

The files are as large as each other, half of each cannot be compressed. Prints a Markdown table. 2 GB take some three
minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ci_platform import copy_on_write, layers
from ci_platform.caches import Budget, Caches
from ci_platform.copy_on_write import MethodName
from ci_platform.errors import UnavailableError
from ci_platform.execution import Execution
from ci_platform.logs import Logs
from ci_platform.model import Repository, Run
from ci_platform.sandboxes import SANDBOX_UID, say_nothing
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Source
from ci_platform.store import Store, Transaction
from ci_platform.workspaces import LayerAuthor, Workspaces
from dynflow.clock import SystemClock
from pipelines.contract import CacheSpec, Command, CommandResult
from scripts.bench_workspaces import IDENTITY
from scripts.measuring import Timings, markdown, number, percentile, say, timed

REPO, RUN = "bench/repository", "run1"
SMALL_FILES, SMALL_SIZE = 1000, 40
"""Files, and megabytes of them all, of the small cache."""

SLOW_ROUNDS = 3
"""Rounds of what takes seconds for each."""

RESTORED = "restored: the difference of the two"


@dataclass
class Bench:
    """What of a platform runs commands with caches."""

    root: Path
    workspaces: Workspaces
    caches: Caches
    execution: Execution
    sha: str
    timings: Timings
    _steps: int = 0

    def author(self) -> LayerAuthor:
        """Return a step that there was not yet."""
        self._steps += 1
        return LayerAuthor(f"step{self._steps}", 1, 1)

    async def run(self, script: str, *cache: CacheSpec) -> CommandResult:
        """Run a command."""
        workspace = await self.workspaces.fork(f"{RUN}.fork", REPO, self.sha)
        command = Command(workspace, ("sh", "-ec", script), cache=cache)
        result = await self.execution.run(command, run_id=RUN, author=self.author())
        if not result.ok:
            raise RuntimeError(f"{script!r} ended with {result.exit_code}: {result.output}")
        return result

    async def fill(self, cache: CacheSpec, files: int, size: int) -> None:
        """Have an entry made of so many files, of so many megabytes together."""
        tree = await self.workspaces.prepare(f"{RUN}.fork", self.author())
        _, (mount,) = await self.caches.open(RUN, self.author(), (cache,), tree, say_nothing)
        make_files(mount.tree.upper, files, size)
        with timed(self.timings, "save a new entry"):
            await self.caches.save(tree, say_nothing)
        await self.caches.close(tree)
        await self.workspaces.drop(tree)

    async def restores(self, cache: CacheSpec, rounds: int) -> None:
        """Run the smallest command with the cache and without, in turns; and look at what takes the time."""
        for _ in range(rounds):
            with timed(self.timings, "true, without a cache"):
                await self.run("true")
            with timed(self.timings, "true, with the cache"):
                await self.run("true", cache)
            with_it, without = (
                self.timings[f"true, {how}"][-1] for how in ("with the cache", "without a cache")
            )
            self.timings[RESTORED].append(with_it - without)
            with timed(self.timings, "one file of it read, with the cache"):
                await self.run("read line <deps/part7/file7", cache)
            tree = await self.workspaces.prepare(f"{RUN}.fork", self.author())
            with timed(self.timings, "find it and prepare its folders"):
                await self.caches.open(RUN, self.author(), (cache,), tree, say_nothing)
            await self.caches.close(tree)
            await self.workspaces.drop(tree)

    async def carries(self, prefix: str, rounds: int) -> None:
        """Carry an entry on under new keys, with ten files changed, and read all of it once."""
        change = "for n in 1 2 3 4 5 6 7 8 9 10; do echo x >deps/part$n/file$n; done"
        for turn in range(rounds):
            cache = CacheSpec(f"next-{turn}", ("deps",), (prefix,))
            with timed(self.timings, "restored by prefix, 10 files changed, saved again"):
                await self.run(change, cache)
        for _ in range(rounds):
            with timed(self.timings, "all of it read, with the cache"):
                await self.run(
                    "find deps -type f -print0 | xargs -0 cat >/dev/null", CacheSpec("first", ("deps",))
                )

    def by_archives(self, files: Path, rounds: int) -> None:
        """Do what others do: an archive is made, and unpacked."""
        place = self.root / "unpacked"
        for kind, options in {"tar": [], "tar and zstd": ["--zstd"]}.items():
            archive = self.root / "archive"
            for _ in range(rounds):
                with timed(self.timings, f"{kind}: save"):
                    subprocess.run(["tar", "-C", files, *options, "-cf", archive, "."], check=True)
                place.mkdir()
                with timed(self.timings, f"{kind}: restore"):
                    subprocess.run(["tar", "-C", place, *options, "-xf", archive], check=True)
                layers.remove_tree(place)
        for _ in range(rounds):
            with timed(self.timings, "cp -a"):
                subprocess.run(["cp", "-a", files, place], check=True)
            layers.remove_tree(place)


def make_files(folder: Path, files: int, size: int) -> None:
    """Write so many files of so many megabytes together, which belong to the sandboxes' user."""
    each = size * 1_000_000 // files
    half = os.urandom(each // 2)
    for number_ in range(files):
        place = folder / f"part{number_ % 500}"
        if number_ < min(files, 500):
            place.mkdir()
        (place / f"file{number_}").write_bytes(
            number_.to_bytes(8, "big") + half + bytes(each - 8 - len(half))
        )
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{SANDBOX_UID}:{SANDBOX_UID}", folder], check=True)


async def _rows(store: Store, sha: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def insert(tx: Transaction) -> None:
        tx.add(Repository(name=REPO, forge="local", created_at=now))
        ref, branch = "refs/heads/main", "main"
        row = Run(
            id=RUN,
            repo=REPO,
            number=1,
            event="push",
            action="push",
            sha=sha,
            ref=ref,
            branch=branch,
            created_at=now,
        )
        tx.add(row)

    await store.write(insert)


@asynccontextmanager
async def opened(root: Path, name: MethodName | None) -> AsyncIterator[Bench]:
    """Give a platform's part over `root`, and end it."""
    repository = root / "repository"
    environment = {**os.environ, **IDENTITY, "GIT_CONFIG_GLOBAL": "/dev/null"}
    for words in (
        ["init", "-q", "-b", "main", str(repository)],
        ["commit", "-q", "--allow-empty", "-m", "x"],
    ):
        where = repository if words[0] == "commit" else root
        subprocess.run(["git", *words], cwd=where, env=environment, check=True)  # noqa: ASYNC221 - nothing else runs
    source, store = Source(root / "source"), Store(f"sqlite:///{root / 'platform.db'}")
    await source.create(REPO)
    subprocess.run(  # noqa: ASYNC221 - nothing else runs
        ["git", "push", "-q", "--mirror", str(source.path(REPO))], cwd=repository, env=environment, check=True
    )
    sha = (repository / ".git/refs/heads/main").read_text().strip()
    method = copy_on_write.probe(root / "workspaces", name)
    workspaces, sandbox = Workspaces(root / "workspaces", source, method), IsolateSandbox()
    await store.open()
    await _rows(store, sha)
    budget = Budget(1 << 40, 1 << 40, 1 << 40)
    caches = Caches(root / "workspaces/.caches", method, store, SystemClock(), budget=budget)
    await caches.sweep()
    await workspaces.fork(f"{RUN}.fork", REPO, sha)
    execution = Execution(workspaces, Logs(root / "logs"), {"isolate": sandbox}, caches=caches)
    try:
        yield Bench(root, workspaces, caches, execution, sha, Timings(list))
    finally:
        await sandbox.close()
        await store.close()


async def measure(root: Path, files: int, size: int, rounds: int, name: MethodName | None) -> Timings:
    """Measure a cache of so many files."""
    say(f"a cache of {files:,} files, {size:,} MB")
    async with opened(root, name) as bench:
        first = CacheSpec("first", ("deps",))
        await bench.run("true")
        await bench.fill(first, files, size)
        await bench.restores(first, rounds)
        say("carrying it on")
        await bench.carries("first", SLOW_ROUNDS)
        say("archives")
        (entry,) = [each for each in bench.caches.entries() if each.key == "first"]
        bench.by_archives(root / "workspaces/.caches" / entry.tenant / entry.id / "files/0", SLOW_ROUNDS)
        return bench.timings


async def main_async(root: Path, given: argparse.Namespace) -> None:
    """Measure everything and print it."""
    sizes = {"small": (SMALL_FILES, SMALL_SIZE), "large": (given.files, given.size)}
    results = {}
    for name, (files, size) in sizes.items():
        folder = root / name
        folder.mkdir(mode=0o755)
        results[name] = await measure(folder, files, size, given.rounds, given.method)
        layers.remove_tree(folder)
    rows = []
    for name in results["large"]:
        cells = [
            (statistics.median(found), percentile(found, 95))
            for found in (each[name] for each in results.values())
        ]
        rows.append([name, *(f"{number(value)} ms" for pair in cells for value in pair)])
    large = {name: statistics.median(found) for name, found in results["large"].items()}
    faster = large["tar and zstd: restore"] / large[RESTORED]
    rows.append(["restored, against tar and zstd", "", "", f"{faster:,.0f} times", ""])
    heads = [f"{files:,} files, {size:,} MB" for files, size in sizes.values()]
    print(markdown(["caches", heads[0], "p95", heads[1], "p95"], rows))


def main() -> None:
    """Read the arguments, measure in a folder of its own, remove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--method", choices=copy_on_write.METHODS)
    given = parser.parse_args()
    if shutil.which("zstd") is None:
        raise SystemExit("there is no zstd to measure beside")
    root = Path(tempfile.mkdtemp(prefix="dynflow-bench-", dir=given.root))
    root.chmod(0o755)
    try:
        anyio.run(main_async, root, given)
    except UnavailableError as error:
        raise SystemExit(str(error)) from None
    finally:
        layers.remove_tree(root)


if __name__ == "__main__":
    main()
