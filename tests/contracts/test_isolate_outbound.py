"""HTTP of tenants: none by default, else everything goes to one object of the host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from dynflow.errors import InvalidArgumentError, IsolateLimitError, OutboundRefusedError
from dynflow.isolates import (
    Caller,
    Capability,
    IsolateLimits,
    ProcessLoader,
    TrustedLoader,
    WorkerCode,
    WorkerLoader,
    binding,
    current_caller,
)
from dynflow.outbound import HttpRequest, HttpResponse


@pytest.fixture(params=["process", "trusted"])
async def loader(request: pytest.FixtureRequest) -> AsyncIterator[WorkerLoader]:
    made: WorkerLoader = ProcessLoader() if request.param == "process" else TrustedLoader()
    async with made:
        yield made


@pytest.fixture
async def confined() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(ready=0) as made:
        yield made


class Outbound:
    """Answers what it was asked, and notes it."""

    def __init__(self) -> None:
        self.asked: list[HttpRequest] = []
        self.callers: list[Caller] = []

    async def fetch(self, request: HttpRequest) -> HttpResponse:
        self.asked.append(request)
        self.callers.append(current_caller.get())
        if "//refused." in request.url:
            raise OutboundRefusedError("only example.org is allowed")
        if request.url.endswith("/moved"):
            return HttpResponse(302, {"Location": "http://example.org/there"})
        if request.url.endswith("/missing"):
            return HttpResponse(404, {}, b"nothing here")
        return HttpResponse(
            200, {"Content-Type": "application/json", "X-Method": request.method}, b'{"a": 1}'
        )


def stub_of(loader: WorkerLoader, source: str, outbound: Any = None, **env: Any) -> Any:
    code = WorkerCode("index.py", {"index.py": source}, env=env, global_outbound=outbound)
    return loader.load(code).get_entrypoint()


FETCH = """
from dynflow.workflow import fetch as http
async def get(url):
    answer = await http(url, method="POST", headers={"X-One": "1"}, body="text")
    return [answer.status, answer.ok, answer.headers["X-Method"], answer.json()]
async def refused(url):
    try:
        await http(url)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


async def test_fetch_goes_to_the_hosts_object(loader: WorkerLoader) -> None:
    outbound = Outbound()
    stub = stub_of(loader, FETCH, outbound)
    assert await stub.get("https://example.org/x?y=1") == [200, True, "POST", {"a": 1}]
    assert outbound.asked == [HttpRequest("https://example.org/x?y=1", "POST", {"X-One": "1"}, b"text")]
    assert outbound.callers[0].worker_id.startswith("loaded:")


async def test_the_host_may_refuse(loader: WorkerLoader) -> None:
    stub = stub_of(loader, FETCH, binding(Outbound()))
    assert await stub.refused("https://refused.org/") == "OutboundRefusedError: only example.org is allowed"


async def test_without_an_outbound_there_is_no_network(loader: WorkerLoader) -> None:
    told = await stub_of(loader, FETCH).refused("https://example.org/")
    assert told.startswith("OutboundRefusedError: this worker has no network")


async def test_another_worker_can_be_the_outbound(loader: WorkerLoader) -> None:
    gate = """
from dynflow.workflow import HttpResponse
async def fetch(request, env):
    return HttpResponse(200, {"X-Method": "of the gate"}, request.json().url.encode().join([b'"', b'"']))
"""
    stub = stub_of(loader, FETCH, stub_of(loader, gate))
    assert await stub.get("http://example.org/") == [200, True, "of the gate", "http://example.org/"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/",
        "file:///etc/passwd",
        "http://exa mple/",
        "http://a/\r\nX: y",
        "//example.org",
        "http://é/",
    ],
)
async def test_what_is_no_http_url_never_reaches_the_hosts_object(loader: WorkerLoader, url: str) -> None:
    outbound = Outbound()
    assert "not an http or https URL" in await stub_of(loader, FETCH, outbound).refused(url)
    assert outbound.asked == []


@pytest.mark.parametrize(
    "request_",
    [
        "HttpRequest('http://a/', 'GET\\r\\n')",
        "HttpRequest('http://a/', 'GET', {'A: b\\r\\nC': 'd'})",
        "HttpRequest('http://a/', 'GET', {'A': 'b\\r\\nC: d'})",
        "HttpRequest('http://a/', 'GET', {'A': 5})",
        "HttpRequest('http://a/', 'GET', {}, 'text')",
        "HttpRequest(5)",
        "5",
    ],
)
async def test_malformed_requests_never_reach_the_hosts_object(
    confined: ProcessLoader, request_: str
) -> None:
    outbound = Outbound()
    source = f"""
from dynflow.workflow import HttpRequest
from dynflow.outbound import current_outbound
async def go(): await current_outbound.get()({request_})
"""
    with pytest.raises(InvalidArgumentError):
        await stub_of(confined, source, outbound).go()
    assert outbound.asked == []


