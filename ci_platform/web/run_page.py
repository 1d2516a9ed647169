"""What a run's page shows: its steps on a time scale, the chosen step's log as harmless data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ci_platform.logs import LogChunk, LogKey, LogLine, Logs
from ci_platform.run_views import RunView, StepView
from ci_platform.web.ansi import Run, Terminal
from ci_platform.web.render import query
from dynflow.types import AttemptInfo, ErrorInfo

# Lines in the page itself; the rest comes through the stream, or by the link for who has no script.
PAGE_LINES = 1000

_STATES = {"complete": "success", "errored": "failure"}


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step in the list. `bar` is start and width on a scale of 1000 over the run's time."""

    name: str
    count: int
    kind: str
    state: str
    started_at: datetime
    ended_at: datetime | None
    attempts: Sequence[AttemptInfo]
    error: ErrorInfo | None
    note: str
    bar: tuple[int, int]
    kept: bool = False


@dataclass(frozen=True, slots=True)
class ShownLine:
    """A line of a log: number, time of day, kind, runs of class names and text."""

    n: int
    at: str
    kind: str
    goes_on: bool
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class ShownLog:
    """The log panel. `name` identifies it between two renderings; `live` is its stream, None if it is whole."""

    name: str
    lines: list[ShownLine]
    live: str | None
    raw: str
    more: str | None
    waits: bool


def step_lines(run: RunView) -> list[StepLine]:
    """Return the steps in the order of their starts, placed on the run's time scale."""
    if not run.steps:
        return []
    now = datetime.now(UTC)
    own = [step for step in run.steps if not step.kept] or list(run.steps)
    begin = min(step.started_at for step in own)
    end = max([step.ended_at or now for step in own])
    span = max((end - begin).total_seconds(), 0.001)
    return [_step_line(step, begin, span, now) for step in run.steps]


def _step_line(step: StepView, begin: datetime, span: float, now: datetime) -> StepLine:
    start = int(1000 * (step.started_at - begin).total_seconds() / span)
    width = int(1000 * ((step.ended_at or now) - step.started_at).total_seconds() / span)
    return StepLine(
        name=step.name,
        count=step.count,
        kind=step.kind,
        state=_STATES.get(step.status, step.status),
        started_at=step.started_at,
        ended_at=step.ended_at,
        attempts=step.attempts,
        error=step.error and ErrorInfo(step.error.name, step.error.message),
        note=_note(step),
        bar=(min(max(start, 0), 995), min(max(width, 5), 1000)),
        kept=step.kept,
    )


def _note(step: StepView) -> str:
    if step.kept:
        return "kept from the run that this one was forked from"
    if step.kind == "wait_for_event" and step.status == "waiting":
        return "waits for a decision"
    if step.status == "running" and len(step.attempts) > 1:
        return "is being tried again"
    return ""


def choose_step(run: RunView, name: str | None, count: int) -> StepView | None:
    """Return the step whose log is shown: the one asked for, else the most telling one."""
    if name is not None:
        return next((step for step in run.steps if (step.name, step.count) == (name, count)), None)
    commands = [step for step in run.steps if step.kind == "do" and not step.kept]
    for status in ("errored", "running"):
        for step in commands:
            if step.status == status:
                return step
    return commands[-1] if commands else None


async def shown_log(logs: Logs, run: RunView, step: StepView, *, offset: int = 0) -> ShownLog:
    """Return the first lines of a step's log, and how to get the rest."""
    key = LogKey(run.id, step.name, step.count)
    chunk = await logs.read(key, offset, PAGE_LINES)
    terminal = Terminal()
    over = run.conclusion is not None or step.ended_at is not None
    whole = chunk.complete or (over and len(chunk.lines) < PAGE_LINES)
    address = {"step": step.name, "count": step.count}
    # A rerun writes another log under the same name.
    name = f"{step.name}\x1f{step.count}\x1f{step.started_at.isoformat()}"
    live = query(f"/runs/{run.id}/live", {**address, "offset": chunk.next_offset})
    raw = f"/api/v1{_path(run.id, step.name)}?count={step.count}"
    more = query(f"/runs/{run.id}", {**address, "offset": chunk.next_offset})
    full = len(chunk.lines) >= PAGE_LINES
    return ShownLog(
        name=name,
        lines=join([shown_line(terminal, line) for line in chunk.lines]),
        live=None if whole else live,
        raw=raw,
        more=more if full else None,
        waits=not whole,
    )


def shown_line(terminal: Terminal, line: LogLine) -> ShownLine:
    """Return a line of hostile output as data that is safe to show."""
    return ShownLine(line.number, f"{line.at:%H:%M:%S}", line.kind, line.goes_on, terminal.render(line.text))


def join(pieces: Sequence[ShownLine]) -> list[ShownLine]:
    """Join the pieces of lines that were printed bit by bit."""
    lines: list[ShownLine] = []
    for piece in pieces:
        if lines and lines[-1].goes_on and lines[-1].n == piece.n:
            before = lines.pop()
            lines.append(
                ShownLine(piece.n, before.at, before.kind, piece.goes_on, [*before.runs, *piece.runs])
            )
        else:
            lines.append(piece)
    return lines


async def live_lines(chunks: AsyncIterator[LogChunk]) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Yield cursors and lines ready to be shown."""
    terminal = Terminal()
    async for chunk in chunks:
        if chunk.lines:
            yield chunk.next_offset, {"lines": [shown_line(terminal, line) for line in chunk.lines]}


def _path(run_id: str, step: str) -> str:
    return f"/runs/{run_id}/steps/{quote(step, safe='')}/log"
