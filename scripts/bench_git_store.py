#!/usr/bin/env python3
"""Measure the git store: forks beside git's own ways, and what idle repositories cost. Medians, in this process."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import anyio

from ci_platform.source import Source

_ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}
_ROUNDS, _MANY = 20, 10_000
_WHO = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")


def _git(*arguments: str, cwd: Path) -> None:
    subprocess.run(["git", *_WHO, *arguments], cwd=cwd, env=_ENVIRONMENT, check=True, capture_output=True)


def _fill(work: Path, bare: Path, commits: int) -> None:
    work.mkdir()
    _git("init", "--quiet", "--initial-branch=main", cwd=work)
    for number in range(commits):
        for file in range(20):
            (work / f"f{number}-{file}").write_bytes(os.urandom(2000))
        _git("add", "--all", cwd=work)
        _git("commit", "--quiet", "--message", str(number), cwd=work)
    _git("push", "--quiet", str(bare), "main", cwd=work)
    _git("--git-dir", str(bare), "repack", "-a", "-d", "--quiet", cwd=work)


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def _measure(root: Path) -> None:
    source = Source(root / "store")
    await source.create("bench/parent")
    bare = source.path("bench/parent")
    _fill(root / "work", bare, 200)
    ways = {"--shared": ["--shared"], "with links": [], "--no-local": ["--no-local"]}
    timings: dict[str, list[float]] = {"fork": [], **{f"git clone --bare {name}": [] for name in ways}}
    for number in range(_ROUNDS):
        begun = time.perf_counter()
        await source.fork("bench/parent", f"bench/fork{number}")
        timings["fork"].append((time.perf_counter() - begun) * 1000)
        for name, options in ways.items():
            target = str(root / f"{name}{number}")
            begun = time.perf_counter()
            _git("clone", "--bare", "--quiet", *options, str(bare), target, cwd=root)
            timings[f"git clone --bare {name}"].append((time.perf_counter() - begun) * 1000)
    print("| a repository of 200 commits, 4,000 files, 8 MB | median |\n|---|--:|")
    for name, found in timings.items():
        print(f"| {name} | {statistics.median(found):.1f} ms |")
    await _idle(source)


async def _idle(source: Source) -> None:
    memory, descriptors = _rss(), _descriptors()
    begun = time.perf_counter()
    for number in range(_MANY):
        await source.create(f"idle/r{number}")
    each = (time.perf_counter() - begun) * 1000 / _MANY
    print(f"\n| {_MANY:,} empty repositories (measured once) | |\n|---|--:|")
    print(f"| make each | {each:.2f} ms |")
    print(f"| memory they take together | {(_rss() - memory) / 2**20:.1f} MB |")
    print(f"| descriptors they take together | {_descriptors() - descriptors} |")
    await source.reconciled()
    begun = time.perf_counter()
    await source.sweep()
    print(f"| what they add to a start | {(time.perf_counter() - begun) * 1000:.0f} ms |")


def main() -> None:
    """Print the figures."""
    root = Path(tempfile.mkdtemp(prefix="dynflow-bench-"))
    try:
        anyio.run(_measure, root)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
