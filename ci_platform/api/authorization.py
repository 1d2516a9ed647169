"""Who may do what over HTTP. Every route says the scope it needs; one that says nothing answers nobody.

`opt={"scope": …}`: `"public"`, `"own"` (the route checks by itself), or a scope of `ci_platform.access`. With
`"of_repo": True` the path's `owner` and `name` say for which repository, and a token of that one alone will do.
"""

from __future__ import annotations

from typing import Any, cast

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from ci_platform.access import Actor, Scope
from ci_platform.errors import ForbiddenError, UnauthorizedError
from ci_platform.sessions import Session, Sessions

Connection = ASGIConnection[Any, Any, Any, Any]

SESSION_COOKIE = "dynflow_session"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_ANYBODY = Actor("anybody", frozenset({"read"}))


class Authorizer:
    """The guard of the whole application. `public_read`: anybody may look."""

    def __init__(self, sessions: Sessions, *, public_read: bool) -> None:
        self._sessions, self._public_read = sessions, public_read

    async def __call__(self, connection: Connection, handler: BaseRouteHandler) -> None:
        """Let the request through, with `state.actor` and `state.session` set, or raise."""
        scope = handler.opt.get("scope", "admin")
        connection.state.session = connection.state.actor = None
        if scope == "own":
            return
        await self._identify(connection, _repo(connection) if handler.opt.get("of_repo") else None)
        if scope == "public":
            return
        actor = connection.state.actor
        if actor is None:
            raise UnauthorizedError("send a token: 'Authorization: Bearer …'; `dynflow token` makes one")
        actor.require(cast("Scope", scope))

    async def _identify(self, connection: Connection, repo: str | None) -> None:
        header = connection.headers.get("authorization")
        if header is not None:
            connection.state.actor = await self._sessions.access.authenticate(header, repo=repo)
            return
        session = await self._sessions.open(connection.cookies.get(SESSION_COOKIE))
        method = connection.scope.get("method", "GET")
        if session is not None and (method in _SAFE_METHODS or _comes_from_a_page(connection)):
            connection.state.session, connection.state.actor = session, session.actor
        elif self._public_read:
            connection.state.actor = _ANYBODY


def _repo(connection: Connection) -> str:
    return f"{connection.path_params['owner']}/{connection.path_params['name']}"


def current_actor(request: Request[Any, Any, Any]) -> Actor:
    """Return who is asking; for routes that need a scope."""
    if request.state.actor is None:
        raise UnauthorizedError("log in first")
    return cast("Actor", request.state.actor)


def current_session(request: Request[Any, Any, Any]) -> Session | None:
    """Return the browser's session, None where there is none."""
    return cast("Session | None", request.state.session)


def require_form(request: Request[Any, Any, Any], sessions: Sessions, csrf: str | None) -> Session:
    """Return the session that sent this form. Raises where there is none or another site made the form."""
    session = current_session(request)
    if session is None:
        raise UnauthorizedError("log in first")
    sessions.check_form(session, csrf)
    return session


def _comes_from_a_page(connection: Connection) -> bool:
    """Return whether a cookie may count for a change: web forms alone, and only those of this very origin.

    Pages check the form's own token as well. The JSON API takes no cookie for changes at all.
    """
    if connection.scope["path"].startswith("/api/"):
        return False
    site = connection.headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        raise ForbiddenError("another site sent this form")
    return True
