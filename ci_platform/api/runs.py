"""Runs: list, show, follow, cancel, rerun, fork."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody, QueryParameter
from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage

from ci_platform.access import Actor
from ci_platform.api.streams import Stopping, event_stream, last_event_id
from ci_platform.api.views import as_json
from ci_platform.errors import NotFoundError
from ci_platform.run_forks import WhatIf
from ci_platform.run_views import RunView
from ci_platform.runs import Runs
from dynflow.types import HistoryEvent

_MOST_WHAT_IF = 4 << 20
"""A patch is at most 1 MiB, and JSON may write its bytes as several."""


@dataclass(frozen=True, slots=True)
class RunList:
    """A page of runs, the newest first. `cursor` leads to the next page; null on the last."""

    items: tuple[RunView, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Cancellation:
    """Why a run is cancelled; it shows as the run's reason."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rerun:
    """Where to begin: at the step of this name (the `count`th of that name), or from the start without one."""

    from_step: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class WhatIfBody:
    """Where to begin and what to change.

    `from_step` (the `count`th of that name): what started before it is kept; without one, nothing is. `code` is a
    commit or branch whose pipeline to run, `inputs` are parts of the event's payload, `patch` is a unified or git
    diff (1 MiB), `workspace` the step that forked the workspace to patch, where there are several.
    """

    from_step: str | None = None
    count: int = 1
    code: str | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    patch: str | None = None
    workspace: str | None = None


@get("/runs", opt={"scope": "read"}, tags=["runs"], summary="List runs")
async def list_runs(
    *,
    runs: NamedDependency[Runs],
    repo: FromQuery[str | None] = None,
    ref: FromQuery[str | None] = None,
    status: FromQuery[str | None] = None,
    sha: FromQuery[str | None] = None,
    pr: FromQuery[int | None] = None,
    cursor: FromQuery[str | None] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=100)] = 50,
) -> RunList:
    """Return runs. `ref` is a full ref or a branch; `status` a status or a conclusion."""
    page = await runs.list(repo=repo, ref=ref, status=status, sha=sha, pr=pr, cursor=cursor, limit=limit)
    return RunList(page.runs, page.cursor)


@get("/runs/{run_id:str}", opt={"scope": "read"}, tags=["runs"], summary="Show a run")
async def get_run(run_id: FromPath[str], runs: NamedDependency[Runs]) -> RunView:
    """Return a run with its steps, their attempts, its gates and its cause."""
    return await runs.get(run_id)


@get("/runs/{run_id:str}/events", opt={"scope": "read"}, tags=["runs"], summary="Follow a run")
async def follow_events(
    run_id: FromPath[str],
    runs: NamedDependency[Runs],
    stopping: NamedDependency[Stopping],
    last_id: Annotated[str | None, HeaderParameter(name="Last-Event-ID")] = None,
) -> ServerSentEvent:
    """Stream what happened, then what happens, as server-sent events.

    An event `history` has `{event_id, type, timestamp, data}`; its id is the cursor to go on from
    (`Last-Event-ID`). `end` comes last, when the run has its conclusion.
    """
    await runs.summary(run_id)
    return event_stream(_messages(runs, run_id, last_event_id(last_id)), stopping)


@post(
    "/runs/{run_id:str}/cancel",
    status_code=202,
    opt={"scope": "write"},
    tags=["runs"],
    summary="Cancel a run",
)
async def cancel_run(
    run_id: FromPath[str],
    runs: NamedDependency[Runs],
    actor: NamedDependency[Actor],
    data: JSONBody[Cancellation | None] = None,
) -> RunView:
    """Have a run end now, whatever it is doing. Durable when this answers; 409 if it has ended."""
    return await runs.cancel(run_id, by=actor.name, reason=(data or Cancellation()).reason)


@post("/runs/{run_id:str}/rerun", status_code=202, opt={"scope": "write"}, tags=["runs"], summary="Run again")
async def rerun_run(
    run_id: FromPath[str], runs: NamedDependency[Runs], data: JSONBody[Rerun | None] = None
) -> RunView:
    """Run a finished run again: all of it, or from a step on, with the files as that step saw them."""
    body = data or Rerun()
    return await runs.rerun(run_id, from_step=(body.from_step, body.count) if body.from_step else None)


@post(
    "/runs/{run_id:str}/what-if",
    status_code=201,
    opt={"scope": "write"},
    tags=["runs"],
    summary="Fork a run",
    request_max_body_size=_MOST_WHAT_IF,
)
async def fork_run(
    run_id: FromPath[str],
    runs: NamedDependency[Runs],
    actor: NamedDependency[Actor],
    data: JSONBody[WhatIfBody | None] = None,
) -> RunView:
    """Make a run out of another one, from a step on, with other code, inputs or files; the other one stays as it is.

    The new run says nothing about its commit to the forge, publishes no image, and asks at gates of its own. 422 names
    file and hunk of a patch that does not fit; then nothing is made.
    """
    body = data or WhatIfBody()
    wanted = WhatIf(body.from_step, body.count, body.code, body.inputs, body.patch, body.workspace)
    return await runs.what_if(run_id, wanted, by=actor.name)


async def _messages(runs: Runs, run_id: str, cursor: int | None) -> AsyncIterator[ServerSentEventMessage]:
    events = cast("AsyncGenerator[HistoryEvent]", runs.events(run_id, cursor))
    with suppress(NotFoundError):  # a run that ended long ago: its history is gone, its conclusion is not
        async with aclosing(events):
            async for event in events:
                yield ServerSentEventMessage(data=as_json(event), event="history", id=event.event_id)
    # The conclusion is stored a moment after the last event; who is told of the end may ask for it at once.
    await runs.concluded(run_id)
    yield ServerSentEventMessage(data="{}", event="end")
