"""Deliveries over HTTP: signed or refused, accepted once, answered before any work."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from ci_platform.model import Counter
from ci_platform.serving import Running
from ci_platform.store import col
from tests.ci_platform.api.world import SECRET, assert_problem

RECORDED = Path(__file__).parents[2] / "data" / "github"


def signed(body: bytes, event: str, *, secret: str = SECRET, delivery: str | None = None) -> dict[str, str]:
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {
        "X-GitHub-Event": event,
        "X-GitHub-Delivery": delivery or str(uuid.uuid4()),
        "X-Hub-Signature-256": f"sha256={signature}",
        "Content-Type": "application/json",
    }


async def refused(served: Running) -> int:
    row = await served.platform.store.read(
        lambda tx: tx.first(Counter, col(Counter.name) == "deliveries_refused_signature")
    )
    return row.value if row else 0


async def post(client: httpx.AsyncClient, body: bytes, headers: dict[str, str]) -> httpx.Response:
    return await client.post("/webhooks/github", content=body, headers=headers)


@pytest.mark.parametrize("event", ["ping", "push", "pull_request.opened", "issue_comment.created"])
async def test_a_signed_delivery_is_accepted(nobody: httpx.AsyncClient, event: str) -> None:
    body = (RECORDED / f"{event}.json").read_bytes()
    answer = await post(nobody, body, signed(body, event.partition(".")[0]))
    assert answer.status_code == 202
    # The repositories of recorded payloads are not registered here.
    assert answer.json()["state"] == "ignored"
    assert answer.json()["reason"]


async def test_an_unknown_repository_is_named_in_the_reason(nobody: httpx.AsyncClient) -> None:
    body = (RECORDED / "push.json").read_bytes()
    answer = await post(nobody, body, signed(body, "push"))
    assert json.loads(body)["repository"]["full_name"] in answer.json()["reason"]


async def test_a_delivery_that_comes_again_is_taken_once(served: Running, nobody: httpx.AsyncClient) -> None:
    body = (RECORDED / "ping.json").read_bytes()
    headers = signed(body, "ping")
    first = (await post(nobody, body, headers)).json()
    again = (await post(nobody, body, headers)).json()
    assert again == {**first, "redelivered": True}
    assert (await served.platform.deliveries.get(first["delivery"])).redeliveries == 1


def unsigned(headers: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key != "X-Hub-Signature-256"}


async def test_a_wrong_or_missing_signature_stores_nothing_but_a_count(
    served: Running, nobody: httpx.AsyncClient
) -> None:
    body = (RECORDED / "push.json").read_bytes()
    before = await refused(served)
    deliveries, _ = await served.platform.deliveries.list()
    wrong = signed(body, "push", secret="guessed")
    for headers in (wrong, unsigned(wrong), {**wrong, "X-Hub-Signature-256": "sha256=zz"}):
        assert_problem(await post(nobody, body, headers), 401, "unauthorized")
    assert_problem(await post(nobody, body + b" ", signed(body, "push")), 401, "unauthorized")
    assert await refused(served) == before + 4
    assert (await served.platform.deliveries.list())[0] == deliveries


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"ref": 3}', b'{"repository": []}']
)
@pytest.mark.parametrize("event", ["push", "pull_request"])
async def test_a_signed_body_of_rubbish_is_400_or_ignored(
    nobody: httpx.AsyncClient, event: str, body: bytes
) -> None:
    answer = await post(nobody, body, signed(body, event))
    assert answer.status_code in {202, 400}, answer.text
    if answer.status_code == 202:
        assert answer.json()["state"] == "ignored"


@pytest.mark.parametrize("missing", ["X-GitHub-Event", "X-GitHub-Delivery"])
async def test_missing_headers_are_400(nobody: httpx.AsyncClient, missing: str) -> None:
    body = b"{}"
    headers = {key: value for key, value in signed(body, "ping").items() if key != missing}
    assert_problem(await post(nobody, body, headers), 400, "invalid_input")


async def test_an_event_that_nobody_knows_is_recorded_as_ignored(
    served: Running, nobody: httpx.AsyncClient
) -> None:
    body = b'{"action": "created"}'
    answer = (await post(nobody, body, signed(body, "sponsorship"))).json()
    assert answer["state"] == "ignored"
    assert "sponsorship" in str((await served.platform.deliveries.get(answer["delivery"])).reason)


async def test_a_body_over_the_limit_is_413_whatever_its_signature(nobody: httpx.AsyncClient) -> None:
    body: bytes = json.dumps({"x": "y" * 100_000}).encode()
    assert_problem(await post(nobody, body, signed(body, "push")), 413, "too_large")


async def test_another_forge_is_404(nobody: httpx.AsyncClient) -> None:
    assert_problem(await nobody.post("/webhooks/elsewhere", content=b"{}"), 404, "not_found")


async def test_the_local_forge_takes_no_webhooks(nobody: httpx.AsyncClient) -> None:
    assert_problem(await nobody.post("/webhooks/local", content=b"{}"), 401, "unauthorized")


async def test_no_token_is_needed_and_none_helps(nobody: httpx.AsyncClient, served: Running) -> None:
    headers: dict[str, Any] = {"Authorization": f"Bearer {served.token}", "X-GitHub-Event": "ping"}
    assert_problem(await post(nobody, b"{}", headers), 401, "unauthorized")
