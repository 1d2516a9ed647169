#!/usr/bin/env python3
"""Run many runs in one server and print what it holds: whatever grows with the number of runs is a leak.

Usage: .venv/bin/python scripts/soak.py [--runs N] [--every N] [--at-once N]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.scenarios.github_server import serve_github
from tests.scenarios.kill_fuzz import pushed
from tests.scenarios.leftovers import group_homes
from tests.scenarios.pipelines import git, make_repository
from tests.scenarios.server import Server, running_server

REPO = "soak/repository"
PIPELINE = """\
import asyncio
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha, branch = (event.payload[key] for key in ("repo", "sha", "branch"))
        number = int(branch.partition("-")[2])
        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        command = lambda script: run_in_sandbox(workspace, ["sh", "-c", script])
        await asyncio.gather(
            step.do("lint", lambda: command("echo lint > lint.txt")),
            step.do("test", lambda: command("echo test > test.txt")),
        )
        if number % 10 == 3:
            await step.do("fail", {"retries": {"limit": 0, "delay": 0}}, lambda: command("exit 3"))
        if number % 10 == 6:
            await step.do("slow", lambda: command("sleep 600"))
        if number % 10 == 9:
            await step.wait_for_event("approval", type="deploy-approval", timeout="1 hour")
        await step.do("deploy", lambda: command("cat lint.txt test.txt"))
"""


@dataclass(frozen=True)
class Figures:
    """What a server holds at one moment. Sizes in MiB."""

    runs: int
    fds: int
    threads: int
    children: int
    child_fds: int
    rss: float
    child_rss: float
    groups: int
    temporary: int
    engine_db: float
    engine_wal: float
    platform_db: float
    platform_wal: float
    data: float


def measure(server: Server, runs: int) -> Figures:
    """Look at the server's process and its data folder."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    children = process.children(recursive=True)
    data = server.data
    return Figures(
        runs,
        process.num_fds(),
        process.num_threads(),
        len(children),
        sum(child.num_fds() for child in children),
        process.memory_info().rss / 2**20,
        sum(child.memory_info().rss for child in children) / 2**20,
        len(_groups(server.process.pid)),
        len(list(Path(server.settings["TMPDIR"]).iterdir())),
        _size(data / "engine.db"),
        _size(data / "engine.db-wal"),
        _size(data / "platform.db"),
        _size(data / "platform.db-wal"),
        _tree_size(data),
    )


def _groups(pid: int) -> list[Path]:
    return [path for home in group_homes() for path in home.glob(f"dynflow-{pid}-*/*/")]


def _size(path: Path) -> float:
    return path.stat().st_size / 2**20 if path.exists() else 0.0


def _tree_size(folder: Path) -> float:
    command = ["du", "-sk", str(folder)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[0]) / 1024


def settled(server: Server, runs: int) -> Figures:
    """Measure once the number of processes and descriptors stays the same."""
    seen: list[tuple[int, int, int]] = []
    deadline = time.monotonic() + 30
    while len(seen) < 20 or len(set(seen[-20:])) > 1:
        figures = measure(server, runs)
        seen.append((figures.fds, figures.children, figures.groups))
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return measure(server, runs)


def finish(server: Server, names: set[str]) -> None:
    """See the runs of these branches to their ends: approve, and cancel what hangs."""
    deadline = time.monotonic() + 300
    while True:
        items = server.api("GET", "/runs", params={"limit": 100})["items"]
        runs = [run for run in items if run["branch"] in names]
        if len(runs) == len(names) and all(run["conclusion"] for run in runs):
            return
        for run in runs:
            if run["conclusion"] is None:
                nudge(server, run)
        if time.monotonic() > deadline:
            raise TimeoutError([run for run in runs if run["conclusion"] is None])
        time.sleep(0.1)


def nudge(server: Server, run: dict[str, Any]) -> None:
    """Do what the run waits for."""
    number = int(run["branch"].partition("-")[2])
    if number % 10 == 6 and not run["stopping"]:
        server.api("POST", f"/runs/{run['id']}/cancel", json={})
    if number % 10 == 9 and (run["waiting_for"] or "").startswith("approval"):
        server.api("POST", f"/runs/{run['id']}/gates/approval", json={"decision": "approve"})


def table(rows: list[Figures]) -> str:
    """Return the figures as a table."""
    names = [field.name for field in fields(Figures)]
    return "\n".join(["  ".join(f"{name:>12}" for name in names), *map(_line, rows)])


def _line(row: Figures) -> str:
    values = astuple(row)
    return "  ".join(f"{value:>12.1f}" if isinstance(value, float) else f"{value:>12}" for value in values)


def main() -> None:
    """Run, and print a line as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tmp.soak-") as name, serve_github() as github:
        folder = Path(name)
        bare, _ = make_repository(folder / "repo", PIPELINE)
        temporary = folder / "tmp"
        temporary.mkdir()
        settings = {"github_api_url": github.url, "allow_file_remotes": "true", "allow_containers": "false"}
        with running_server(folder / "data", {"TMPDIR": str(temporary)}, **settings) as server:
            server.register(REPO, bare)
            soak(server, folder / "repo" / "work", bare, given.runs, given.every, given.at_once)


def soak(server: Server, work: Path, bare: Path, runs: int, every: int, at_once: int) -> None:
    """Deliver `runs` pushes, `at_once` at a time; print a table in the end and a row now and then."""
    rows = [settled(server, 0)]
    print(table(rows), flush=True)
    for first in range(0, runs, at_once):
        names = {f"branch-{number}" for number in range(first, first + at_once)}
        for branch in sorted(names):
            git(work, "commit", "--quiet", "--allow-empty", "-m", f"For {branch}")
            git(work, "push", "--quiet", str(bare), f"HEAD:refs/heads/{branch}")
            sha = git(work, "rev-parse", "HEAD")
            server.deliver("push", pushed(REPO, sha, branch)).raise_for_status()
        finish(server, names)
        if (first + at_once) % every == 0:
            rows.append(settled(server, first + at_once))
            print(table(rows[-1:]).splitlines()[1], flush=True)


if __name__ == "__main__":
    main()
