"""A large file is checked beside the engine, and damage found there ends what would be built upon it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import pytest

from dynflow import WorkflowEntrypoint
from dynflow.engines.embedded import EmbeddedEngine, integrity
from dynflow.errors import StorageError


class Empty(WorkflowEntrypoint):
    """Does nothing."""

    async def run(self, event: Any, step: Any) -> Any:
        return "done"


def engine_on(path: Path) -> EmbeddedEngine:
    engine = EmbeddedEngine(path, synchronous="NORMAL")
    engine.register("empty", Empty)
    return engine


@pytest.fixture
async def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a few thousand ended instances, too large to be checked before the start."""
    path = tmp_path / "flow.db"
    async with engine_on(path) as engine:
        binding = engine.binding("empty")
        for first in range(0, 3000, 100):
            made = await binding.create_batch([{"id": f"i-{first + number}"} for number in range(100)])
            await made[-1].result(timeout=30)
    monkeypatch.setattr(integrity, "CHECKED_AT_ONCE", 0)
    return path


def damage(path: Path) -> None:
    """Write over a page in the middle: one that no start reads."""
    middle = path.stat().st_size // 4096 // 2 * 4096
    with path.open("r+b") as file:
        file.seek(middle)
        file.write(os.urandom(4096))


async def test_a_whole_file_serves_while_it_is_checked_and_after(large: Path) -> None:
    async with engine_on(large) as engine:
        for _ in range(3):
            assert await (await engine.binding("empty").create()).result(timeout=30) == "done"


async def test_damage_that_is_found_late_ends_the_service_with_its_reason(large: Path) -> None:
    damage(large)
    with pytest.raises(StorageError, match=r"flow\.db is damaged \(.+\): restore it from a backup"):  # noqa: PT012
        async with engine_on(large) as engine:
            with anyio.fail_after(30):
                while True:
                    await engine.binding("empty").create()


async def test_an_engine_closes_while_its_file_is_checked(large: Path) -> None:
    for _ in range(20):
        async with engine_on(large):
            pass


async def test_a_small_file_is_checked_first_and_left_as_it_is(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    damage(large)
    before = await anyio.Path(large).read_bytes()
    with pytest.raises(StorageError, match=r"is damaged .* the file was not changed"):
        async with engine_on(large):
            pass
    assert await anyio.Path(large).read_bytes() == before
