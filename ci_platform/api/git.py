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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Literal, cast

import anyio
import anyio.abc
from litestar import asgi
from litestar.connection import ASGIConnection
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from ci_platform import git_commands
from ci_platform.api import git_wire
from ci_platform.api.git_wire import Connection
from ci_platform.api.lfs import LfsServer, is_lfs
from ci_platform.assembly import Platform
from ci_platform.errors import (
    ConflictError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    PlatformError,
    TooLargeError,
    UnavailableError,
)
from ci_platform.pushes import RefUpdate, changes
from ci_platform.repositories import RepositoryView
from ci_platform.source import Source

logger = logging.getLogger(__name__)

Service = Literal["git-upload-pack", "git-receive-pack"]
_SERVICES: tuple[Service, ...] = ("git-upload-pack", "git-receive-pack")
_ADDRESS = re.compile(r"(?:/git)?/([^/]+/[^/]+?)(?:\.git)?/(info/refs|git-upload-pack|git-receive-pack)")
_CHUNK = 64 * 1024
_VERSIONS = ("version=1", "version=2")
_REPORT_BYTES = 4 * 1024 * 1024
_SETTINGS = {
    "transfer.hideRefs": "refs/dynflow",
    "receive.denyNonFastForwards": "false",
    "uploadpack.allowFilter": "true",
    # Of many at once, each gets by with little; large files are passed on without being compared.
    "pack.threads": "1",
    "pack.windowMemory": "64m",
    "core.bigFileThreshold": "32m",
    "core.fsync": "committed,reference",
    **git_commands.verified("receive"),
}


Authorize = Callable[[Connection, str, bool], Awaitable[str]]
"""Called with request, repository and whether it writes; returns who it is, or raises a RejectedError."""

OnPush = Callable[[str, list[RefUpdate], str], Awaitable[list[str]]]
"""Called with repository, updates and who pushed, after the refs have moved; returns lines for the pusher."""


@dataclass(frozen=True, slots=True)
class GitLimits:
    """What requests may take.

    `push` in bytes. `within` is how long git may work; `at_once` how many processes, and as many uploads;
    `queue` how long a request waits for its turn; `stall` how long a connection may stand still.
    """

    push: int = 2 * 1024**3
    within: timedelta = timedelta(minutes=30)
    at_once: int = 16
    queue: timedelta = timedelta(minutes=2)
    stall: timedelta = timedelta(minutes=1)


