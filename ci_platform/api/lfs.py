"""The LFS server of our own repositories: `/git/<owner>/<repository>.git/info/lfs`, the batch API with basic transfers.

What it speaks is git-lfs's docs/api: a client asks for many files at once, and gets for each where to send it, or to
have it from: here, with the token that it has come with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from litestar.connection import ASGIConnection
from litestar.types import Receive, Scope, Send

from ci_platform import full_disk
from ci_platform.api import git_wire
from ci_platform.api.git_wire import Connection
from ci_platform.errors import (
    InvalidInputError,
    NotFoundError,
    PlatformError,
    TooLargeError,
    UnavailableError,
)
from ci_platform.named_locks import NamedLocks
from ci_platform.source import Source
from ci_platform.source.own_lfs import OID, OwnLfs, place_of

T = TypeVar("T")

KIND = "application/vnd.git-lfs+json"
_ADDRESS = re.compile(
    r"(?:/git)?/([^/]+/[^/]+?)(?:\.git)?/info/lfs/(objects/batch|objects/[0-9a-f]{64}|verify)", re.ASCII
)
Authorize = Callable[[Connection, str, bool], Awaitable[str]]
"""Called with request, repository and whether it writes; raises a RejectedError."""

_MOST_ASKED = 1000
_REQUEST_BYTES = 1 << 20
_PIECE = 1 << 18


def is_lfs(path: str) -> bool:
    """Whether a request below `/git` is for the LFS server."""
    return "/info/lfs/" in path or path.endswith("/info/lfs")


class LfsServer:
    """The ASGI application. `url` is the platform's own; a file has `largest` bytes, a repository's together `most`.

    A transfer takes `within` seconds and stands still for `stall` at most; `at_once` go on at a time.
    """

    def __init__(
        self,
        source: Source,
        authorize: Authorize,
        url: str,
        *,
        largest: int,
        most: int,
        within: float = 1800,
        stall: float = 60,
        at_once: int = 16,
    ) -> None:
        self._source, self._authorize, self._url = source, authorize, url
        self._largest, self._most, self._within, self._stall = largest, most, within, stall
        self._transfers, self._keeping = anyio.CapacityLimiter(at_once), NamedLocks()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors as git-lfs shows them."""
        connection: Connection = ASGIConnection(scope, receive, send)
        try:
            await self._answer(connection)
        except PlatformError as error:
            extra = {
                401: {
                    "lfs-authenticate": 'Basic realm="dynflow"',
                    "www-authenticate": 'Basic realm="dynflow"',
                }
            }
            extra[503] = {"retry-after": "10"}
            await self._say(connection, {"message": str(error)}, error.status, extra.get(error.status))
        except TimeoutError:
            return  # left unfinished: the client sees that it was cut off

    async def _say(
        self, connection: Connection, value: Any, status: int = 200, extra: dict[str, str] | None = None
    ) -> None:
        await git_wire.respond(connection.send, status, KIND, json.dumps(value).encode(), extra)

    async def _answer(self, connection: Connection) -> None:
        method = connection.scope.get("method")
        address = _ADDRESS.fullmatch(connection.scope["path"].rstrip("/"))
        if address is None:
            raise NotFoundError("this LFS server has the batch API with basic transfers, and nothing else")
        repo, action = address.groups()
        oid = action.rpartition("/")[2]
        if (action, method) == ("objects/batch", "POST"):
            await self._batch(connection, repo)
        elif (action, method) == ("verify", "POST"):
            await self._verify(connection, repo)
        elif OID.fullmatch(oid) and method == "GET":
            await self._download(connection, repo, oid)
        elif OID.fullmatch(oid) and method == "PUT":
            await self._upload(connection, repo, oid)
        else:
            raise InvalidInputError(f"{action} does not answer {method}")

    async def _files(self, connection: Connection, repo: str, *, write: bool) -> OwnLfs:
        await self._authorize(connection, repo, write)
        if not await self._source.exists(repo):
            raise NotFoundError(f"there is no repository {repo!r} here")
        return OwnLfs(self._source.path(repo))

    async def _asked(self, connection: Connection) -> dict[str, Any]:
        content = bytearray()
        async for piece in git_wire.body(connection, _REQUEST_BYTES, self._stall):
            content += piece
        try:
            asked = json.loads(content)
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise InvalidInputError("the request is no JSON object")
        return asked

    # The batch API

    async def _batch(self, connection: Connection, repo: str) -> None:
        # Who may read at least is asked first: others are told nothing of what is wrong with their request.
        await self._files(connection, repo, write=False)
        asked = await self._asked(connection)
        operation = asked.get("operation")
        if not isinstance(operation, str) or operation not in {"upload", "download"}:
            raise InvalidInputError(f"operation is 'upload' or 'download', not {operation!r:.100}")
        transfers = asked.get("transfers") or ["basic"]
        if not isinstance(transfers, list) or "basic" not in transfers:
            raise InvalidInputError("this server has basic transfers only")
        if asked.get("hash_algo", "sha256") != "sha256":
            raise InvalidInputError("this server names files by their SHA-256")
        objects = _objects(asked.get("objects"))
        files = await self._files(connection, repo, write=operation == "upload")
        base = f"{self._home(connection)}/git/{repo}.git/info/lfs"
        headers = {"Authorization": sent} if (sent := connection.headers.get("authorization")) else {}

        def places() -> list[dict[str, Any]]:
            find = self._to_send if operation == "upload" else self._to_have
            found = find(files, objects)
            return [
                {"oid": oid, "size": size, **_places(found[oid], base, oid, headers)} for oid, size in objects
            ]

        answer = {"transfer": "basic", "objects": await self._thread(places), "hash_algo": "sha256"}
        await self._say(connection, answer)

    def _home(self, connection: Connection) -> str:
        """Return where this server is for whom has asked, which may know it by another name than its own."""
        host, own = connection.headers.get("host"), urlsplit(self._url)
        if not host or host == own.netloc:
            return self._url
        # Never less than https where that is in front: a token comes along.
        return f"{'https' if own.scheme == 'https' else connection.scope['scheme']}://{host}"

    def _to_have(self, files: OwnLfs, objects: list[tuple[str, int]]) -> dict[str, Any]:
        def find(oid: str, size: int) -> Any:
            here = files.size(oid)
            if here is None:
                return 404, "the repository has no such file"
            return "download" if here == size else (422, f"the file has {here} bytes, not {size}")

        return {oid: find(oid, size) for oid, size in objects}

    def _to_send(self, files: OwnLfs, objects: list[tuple[str, int]]) -> dict[str, Any]:
        room = self._most - files.taken()

        def find(oid: str, size: int) -> Any:
            nonlocal room
            if files.announced(oid):
                return None
            if size > self._largest:
                return 413, f"a file has {self._largest:,} bytes at most (setting max_lfs)"
            room -= size
            return (
                "upload" if room >= 0 else (507, f"the repository may keep {self._most:,} bytes (lfs_budget)")
            )

        return {oid: find(oid, size) for oid, size in objects}

    async def _verify(self, connection: Connection, repo: str) -> None:
        files, asked = await self._files(connection, repo, write=True), await self._asked(connection)
        ((oid, size),) = _objects([asked])
        here = await self._thread(lambda: files.size(oid))
        if here != size:
            raise NotFoundError(f"the repository has no file {oid} of {size} bytes")
        await self._say(connection, {"oid": oid, "size": size})

    # Transfers

    async def _upload(self, connection: Connection, repo: str, oid: str) -> None:
        files = await self._files(connection, repo, write=True)
        async with self._turn():
            if not await self._thread(lambda: files.announced(oid)):
                await self._take(connection, repo, files, oid)
        await git_wire.respond(connection.send, 200, KIND, b"{}")

    async def _take(self, connection: Connection, repo: str, files: OwnLfs, oid: str) -> None:
        most = min(self._largest, self._most - await self._thread(files.taken))
        part = await self._thread(files.begin)
        try:
            with part.open("xb") as aside, anyio.fail_after(self._within):
                await git_wire.spool(connection, aside, max(most, 0), self._stall)
            async with self._keeping(repo):  # what others have sent meanwhile counts
                if await self._thread(lambda: files.taken() + part.stat().st_size) > self._most:
                    raise TooLargeError(f"the repository may keep {self._most:,} bytes (lfs_budget)")
                await self._thread(lambda: files.keep(part, oid))
        except FileNotFoundError:
            raise NotFoundError("the repository was deleted meanwhile") from None
        finally:
            with anyio.CancelScope(shield=True):
                await self._thread(lambda: files.forget(part))

    async def _download(self, connection: Connection, repo: str, oid: str) -> None:
        files = await self._files(connection, repo, write=False)
        try:
            content = await self._thread(lambda: place_of(files.repository, oid).open("rb"))
        except FileNotFoundError:
            raise NotFoundError(f"the repository has no file {oid}") from None
        with content:
            async with self._turn():
                await self._send(connection, content, os.fstat(content.fileno()).st_size)

    async def _send(self, connection: Connection, content: IO[bytes], size: int) -> None:
        headers = git_wire.headers("application/octet-stream", {"content-length": str(size)})
        await connection.send({"type": "http.response.start", "status": 200, "headers": headers})
        more = True
        while more:
            piece = await self._thread(lambda: content.read(_PIECE))
            more = bool(piece)
            with anyio.fail_after(self._stall):
                await connection.send({"type": "http.response.body", "body": piece, "more_body": more})

    async def _thread(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(full_disk.told(function))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            with anyio.fail_after(2 * self._stall):
                await self._transfers.acquire()
        except TimeoutError:
            raise UnavailableError("too many transfers at once: try again in a minute") from None
        try:
            yield
        finally:
            self._transfers.release()


def _objects(asked: Any) -> list[tuple[str, int]]:
    """Return the files (id, bytes) that a request names, each once. Raises InvalidInputError."""
    if not isinstance(asked, list) or not 0 < len(asked) <= _MOST_ASKED:
        raise InvalidInputError(f"objects is a list of 1 to {_MOST_ASKED:,} files")
    found = dict[str, int]()
    for each in asked:
        oid, size = (each.get("oid"), each.get("size")) if isinstance(each, dict) else (None, None)
        if not isinstance(oid, str) or not OID.fullmatch(oid):
            raise InvalidInputError(f"oid is a SHA-256 in hexadecimal, not {oid!r:.100}")
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise InvalidInputError(f"size is a number of bytes, not {size!r:.100}")
        found[oid] = size
    return list(found.items())


def _places(found: Any, base: str, oid: str, headers: dict[str, str]) -> dict[str, Any]:
    """Return what a client is to do for a file: nothing, where the server has what it would send."""
    if found is None:
        return {}
    if not isinstance(found, str):
        code, message = found
        return {"error": {"code": code, "message": message}}
    actions = {found: {"href": f"{base}/objects/{oid}", "header": headers}}
    if found == "upload":
        actions["verify"] = {"href": f"{base}/verify", "header": headers}
    return {"authenticated": True, "actions": actions}
