"""A tenant against the one way out that its platform gave it: what reaches the host's object is one plain request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynflow.errors import DynflowError, InvalidArgumentError, IsolateLimitError, ValueTooLargeError
from dynflow.isolates import Capability, IsolateLimits, ProcessLoader
from dynflow.outbound import HttpRequest, HttpResponse
from dynflow.serialization import MEBIBYTE
from tests.security.support import tenant


@pytest.fixture(scope="module")
async def loader() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(ready=0) as made:
        yield made


class Outbound:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[HttpRequest] = []

    async def fetch(self, request: HttpRequest) -> HttpResponse:
        self.asked.append(request)
        return HttpResponse(200, {}, b"secret of the platform")

    async def configure(self) -> str:
        raise AssertionError("only fetch can be reached")


ASK = """
from dynflow.workflow import HttpRequest, current_env, fetch as http
import asyncio, gc
from dynflow.isolates.guest import Guest

async def ask(target, method, *args):
    gc.unfreeze()
    loop = asyncio.get_running_loop()
    guest = next(thing for thing in gc.get_objects() if type(thing) is Guest and thing._loop is loop)
    try:
        return await guest._ask(target, method, args, {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
async def send(url, method="GET", headers=None, body=b""):
    return await ask("outbound", "fetch", HttpRequest(url, method, headers or {}, body))
"""


@pytest.mark.parametrize(
    "url",
    [
        "http://a/ HTTP/1.1\r\nHost: b",
        "http://a/\nX: y",
        "http://a/\t",
        "http://a/\0",
        "http://a/\x7f",
        "http://a/\u2028",
        "http://\u2024\u2024/",
        "http://a/%0d%0a\r",
        "unix:///var/run/docker.sock",
        "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
        "gopher://a/",
        "data:text/plain,x",
        "javascript:x",
        "HTTP:a",
        "http:/a",
        "http://",
        " http://a/",
        "http://a/" + "x" * 9_000,
    ],
)
async def test_an_odd_address_never_reaches_the_hosts_object(loader: ProcessLoader, url: str) -> None:
    outbound = Outbound()
    stub = tenant(loader, ASK, global_outbound=outbound)
    assert "not an http or https URL" in await stub.call("send", url)
    assert outbound.asked == []


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET / HTTP/1.1\r\n", {}),
        ("get", {}),
        ("", {}),
        ("X" * 21, {}),
        ("GET", {"A": "b\r\nAuthorization: c"}),
        ("GET", {"A": "b\nc"}),
        ("GET", {"A": "b\0c"}),
        ("GET", {"A": "\x85"}),
        ("GET", {"A\r\nB": "c"}),
        ("GET", {"A:": "c"}),
        ("GET", {"A B": "c"}),
        ("GET", {"": "c"}),
        ("GET", {"\u212a": "c"}),
        ("GET", {"A": "x" * 9_000}),
    ],
)
async def test_a_request_that_would_be_two_never_reaches_the_hosts_object(
    loader: ProcessLoader, method: str, headers: dict[str, str]
) -> None:
    outbound = Outbound()
    stub = tenant(loader, ASK, global_outbound=outbound)
    assert "InvalidArgumentError" in await stub.call("send", "http://a/", method, headers)
    assert outbound.asked == []


@pytest.mark.parametrize("method", ["configure", "__init__", "_target", "find", "call", ""])
async def test_nothing_but_fetch_of_the_outbound_can_be_called(loader: ProcessLoader, method: str) -> None:
    stub = tenant(loader, ASK, global_outbound=Outbound())
    for target in ("outbound", "env:"):
        assert "has no method" in await stub.call("ask", target, method)


async def test_a_worker_without_an_outbound_cannot_name_one(loader: ProcessLoader) -> None:
    stub = tenant(loader, ASK)
    assert "there is no binding" in await stub.call("send", "http://a/")
    for target in ("env:", "outbound:", "env:outbound", "env:global_outbound"):
        assert "there is no binding" in await stub.call("ask", target, "fetch")


async def test_the_outbound_cannot_be_passed_to_a_capability(loader: ProcessLoader) -> None:
    got: list[Any] = []

    class Take(Capability):
        async def take(self, value: Any) -> None:
            got.append(value)

    source = f"""{ASK}
from dynflow.isolates import stubs
async def steal():
    stubs.Stubs.pack = lambda self, value: {{"$": ["stub", "env", "object", "", None]}} if value == "it" else value
    try:
        await current_env.get().TAKE.take("it")
    except ValueError as error:
        return str(error)
"""
    stub = tenant(loader, source, global_outbound=Outbound(), env={"TAKE": Take()})
    assert "cannot be passed on" in await stub.call("steal")
    assert got == []


async def test_a_body_has_the_size_of_a_message(loader: ProcessLoader) -> None:
    outbound = Outbound()
    source = f"""{ASK}
async def big(size):
    return (await http("http://a/", method="POST", body=b"x" * size)).status
"""
    limits = IsolateLimits(message=MEBIBYTE)
    stub = tenant(loader, source, global_outbound=outbound, limits=limits)
    assert await stub.call("big", 700_000) == 200
    with pytest.raises(ValueTooLargeError):
        await stub.call("big", MEBIBYTE)
    assert [len(request.body) for request in outbound.asked] == [700_000]


async def test_an_answer_larger_than_a_message_is_an_error_of_the_call(loader: ProcessLoader) -> None:
    class Giant:
        async def fetch(self, request: HttpRequest) -> HttpResponse:
            del request
            return HttpResponse(200, {}, b"x" * 2 * MEBIBYTE)

    source = f"{ASK}\nasync def get(): return (await http('http://a/')).status"
    with pytest.raises(ValueTooLargeError):
        await tenant(loader, source, global_outbound=Giant(), limits=IsolateLimits(message=MEBIBYTE)).call(
            "get"
        )


async def test_requests_without_end_are_counted(loader: ProcessLoader) -> None:
    outbound = Outbound()
    source = f"{ASK}\nasync def flood():\n    while True: await http('http://a/')"
    with pytest.raises(IsolateLimitError, match="more than 25 calls"):
        await tenant(loader, source, global_outbound=outbound, limits=IsolateLimits(subrequests=25)).call(
            "flood"
        )
    assert len(outbound.asked) == 25


async def test_a_tenants_worker_as_outbound_answers_a_response_or_nothing(loader: ProcessLoader) -> None:
    for answer in ("5", "None", "{'status': 200}", "[200, {}, b'']"):
        gate = tenant(loader, f"async def fetch(request, env): return {answer}")
        source = f"{ASK}\nasync def get(): return (await http('http://a/')).status"
        with pytest.raises((DynflowError, TypeError), match="not an HttpResponse"):
            await tenant(loader, source, global_outbound=gate).call("get")


async def test_addresses_that_only_the_host_can_judge_reach_it_as_they_are(loader: ProcessLoader) -> None:
    """What an outbound has to refuse by itself: nothing is resolved or allowed before it."""
    outbound = Outbound()
    stub = tenant(loader, ASK, global_outbound=outbound)
    urls = [
        "http://127.0.0.1/",
        "http://169.254.169.254/",
        "http://a@b/",
        "http://a\\@b/",
        "http://[::1]:1/",
        "HTTP://a",
    ]
    for url in urls:
        await stub.call("send", url, "POST", {"Host": "b", "Content-Length": "9"})
    assert [request.url for request in outbound.asked] == urls
    assert outbound.asked[0].headers == {"Host": "b", "Content-Length": "9"}
    with pytest.raises(InvalidArgumentError):
        await tenant(loader, ASK, global_outbound=object()).call("fetch")
