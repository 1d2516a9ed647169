"""Gates: list those that wait, decide one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from ci_platform.access import Actor
from ci_platform.gates import Decision, Gates, GateView
from ci_platform.runs import Runs


@dataclass(frozen=True, slots=True)
class GateList:
    """Gates, the one that waits longest first."""

    items: list[GateView]


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What is decided. Who decides is the bearer of the token."""

    decision: Decision
    comment: str | None = None


@get("/gates", opt={"scope": "read"}, tags=["gates"], summary="List open gates")
async def list_gates(
    gates: NamedDependency[Gates],
    wanted: Annotated[Literal["open"], QueryParameter(name="state")] = "open",
    repo: FromQuery[str | None] = None,
) -> GateList:
    """Return the open gates of all runs, or of one repository's."""
    del wanted  # there is one value today; the parameter is part of the address
    return GateList(await gates.open(repo=repo))


@post(
    "/runs/{run_id:str}/gates/{name:str}",
    status_code=200,
    opt={"scope": "write"},
    tags=["gates"],
    summary="Approve or reject",
)
async def decide_gate(
    run_id: FromPath[str],
    name: FromPath[str],
    data: JSONBody[GateDecision],
    runs: NamedDependency[Runs],
    actor: NamedDependency[Actor],
) -> GateView:
    """Decide a gate. The first decision wins; a later one gets 409 with who was first."""
    return await runs.decide(run_id, name, data.decision, by=actor.name, comment=data.comment)