class GitServer:
    """The ASGI application. Serves repositories that `source` has of its own, none of its mirrors."""

    def __init__(
        self, source: Source, authorize: Authorize, on_push: OnPush, *, limits: GitLimits | None = None
    ) -> None:
        self._source, self._authorize, self._on_push = source, authorize, on_push
        self._limits = limits or GitLimits()
        self._stall = self._limits.stall.total_seconds()
        self._work = anyio.CapacityLimiter(self._limits.at_once)
        self._uploads = anyio.CapacityLimiter(self._limits.at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Git shows the plain text of an error to its user."""
        connection: Connection = ASGIConnection(scope, receive, send)
        try:
            await self._answer(connection)
        except PlatformError as error:
            extra = {401: {"www-authenticate": 'Basic realm="dynflow"'}, 503: {"retry-after": "10"}}
            text = f"{error}\n".encode("utf-8", "replace")
            kind = "text/plain; charset=utf-8"
            await git_wire.respond(send, error.status, kind, text, extra.get(error.status))
        except TimeoutError:
            # Left unfinished: the client takes the answer for cut off, which it is.
            logger.info("%s was given up: nobody took the answer, or git took too long", scope["path"])

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

    @asynccontextmanager
    async def _turn(self, limiter: anyio.CapacityLimiter) -> AsyncIterator[None]:
        try:
            with anyio.fail_after(self._limits.queue.total_seconds()):
                await limiter.acquire()
        except TimeoutError:
            raise UnavailableError("too many clones and pushes at once: try again in a minute") from None
        try:
            yield
        finally:
            limiter.release()

    def _path(self, repo: str) -> str:
        return str(self._source.path(repo))

    async def _environment(self, connection: Connection, repo: str) -> dict[str, str]:
        settings = {**_SETTINGS, "receive.maxInputSize": str(self._limits.push)}
        env = await self._source.environment(repo, settings)
        # The one header that git's own server passes on; of it, what is known.
        if (version := connection.headers.get("git-protocol")) in _VERSIONS:
            env["GIT_PROTOCOL"] = version
        return env

    async def _advertise(self, connection: Connection, repo: str, service: Service) -> None:
        command = [service.removeprefix("git-"), "--stateless-rpc", "--advertise-refs", self._path(repo)]
        env = await self._environment(connection, repo)
        stream = git_wire.Stream(connection.send, f"application/x-{service}-advertisement", self._stall)
        # Pushes have no version 2.
        bare = service == "git-upload-pack" and env.get("GIT_PROTOCOL") == "version=2"
        prefix = b"" if bare else git_wire.packet(f"# service={service}\n".encode()) + b"0000"
        async with self._turn(self._work):
            with anyio.fail_after(self._limits.within.total_seconds()):
                async with git_commands.process(command, env, stderr=subprocess.DEVNULL) as git:
                    async for chunk in git_wire.output(git):
                        await stream.write(prefix + chunk)
                        prefix = b""
                    if prefix or await git.wait():
                        raise UnavailableError(f"git cannot read {repo!r}: have its administrator look at it")
                    await stream.end()

    async def _serve_fetch(self, connection: Connection, repo: str, actor: str) -> None:
        del actor
        env = await self._environment(connection, repo)
        command = ["upload-pack", "--stateless-rpc", self._path(repo)]
        stream = git_wire.Stream(connection.send, "application/x-git-upload-pack-result", self._stall)
        wrong: list[PlatformError] = []
        async with self._turn(self._work):
            with anyio.move_on_after(self._limits.within.total_seconds()):
                async with (
                    git_commands.process(
                        command, env, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
                    ) as git,
                    anyio.create_task_group() as tasks,
                ):

                    async def feed() -> None:
                        error = await git_wire.feed(connection, git, self._stall)
                        wrong.extend([error] if error is not None else [])
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(feed)
                    await self._pass_on(git, stream)
                    tasks.cancel_scope.cancel()
        if wrong and not stream.begun:
            raise wrong[0]

    async def _pass_on(self, git: anyio.abc.Process, stream: git_wire.Stream) -> None:
        try:
            async for chunk in git_wire.output(git):
                await stream.write(chunk)
            await stream.end()
        except TimeoutError:
            logger.info("a clone was given up: its client took nothing for %s", self._limits.stall)

    async def _serve_push(self, connection: Connection, repo: str, actor: str) -> None:
        env = await self._environment(connection, repo)
        with tempfile.TemporaryFile(dir=Path(self._path(repo)).parent, prefix=".push-") as aside:
            async with self._turn(self._uploads):
                await self._take(connection, aside)
            sideband = b"side-band-64k" in aside.read(_CHUNK)
            aside.seek(0)
            # The repository first: who waits for another push to it takes no turn from the others.
            async with self._alone(repo), self._turn(self._work):
                report, lines = await self._receive(repo, actor, aside, env)
        if sideband and report.endswith(b"0000"):
            report = report[:-4] + b"".join(map(git_wire.remark, lines)) + b"0000"
        await git_wire.respond(connection.send, 200, "application/x-git-receive-pack-result", report)

    @asynccontextmanager
    async def _alone(self, repo: str) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            try:
                with anyio.fail_after(self._limits.within.total_seconds()):
                    await held.enter_async_context(self._source.writing(repo))
            except TimeoutError:
                raise UnavailableError(f"{repo!r} is being written to: push again later") from None
            yield

    async def _take(self, connection: Connection, aside: IO[bytes]) -> None:
        try:
            with anyio.fail_after(self._limits.within.total_seconds()):
                await git_wire.spool(connection, aside, self._limits.push, self._stall)
        except TimeoutError:
            raise UnavailableError(f"the upload took longer than {self._limits.within}") from None

    async def _receive(
        self, repo: str, actor: str, aside: IO[bytes], env: Mapping[str, str]
    ) -> tuple[bytes, list[str]]:
        """Apply a push and tell `on_push`. Killed in between, the refs have moved: compare them at start."""
        command = ["receive-pack", "--stateless-rpc", self._path(repo)]
        before, report = await self._source.ref_snapshot(repo), bytearray()
        try:
            with anyio.fail_after(self._limits.within.total_seconds()):
                async with git_commands.process(command, env, stdin=aside, stderr=subprocess.DEVNULL) as git:
                    async for chunk in git_wire.output(git):
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
        updates = changes(before, after)
        if not updates:
            return []
        await self._source.settle_default_branch(repo)
        try:
            return await self._on_push(repo, updates, actor)
        except PlatformError:
            # The push is done and cannot be taken back; what compares refs finds it.
            logger.exception("a push to %s was stored but not taken in", repo)
            self._source.look_again(repo)
            return ["dynflow has your commits but cannot start runs right now; it will try again"]


def git_router(platform: Platform) -> ASGIRouteHandler:
    """Return the git server of the platform's local repositories; git sends its token as a password."""

    async def authorize(connection: Connection, repo: str, write: bool) -> str:  # noqa: FBT001
        header = connection.headers.get("authorization")
        if header is None and platform.settings.public_read and not write:
            name = "anybody"
        else:
            actor = await platform.access.authenticate(header, repo=repo)
            actor.require("write" if write else "read")
            name = actor.name
        registered = await platform.repositories.get(repo)
        if registered.forge != "local":
            raise NotFoundError(f"{repo!r} lives at {registered.forge}, not here")
        # An import stays closed whatever is set: the next refresh would take back what was pushed.
        if write and (registered.read_only or await platform.imports.has(repo)):
            raise ForbiddenError(
                f"{repo!r} is read-only here: push to where it comes from, or to a fork of it"
            )
        if not await platform.source.exists(repo):
            await _make(platform, registered)
        return name

    async def on_push(repo: str, updates: list[RefUpdate], actor: str) -> list[str]:
        accepted = await platform.pushes.accept(repo, updates, actor=actor)
        if not any(delivery.state == "received" for delivery in accepted):
            return [f"dynflow: {delivery.reason}" for delivery in accepted if delivery.reason]
        return [f"dynflow: follow the run at {platform.settings.base_url}/"]

    settings, source = platform.settings, platform.source
    lfs = LfsServer(source, authorize, settings.base_url, largest=settings.max_lfs, most=settings.lfs_budget)
    limits = GitLimits(push=settings.max_push)
    return git_handler(GitServer(source, authorize, on_push, limits=limits), lfs)


async def _make(platform: Platform, registered: RepositoryView) -> None:
    """Make the repository on its first use: registering it made a row alone."""
    if await platform.imports.has(registered.name):
        raise UnavailableError(
            f"{registered.name!r} is being imported: try again when `dynflow repo show` says so"
        )
    with suppress(ConflictError):  # two first uses at once
        await platform.source.create(registered.name, default_branch=registered.default_branch)


def git_handler(server: GitServer, lfs: LfsServer | None = None) -> ASGIRouteHandler:
    """Mount a git server at `/git`, and the LFS server of its repositories. They check tokens by themselves."""

    @asgi("/git", is_mount=True, copy_scope=True, opt={"scope": "own"})
    async def serve_git(scope: Scope, receive: Receive, send: Send) -> None:
        await (lfs if lfs is not None and is_lfs(scope["path"]) else server)(scope, receive, send)

    return serve_git
