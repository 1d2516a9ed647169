"""The multi-tenant app: the play, and the platform killed with an order in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.examples.running import EXAMPLES, read_until, run, started

NAME = "multi_tenant_app"
TENANTS = EXAMPLES / NAME / "tenants"


def test_the_play() -> None:
    done = run(NAME)
    assert done.returncode == 0, done.stdout
    printed = done.stdout
    # Each order ends with the code that it began with, over a restart and a deploy.
    assert "order-1 is paid: anvil, paid with gold, goes by mail" in printed
    assert "order-2 is paid: rocket, paid with gold, goes by bicycle" in printed
    for attack, outcome in {
        "read a file": "FileNotFoundError",
        "list the code of others": "FileNotFoundError",
        "call home": "PermissionError",
        "run a program": "PermissionError",
        "take all memory": "isolate_limit",
        "never come back": "isolate_limit",
        "look at acmes order": "instance_not_found",
        "end acmes order": "{'deleted': []}",
        "pass for acme": "I run as mallory",
    }.items():
        assert f"  {attack}: {outcome}" in printed
    assert "acme's order-1 is still: complete" in printed


def serving(data: Path, act: Callable[[httpx.Client], None]) -> None:
    """Serve the platform, act as Acme, kill the platform."""
    with started(NAME, "--serve", "0", "--data", data) as process:
        found = re.search(r"http://\S+(?=;)", read_until(process, "http://"))
        assert found is not None
        headers = {"authorization": "Bearer key-of-acme"}
        with httpx.Client(base_url=found[0], headers=headers, timeout=30, trust_env=False) as acme:
            act(acme)
        process.kill()


def test_a_platform_that_was_killed_has_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    def sell(acme: httpx.Client) -> None:
        acme.put("/code", content=(TENANTS / "acme.py").read_bytes()).raise_for_status()
        acme.post("/call", json={"id": "order-1", "item": "anvil"}).raise_for_status()
        acme.post("/instances/order-1/events/paid", json={"with": "gold"}).raise_for_status()

    def look(acme: httpx.Client) -> None:
        order: dict[str, Any] = {}
        while order.get("status") != "complete":
            order = acme.get("/instances/order-1").raise_for_status().json()
        assert order["output"] == "anvil, paid with gold, goes by mail"
        assert order["done"] == ["reserve", "payment", "ship"]

    serving(tmp_path, sell)
    serving(tmp_path, look)


def test_mistakes_are_answered_with_what_is_wrong(tmp_path: Path) -> None:
    def err(acme: httpx.Client) -> None:
        assert acme.get("/instances/x", headers={"authorization": "Bearer no"}).status_code == 401
        nothing = acme.post("/call", json={})
        assert (nothing.status_code, nothing.json()["error"]["message"]) == (
            404,
            "acme has no code yet: PUT /code",
        )
        acme.put("/code", content=b"def fetch(request, env):\n    return 1 +\n")
        broken = acme.post("/call", json={})
        assert broken.status_code == 422
        assert "index.py:2: SyntaxError" in broken.json()["error"]["message"]
        assert acme.get("/instances/x").status_code == 404
        assert acme.get("/instances/-x").status_code == 422

    serving(tmp_path, err)
