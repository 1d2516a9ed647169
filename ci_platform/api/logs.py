"""Logs of steps: plain text, or server-sent events while they grow."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from litestar import Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, HeaderParameter, QueryParameter
from litestar.response import Stream
from litestar.response.sse import ServerSentEventMessage

from ci_platform.api.streams import Stopping, event_stream, last_event_id
from ci_platform.api.views import as_json
from ci_platform.egress import Connection
from ci_platform.errors import NotFoundError
from ci_platform.logs import LogChunk, LogKey, LogLine, Logs
from ci_platform.runs import Runs

# How a line of the platform's own starts in plain text, where a page has a place for it.
_MARKS = {"output": "", "command": "$ ", "result": "= ", "notice": "! "}


@get(
    "/runs/{run_id:str}/steps/{step:str}/log",
    opt={"scope": "read"},
    tags=["runs"],
    summary="Read or follow a step's log",
)
async def read_log(  # noqa: PLR0913 - the address's parts and parameters
    *,
    run_id: FromPath[str],
    step: FromPath[str],
    runs: NamedDependency[Runs],
    logs: NamedDependency[Logs],
    stopping: NamedDependency[Stopping],
    count: Annotated[int, QueryParameter(ge=1, le=10_000)] = 1,
    follow: FromQuery[bool] = False,
    timestamps: FromQuery[bool] = False,
    last_id: Annotated[str | None, HeaderParameter(name="Last-Event-ID")] = None,
) -> Response[Any]:
    """Return the whole log as text, or with `follow=1` as events.

    An event `lines` has `{"lines": [{number, at, text, kind, goes_on}]}`; its id is the cursor to go on from
    (`Last-Event-ID`). `goes_on` says that the next line continues this one. `end` comes last. `count` tells
    apart steps of one name.
    """
    key = LogKey(run_id, step, count)
    over = await is_over(runs, key)
    if follow:
        offset = last_event_id(last_id) or 0
        # A log that is over is not waited for: a crash may have left it without the mark that says so.
        chunks = whole(logs, key, offset) if over else logs.follow(key, offset)
        return event_stream(_events(chunks), stopping)
    return Stream(_text(logs, key, timestamps=timestamps), media_type="text/plain")


@get(
    "/runs/{run_id:str}/steps/{step:str}/connections",
    opt={"scope": "read"},
    tags=["runs"],
    summary="List a step's connections",
)
async def list_connections(
    *,
    run_id: FromPath[str],
    step: FromPath[str],
    runs: NamedDependency[Runs],
    logs: NamedDependency[Logs],
    count: Annotated[int, QueryParameter(ge=1, le=10_000)] = 1,
) -> list[Connection]:
    """Return each connection that the step's commands made or were refused: host, port, why not, bytes, seconds."""
    key = LogKey(run_id, step, count)
    await is_over(runs, key)
    return list(logs.connections(key).read())


async def is_over(runs: Runs, key: LogKey) -> bool:
    """Return whether the step has ended. Raises NotFoundError unless the run has this step."""
    run = await runs.get(key.run_id)
    for step in run.steps:
        if (step.name, step.count) == (key.step, key.count):
            return run.conclusion is not None or step.ended_at is not None
    raise NotFoundError(f"the run has no step {key.step[:256]!r} number {key.count} (yet)")


async def whole(logs: Logs, key: LogKey, offset: int = 0) -> AsyncGenerator[LogChunk]:
    """Yield what the log holds now."""
    while True:
        chunk = await logs.read(key, offset)
        if not chunk.lines:
            return
        yield chunk
        offset = chunk.next_offset


async def _events(chunks: AsyncIterator[LogChunk]) -> AsyncIterator[ServerSentEventMessage]:
    async for chunk in chunks:
        if chunk.lines:
            data = as_json({"lines": chunk.lines})
            yield ServerSentEventMessage(data=data, event="lines", id=chunk.next_offset)
    yield ServerSentEventMessage(data="{}", event="end")


async def _text(logs: Logs, key: LogKey, *, timestamps: bool) -> AsyncGenerator[str]:
    continued = False
    async for chunk in whole(logs, key):
        parts = []
        for line in chunk.lines:
            parts.append(line.text if continued else _start(line, timestamps=timestamps) + line.text)
            parts.append("" if line.goes_on else "\n")
            continued = line.goes_on
        yield "".join(parts)


def _start(line: LogLine, *, timestamps: bool) -> str:
    return (f"{line.at:%Y-%m-%dT%H:%M:%S.%f}Z " if timestamps else "") + _MARKS[line.kind]
