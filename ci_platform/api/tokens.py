"""Tokens, and links that log a browser in once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from litestar import delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from ci_platform.access import Access, Actor, Scope, TokenView
from ci_platform.errors import ForbiddenError, InvalidInputError
from ci_platform.sessions import Sessions
from ci_platform.web.render import Pages
from dynflow.durations import parse_duration


@dataclass(frozen=True, slots=True)
class NewToken:
    """`name` shows as who decided a gate. A scope holds those below it: admin, write, read.

    With `repo` it opens the git, the commits and the files of that repository alone. `expires_in` is a duration,
    such as `30 days`; without it the token lives until it is revoked.
    """

    name: str
    scopes: tuple[Scope, ...] = ("write",)
    repo: str | None = None
    expires_in: str | None = None


@dataclass(frozen=True, slots=True)
class CreatedToken:
    """A new token with its secret, which is never shown again."""

    token: TokenView
    secret: str


@dataclass(frozen=True, slots=True)
class TokenList:
    """Tokens, the newest first, without their secrets."""

    items: list[TokenView]


@dataclass(frozen=True, slots=True)
class LoginLink:
    """A link that logs one browser in, once."""

    url: str
    expires_at: datetime


@get("/tokens", opt={"scope": "admin"}, tags=["tokens"], summary="List tokens")
async def list_tokens(access: NamedDependency[Access]) -> TokenList:
    """Return all tokens."""
    return TokenList(await access.list())


@post("/tokens", opt={"scope": "admin"}, tags=["tokens"], summary="Make a token")
async def create_token(data: JSONBody[NewToken], access: NamedDependency[Access]) -> CreatedToken:
    """Make a token; the answer is the only time its secret is shown."""
    lifetime = None if data.expires_in is None else _lifetime(data.expires_in)
    return CreatedToken(
        *await access.create(data.name, tuple(data.scopes), repo=data.repo, lifetime=lifetime)
    )


def _lifetime(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"expires_in: {error}") from None


@delete("/tokens/{token_id:int}", opt={"scope": "admin"}, tags=["tokens"], summary="Revoke a token")
async def revoke_token(token_id: FromPath[int], access: NamedDependency[Access]) -> None:
    """Make a token and its browser sessions useless from now on."""
    await access.revoke(token_id)


@post("/login-links", opt={"scope": "read"}, tags=["tokens"], summary="Make a link that logs in once")
async def create_login_link(
    actor: NamedDependency[Actor], sessions: NamedDependency[Sessions], pages: NamedDependency[Pages]
) -> LoginLink:
    """Return a link that logs a browser in as the bearer of this token. It works once, for ten minutes."""
    if not actor.token_id:
        raise ForbiddenError("a link stands for a token: send one")
    ticket, expires_at = sessions.make_link(actor)
    return LoginLink(f"{pages.base_url}/login/{ticket}", expires_at)
