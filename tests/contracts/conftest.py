"""Engines under contract: every test of `test_engine*.py` runs on each of them."""

from __future__ import annotations

import asyncio
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


def temporal(server: Any) -> Callable[..., Any]:
    """Engines of one task queue of a real server, through one client."""
    from dynflow.engines.temporal import TemporalEngine
    from tests.temporal_server import new_queue

    factory = partial(TemporalEngine, asyncio.run(server.client()), task_queue=new_queue())
    factory.many = 60  # type: ignore[attr-defined]
    return factory


@pytest.fixture(params=["embedded", "temporal"])
def engine_factory(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Make an engine over this test's storage; the next one made finds what the last one left."""
    if request.param == "temporal":
        return temporal(request.getfixturevalue("temporal_server"))
    return embedded(tmp_path)


@pytest.fixture
async def world(engine_factory: Callable[..., Any]) -> AsyncIterator[World]:
    """An open engine on a manual clock; at the end of the test its histories must be what it told."""
    async with World(engine_factory) as world:
        yield world
        await world.check_histories()
