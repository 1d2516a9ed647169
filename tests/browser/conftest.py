"""Debian's Chromium, headless, in front of a real platform."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from ci_platform.serving import Running, running
from ci_platform.settings import load_settings
from tests.ci_platform.api.world import World

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A machine that builds something else at the same time is slow.
expect.set_options(timeout=20_000)

# Without the last four, Chromium talks to its maker at every start.
_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    data = tmp_path_factory.mktemp("platform") / "data"
    async with running(load_settings({"data": data, "port": 0, "allow_containers": False}, {})) as platform:
        yield platform


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    # Chromium's own sandbox does not run as root.
    flags = [*_FLAGS, "--no-sandbox"] if os.geteuid() == 0 else _FLAGS
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        await browser.close()


@pytest.fixture
async def world(served: Running, tmp_path: Path) -> AsyncIterator[World]:
    headers = {"Authorization": f"Bearer {served.token}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=30) as http:
        yield World(served, http, tmp_path, f"web/{tmp_path.name.replace('_', '-')[:60]}")


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What pages complained about on their consoles: nothing, at the end of every test."""
    found: list[str] = []
    yield found
    assert found == []


@pytest.fixture
async def page(chromium: Browser, world: World, complaints: list[str]) -> AsyncIterator[Page]:
    """A page of a browser that has followed a login link."""
    context = await chromium.new_context(base_url=world.served.url)
    context.set_default_timeout(20_000)
    page = await context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    link = (await world.http.post("/api/v1/login-links")).json()["url"]
    await page.goto(link)
    yield page
    await context.close()
