"""Deliveries of forges: raw bytes, verified, stored, answered 202 before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litestar import Request, post
from litestar.di import NamedDependency
from litestar.params import FromPath

from ci_platform.deliveries import Deliveries
from ci_platform.errors import NotFoundError, UnauthorizedError
from ci_platform.forges import Forge


@dataclass(frozen=True, slots=True)
class DeliveryAnswer:
    """What became of a delivery so far: `received`, `dispatched`, `ignored` or `failed`, and why."""

    delivery: int
    state: str
    reason: str | None
    redelivered: bool


@post(
    "/webhooks/{forge:str}",
    status_code=202,
    opt={"scope": "own"},
    tags=["webhooks"],
    summary="Take a delivery",
)
async def receive_webhook(
    request: Request[Any, Any, Any],
    forge: FromPath[str],
    forges: NamedDependency[Mapping[str, Forge]],
    deliveries: NamedDependency[Deliveries],
) -> DeliveryAnswer:
    """Verify the signature over the raw body, store, answer. Runs start after the answer.

    The body may have 25 MB; it is cut off while it comes in, not after.
    """
    if forge not in forges:
        raise NotFoundError(f"there is no forge {forge[:50]!r}")
    body = b"".join([chunk async for chunk in request.stream()])
    headers = {key.lower(): value for key, value in request.headers.items()}
    try:
        delivery = forges[forge].receive(headers, body)
    except UnauthorizedError:
        # Only counted: whoever has no secret writes nothing else into the database.
        await deliveries.count_refused("signature")
        raise
    accepted = await deliveries.accept(delivery)
    return DeliveryAnswer(accepted.id, accepted.state, accepted.reason, accepted.redelivered)
