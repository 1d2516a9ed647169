"""Our own git server: git's smart HTTP protocol under `/git/<owner>/<repository>.git`, versions 0 to 2.

`git upload-pack` and `git receive-pack` do the work, in an environment in which no repository runs anything. A
fetch is streamed through. A push is first put aside on disk, so that slow uploads hold no lock, then applied
under the repository's lock: which push moved which ref is therefore certain.
"""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, cast

import anyio
import anyio.abc
import anyio.to_thread
from litestar import asgi
from litestar.connection import ASGIConnection
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from ci_platform import git_commands
from ci_platform.assembly import Platform
from ci_platform.errors import (
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    PlatformError,
    TooLargeError,
    UnavailableError,
)
from ci_platform.source import Source

logger = logging.getLogger(__name__)

Service = Literal["git-upload-pack", "git-receive-pack"]
_SERVICES: tuple[Service, ...] = ("git-upload-pack", "git-receive-pack")
_ADDRESS = re.compile(r"(?:/git)?/([^/]+/[^/]+?)(?:\.git)?/(info/refs|git-upload-pack|git-receive-pack)")
_CHUNK = 64 * 1024
_SPOOL_CHUNK = 1024 * 1024
_REQUEST_BYTES = 32 * 1024 * 1024
"""Of a fetch: what the client has and wants, 50 bytes a commit."""

_REPORT_BYTES = 4 * 1024 * 1024
_SETTINGS = {
    "transfer.hideRefs": "refs/dynflow",
    "receive.fsckObjects": "true",
    # Harmless oddities of old repositories, which everybody else's server takes too.
    "receive.fsck.zeroPaddedFilemode": "ignore",
    "receive.fsck.badTimezone": "ignore",
    "receive.fsck.missingSpaceBeforeDate": "ignore",
    "receive.denyNonFastForwards": "false",
    "uploadpack.allowFilter": "true",
    "core.fsync": "committed,reference",
}


@dataclass(frozen=True, slots=True)
class RefUpdate:
    """A ref that a push moved. `before` is None where it is new, `after` None where it is gone."""

    ref: str
    before: str | None
    after: str | None


Connection = ASGIConnection[Any, Any, Any, Any]
Authorize = Callable[[Connection, str, bool], Awaitable[str]]
"""Called with request, repository and whether it writes; returns who it is, or raises a RejectedError."""

OnPush = Callable[[str, list[RefUpdate], str], Awaitable[list[str]]]
"""Called with repository, updates and who pushed, after the refs have moved; returns lines for the pusher."""


@dataclass(frozen=True, slots=True)
class GitLimits:
    """`push` in bytes. `within` is how long git may work; `at_once` how many processes."""

    push: int = 2 * 1024**3
    within: timedelta = timedelta(minutes=30)
    at_once: int = 16


