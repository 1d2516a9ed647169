"""Bearer tokens: who is asking, and what they may do. A token is shown once; its digest alone is kept."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, cast, get_args

from ci_platform.errors import ForbiddenError, InvalidInputError, NotFoundError, UnauthorizedError
from ci_platform.model import Repository, Token
from ci_platform.settings import read_secret, write_secret
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock

Scope = Literal["read", "write", "admin"]

# A scope holds those below it: who may push and decide gates may also look.
_IMPLIED: dict[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "write": frozenset({"read", "write"}),
    "admin": frozenset({"read", "write", "admin"}),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}", re.ASCII)
# The prefix lets secret scanners find a token that was committed by mistake. 32 random bytes cannot be
# guessed, so a plain SHA-256 of them is as good as a slow hash.
_PREFIX = "dynflow_"
_RANDOM_BYTES = 32
# `last_used_at` tells whether a token is still in use: to the minute is enough, and spares most writes.
_USE_RESOLUTION = timedelta(minutes=1)
_SHORTEST, _LONGEST = timedelta(minutes=1), timedelta(days=3660)
_UNKNOWN = "the token is not known here, or was revoked"
LOCAL_TOKEN_NAME = "local-admin"  # noqa: S105 - its name, not its secret


@dataclass(frozen=True, slots=True)
class Actor:
    """Who is asking: the token's name, what it may do, and the token's id (0 where there is none)."""

    name: str
    scopes: frozenset[str]
    token_id: int = 0

    def require(self, scope: Scope) -> None:
        """Raise ForbiddenError unless the actor has `scope`."""
        if scope not in self.scopes:
            raise ForbiddenError(f"token {self.name!r} may not do this: it needs the scope {scope!r}")


@dataclass(frozen=True, slots=True)
class TokenView:
    """A token as lists show it, without its secret. `repo` is the one repository that it opens."""

    id: int
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None
    repo: str | None = None
    expires_at: datetime | None = None


class Access:
    """Makes, lists, revokes and checks tokens."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def create(
        self,
        name: str,
        scopes: tuple[str, ...] = ("read", "write"),
        *,
        repo: str | None = None,
        lifetime: timedelta | None = None,
    ) -> tuple[TokenView, str]:
        """Make a token and return it with its secret, which is not shown again.

        Names are 1-100 of `[A-Za-z0-9_.@-]`; they appear as who decided a gate, so a name that is in use is
        refused. With `repo`, it opens that repository's git, commits and files alone. Raises InvalidInputError,
        NotFoundError for the repository.
        """
        row = self._row(name, scopes, repo, lifetime)

        def insert(tx: Transaction) -> Token:
            if repo is not None and not tx.first(
                Repository, col(Repository.name) == repo, col(Repository.deleted_at).is_(None)
            ):
                raise NotFoundError(f"repository {repo[:200]!r} is not registered here")
            for held in tx.all(Token, col(Token.name) == name, col(Token.revoked_at).is_(None)):
                if held.expires_at is None or held.expires_at > self._clock.now():
                    raise InvalidInputError(
                        f"there is a token named {name!r} already: revoke it or choose another"
                    )
            return tx.add(row)

        secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        row.digest = _digest(secret)
        return _view(await self._store.write(insert)), secret

    def _row(self, name: str, scopes: tuple[str, ...], repo: str | None, lifetime: timedelta | None) -> Token:
        if not _NAME.fullmatch(name):
            raise InvalidInputError(f"{name[:100]!r} cannot be a token's name: 1-100 of A-Z a-z 0-9 _ . @ -")
        if not scopes or set(scopes) - set(get_args(Scope)):
            raise InvalidInputError(f"scopes are some of {', '.join(get_args(Scope))}, not {scopes!r}")
        if repo is not None and "admin" in scopes:
            raise InvalidInputError(
                "a token of one repository can read or write it; admin is for all of them"
            )
        if lifetime is not None and not _SHORTEST <= lifetime <= _LONGEST:
            raise InvalidInputError(f"a token lives between {_SHORTEST} and {_LONGEST.days} days")
        now = self._clock.now()
        expires_at = None if lifetime is None else now + lifetime
        return Token(
            name=name, digest="", scopes=sorted(set(scopes)), created_at=now, repo=repo, expires_at=expires_at
        )

    async def list(self) -> list[TokenView]:
        """Return all tokens, the newest first."""
        rows = await self._store.read(lambda tx: tx.all(Token, order=col(Token.id).desc()))
        return [_view(row) for row in rows]

    async def revoke(self, token_id: int) -> None:
        """Make a token useless from now on. Raises NotFoundError; revoking twice changes nothing."""
        now = self._clock.now()

        def mark(tx: Transaction) -> None:
            if not 0 <= token_id < 2**31 or tx.get(Token, token_id) is None:
                raise NotFoundError(f"there is no token {token_id}")
            tx.change(Token, {"revoked_at": now}, col(Token.id) == token_id, col(Token.revoked_at).is_(None))

        await self._store.write(mark)

    async def revoke_all_of(self, repo: str) -> None:
        """Make all tokens of one repository useless from now on."""
        now = self._clock.now()
        where = (col(Token.repo) == repo, col(Token.revoked_at).is_(None))
        await self._store.write(lambda tx: tx.change(Token, {"revoked_at": now}, *where))

    async def authenticate(self, authorization: str | None, *, repo: str | None = None) -> Actor:
        """Return who sent this `Authorization` header: `Bearer <token>`, or `Basic` with it as the password.

        `repo` is the repository that is asked for: who has a token of another one alone, or asks for something
        that is of none, gets a ForbiddenError. Raises UnauthorizedError; the message is the same for every wrong
        token.
        """
        return await self.authenticate_token(_secret_of(authorization), repo=repo)

    async def authenticate_token(self, secret: str, *, repo: str | None = None) -> Actor:
        """Return who has this token. Raises UnauthorizedError, ForbiddenError for a token of another repository."""
        digest, now = _digest(secret), self._clock.now()
        row = self._valid(await self._store.read(lambda tx: tx.first(Token, col(Token.digest) == digest)))
        # The database finds a digest, which tells nothing of the secret; what it found is compared in constant time.
        if not hmac.compare_digest(row.digest, digest):
            raise UnauthorizedError(_UNKNOWN)
        if row.repo is not None and row.repo != repo:
            raise ForbiddenError(f"token {row.name!r} opens the repository {row.repo} alone")
        if row.last_used_at is None or now - row.last_used_at >= _USE_RESOLUTION:
            used = {"last_used_at": now}
            await self._store.write(lambda tx: tx.change(Token, used, col(Token.digest) == digest))
        return _actor(row)

    async def resume(self, token_id: int) -> Actor:
        """Return who has the token of this id: what a session stands for. Raises UnauthorizedError."""
        row = self._valid(await self._store.read(lambda tx: tx.get(Token, token_id)))
        if row.repo is not None:
            raise UnauthorizedError("a token of one repository has no sessions")
        return _actor(row)

    def _valid(self, row: Token | None) -> Token:
        if row is None or row.revoked_at is not None:
            raise UnauthorizedError(_UNKNOWN)
        if row.expires_at is not None and row.expires_at <= self._clock.now():
            raise UnauthorizedError(f"the token {row.name!r} expired: have another one made")
        return row

    async def ensure_local_token(self, path: Path) -> str:
        """Return the administrator's token in `path`, made on the first call; its file has mode 0600.

        It is how the command line on this machine gets in.
        """
        if path.exists():  # noqa: ASYNC240 - once at start, a local file
            secret = read_secret(path)
            digest = _digest(secret)
            row = await self._store.read(lambda tx: tx.first(Token, col(Token.digest) == digest))
            if row is not None and row.revoked_at is None:
                return secret
        held = await self._store.read(
            lambda tx: tx.first(Token, col(Token.name) == LOCAL_TOKEN_NAME, col(Token.revoked_at).is_(None))
        )
        if held is not None:
            await self.revoke(cast("int", held.id))
        _, secret = await self.create(LOCAL_TOKEN_NAME, ("admin",))
        write_secret(path, secret)
        return secret


def _secret_of(authorization: str | None) -> str:
    scheme, _, value = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if scheme.lower() == "basic":
        try:
            _, colon, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            colon = password = ""
        if colon and password:
            return password
    raise UnauthorizedError("send a token: 'Authorization: Bearer <token>', or as the password of Basic")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _actor(row: Token) -> Actor:
    return Actor(row.name, frozenset().union(*(_IMPLIED[scope] for scope in row.scopes)), cast("int", row.id))


def _view(row: Token) -> TokenView:
    return TokenView(
        id=cast("int", row.id),
        name=row.name,
        scopes=tuple(row.scopes),
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
        repo=row.repo,
        expires_at=row.expires_at,
    )
