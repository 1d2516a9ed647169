"""Hibernation at scale: a hundred thousand waiting instances of a thousand tenants, and one process holds nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from scripts.measuring import ask

INSTANCES = 100_000
# Megabytes over an engine that has none: the pages of the file that SQLite keeps, and nothing for an instance.
MOST_MEMORY = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def measured(role: str, path: Path, *options: str) -> dict[str, float]:
    """What a process of its own tells: an engine in this one would be measured with all that the tests hold."""
    process: list[str | Path] = [sys.executable, "-m", "scripts.scale_process", role, path, "--bare"]
    figures: dict[str, float] = ask([*process, *options], timeout=550)
    return figures


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="dynflow-scale-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, float]:
    return measured("fill", folder / "many.db", "--count", str(INSTANCES))


def test_waiting_instances_hold_no_task_no_thread_no_descriptor(made: dict[str, float]) -> None:
    assert made["tasks"] == 1  # the one that measures
    assert (made["more_threads"], made["more_descriptors"]) == (0, 0)


def test_a_hundred_thousand_waiting_instances_fit_into_the_memory_bar(made: dict[str, float]) -> None:
    assert made["memory_mb"] <= MOST_MEMORY


def test_any_of_them_wakes(made: dict[str, float]) -> None:
    assert made["woken"] == 5


def test_a_restart_holds_none_of_them_and_any_wakes(made: dict[str, float], folder: Path) -> None:
    assert made
    empty = measured("rest", folder / "none.db", "--count", "5", "--seconds", "0")
    many = measured("rest", folder / "many.db", "--count", "5", "--seconds", "0")
    assert many["woken"] == 5
    assert many["resident_mb"] - empty["resident_mb"] <= MOST_MEMORY
