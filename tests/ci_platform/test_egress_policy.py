"""Which hosts and addresses a command's gateway lets through, and how it reads what clients ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ci_platform.egress.policy import Policy, Rule, host_name, why_not_public
from ci_platform.egress.requests import BadRequestError, parse


@pytest.mark.parametrize(("rule", "host", "port", "allowed"), [
    ("example.org", "example.org", 443, True),
    ("example.org", "example.org", 80, True),
    ("example.org", "example.org", 22, False),
    ("example.org", "www.example.org", 443, False),
    ("example.org", "notexample.org", 443, False),
    ("example.org", "example.org.evil.test", 443, False),
    ("EXAMPLE.org.", "example.org", 443, True),
    ("*.example.org", "www.example.org", 443, True),
    ("*.example.org", "a.b.example.org", 443, True),
    ("*.example.org", "example.org", 443, False),
    ("*.example.org", "notexample.org", 443, False),
    ("example.org:22", "example.org", 22, True),
    ("example.org:22", "example.org", 443, False),
    ("example.org:*", "example.org", 9418, True),
    ("[2606:4700::1]:443", "2606:4700::1", 443, True),
    ("192.0.2.1", "192.0.2.1", 443, True),
])  # fmt: skip
def test_a_rule_allows_what_it_names_and_nothing_else(
    rule: str,
    host: str,
    port: int,
    allowed: bool,  # noqa: FBT001 - a row of the table
) -> None:
    assert Rule.parse(rule).allows(host, port) is allowed


@pytest.mark.parametrize("text", [
    "", "*", "*.org", "*.*.org", "a*.org", "https://example.org", "user@example.org", "example.org/path",
    "exa mple.org", "example.org:0", "example.org:65536", "example.org:x", "-example.org", "exämple.org", "a" * 254,
    "[::1", "[zz]", "example.org\n", "example..org", "1.2.3.4%eth0",
])  # fmt: skip
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|top-level|port|IPv6|hextet|address|Expected"):
        Rule.parse(text)


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "169.254.170.2", "169.254.1.1", "168.63.129.16", "100.100.100.200", "100.64.0.1", "192.0.0.1",
    "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "2001::1", "100::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::a9fe:a9fe",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "5f00::1", "3fff::1",
])  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert why_not_public(address)
    assert address in Policy(None).why_not_address("innocent.example", 443, address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "140.82.121.4", "2606:4700::1", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_public_addresses_are_not(address: str) -> None:
    assert why_not_public(address) == ""


def test_what_the_operator_has_opened_is_reached_at_its_own_port_alone() -> None:
    policy = Policy(None, inner=["mirror.internal:8080"])
    assert policy.why_not_address("mirror.internal", 8080, "10.0.0.9") == ""
    assert policy.why_not_address("mirror.internal", 22, "10.0.0.9")
    assert policy.why_not_address("other.internal", 8080, "10.0.0.9")
    # A command's own list of hosts holds all the same.
    assert Policy(["example.org"], inner=["mirror.internal:8080"]).why_not_host("mirror.internal", 8080)


def test_an_open_network_sends_no_mail() -> None:
    assert Policy(None).why_not_host("smtp.example.org", 25)
    assert Policy(None).why_not_host("example.org", 9418) == ""


def test_a_tunnel_is_read() -> None:
    request = parse(
        b"CONNECT Example.ORG.:443 HTTP/1.1\r\nHost: evil.test\r\nProxy-Authorization: Basic eA==\r\n\r\n"
    )
    assert (request.host, request.port, request.tunnel) == ("example.org", 443, True)
    assert parse(b"CONNECT [2606:4700::1]:443 HTTP/1.1\r\n\r\n").host == "2606:4700::1"


def test_a_plain_request_is_passed_on_for_the_host_that_was_judged() -> None:
    head = (
        b"GET http://example.org/a?b=c HTTP/1.1\r\nHost: evil.test\r\nConnection: keep-alive, X-Hop\r\n"
        b"Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\nAccept: */*\r\n\r\n"
    )
    request = parse(head)
    assert (request.host, request.port, request.tunnel) == ("example.org", 80, False)
    lines = request.forward.split(b"\r\n")
    assert lines == [
        b"GET /a?b=c HTTP/1.1", b"Host: example.org", b"Connection: close", b"Accept: */*", b"", b""
    ]  # fmt: skip
    assert b"Host: example.org:8080\r\n" in parse(b"GET http://example.org:8080 HTTP/1.1\r\n\r\n").forward


@pytest.mark.parametrize("head", [
    b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    b"GET https://example.org/ HTTP/1.1\r\n\r\n",
    b"GET ftp://example.org/ HTTP/1.1\r\n\r\n",
    b"GET file:///etc/passwd HTTP/1.1\r\n\r\n",
    b"GET http://user:secret@example.org/ HTTP/1.1\r\n\r\n",
    b"GET http://example.org@127.0.0.1/ HTTP/1.1\r\n\r\n",
    b"GET http:///path HTTP/1.1\r\n\r\n",
    b"GET http://exa%6dple.org/ HTTP/1.1\r\n\r\n",
    b"GET http://example.org:99999/ HTTP/1.1\r\n\r\n",
    b"GET http://[fe80::1%25eth0]/ HTTP/1.1\r\n\r\n",
    b"CONNECT example.org HTTP/1.1\r\n\r\n",
    b"CONNECT example.org:0 HTTP/1.1\r\n\r\n",
    b"CONNECT http://example.org:443 HTTP/1.1\r\n\r\n",
    b"CONNECT ex\xc3\xa4mple.org:443 HTTP/1.1\r\n\r\n",
    b"CONNECT example.org:443 HTTP/2\r\n\r\n",
    b"get http://example.org/ HTTP/1.1\r\n\r\n",
    b"GET http://example.org/ HTTP/1.1\r\n folded\r\n\r\n",
    b"GET http://example.org/ HTTP/1.1\r\nA : b\r\n\r\n",
    b"GET http://example.org/ HTTP/1.1\r\nA: b\nB: c\r\n\r\n",
    b"POST http://example.org/ HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST http://example.org/ HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    b"\r\n\r\n",
])  # fmt: skip
def test_what_is_no_request_to_a_proxy_is_refused(head: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse(head)


@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_unexpected(data: bytes) -> None:
    for head in (
        data,
        b"CONNECT " + data + b" HTTP/1.1\r\n\r\n",
        b"GET http://" + data + b" HTTP/1.1\r\n\r\n",
    ):
        try:
            request = parse(head)
        except BadRequestError:
            continue
        assert host_name(request.host) == request.host
        assert 0 < request.port < 65_536
        assert request.forward.count(b"\r\n\r\n") <= 1
