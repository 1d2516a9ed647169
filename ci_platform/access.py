"""Bearer tokens: who is asking, and what they may do. A token is shown once; its digest alone is kept."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, cast, get_args

from ci_platform.errors import ForbiddenError, InvalidInputError, NotFoundError, UnauthorizedError
from ci_platform.model import Token
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
    """A token as lists show it, without its secret."""

    id: int
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


class Access:
    """Makes, lists, revokes and checks tokens."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def create(self, name: str, scopes: tuple[str, ...] = ("read", "write")) -> tuple[TokenView, str]:
        """Make a token and return it with its secret, which is not shown again.

        Names are 1-100 of `[A-Za-z0-9_.@-]`; they appear as who decided a gate, so a name that is in use is
        refused. Raises InvalidInputError.
        """
        if not _NAME.fullmatch(name):
            raise InvalidInputError(f"{name[:100]!r} cannot be a token's name: 1-100 of A-Z a-z 0-9 _ . @ -")
        if not scopes or set(scopes) - set(get_args(Scope)):
            raise InvalidInputError(f"scopes are some of {', '.join(get_args(Scope))}, not {scopes!r}")
        secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        row = Token(
            name=name, digest=_digest(secret), scopes=sorted(set(scopes)), created_at=self._clock.now()
        )

        def insert(tx: Transaction) -> Token:
            if tx.first(Token, col(Token.name) == name, col(Token.revoked_at).is_(None)):
                raise InvalidInputError(
                    f"there is a token named {name!r} already: revoke it or choose another"
                )
            return tx.add(row)

        return _view(await self._store.write(insert)), secret

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

    async def authenticate(self, authorization: str | None) -> Actor:
        """Return who sent this `Authorization` header: `Bearer <token>`, or `Basic` with it as the password.

        Raises UnauthorizedError. The message is the same for every wrong token.
        """
        return await self.authenticate_token(_secret_of(authorization))

    async def authenticate_token(self, secret: str) -> Actor:
        """Return who has this token. Raises UnauthorizedError."""
        digest, now = _digest(secret), self._clock.now()
        row = await self._store.read(lambda tx: tx.first(Token, col(Token.digest) == digest))
        if row is None or row.revoked_at is not None:
            raise UnauthorizedError("the token is not known here, or was revoked")
        if row.last_used_at is None or now - row.last_used_at >= _USE_RESOLUTION:
            used = {"last_used_at": now}
            await self._store.write(lambda tx: tx.change(Token, used, col(Token.digest) == digest))
        return _actor(row)

    async def resume(self, token_id: int) -> Actor:
        """Return who has the token of this id: what a session stands for. Raises UnauthorizedError."""
        row = await self._store.read(lambda tx: tx.get(Token, token_id))
        if row is None or row.revoked_at is not None:
            raise UnauthorizedError("the token is not known here, or was revoked")
        return _actor(row)

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
    )
