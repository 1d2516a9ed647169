"""What a client asks its gateway for: CONNECT, or a plain HTTP request with a whole URL. Stdlib only.

The client is a tenant's command: every byte of a request is hostile. What is not understood is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ci_platform.egress.policy import host_name

LARGEST_HEAD = 64 * 1024
"""Bytes; common servers take 8 to 16 KiB, and cookies and tokens grow."""

_LINE = re.compile(rb"([A-Z]{1,32}) ([!-~]+) HTTP/1\.[01]", re.ASCII)
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*)", re.ASCII)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]@/?#\\]+)(?::([0-9]{1,5}))?", re.ASCII)

_OF_THE_HOP = frozenset(
    {
        "connection",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
    }
    | {"trailer", "upgrade"}
)
"""Headers between client and gateway alone (RFC 9110, 7.6.1); `Host` is made anew from the URL."""


class BadRequestError(Exception):
    """Not a request that a gateway serves; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """Where a client wants to go. `forward` is what its server is sent first: nothing for a tunnel."""

    host: str
    port: int
    forward: bytes = b""

    @property
    def tunnel(self) -> bool:
        """Whether the client waits to be told that the connection stands."""
        return not self.forward


def parse(head: bytes) -> Request:
    """Read the head of a request, with the empty line at its end. Raises BadRequestError."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _LINE.fullmatch(first)
    if found is None:
        raise BadRequestError("this is not a request of HTTP/1.1 to a proxy")
    method, target = found[1], found[2].decode("ascii")
    if method == b"CONNECT":
        return Request(*_authority(target, None))
    scheme, separator, rest = target.partition("://")
    if not separator or scheme.lower() != "http":
        raise BadRequestError(f"a proxy takes CONNECT or http:// addresses, not {scheme[:20]!r}")
    cut = min((rest.index(mark) for mark in "/?#" if mark in rest), default=len(rest))
    authority, path = rest[:cut], rest[cut:].partition("#")[0]
    host, port = _authority(authority, 80)
    path = path if path.startswith("/") else f"/{path}"
    shown = f"[{host}]" if ":" in host else host
    own = [b"Host: %s" % (shown if port == 80 else f"{shown}:{port}").encode(), b"Connection: close"]
    request = b"%s %s HTTP/1.1" % (method, path.encode("ascii"))
    return Request(host, port, b"\r\n".join([request, *own, *_passed_on(lines), b"", b""]))


def _authority(text: str, default: int | None) -> tuple[str, int]:
    if "@" in text:
        raise BadRequestError("an address with a user name in it is not passed on")
    found = _AUTHORITY.fullmatch(text)
    port = int(found[2] or default or 0) if found else 0
    if found is None or not 0 < port < 65_536:
        raise BadRequestError(f"{text[:100]!r} is not a host and a port")
    try:
        return host_name(found[1]), port
    except ValueError as error:
        raise BadRequestError(str(error)) from None


def _passed_on(lines: list[bytes]) -> list[bytes]:
    """Return the headers for the server. Raises BadRequestError for what another server may read otherwise."""
    kept, lengths = [], 0
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise BadRequestError("a header is malformed")
        name = found[1].lower().decode()
        lengths += name in {"content-length", "transfer-encoding"}
        if name not in _OF_THE_HOP:
            kept.append(line)
    if lengths > 1:
        raise BadRequestError("a request has one length")
    return kept
