"""LFS over HTTP: asks a server where files are, and gets them. Blocking; every byte of an answer is hostile.

All goes through a gateway (`ci_platform.guarded`), so that no answer leads to an inner address. Credentials are sent
to the server that they are for and to no other.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

from ci_platform.errors import FailedError, UnavailableError
from ci_platform.git_commands import redact
from ci_platform.lfs_pointers import Pointer

AT_ONCE = 100
"""Files that are asked for in one request; servers refuse many more."""

_MEDIA = "application/vnd.git-lfs+json"
_LARGEST_ANSWER = 4 << 20
_MOST_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
_SILENCE = 60.0
"""Seconds without a byte."""

_PIECE = 1 << 20
_HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,100}", re.ASCII)
_OWN_HEADERS = {
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "te",
    "trailer",
    "upgrade",
    "expect",
}
_LATER = {429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is. `headers` are what its server wants to be told there."""

    url: str
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class LfsClient:
    """Speaks to the server at `endpoint` through the gateway at `port`, until `until` (monotonic seconds)."""

    endpoint: str
    credentials: tuple[str, str] | None = field(repr=False)
    port: int
    until: float

    def places(self, wanted: Sequence[Pointer]) -> dict[str, Place]:
        """Return where files are, by their ids. Raises FailedError where the server has not all of them."""
        body = {
            "operation": "download",
            "transfers": ["basic"],
            "hash_algo": "sha256",
            "objects": [{"oid": each.oid, "size": each.size} for each in wanted],
        }
        headers = {"Accept": _MEDIA, "Content-Type": _MEDIA}
        if self.credentials is not None:
            pair = base64.b64encode(":".join(self.credentials).encode()).decode()
            headers["Authorization"] = f"Basic {pair}"
        url = f"{self.endpoint}/objects/batch"
        with self._request("POST", url, headers, json.dumps(body).encode()) as response:
            content = _read(response, _LARGEST_ANSWER + 1, url)
        return _read_places(url, content, {each.oid for each in wanted})

    def get(self, place: Place, pointer: Pointer, into: IO[bytes]) -> None:
        """Write a file, and no more of it than its pointer says. Whether it is that file, who keeps it has to see."""
        left = pointer.size
        with self._request("GET", place.url, place.headers, None) as response:
            while piece := _read(response, min(_PIECE, left + 1), place.url):
                left -= len(piece)
                self._check_time()
                if left < 0:
                    raise FailedError(
                        f"{_shown(place.url)} has more than the {pointer.size:,} bytes of its pointer"
                    )
                into.write(piece)

    def _check_time(self) -> None:
        if time.monotonic() > self.until:
            raise UnavailableError(f"{_shown(self.endpoint)} takes too long")

    @contextmanager
    def _request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield its answer, the last one of up to five redirects."""
        sent = dict(headers)
        for _ in range(_MOST_REDIRECTS + 1):
            self._check_time()
            with (
                closing(self._connect(url)) as connection,
                self._ask(connection, method, url, sent, body) as response,
            ):
                if response.status not in _REDIRECTS:
                    yield _checked(response, url)
                    return
                target = urljoin(url, response.headers.get("Location", ""))
            if _origin(target) != _origin(url):
                # Nothing that was for one server goes to another.
                sent = {name: value for name, value in sent.items() if name in {"Accept", "Content-Type"}}
            if url.startswith("https:") and not target.startswith("https:"):
                raise FailedError(f"{_shown(url)} sends on to {_shown(target)}, which is not https")
            url = target
        raise FailedError(f"{_shown(url)} is sent on more than {_MOST_REDIRECTS} times")

    def _connect(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(check(url))
        if parts.scheme == "http":
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SILENCE)
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=_SILENCE, context=context)
        connection.set_tunnel(parts.hostname or "", parts.port or 443)
        return connection

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
    ) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # A proxy is told the whole address, a server behind a tunnel its own part of it.
        target = f"http://{parts.netloc}{path}" if parts.scheme == "http" else path
        more = {"User-Agent": "dynflow", "Accept-Encoding": "identity"}
        try:
            connection.request(method, target, body=body, headers={**more, **headers})
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"{_shown(url)} does not answer: {error}") from None


def _read(response: http.client.HTTPResponse, most: int, url: str) -> bytes:
    try:
        return response.read(most)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{_shown(url)} stops in the middle: {error}") from None


def check(url: str) -> str:
    """Return an address if it is a plain one, of http or https. Raises FailedError."""
    try:
        parts = urlsplit(url)
        plain = (
            parts.scheme in {"http", "https"}
            and parts.hostname
            and parts.port != 0
            and "@" not in parts.netloc
        )
    except ValueError:
        plain = None
    if not plain or len(url) > 8000 or not re.fullmatch(r"[!-~]+", url):
        raise FailedError(f"LFS files are fetched from https or http addresses, not {_shown(url)}")
    return url


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        return "", None, None


def _shown(url: str) -> str:
    """Return an address for people: what comes after the path may be a key to it."""
    return repr(redact(url).partition("?")[0][:200])


def _checked(response: http.client.HTTPResponse, url: str) -> http.client.HTTPResponse:
    if response.status == 200:
        return response
    if response.status in _LATER:
        raise UnavailableError(f"{_shown(url)} answers with {response.status}")
    why = {
        401: ": it wants other credentials",
        403: ": it refuses",
        404: ": there is no such repository or file",
    }
    raise FailedError(f"{_shown(url)} answers with {response.status}{why.get(response.status, '')}")


def _read_places(url: str, content: bytes, wanted: set[str]) -> dict[str, Place]:
    if len(content) > _LARGEST_ANSWER:
        raise FailedError(f"{_shown(url)} answers with more than {_LARGEST_ANSWER:,} bytes")
    try:
        objects = json.loads(content)["objects"]
        found = {each["oid"]: _place(each) for each in objects if each["oid"] in wanted}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FailedError(f"{_shown(url)} does not answer as an LFS server does") from None
    if missing := sorted(wanted - found.keys()):
        raise FailedError(f"{_shown(url)} says nothing of {missing[0]}")
    return found


def _place(told: Any) -> Place:
    if "error" in told:
        code, message = int(told["error"]["code"]), str(told["error"].get("message", ""))
        raise FailedError(f"the LFS file {told['oid']} is not to be had: {code} {message[:200]!r}")
    action = told["actions"]["download"]
    headers = {str(name): str(value) for name, value in (action.get("header") or {}).items()}
    for name, value in headers.items():
        if not _HEADER.fullmatch(name) or name.lower() in _OWN_HEADERS or name.lower().startswith("proxy-"):
            raise FailedError(f"an LFS server wants to be told a header {name[:50]!r}")
        if not value.isprintable() or not value.isascii() or len(value) > 8000:
            raise FailedError(f"an LFS server wants to be told a header {name[:50]!r} that none can be")
    return Place(check(str(action["href"])), headers)
