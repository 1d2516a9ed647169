"""What every test shares: the asyncio backend, and a Temporal server where one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def _temporal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server of a file of tests: what other files look for among their processes must not find it."""
    from tests.temporal_server import require_program, serving  # most processes of tests need no client

    with serving(require_program(), tmp_path_factory.mktemp("temporal")) as server:
        yield server


@pytest.fixture
def temporal_server(_temporal_server: Any) -> Any:
    """A Temporal server that runs; a test may kill it. Skips, with the reason, where there is none."""
    if not _temporal_server.is_running:
        _temporal_server.start()
    return _temporal_server


@pytest.fixture
async def temporal_client(temporal_server: Any) -> Any:
    """A client of a namespace that only this test has."""
    return await temporal_server.client(await temporal_server.new_namespace())
