"""Every error has one shape and says nothing about the inside; every route says who may call it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest

from ci_platform.api.problems import describe
from ci_platform.app import create_app
from ci_platform.errors import FailedError, PlatformError, UnavailableError
from ci_platform.serving import Running
from dynflow.errors import IllegalMoveError
from tests.ci_platform.api.world import assert_problem


@pytest.mark.parametrize("path", ["/nothing", "/api/v1/nothing", "/api/v1/runs/nothing", "/api/v2/runs"])
async def test_what_is_not_there_is_404(http: httpx.AsyncClient, path: str) -> None:
    assert_problem(await http.get(path), 404, "not_found")


async def test_a_wrong_method_is_405_and_names_the_right_ones(http: httpx.AsyncClient) -> None:
    answer = await http.delete("/api/v1/runs")
    assert_problem(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    "body", ["{", "", "[]", "a=1", '"text"', '{"forge": "local"}', '{"name": 3}', "\x00"]
)
async def test_a_body_that_is_not_what_is_asked_for_is_400(http: httpx.AsyncClient, body: str) -> None:
    assert_problem(await http.post("/api/v1/repos", content=body), 400, "invalid_input")


async def test_a_wrong_parameter_is_named(http: httpx.AsyncClient) -> None:
    error = assert_problem(await http.get("/api/v1/runs?limit=5000"), 400, "invalid_input")
    assert error["details"]["problems"][0]["key"] == "limit"


@pytest.mark.parametrize("body", ["[" * 30_000, '{"a":' * 12_000])
async def test_a_body_nested_without_end_is_400(http: httpx.AsyncClient, body: str) -> None:
    headers = {"content-type": "application/json"}
    assert_problem(await http.post("/api/v1/repos", content=body, headers=headers), 400, "invalid_input")


@pytest.mark.parametrize(
    "query", ["status=great", "cursor=eHh4", "cursor=%00", "limit=0", "pr=x", "pr=0", f"pr={2**70}"]
)
async def test_parameters_out_of_range_are_400(http: httpx.AsyncClient, query: str) -> None:
    assert_problem(await http.get(f"/api/v1/runs?{query}"), 400, "invalid_input")


async def test_a_body_over_the_limit_is_413(http: httpx.AsyncClient) -> None:
    answer = await http.post("/api/v1/repos", json={"name": "x" * 200_000})
    assert_problem(answer, 413, "too_large")


async def test_without_a_token_nothing_is_shown(nobody: httpx.AsyncClient) -> None:
    answer = await nobody.get("/api/v1/runs")
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("header", ["Bearer wrong", "Bearer", "Basic !!", "Digest x", "Bearer \u00e9"])
async def test_a_wrong_token_is_401(nobody: httpx.AsyncClient, header: str) -> None:
    assert_problem(
        await nobody.get("/api/v1/runs", headers={b"Authorization": header.encode()}), 401, "unauthorized"
    )


async def test_a_token_may_only_do_what_its_scope_says(
    http: httpx.AsyncClient, nobody: httpx.AsyncClient
) -> None:
    made = await http.post("/api/v1/tokens", json={"name": "looker", "scopes": ["read"]})
    assert made.status_code == 201
    headers = {"Authorization": f"Bearer {made.json()['secret']}"}
    assert (await nobody.get("/api/v1/runs", headers=headers)).status_code == 200
    for path in ("/api/v1/repos", "/api/v1/tokens", "/api/v1/runs/x/cancel", "/api/v1/runs/x/gates/y"):
        assert_problem(await nobody.post(path, headers=headers, json={}), 403, "forbidden")
    assert_problem(await nobody.get("/api/v1/tokens", headers=headers), 403, "forbidden")


async def test_a_revoked_token_is_401(http: httpx.AsyncClient, nobody: httpx.AsyncClient) -> None:
    made = (await http.post("/api/v1/tokens", json={"name": "short-lived"})).json()
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert (await nobody.get("/api/v1/runs", headers=headers)).status_code == 200
    assert (await http.delete(f"/api/v1/tokens/{made['token']['id']}")).status_code == 204
    assert_problem(await nobody.get("/api/v1/runs", headers=headers), 401, "unauthorized")


def test_a_defect_shows_nothing_of_itself() -> None:
    problem = describe(RuntimeError("password=hunter2"))
    assert (problem.status, problem.code) == (500, "internal")
    assert "hunter2" not in str(problem.body())
    assert "hunter2" not in str(describe(PlatformError("password=hunter2")).body())


def test_errors_of_all_families_have_their_status() -> None:
    assert describe(FailedError("x")).status == 422
    assert describe(IllegalMoveError("x")).status == 409
    unavailable = describe(UnavailableError("x"))
    assert (unavailable.status, unavailable.headers["Retry-After"]) == (503, "10")


async def test_every_route_says_who_may_call_it(served: Running) -> None:
    silent = []
    for route in create_app(served.platform).routes:
        handlers = getattr(route, "route_handlers", None) or [route.route_handler]  # type: ignore[union-attr]
        silent += [
            f"{route.path} {handler}"
            for handler in handlers
            if "scope" not in handler.opt and "OPTIONS" not in getattr(handler, "http_methods", ())
        ]
    assert silent == []


async def test_the_schema_has_every_path(nobody: httpx.AsyncClient) -> None:
    schema = (await nobody.get("/schema")).json()
    assert schema["openapi"].startswith("3.")
    documented = {(method.upper(), path) for path, item in schema["paths"].items() for method in item}
    assert documented >= {
        ("GET", "/api/v1/runs"),
        ("GET", "/api/v1/runs/{run_id}"),
        ("GET", "/api/v1/runs/{run_id}/steps/{step}/log"),
        ("GET", "/api/v1/runs/{run_id}/events"),
        ("POST", "/api/v1/runs/{run_id}/cancel"),
        ("POST", "/api/v1/runs/{run_id}/rerun"),
        ("POST", "/api/v1/runs/{run_id}/what-if"),
        ("GET", "/api/v1/gates"),
        ("POST", "/api/v1/runs/{run_id}/gates/{name}"),
        ("GET", "/api/v1/repos"),
        ("POST", "/api/v1/repos"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("POST", "/webhooks/{forge}"),
    }
    assert not any(path.startswith("/login") for _, path in documented)


async def test_health_needs_no_token_and_tells_nothing(nobody: httpx.AsyncClient) -> None:
    assert (await nobody.get("/healthz")).json() == {"status": "ok", "parts": {}}
    ready = await nobody.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")


@pytest.mark.parametrize("path", ["/healthz", "/nothing", "/login", "/static/app.js", "/schema"])
async def test_every_answer_carries_the_headers_that_browsers_obey(
    nobody: httpx.AsyncClient, path: str
) -> None:
    headers = (await nobody.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


async def test_a_body_that_never_ends_is_cut_off_while_it_comes(served: Running) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 16 * 1024
            yield b"x" * 16 * 1024

    async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
        # The server may have answered and hung up before everything was sent.
        with suppress(httpx.WriteError, httpx.ReadError):
            assert_problem(await client.post("/webhooks/github", content=endless()), 413, "too_large")
    assert sent < 64 * 1024 * 1024  # what the buffers of two sockets hold, not what was to come