class GitServer:
    """The ASGI application. Serves repositories that `source` has of its own, none of its mirrors."""

    def __init__(
        self, source: Source, authorize: Authorize, on_push: OnPush, *, limits: GitLimits | None = None
    ) -> None:
        self._source, self._authorize, self._on_push = source, authorize, on_push
        self._limits = limits or GitLimits()
        self._slots = anyio.CapacityLimiter(self._limits.at_once)
        self._pushes: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Git shows the plain text of an error to its user."""
        connection: Connection = ASGIConnection(scope, receive, send)
        try:
            await self._answer(connection)
        except PlatformError as error:
            headers = {"www-authenticate": 'Basic realm="dynflow"'} if error.status == 401 else {}
            await _respond(send, error.status, "text/plain; charset=utf-8", f"{error}\n".encode(), headers)

    async def _answer(self, connection: Connection) -> None:
        method = connection.scope.get("method")
        # A mount's path comes with a slash at its end in some versions of Litestar.
        address = _ADDRESS.fullmatch(connection.scope["path"].rstrip("/"))
        if address is None:
            raise NotFoundError("there is nothing at this address; repositories are /git/<owner>/<name>.git")
        repo, action = address.groups()
        if action == "info/refs" and method == "GET":
            service = connection.query_params.get("service")
            if service not in _SERVICES:
                raise ForbiddenError("this server speaks git's smart protocol only")
            await self._authorized(connection, repo, cast("Service", service))
            await self._advertise(connection, repo, cast("Service", service))
        elif action != "info/refs" and method == "POST":
            expected = f"application/x-{action}-request"
            if connection.headers.get("content-type") != expected:
                raise InvalidInputError(f"the content type has to be {expected}")
            actor = await self._authorized(connection, repo, cast("Service", action))
            serve = self._serve_push if action == "git-receive-pack" else self._serve_fetch
            await serve(connection, repo, actor)
        else:
            raise InvalidInputError(f"{action} does not answer {method}")

    async def _authorized(self, connection: Connection, repo: str, service: Service) -> str:
        actor = await self._authorize(connection, repo, service == "git-receive-pack")
        if not await self._source.exists(repo):
            raise NotFoundError(f"there is no repository {repo!r} here")
        return actor

    async def _advertise(self, connection: Connection, repo: str, service: Service) -> None:
        command = [service.removeprefix("git-"), "--stateless-rpc", "--advertise-refs", self._path(repo)]
        env = self._environment(connection, service)
        async with self._slots:
            try:
                refs = await git_commands.run(command, env, within=self._limits.within)
            except git_commands.GitError as error:
                raise UnavailableError(f"{repo!r} cannot be served: {error}") from None
        if "GIT_PROTOCOL" not in env:
            refs = _packet(f"# service={service}\n".encode()) + b"0000" + refs
        await _respond(connection.send, 200, f"application/x-{service}-advertisement", refs)

    def _path(self, repo: str) -> str:
        return str(self._source.path(repo))

    def _environment(self, connection: Connection, service: Service) -> dict[str, str]:
        env = git_commands.environment({**_SETTINGS, "receive.maxInputSize": str(self._limits.push)})
        # Pushes have no version 2; git's own client never asks for it.
        if service == "git-upload-pack" and connection.headers.get("git-protocol") == "version=2":
            env["GIT_PROTOCOL"] = "version=2"
        return env

    async def _serve_fetch(self, connection: Connection, repo: str, actor: str) -> None:
        del actor
        env = self._environment(connection, "git-upload-pack")
        command = ["upload-pack", "--stateless-rpc", self._path(repo)]
        headers = _headers("application/x-git-upload-pack-result")
        with anyio.move_on_after(self._limits.within.total_seconds()):
            async with (
                self._slots,
                git_commands.process(command, env, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as git,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(_feed, connection, git, tasks.cancel_scope)
                await connection.send({"type": "http.response.start", "status": 200, "headers": headers})
                await _pump(git, connection.send)
                tasks.cancel_scope.cancel()

    async def _serve_push(self, connection: Connection, repo: str, actor: str) -> None:
        env = self._environment(connection, "git-receive-pack")
        with tempfile.TemporaryFile(dir=Path(self._path(repo)).parent, prefix=".push-") as spool:
            await _spool(connection, spool, self._limits.push)
            sideband = b"side-band-64k" in spool.read(_CHUNK)
            spool.seek(0)
            async with self._slots, self._pushes[repo]:
                report, lines = await self._receive(repo, actor, spool, env)
        if sideband and report.endswith(b"0000"):
            said = b"".join(_packet(b"\x02" + _printable(line) + b"\n") for line in lines)
            report = report[:-4] + said + b"0000"
        await _respond(connection.send, 200, "application/x-git-receive-pack-result", report)

    async def _receive(
        self, repo: str, actor: str, spool: IO[bytes], env: Mapping[str, str]
    ) -> tuple[bytes, list[str]]:
        """Apply a push and tell `on_push`. Killed in between, the refs have moved: compare them at start."""
        command = ["receive-pack", "--stateless-rpc", self._path(repo)]
        before, report = await self._source.ref_snapshot(repo), bytearray()
        try:
            with anyio.fail_after(self._limits.within.total_seconds()):
                async with git_commands.process(command, env, stdin=spool, stderr=subprocess.DEVNULL) as git:
                    async for chunk in _output(git):
                        report += chunk
                        if len(report) > _REPORT_BYTES:
                            raise TooLargeError("the push changes too many refs at once")
                    await git.wait()
        except TimeoutError:
            raise UnavailableError(f"the push took longer than {self._limits.within}") from None
        finally:
            # Also after an error: git may have moved refs before it.
            with anyio.CancelScope(shield=True):
                lines = await self._tell(repo, before, actor)
        return bytes(report), lines

    async def _tell(self, repo: str, before: Mapping[str, str], actor: str) -> list[str]:
        after = await self._source.ref_snapshot(repo)
        names = sorted(before.keys() | after.keys())
        updates = [RefUpdate(name, before.get(name), after.get(name)) for name in names]
        updates = [update for update in updates if update.before != update.after]
        if not updates:
            return []
        await self._source.settle_default_branch(repo)
        try:
            return await self._on_push(repo, updates, actor)
        except PlatformError:
            # The push is done and cannot be taken back; what compares refs finds it.
            logger.exception("a push to %s was stored but not taken in", repo)
            return ["dynflow has your commits but cannot start runs right now; it will try again"]


def git_router(platform: Platform) -> ASGIRouteHandler:
    """Return the git server of the platform's local repositories; git sends its token as a password."""

    async def authorize(connection: Connection, repo: str, write: bool) -> str:  # noqa: FBT001
        header = connection.headers.get("authorization")
        if header is None and platform.settings.public_read and not write:
            name = "anybody"
        else:
            actor = await platform.access.authenticate(header)
            actor.require("write" if write else "read")
            name = actor.name
        registered = await platform.repositories.get(repo)
        if registered.forge != "local":
            raise NotFoundError(f"{repo!r} lives at {registered.forge}, not here")
        if not await platform.source.exists(repo):
            await platform.source.create(repo, default_branch=registered.default_branch)
        return name

    async def on_push(repo: str, updates: list[RefUpdate], actor: str) -> list[str]:
        accepted = await platform.pushes.accept(repo, updates, actor=actor)
        if not any(delivery.state == "received" for delivery in accepted):
            return [f"dynflow: {delivery.reason}" for delivery in accepted if delivery.reason]
        return [f"dynflow: follow the run at {platform.settings.base_url}/"]

    limits = GitLimits(push=platform.settings.max_push)
    return git_handler(GitServer(platform.source, authorize, on_push, limits=limits))


