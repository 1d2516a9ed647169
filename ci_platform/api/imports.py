"""Repositories that are filled from a URL: imported, refreshed when asked and when their forge says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from ci_platform.errors import InvalidInputError
from ci_platform.imports import Imports, ImportView
from ci_platform.mirroring import Shape


@dataclass(frozen=True, slots=True)
class NewImport:
    """`name` is `owner/repository` here, `url` where it comes from, without credentials in it.

    `password` is a password or token; it is kept encrypted and never shown. `depth` imports that many commits of
    each branch; without `blobs`, files come when they are read. Nobody pushes to an import: fork it.
    """

    name: str
    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    depth: int | None = None
    blobs: bool = True


@dataclass(frozen=True, slots=True)
class StartedImport:
    """An import that goes on by itself. `hook_secret` is what its webhook signs with, and is not shown again."""

    started: ImportView
    hook_url: str
    hook_secret: str


@dataclass(frozen=True, slots=True)
class Refresh:
    """`verify` looks at every object here as well, and fetches all anew where one is damaged."""

    verify: bool = False


@post("/imports", status_code=202, opt={"scope": "admin"}, tags=["imports"], summary="Import a repository")
async def start_import(
    request: Request[Any, Any, Any], data: JSONBody[NewImport], imports: NamedDependency[Imports]
) -> StartedImport:
    """Register a repository and fill it from its URL, after the answer. The same again gives new credentials."""
    if data.password is None and data.username is not None:
        raise InvalidInputError("a username needs a password or token with it")
    credentials = None if data.password is None else (data.username or "", data.password)
    started, secret = await imports.start(
        data.name,
        data.url,
        credentials=credentials,
        shape=Shape(data.depth, data.blobs),
    )
    return StartedImport(started, f"{request.app.state.base_url}/webhooks/refresh/{started.repo}", secret)


@get(
    "/repos/{owner:str}/{name:str}/import",
    opt={"scope": "read", "of_repo": True},
    tags=["imports"],
    summary="Show an import",
)
async def get_import(
    owner: FromPath[str], name: FromPath[str], imports: NamedDependency[Imports]
) -> ImportView:
    """Return where a repository comes from, when it was refreshed, and what went wrong."""
    return await imports.get(f"{owner}/{name}")


@post(
    "/repos/{owner:str}/{name:str}/refresh",
    status_code=202,
    opt={"scope": "write", "of_repo": True},
    tags=["imports"],
    summary="Refresh an import",
)
async def refresh_import(
    owner: FromPath[str], name: FromPath[str], data: JSONBody[Refresh], imports: NamedDependency[Imports]
) -> ImportView:
    """Bring an import to what its remote has now, after the answer. Runs start for what moved."""
    return await imports.refresh(f"{owner}/{name}", verify=data.verify)


@post(
    "/webhooks/refresh/{owner:str}/{name:str}",
    status_code=202,
    opt={"scope": "own"},
    tags=["webhooks"],
    summary="Be told that an import moved",
)
async def receive_refresh(
    request: Request[Any, Any, Any],
    owner: FromPath[str],
    name: FromPath[str],
    imports: NamedDependency[Imports],
) -> None:
    """Verify the signature over the raw body, then refresh. What the body says does not matter."""
    body = b"".join([chunk async for chunk in request.stream()])
    headers = {key.lower(): value for key, value in request.headers.items()}
    await imports.receive(f"{owner}/{name}", headers, body)
