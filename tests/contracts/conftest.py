"""Engines under contract: every test of `test_engine*.py` runs on each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynflow.engines.embedded import EmbeddedEngine
from tests.engine_world import World


def embedded(folder: Path) -> Callable[..., Any]:
    """Engines over one file; what a test of the contract needs is not that each write reaches the disk."""
    return partial(EmbeddedEngine, folder / "flow.db", synchronous="NORMAL")


ENGINES = {"embedded": embedded}


@pytest.fixture(params=list(ENGINES))
def engine_factory(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Make an engine over this test's storage; the next one made finds what the last one left."""
    return ENGINES[request.param](tmp_path)


@pytest.fixture
async def world(engine_factory: Callable[..., Any]) -> AsyncIterator[World]:
    """An open engine on a manual clock; at the end of the test its histories must be what it told."""
    async with World(engine_factory) as world:
        yield world
        await world.check_histories()
