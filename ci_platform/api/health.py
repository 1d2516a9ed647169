"""Whether the process is alive, and whether it can work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import anyio
from litestar import Response, get
from litestar.di import NamedDependency

Readiness = Mapping[str, Callable[[], Awaitable[object]]]
"""By name: what raises where the part cannot work."""

Degraded = Mapping[str, Callable[[], str | None]]
"""By name: what says in a few words what does not work as it should, though the platform as a whole does."""

# A probe that takes longer than this is as bad as one that fails: balancers give up after some seconds.
_PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class Health:
    """`status` is `ok`, `degraded` or `unavailable`; `parts` says which part is not ok, without its inner matters."""

    status: str
    parts: dict[str, str]


@get("/healthz", opt={"scope": "public"}, tags=["health"], summary="Whether the process answers")
async def healthz() -> Health:
    """Answer. Touches nothing."""
    return Health("ok", {})


@get("/readyz", opt={"scope": "public"}, tags=["health"], summary="Whether the platform can work")
async def readyz(
    readiness: NamedDependency[Readiness], degraded: NamedDependency[Degraded]
) -> Response[Health]:
    """Ask each part; 503 where one cannot work. With too little room it takes everything in, and so is ready."""
    parts = {name: await _state(probe) for name, probe in readiness.items()}
    ready = all(state == "ok" for state in parts.values())
    parts |= {name: ask() or "ok" for name, ask in degraded.items()}
    well = "ok" if all(state == "ok" for state in parts.values()) else "degraded"
    return Response(Health(well if ready else "unavailable", parts), status_code=200 if ready else 503)


async def _state(probe: Callable[[], Awaitable[object]]) -> str:
    try:
        with anyio.fail_after(_PATIENCE):
            await probe()
    except Exception as error:  # noqa: BLE001 - a probe reports whatever is wrong, by its kind alone
        return type(error).__name__
    return "ok"