def test_an_outbound_has_a_fetch() -> None:
    async def main() -> None:
        async with TrustedLoader() as loader:
            await stub_of(loader, FETCH, object()).get("http://a/")

    with pytest.raises(InvalidArgumentError, match="has to have an async method fetch"):
        asyncio.run(main())


URLLIB = """
import json, urllib.error, urllib.request
def get(url, data=None):
    request = urllib.request.Request(url, data=data, headers={"X-One": "1"})
    with urllib.request.urlopen(request) as answer:
        return [answer.status, answer.reason, answer.headers["content-type"], answer.geturl(), json.load(answer)]
def failing(url):
    try:
        urllib.request.urlopen(url)
    except urllib.error.HTTPError as error:
        return [error.code, error.reason, error.read().decode()]
    except urllib.error.URLError as error:
        return str(error.reason)
"""


async def test_urllib_asks_the_host_too(confined: ProcessLoader) -> None:
    outbound = Outbound()
    stub = stub_of(confined, URLLIB, outbound)
    there = "http://example.org/x"
    assert await stub.get(there) == [200, "OK", "application/json", there, {"a": 1}]
    assert (await stub.get(there, b"a=b"))[0] == 200
    get, post = outbound.asked
    assert (get.method, get.url, get.headers["X-one"]) == ("GET", there, "1")
    assert (post.method, post.body) == ("POST", b"a=b")
    assert (await stub.get("http://example.org/moved"))[3] == "http://example.org/there"
    assert await stub.failing("http://example.org/missing") == [404, "Not Found", "nothing here"]
    assert await stub.failing("http://refused.org/") == "only example.org is allowed"


async def test_urllib_without_an_outbound_says_why(confined: ProcessLoader) -> None:
    told = await stub_of(confined, URLLIB).failing("http://example.org/")
    assert told.startswith("this worker has no network")


async def test_waiting_for_urllib_is_not_being_busy(confined: ProcessLoader) -> None:
    class Slow:
        async def fetch(self, request: HttpRequest) -> HttpResponse:
            await asyncio.sleep(0.5)
            return HttpResponse(200, {"content-type": "x"}, b"1")

    limits = IsolateLimits(busy=timedelta(milliseconds=200))
    code = WorkerCode("index.py", {"index.py": URLLIB}, limits=limits, global_outbound=Slow())
    answer = await confined.load(code).get_entrypoint().call("get", "http://example.org/")
    assert answer[0] == 200


async def test_other_calls_go_on_around_urllib(confined: ProcessLoader) -> None:
    class Echo(Capability):
        async def back(self, value: int) -> int:
            await asyncio.sleep(0)
            return value

    source = (
        URLLIB
        + """
import asyncio
async def fetch(request, env):
    async def blocking(): return get("http://example.org/")[0]
    return await asyncio.gather(env.ECHO.back(1), blocking(), env.ECHO.back(2), blocking())
"""
    )
    assert await stub_of(confined, source, Outbound(), ECHO=Echo()).fetch() == [1, 200, 2, 200]


async def test_requests_count_as_calls_of_bindings(confined: ProcessLoader) -> None:
    code = WorkerCode(
        "index.py", {"index.py": URLLIB}, limits=IsolateLimits(subrequests=1), global_outbound=Outbound()
    )
    with pytest.raises(IsolateLimitError, match="more than 1 calls of bindings"):
        await confined.load(code).get_entrypoint().call("get", "http://example.org/moved")


async def test_bodies_have_the_size_of_a_message(loader: WorkerLoader) -> None:
    class Mirror:
        async def fetch(self, request: HttpRequest) -> HttpResponse:
            more = int(request.headers.get("More", 0))
            return HttpResponse(200, {}, request.body + b"x" * more)

    source = """
from dynflow.workflow import fetch as http
async def send(size, more=0):
    try:
        answer = await http("http://a/", method="POST", body=bytes(size), headers={"More": str(more)})
    except ValueError as error:
        return [type(error).__name__, str(error)]
    return len(answer.body)
"""
    stub = stub_of(loader, source, Mirror())
    assert await stub.send(6_000_000) == 6_000_000
    for size, more in ((7_000_000, 0), (4_000_000, 4_000_000)):
        name, told = await stub.send(size, more)
        assert name == "ValueTooLargeError"
        assert "the limit is 8,388,608 bytes" in told
    assert await stub.send(1) == 1
