"""A platform that answers on loopback, with a real engine, real git, real isolates; and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from ci_platform.serving import Running, running
from ci_platform.settings import load_settings
from tests.ci_platform.api.world import SECRET, World


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """One server for a module's tests; each works in repositories of its own."""
    data = tmp_path_factory.mktemp("platform") / "data"
    options = {"port": 0, "github_webhook_secret": SECRET, "max_body": 64 * 1024, "allow_containers": False}
    settings = load_settings({"data": data, **options}, {})
    async with running(settings) as platform:
        yield platform


@pytest.fixture
async def http(served: Running) -> AsyncIterator[httpx.AsyncClient]:
    """The administrator's client."""
    headers = {"Authorization": f"Bearer {served.token}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
async def nobody(served: Running) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a token."""
    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        yield client


@pytest.fixture
def new_repo(request: pytest.FixtureRequest) -> Callable[[], str]:
    """Names of repositories that no other test uses."""
    names = iter(f"test/{abs(hash(request.node.nodeid)) % 10**9}-{n}" for n in range(100))
    return lambda: next(names)


@pytest.fixture
def world(served: Running, http: httpx.AsyncClient, tmp_path: Path, new_repo: Callable[[], str]) -> World:
    """What tests do with the server."""
    return World(served, http, tmp_path, new_repo())
