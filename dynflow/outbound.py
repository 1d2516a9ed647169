"""HTTP of tenants: `fetch`, which goes to the host's object that was given as `global_outbound`, and nowhere else.

Stdlib only: isolates use it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dynflow.errors import OutboundRefusedError
from dynflow.serialization import register


@register
@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request of a tenant, as its host gets it. Nothing in it is resolved or allowed yet."""

    url: str
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@register
@dataclass(frozen=True, slots=True)
class HttpResponse:
    """What the host answers."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def ok(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    def text(self) -> str:
        """Return the body as text, which is UTF-8 wherever it is anything."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """Return the body's value. Raises ValueError where it is no JSON."""
        return json.loads(self.body)


Outbound = Callable[[HttpRequest], Awaitable[HttpResponse]]

current_outbound: ContextVar[Outbound | None] = ContextVar("current_outbound", default=None)
"""Where the requests of the code that is running go."""

NO_NETWORK = "this worker has no network: its platform gave it no global_outbound"


async def fetch(
    url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes | str = b""
) -> HttpResponse:
    """Send an HTTP request; the platform decides what becomes of it. Call it inside of a step.

    Raises OutboundRefusedError where the platform does not allow it. Statuses from 400 on raise nothing.
    """
    outbound = current_outbound.get()
    if outbound is None:
        raise OutboundRefusedError(NO_NETWORK)
    data = body.encode() if isinstance(body, str) else bytes(body)
    return await outbound(HttpRequest(url, method, dict(headers or {}), data))