def git_handler(server: GitServer) -> ASGIRouteHandler:
    """Mount a git server at `/git`. It checks tokens by itself."""

    @asgi("/git", is_mount=True, copy_scope=True, opt={"scope": "own"})
    async def serve_git(scope: Scope, receive: Receive, send: Send) -> None:
        await server(scope, receive, send)

    return serve_git


def _packet(content: bytes) -> bytes:
    return b"%04x" % (len(content) + 4) + content


def _printable(line: str) -> bytes:
    return "".join(char for char in line if char.isprintable())[:500].encode()


def _headers(media_type: str, extra: Mapping[str, str] | None = None) -> list[tuple[bytes, bytes]]:
    found = {"content-type": media_type, "cache-control": "no-cache", **(extra or {})}
    return [(name.encode(), value.encode()) for name, value in found.items()]


async def _respond(
    send: Send, status: int, media_type: str, body: bytes, headers: Mapping[str, str] | None = None
) -> None:
    found = _headers(media_type, {"content-length": str(len(body)), **(headers or {})})
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _body(connection: Connection, limit: int) -> AsyncIterator[bytes]:
    """Yield the request's body, unpacked; TooLargeError where it is, or unfolds to, more than `limit` bytes."""
    inflate = zlib.decompressobj(wbits=31) if connection.headers.get("content-encoding") == "gzip" else None
    total, more = 0, True
    while more:
        message = await connection.receive()
        if message["type"] == "http.disconnect":
            raise InvalidInputError("the request ended early")
        more = bool(message.get("more_body"))
        for chunk in _unpacked(inflate, cast("bytes", message.get("body", b""))):
            total += len(chunk)
            if total > limit:
                raise TooLargeError(f"the request has more than {limit} bytes")
            yield chunk


def _unpacked(inflate: Any, data: bytes) -> Any:
    if inflate is None:
        yield data
        return
    while data:
        try:
            yield inflate.decompress(data, _SPOOL_CHUNK)
        except zlib.error as error:
            raise InvalidInputError(f"the request is not gzip: {error}") from None
        data = inflate.unconsumed_tail


async def _spool(connection: Connection, spool: IO[bytes], limit: int) -> None:
    pending = bytearray()
    async for chunk in _body(connection, limit):
        pending += chunk
        if len(pending) >= _SPOOL_CHUNK:
            await anyio.to_thread.run_sync(spool.write, bytes(pending))
            pending.clear()
    spool.write(pending)
    spool.flush()
    spool.seek(0)


async def _feed(connection: Connection, git: anyio.abc.Process, running: anyio.CancelScope) -> None:
    """Give git the request; then wait for the client to go away, which ends the work for it."""
    assert git.stdin is not None  # noqa: S101 - asked for above
    try:
        async for chunk in _body(connection, _REQUEST_BYTES):
            await git.stdin.send(chunk)
        await git.stdin.aclose()
    except (PlatformError, anyio.BrokenResourceError):
        running.cancel()
        return
    while (await connection.receive())["type"] != "http.disconnect":
        pass
    running.cancel()


async def _output(git: anyio.abc.Process) -> AsyncIterator[bytes]:
    assert git.stdout is not None  # noqa: S101 - always a pipe
    async for chunk in git.stdout:
        yield chunk


async def _pump(git: anyio.abc.Process, send: Send) -> None:
    async for chunk in _output(git):
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
