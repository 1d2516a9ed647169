"""Browser sessions: a signed cookie that stands for a token, and links that log in once.

The cookie holds no token: it names one, and the token is asked for again at every request, so that revoking
it ends its sessions. Sessions survive a restart of the server.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from ci_platform.access import Access, Actor
from ci_platform.errors import ForbiddenError, UnauthorizedError
from ci_platform.settings import read_secret, write_secret
from dynflow.clock import Clock

LIFETIME = timedelta(days=14)
# Long enough to walk over to the browser, short enough that a link in a terminal's history is worth nothing.
LINK_LIFETIME = timedelta(minutes=10)
_MOST_LINKS = 100


@dataclass(frozen=True, slots=True)
class Session:
    """Who a browser speaks for. `csrf` has to come back with every form."""

    actor: Actor
    csrf: str


@dataclass(frozen=True, slots=True)
class _Link:
    token_id: int
    expires_at: datetime


class Sessions:
    """Issues and checks session cookies. `key` is a file with the signing key, made on the first use."""

    def __init__(self, key: Path, access: Access, clock: Clock) -> None:
        self._path, self.access, self._clock = key, access, clock
        self._key: bytes | None = None
        self._links: dict[str, _Link] = {}

    async def log_in(self, secret: str) -> str:
        """Return the cookie of a new session for the bearer of this token. Raises UnauthorizedError."""
        return self._cookie((await self.access.authenticate_token(secret)).token_id)

    async def open(self, cookie: str | None) -> Session | None:
        """Return the session of this cookie, None where it is missing, forged, expired or revoked."""
        token_id = self._token_of(cookie or "")
        if token_id is None:
            return None
        try:
            actor = await self.access.resume(token_id)
        except UnauthorizedError:
            return None
        return Session(actor, self._sign("csrf", cookie or ""))

    def check_form(self, session: Session, csrf: str | None) -> None:
        """Raise ForbiddenError unless the form was made by this server for this session."""
        if not hmac.compare_digest(session.csrf.encode(), (csrf or "").encode("utf-8", "replace")):
            raise ForbiddenError("this form is from another session: go back, reload the page, try again")

    def make_link(self, actor: Actor) -> tuple[str, datetime]:
        """Return the secret part of a link that logs in once as `actor`, and until when."""
        now = self._clock.now()
        self._links = {name: link for name, link in self._links.items() if link.expires_at > now}
        while len(self._links) >= _MOST_LINKS:
            self._links.pop(next(iter(self._links)))
        ticket, expires_at = secrets.token_urlsafe(24), now + LINK_LIFETIME
        self._links[ticket] = _Link(actor.token_id, expires_at)
        return ticket, expires_at

    async def follow_link(self, ticket: str) -> str:
        """Return the cookie of a new session; the link is used up. Raises UnauthorizedError."""
        link = self._links.pop(ticket, None)
        if link is None or link.expires_at <= self._clock.now():
            raise UnauthorizedError("this link was used already, or is older than ten minutes")
        return self._cookie((await self.access.resume(link.token_id)).token_id)

    def _cookie(self, token_id: int) -> str:
        ends = int((self._clock.now() + LIFETIME).timestamp())
        # The random part makes every session's CSRF value its own.
        claims = f"{token_id}.{ends}.{secrets.token_urlsafe(9)}"
        return f"{claims}.{self._sign('session', claims)}"

    def _token_of(self, cookie: str) -> int | None:
        claims, _, signature = cookie.rpartition(".")
        expected = self._sign("session", claims)
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            return None
        token_id, ends, _ = claims.split(".", 2)
        return int(token_id) if int(ends) > self._clock.now().timestamp() else None

    def _sign(self, purpose: str, text: str) -> str:
        if self._key is None:
            if not self._path.exists():
                write_secret(self._path, secrets.token_urlsafe(32))
            self._key = read_secret(self._path).encode()
        digest = hmac.digest(self._key, f"{purpose}\x1f{text}".encode("utf-8", "replace"), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")
