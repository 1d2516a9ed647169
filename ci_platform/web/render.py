"""Pages from templates: who looks, how errors look, what headers go along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from litestar import MediaType, Request, Response
from litestar.response import Redirect
from markupsafe import Markup, escape

from ci_platform.access import Actor
from ci_platform.api.problems import describe
from ci_platform.garbage.planning import in_bytes
from ci_platform.sessions import Session
from ci_platform.web.ansi import clean

HERE = Path(__file__).parent

# Nothing inline, nothing from elsewhere: log output that slipped through as markup could still do nothing.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_NOT_PAGES = ("/api/", "/webhooks/", "/git/", "/schema", "/static/", "/healthz", "/readyz")
_ICONS = {
    "complete": "success",
    "approved": "success",
    "errored": "failure",
    "error": "failure",
    "timed_out": "failure",
    "rejected": "failure",
    "paused": "waiting",
}

AnyRequest = Request[Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks at a page, for templates."""

    actor: Actor | None
    session: Session | None

    def can(self, scope: str) -> bool:
        """Whether buttons that need `scope` are shown. Only sessions send forms."""
        return self.session is not None and scope in self.session.actor.scopes


class Pages:
    """Renders templates. `base_url` is the server's address as people see it."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.secure = base_url.startswith("https:")
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_harmless,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            icon_of=lambda name: _ICONS.get(name, name),
            length=length,
            in_bytes=in_bytes,
            now=lambda: datetime.now(UTC),
            base_url=base_url,
        )

    def render(
        self, request: AnyRequest, template: str, *, status: int = 200, **values: Any
    ) -> Response[str]:
        """Return the page. Every template gets `session` (a Viewer), `csrf()` and `section`."""
        session = getattr(request.state, "session", None)
        viewer = Viewer(getattr(request.state, "actor", None) if session else None, session)
        page = self._templates.get_template(template).render(
            **{"section": "", **values}, session=viewer, csrf=_csrf_field(session)
        )
        headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
        return Response(page, media_type=MediaType.HTML, status_code=status, headers=headers)


def wants_page(request: AnyRequest) -> bool:
    """Return whether an error is better shown as a page: asked for by a browser, outside of the API."""
    path = request.url.path
    return not path.startswith(_NOT_PAGES) and "text/html" in request.headers.get("accept", "")


def problem_page(pages: Pages, request: AnyRequest, error: Exception) -> Response[Any]:
    """Show an error as a page; who is not logged in is asked to."""
    problem = describe(error)
    if problem.status == 401 and request.method == "GET" and not request.url.path.startswith("/login"):
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return Redirect(f"/login?{urlencode({'next': here})}", status_code=303)
    heading = HTTPStatus(problem.status).phrase
    return pages.render(request, "problem.html", status=problem.status, problem=problem, heading=heading)


def safe_path(path: str | None) -> str:
    """Return `path` if it leads to this server, else `/`: a login must not end on another site."""
    if path and path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable():
        return quote(path, safe="/?&=#%+:@,;~")
    return "/"


def length(duration: timedelta) -> str:
    """Return a duration as people say it."""
    seconds = max(duration.total_seconds(), 0.0)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def query(path: str, values: Mapping[str, Any]) -> str:
    """Return `path` with those of `values` that are set."""
    given = {key: value for key, value in values.items() if value not in {None, ""}}
    return f"{path}?{urlencode(given)}" if given else path


def _harmless(value: Any) -> Any:
    """Take control characters off every text that gets into a page: titles, errors, names are others' words."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _csrf_field(session: Session | None) -> Callable[[], Markup]:
    value = session.csrf if session else ""
    return lambda: Markup('<input type="hidden" name="csrf" value="{}">').format(escape(value))
