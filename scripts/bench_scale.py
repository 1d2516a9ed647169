"""Measure the embedded engine with many instances stored: memory, being idle, waking, restarts, recovery, growth.

Prints Markdown tables; with `--json FILE` writes all figures there too. `--most 1000000` adds a million stored
instances to the 100,000 of a run of default size: ten minutes to make them, and 3 GB of room. With `--keep FOLDER` they
are made once and found there by the next run, which measures copies of them.

Each figure is taken in a process of its own (scripts/scale_process.py), several times, and the rounds of different
sizes alternate, so that a busy minute of the machine troubles all of them alike. Medians are reported.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from scripts.measuring import ROOT, ask, markdown, medians, number, say

PROCESS = [sys.executable, "-m", "scripts.scale_process"]
SMALL, DEFAULT = 1_000, 100_000
# How many instances one recovery has, the bar's number.
INTERRUPTED = 1000
# How many waiting instances a round wakes.
WOKEN = 100

Figures = dict[str, float]


def process(role: str, path: Path, **options: float | bool) -> Figures:
    """Run one process of scripts/scale_process.py; returns its figures."""
    figures: Figures = ask([*PROCESS, role, path, *flags(options)])
    return figures


def flags(options: dict[str, Any]) -> list[str]:
    """Return command line options."""
    found = []
    for name, value in options.items():
        found += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", str(value)]
    return found


def copied(source: Path, target: Path) -> Path:
    """Copy an engine's file that no engine has open."""
    for end in ("-wal", "-shm", ".lock"):
        Path(f"{target}{end}").unlink(missing_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:  # so that the machine does not write it during the measurement
        os.fsync(file.fileno())
    return target


@contextmanager
def scratch(source: Path) -> Iterator[Path]:
    """Return a copy to spoil."""
    folder = Path(tempfile.mkdtemp(prefix="dynflow-scale-"))
    try:
        yield copied(source, folder / "copy.db")
    finally:
        shutil.rmtree(folder)


def make_files(folder: Path, sizes: list[int]) -> dict[int, tuple[Path, Figures]]:
    """Make a file for each size, each from a copy of the one before; returns what making it told."""
    made: dict[int, tuple[Path, Figures]] = {}
    before, last = 0, folder / "0.db"
    for size in sizes:
        path, told = folder / f"{size}.db", folder / f"{size}.json"
        if told.exists():
            made[size] = (path, json.loads(told.read_text()))
            before, last = size, path
            continue
        say(f"making {size:,} waiting instances")
        if before:
            copied(last, path)
            shutil.copyfile(last.with_suffix(".ids"), path.with_suffix(".ids"))
        figures = process("fill", path, before=before, count=size)
        figures["disk_bytes"] = path.stat().st_size / size
        if before:  # a part of them was there before
            del figures["memory_mb"]
        told.write_text(json.dumps(figures))
        made[size] = (path, figures)
        before, last = size, path
    return made


def measure_making(folder: Path, size: int, rounds: int) -> Figures:
    """Make so many waiting instances in one process, from none; returns the medians."""
    samples = []
    for turn in range(rounds):
        say(f"memory of the process that made {size:,} waiting instances, round {turn + 1} of {rounds}")
        path = Path(tempfile.mkdtemp(dir=folder)) / "one.db"
        samples.append(process("fill", path, count=size))
        shutil.rmtree(path.parent)
    return medians(samples)


def measure_rest(folder: Path, files: dict[int, Path], rounds: int, seconds: float) -> dict[int, Figures]:
    """Open files with waiting instances, be idle, wake some; size 0 is an engine that has none."""
    samples: dict[int, list[Figures]] = {size: [] for size in (0, *files)}
    for turn in range(rounds):
        say(f"being idle, waking, restarts: round {turn + 1} of {rounds}")
        for size, found in samples.items():
            path = files.get(size, folder / f"empty-{turn}.db")
            found.append(process("rest", path, count=WOKEN, seconds=seconds))
    result = {size: medians(found) for size, found in samples.items()}
    for size, path in files.items():
        cold = [process("rest", path, count=1, seconds=0, cold=True)["open_ms"] for _ in range(3)]
        result[size]["open_cold_ms"] = sorted(cold)[1]
        result[size]["memory_mb"] = result[size]["resident_mb"] - result[0]["resident_mb"]
    return result


def measure_recovery(path: Path, rounds: int) -> Figures:
    """Kill a process with 1,000 instances in their step and start the next, as often as there are rounds."""
    with scratch(path) as copy:
        interrupt(copy, 0)
        return medians([interrupt(copy, time.monotonic()) for _ in range(rounds)])


def interrupt(path: Path, started: float) -> Figures:
    """Start a process, let it tell that all are in their step, kill it; returns what it told."""
    command = [*PROCESS, "block", str(path), "--count", str(INTERRUPTED), "--started", str(started)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    if not line:
        raise RuntimeError("the process with interrupted instances ended by itself")
    figures: Figures = json.loads(line)
    return figures


def measure_growth(files: dict[int, Path], rounds: int) -> dict[int, Figures]:
    """Measure throughput and latencies beside what is stored."""
    samples: dict[int, list[Figures]] = {size: [] for size in files}
    with ExitStack() as stack:
        copies = {size: stack.enter_context(scratch(path)) for size, path in files.items()}
        for turn in range(rounds):
            say(f"growth: round {turn + 1} of {rounds}")
            for size, copy in copies.items():
                samples[size].append(process("grow", copy))
    return {size: medians(found) for size, found in samples.items()}


def measure(folder: Path, keep: Path, most: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Return all figures. The files of stored instances are in `keep`."""
    sizes = sorted({SMALL, DEFAULT, most} if most > DEFAULT else {SMALL, most})
    keep.mkdir(parents=True, exist_ok=True)
    made = make_files(keep, sizes)
    files = {size: path for size, (path, _) in made.items()}
    waiting = {size: path for size, path in files.items() if size > SMALL}
    making = {size: measure_making(folder, size, min(rounds, 3)) for size in waiting if size <= DEFAULT}
    growth = measure_growth(files, rounds)
    recovery = {}
    for size, path in files.items():
        say(f"recovery beside {size:,}")
        recovery[size] = measure_recovery(path, rounds)
    rest = measure_rest(folder, waiting, rounds, seconds)
    return {
        "rounds": rounds,
        "filled": {size: figures for size, (_, figures) in made.items()},
        "made": making,
        "rest": rest,
        "recovery": recovery,
        "growth": growth,
    }


def waiting_table(figures: dict[str, Any]) -> str:
    """Return the table of what waiting instances cost."""
    rest, made, filled = figures["rest"], figures["made"], figures["filled"]
    sizes = [size for size in rest if size]

    def row(name: str, bar: str, part: dict[int, Figures], key: str) -> list[str]:
        return [name, *(number(part.get(size, {}).get(key)) for size in sizes), bar]

    return markdown(
        ["Waiting instances in one process", *(f"{size:,}" for size in sizes), "bar"],
        [
            row("memory over an empty engine, in the process that made them (MB)", "60", made, "memory_mb"),
            row("the same after a restart (MB)", "60", rest, "memory_mb"),
            row("idle: processor (% of a core)", "1", rest, "idle_cpu_percent"),
            row("idle: threads woken (per second)", "", rest, "idle_wake_ups_per_second"),
            row("event to next step (ms, median)", "2.5", rest, "wake_p50_ms"),
            row("event to next step (ms, 95 of 100)", "", rest, "wake_p95_ms"),
            row("disk (bytes an instance)", "", filled, "disk_bytes"),
            row("open the engine (ms)", "", rest, "open_ms"),
            row("open the engine, nothing of the file in memory (ms)", "", rest, "open_cold_ms"),
            row("made: created, a step, parked (per second)", "", made, "made_per_second"),
        ],
    )


def growth_table(figures: dict[str, Any]) -> str:
    """Return the table of what more stored instances do to each figure, and of recovery."""
    growth, recovery = figures["growth"], figures["recovery"]
    sizes = sorted(growth)
    rows = [
        ("create, concurrent callers (per second)", growth, "create_per_second", True),
        ("three-step run, concurrent (per second)", growth, "runs_per_second", True),
        ("the same: processor (ms a run)", growth, "runs_per_second_cpu_ms", False),
        ("three-step run, alone (ms)", growth, "alone_ms", False),
        ("added by a step, alone (ms)", growth, "step_ms", False),
        ("event to next step, alone (ms)", growth, "wake_ms", False),
        ("1,000 interrupted running again, from opening the engine (ms)", recovery, "recovered_ms", False),
        ("the same from the start of the process (ms)", recovery, "from_exec_ms", False),
    ]
    return markdown(
        ["Instances stored", *(f"{size:,}" for size in sizes), "times slower"],
        [
            [
                name,
                *(number(part[size][key]) for size in sizes),
                f"{slower(part[sizes[0]][key], part[sizes[-1]][key], is_rate):.2f}",
            ]
            for name, part, key, is_rate in rows
        ],
    )


def slower(first: float, last: float, is_rate: bool) -> float:  # noqa: FBT001 - a column of the table above
    """Return how many times slower the last is."""
    return first / last if is_rate else last / first


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--most", type=int, default=DEFAULT, help="the largest number of stored instances")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="how long a round is idle")
    parser.add_argument("--keep", type=Path, help="a folder in which the files of stored instances stay")
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dynflow-scale-") as folder:
        figures = measure(Path(folder), given.keep or Path(folder), given.most, given.rounds, given.seconds)
    figures["minutes"] = (time.perf_counter() - start) / 60
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{waiting_table(figures)}\n\n{growth_table(figures)}\n\nMedians of {given.rounds} rounds.")


if __name__ == "__main__":
    main()
