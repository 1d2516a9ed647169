"""Measure workspaces: fork, prepare, commit of a small change, against `cp -a` of the same tree.

    .venv/bin/python scripts/bench_workspaces.py [--files 2000] [--rounds 50] [--root /tmp]

Prints a Markdown table, for every method that works here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio

from ci_platform import copy_on_write, layers
from ci_platform.copy_on_write import Method
from ci_platform.errors import UnavailableError
from ci_platform.source import Remote, Source
from ci_platform.workspaces import LayerAuthor, Workspaces

REPO = "bench/repository"
IDENTITY = {f"GIT_{role}_{part}": "bench" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}

Timings = defaultdict[str, list[float]]


@contextmanager
def timed(timings: Timings, name: str) -> Iterator[None]:
    """Add the duration of the block, in milliseconds."""
    started = time.perf_counter()
    yield
    timings[name].append((time.perf_counter() - started) * 1000)


def git(repository: Path, *arguments: str) -> str:
    """Run git and return what it printed."""
    environment = {**os.environ, **IDENTITY, "GIT_CONFIG_GLOBAL": "/dev/null"}
    done = subprocess.run(
        ["git", *arguments], cwd=repository, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_repository(path: Path, files: int) -> tuple[str, str]:
    """Make a repository with two commits that differ in ten files; return their ids."""
    path.mkdir()
    git(path, "init", "--quiet")
    for number in range(files):
        file = path / f"package{number % 50}" / f"module{number}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"# module {number}\n" * 80)
    shas = []
    for change in range(2):
        for number in range(10):
            (path / f"package{number}" / f"changed{number}.py").write_text(str(change))
        git(path, "add", "--all")
        git(path, "commit", "--quiet", "--message", str(change))
        shas.append(git(path, "rev-parse", "HEAD"))
    return shas[0], shas[1]


def change_ten_files(upper: Path) -> None:
    """Do what a small step does: ten files of a kilobyte."""
    for number in range(10):
        (upper / f"result{number}").write_bytes(b"x" * 1024)


async def measure(
    root: Path, source: Source, sha: str, rounds: int, method: Method, *, durable: bool
) -> Timings:
    """Run `rounds` forks with one command each."""
    timings: Timings = defaultdict(list)
    workspaces = Workspaces(root / f"workspaces-{method.name}-{durable}", source, method, durable=durable)
    for number in range(rounds):
        with timed(timings, "all three"):
            with timed(timings, "fork"):
                await workspaces.fork(f"run{number}.bench", REPO, sha)
            with timed(timings, "prepare"):
                tree = await workspaces.prepare(f"run{number}.bench", LayerAuthor("step", 1, 1))
            change_ten_files(tree.upper)
            with timed(timings, "commit 10 files"):
                await workspaces.commit(tree)
        with timed(timings, "delete"):
            await workspaces.delete(f"run{number}.bench")
    return timings


async def bench(root: Path, files: int, rounds: int) -> None:
    """Measure everything and print it."""
    first, second = make_repository(root / "repository", files)
    source, timings = Source(root / "source", allow_file=True), defaultdict[str, list[float]](list)
    remote = Remote(f"file://{root / 'repository'}")
    await source.fetch(REPO, first, remote)
    with timed(timings, "materialise: first commit"):
        (base,) = await source.materialise(REPO, first)
    with timed(timings, "fetch: next commit"):
        await source.fetch(REPO, second, remote)
    with timed(timings, "materialise: next commit (delta)"):
        await source.materialise(REPO, second)
    for number in range(min(rounds, 20)):
        with timed(timings, "cp -a of the tree"):
            subprocess.run(["cp", "-a", base, root / f"copy{number}"], check=True)  # noqa: ASYNC221
        layers.remove_tree(root / f"copy{number}")
    for _ in range(rounds):
        with timed(timings, "fetch: warm"):
            await source.fetch(REPO, second, remote)
        with timed(timings, "materialise: warm"):
            await source.materialise(REPO, second)
    show(f"{files} files", timings)
    for name in copy_on_write.METHODS:
        try:
            method = copy_on_write.probe(root, name)
        except UnavailableError:
            continue
        if method.name != name or (name == "user-overlay" and os.geteuid() == 0):
            continue
        for durable in (True, False):
            some = rounds if method.mounts else min(rounds, 20)
            found = await measure(root, source, second, some, method, durable=durable)
            show(f"{name}, {'durable' if durable else 'not flushed'}", found)


def show(title: str, timings: Timings) -> None:
    """Print rows of the table."""
    for name, values in timings.items():
        p95 = sorted(values)[int(len(values) * 0.95)]
        print(f"| {title}: {name} | {statistics.median(values):.2f} ms | {p95:.2f} ms | {len(values)} |")


def main() -> None:
    """Read the arguments, measure in a folder of its own, remove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    print("| what | median | p95 | runs |\n|---|--:|--:|--:|")
    root = Path(tempfile.mkdtemp(prefix="dynflow-bench-", dir=given.root))
    try:
        anyio.run(bench, root, given.files, given.rounds)
    finally:
        layers.remove_tree(root)


if __name__ == "__main__":
    main()
