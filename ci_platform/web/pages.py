"""Page handlers: runs, a run with its log, gates, repositories, logging in. Complete without JavaScript."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from litestar import Response, Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, HeaderParameter, QueryParameter, URLEncodedBody
from litestar.response import Redirect, ServerSentEvent
from litestar.response.sse import ServerSentEventMessage
from litestar.static_files import create_static_files_router

from ci_platform.api.artifacts import artifacts_of
from ci_platform.api.authorization import SESSION_COOKIE, require_form
from ci_platform.api.logs import is_over, whole
from ci_platform.api.streams import Stopping, event_stream, last_event_id
from ci_platform.api.views import as_json
from ci_platform.artifacts import Artifacts
from ci_platform.errors import InvalidInputError, UnauthorizedError
from ci_platform.fork_words import differences
from ci_platform.gates import Gates
from ci_platform.logs import LogKey, Logs
from ci_platform.repositories import Repositories
from ci_platform.run_forks import WhatIf
from ci_platform.runs import Runs
from ci_platform.sessions import LIFETIME, Sessions
from ci_platform.web.artifact_pages import artifact_page
from ci_platform.web.render import HERE, AnyRequest, Pages, query, safe_path
from ci_platform.web.run_page import choose_step, live_lines, shown_log, step_lines

_STATUSES = ("queued", "running", "waiting", "success", "failure", "error", "cancelled", "timed_out")

Form = URLEncodedBody[dict[str, str]]


def page_router(*, max_body: int) -> Router:
    """Return the pages, and the static files that they use."""
    static = create_static_files_router("/static", [HERE / "static"], name="static", opt={"scope": "public"})
    shown = [runs_page, run_page, artifact_page, live_log, gates_page, repositories_page]
    changes = [decide, cancel, rerun, fork]
    sessions = [login_page, log_in, log_in_by_link, log_out]
    return Router(
        "/",
        route_handlers=[static, *shown, *changes, *sessions],
        include_in_schema=False,
        request_max_body_size=max_body,
    )


# --- looking ---------------------------------------------------------------------------------------


@get("/", opt={"scope": "read"})
async def runs_page(
    *,
    request: AnyRequest,
    pages: NamedDependency[Pages],
    runs: NamedDependency[Runs],
    repositories: NamedDependency[Repositories],
    repo: FromQuery[str | None] = None,
    ref: FromQuery[str | None] = None,
    status: FromQuery[str | None] = None,
    cursor: FromQuery[str | None] = None,
) -> Response[str]:
    """Show the list of runs."""
    filters = {"repo": repo or None, "ref": ref or None, "status": status or None}
    page = await runs.list(
        repo=filters["repo"], ref=filters["ref"], status=filters["status"], cursor=cursor, limit=30
    )
    return pages.render(
        request,
        "runs.html",
        section="runs",
        runs=page.runs,
        filters=filters,
        filtered=any(filters.values()) or cursor,
        statuses=_STATUSES,
        repositories=[one.name for one in await repositories.list()],
        here=query("/", {**filters, "cursor": cursor}),
        older=query("/", {**filters, "cursor": page.cursor}) if page.cursor else None,
    )


@get("/runs/{run_id:str}", opt={"scope": "read"})
async def run_page(  # noqa: PLR0913 - the address's parts and parameters
    *,
    request: AnyRequest,
    run_id: FromPath[str],
    pages: NamedDependency[Pages],
    runs: NamedDependency[Runs],
    logs: NamedDependency[Logs],
    artifacts: NamedDependency[Artifacts],
    step: FromQuery[str | None] = None,
    count: Annotated[int, QueryParameter(ge=1)] = 1,
    offset: Annotated[int, QueryParameter(ge=0)] = 0,
) -> Response[str]:
    """Show a run: its steps, its open gates, the log of one step."""
    run = await runs.get(run_id)
    chosen = choose_step(run, step, count)
    return pages.render(
        request,
        "run.html",
        section="runs",
        run=run,
        changed=list(differences(asdict(run.forked))) if run.forked else [],
        steps=step_lines(run),
        artifacts=(await artifacts_of(artifacts, run_id)).items,
        chosen=chosen,
        log=await shown_log(logs, run, chosen, offset=offset) if chosen and chosen.kind == "do" else None,
        here=query(
            f"/runs/{run_id}", {"step": step, "count": count if step else None, "offset": offset or None}
        ),
    )


@get("/runs/{run_id:str}/live", opt={"scope": "read"})
async def live_log(
    *,
    run_id: FromPath[str],
    step: FromQuery[str],
    runs: NamedDependency[Runs],
    logs: NamedDependency[Logs],
    stopping: NamedDependency[Stopping],
    count: Annotated[int, QueryParameter(ge=1)] = 1,
    offset: Annotated[int, QueryParameter(ge=0)] = 0,
    last_id: Annotated[str | None, HeaderParameter(name="Last-Event-ID")] = None,
) -> ServerSentEvent:
    """Stream a log to its page, colours already told from text."""
    key, start = LogKey(run_id, step, count), last_event_id(last_id, default=offset) or 0
    chunks = whole(logs, key, start) if await is_over(runs, key) else logs.follow(key, start)

    async def messages() -> Any:
        async for cursor, lines in live_lines(chunks):
            yield ServerSentEventMessage(data=as_json(lines), event="lines", id=cursor)
        yield ServerSentEventMessage(data="{}", event="end")

    return event_stream(messages(), stopping)


@get("/gates", opt={"scope": "read"})
async def gates_page(
    request: AnyRequest,
    pages: NamedDependency[Pages],
    gates: NamedDependency[Gates],
    runs: NamedDependency[Runs],
) -> Response[str]:
    """Show what waits for a decision."""
    waiting = []
    for gate in await gates.open():
        run = await runs.summary(gate.run_id)
        waiting.append({**asdict(gate), "title": f"{run.repo} #{run.number} {run.title}"})
    return pages.render(request, "gates.html", section="gates", gates=waiting)


@get("/repositories", opt={"scope": "read"})
async def repositories_page(
    request: AnyRequest, pages: NamedDependency[Pages], repositories: NamedDependency[Repositories]
) -> Response[str]:
    """Show the registered repositories."""
    listed = await repositories.list()
    return pages.render(request, "repositories.html", section="repositories", repositories=listed)


# --- changing --------------------------------------------------------------------------------------


@post("/runs/{run_id:str}/gates", opt={"scope": "write"})
async def decide(
    request: AnyRequest,
    run_id: FromPath[str],
    data: Form,
    runs: NamedDependency[Runs],
    sessions: NamedDependency[Sessions],
) -> Redirect:
    """Approve or reject a gate."""
    session = require_form(request, sessions, data.get("csrf"))
    decision: Any = data.get("decision", "")
    comment = data.get("comment") or None
    await runs.decide(run_id, data.get("name", ""), decision, by=session.actor.name, comment=comment)
    return _back_to(run_id)


@post("/runs/{run_id:str}/cancel", opt={"scope": "write"})
async def cancel(
    request: AnyRequest,
    run_id: FromPath[str],
    data: Form,
    runs: NamedDependency[Runs],
    sessions: NamedDependency[Sessions],
) -> Redirect:
    """Cancel a run."""
    session = require_form(request, sessions, data.get("csrf"))
    await runs.cancel(run_id, by=session.actor.name)
    return _back_to(run_id)


@post("/runs/{run_id:str}/rerun", opt={"scope": "write"})
async def rerun(
    request: AnyRequest,
    run_id: FromPath[str],
    data: Form,
    runs: NamedDependency[Runs],
    sessions: NamedDependency[Sessions],
) -> Redirect:
    """Run a finished run again, whole or from a step."""
    require_form(request, sessions, data.get("csrf"))
    await runs.rerun(run_id, from_step=_step_of(data))
    return _back_to(run_id)


@post("/runs/{run_id:str}/what-if", opt={"scope": "write"})
async def fork(
    request: AnyRequest,
    run_id: FromPath[str],
    data: Form,
    runs: NamedDependency[Runs],
    sessions: NamedDependency[Sessions],
) -> Redirect:
    """Make a new run out of a run, from a step on."""
    session = require_form(request, sessions, data.get("csrf"))
    name, count = _step_of(data) or (None, 1)
    made = await runs.what_if(run_id, WhatIf(name, count), by=session.actor.name)
    return _back_to(made.id)


def _step_of(data: Mapping[str, str]) -> tuple[str, int] | None:
    """Return name and count of the step that a form names, None where it names none."""
    step, count = data.get("step"), data.get("count", "1")
    if not (count.isascii() and count.isdecimal() and len(count) < 10):
        raise InvalidInputError("count is a whole number")
    return (step, int(count)) if step else None


# --- logging in ------------------------------------------------------------------------------------


@get("/login", opt={"scope": "public"})
async def login_page(
    request: AnyRequest,
    pages: NamedDependency[Pages],
    after: Annotated[str | None, QueryParameter(name="next")] = None,
) -> Response[str]:
    """Ask for a token."""
    return pages.render(request, "login.html", problem=None, next=safe_path(after))


@post("/login", opt={"scope": "public"})
async def log_in(
    request: AnyRequest, data: Form, pages: NamedDependency[Pages], sessions: NamedDependency[Sessions]
) -> Response[Any]:
    """Start a session for the bearer of a token."""
    after = safe_path(data.get("next"))
    try:
        cookie = await sessions.log_in(data.get("token", "").strip())
    except UnauthorizedError as error:
        return pages.render(request, "login.html", status=401, problem=str(error), next=after)
    return _with_cookie(pages, cookie, after)


@get("/login/{ticket:str}", opt={"scope": "public"})
async def log_in_by_link(
    ticket: FromPath[str],
    pages: NamedDependency[Pages],
    sessions: NamedDependency[Sessions],
    after: Annotated[str | None, QueryParameter(name="next")] = None,
) -> Redirect:
    """Start a session by a link that works once."""
    return _with_cookie(pages, await sessions.follow_link(ticket), safe_path(after))


@post("/logout", opt={"scope": "public"})
async def log_out(request: AnyRequest, data: Form, sessions: NamedDependency[Sessions]) -> Redirect:
    """Forget the session in this browser."""
    require_form(request, sessions, data.get("csrf"))
    response = Redirect("/login", status_code=303)
    response.delete_cookie(SESSION_COOKIE)
    return response


def _with_cookie(pages: Pages, cookie: str, after: str) -> Redirect:
    response = Redirect(after, status_code=303)
    response.set_cookie(
        SESSION_COOKIE,
        cookie,
        max_age=int(LIFETIME.total_seconds()),
        httponly=True,
        secure=pages.secure,
        # Lax, not strict: a commit status on a forge links to a run's page. Forms carry a token of their own.
        samesite="lax",
    )
    return response


def _back_to(run_id: str) -> Redirect:
    return Redirect(f"/runs/{run_id}", status_code=303)
