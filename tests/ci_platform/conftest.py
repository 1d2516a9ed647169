"""What the platform's tests share: a clock that stands still, real databases with a repository in them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ci_platform.model import Repository
from ci_platform.store import Store
from dynflow.clock import ManualClock
from tests.ci_platform.harness import Harness, harness
from tests.databases import DATABASES, database


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=DATABASES)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    with database(request.param, tmp_path) as url:
        store = Store(url)
        await store.open()
        row = Repository(name="o/r", forge="local", created_at=clock.now())
        await store.write(lambda tx: tx.add(row))
        yield store
        await store.close()


@pytest.fixture
async def platform(store: Store, clock: ManualClock, tmp_path: Path) -> AsyncIterator[Harness]:
    async with harness(store, clock, tmp_path) as running:
        yield running
