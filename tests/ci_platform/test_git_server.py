"""Our git server, spoken to by git itself over HTTP."""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import pytest
import uvicorn
from litestar import Litestar
from litestar.types import ASGIApp, Receive, Scope, Send

from ci_platform.api.git import GitLimits, GitServer, git_handler
from ci_platform.api.git_wire import Connection
from ci_platform.errors import FailedError, ForbiddenError, UnauthorizedError, UnavailableError
from ci_platform.pushes import RefUpdate
from ci_platform.source import Remote, Source
from tests.ci_platform.git_repositories import ENVIRONMENT, Link, Script, WorkingCopy, working_copy

REPO, TOKEN = "ada/engine", "token-of-ada"


@dataclass
class Served:
    """A running server; `pushes` is what `on_push` was told."""

    url: str
    source: Source
    pushes: list[tuple[str, list[RefUpdate], str]] = field(default_factory=list)
    fails: bool = False
    protocols: bool = True

    async def authorize(self, connection: Connection, repo: str, write: bool) -> str:  # noqa: FBT001
        header = connection.headers.get("authorization", "")
        if header == f"Basic {_basic('reader', TOKEN)}" and write:
            raise ForbiddenError("the token may not write")
        if header not in {f"Basic {_basic('reader', TOKEN)}", f"Basic {_basic('ada', TOKEN)}"}:
            raise UnauthorizedError("send a token")
        return "ada"

    async def on_push(self, repo: str, updates: list[RefUpdate], actor: str) -> list[str]:
        if self.fails:
            raise UnavailableError("the database is away")
        self.pushes.append((repo, updates, actor))
        return [f"run of {update.ref}\x1b[31m" for update in updates]

    def address(self, user: str = "ada", repo: str = REPO) -> str:
        return self.url.replace("http://", f"http://{user}:{TOKEN}@") + f"/git/{repo}.git"


def _basic(user: str, password: str) -> str:
    return httpx.BasicAuth(user, password)._auth_header.removeprefix("Basic ")


def without_protocol_header(served: Served, app: ASGIApp) -> ASGIApp:
    """Older servers know no version 2, in which any commit can be asked for by its id."""

    async def old(scope: Scope, receive: Receive, send: Send) -> None:
        if not served.protocols:
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"git-protocol"]
        await app(scope, receive, send)

    return old


@asynccontextmanager
async def serving(
    root: Path, limits: GitLimits | None = None, source: Source | None = None
) -> AsyncIterator[Served]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", source or Source(root))
        handler = git_handler(GitServer(served.source, served.authorize, served.on_push, limits=limits))
        app = without_protocol_header(served, Litestar([handler], openapi_config=None))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener])
            with anyio.fail_after(10):
                while not server.started:
                    await anyio.lowlevel.checkpoint()
            yield served
            server.should_exit = True


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path / "server") as running:
        await running.source.create(REPO)
        yield running


@pytest.fixture
def work(tmp_path: Path) -> WorkingCopy:
    return working_copy(tmp_path / "work")


async def git(work: WorkingCopy, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments],
            cwd=work.path,
            env={**ENVIRONMENT, **extra},
            capture_output=True,
            text=True,
            check=False,
        )

    return await anyio.to_thread.run_sync(run)


async def push(work: WorkingCopy, served: Served, *refs: str, user: str = "ada") -> str:
    done = await git(work, "push", served.address(user), *(refs or ("main",)))
    assert done.returncode == 0, done.stderr
    return done.stderr


async def test_what_is_pushed_is_told_and_can_be_cloned(
    served: Served, work: WorkingCopy, tmp_path: Path
) -> None:
    first = work.commit({"a": b"1", "run": Script(b"#!"), "l": Link("a")})
    said = await push(work, served)
    assert "remote: run of refs/heads/main[31m" in said, "shown to the pusher, without control characters"
    second = work.commit({"a": b"2"})
    await push(work, served)
    assert served.pushes == [
        (REPO, [RefUpdate("refs/heads/main", None, first)], "ada"),
        (REPO, [RefUpdate("refs/heads/main", first, second)], "ada"),
    ]
    for version in ("0", "1", "2"):
        clone = tmp_path / f"clone{version}"
        done = await git(
            work, "-c", f"protocol.version={version}", "clone", "-q", served.address("reader"), str(clone)
        )
        assert done.returncode == 0, done.stderr
        assert (clone / "a").read_bytes() == b"2"
    shallow = tmp_path / "shallow"
    assert (await git(work, "clone", "-q", "--depth=1", served.address(), str(shallow))).returncode == 0
    assert WorkingCopy(shallow).git("rev-list", "--count", "HEAD") == "1"


async def test_every_ref_of_a_push_is_told(served: Served, work: WorkingCopy) -> None:
    one = work.commit({"a": b"1"})
    work.git("tag", "--annotate", "--message", "v", "v1")
    await push(work, served, "main", "v1", "main:other", "main:refs/notes/x")
    two = work.commit({"a": b"2"})
    await push(work, served, "main", ":other")
    work.git("reset", "--quiet", "--hard", one)
    await push(work, served, "+main")
    assert [updates for _, updates, _ in served.pushes] == [
        [
            RefUpdate("refs/heads/main", None, one),
            RefUpdate("refs/heads/other", None, one),
            RefUpdate("refs/tags/v1", None, one),
        ],
        [RefUpdate("refs/heads/main", one, two), RefUpdate("refs/heads/other", one, None)],
        [RefUpdate("refs/heads/main", two, one)],
    ]


async def test_a_push_of_nothing_new_is_not_told(served: Served, work: WorkingCopy) -> None:
    work.commit({"a": b"1"})
    await push(work, served)
    await push(work, served)
    assert len(served.pushes) == 1


async def test_many_pushes_at_once_are_each_told_once(served: Served, work: WorkingCopy) -> None:
    sha = work.commit({"a": b"1"})
    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(push, work, served, f"main:branch{number}")
    told = [update for _, updates, _ in served.pushes for update in updates]
    assert sorted(told, key=lambda update: update.ref) == [
        RefUpdate(f"refs/heads/branch{number}", None, sha) for number in range(6)
    ]
    assert all(len(updates) == 1 for _, updates, _ in served.pushes)


async def test_a_large_push_goes_through_in_pieces(served: Served, work: WorkingCopy, tmp_path: Path) -> None:
    content = os.urandom(30 * 1024 * 1024)
    work.commit({"large": content, **{f"f{number}": b"%d" % number for number in range(500)}})
    await push(work, served)
    clone = tmp_path / "clone"
    assert (await git(work, "clone", "-q", served.address(), str(clone))).returncode == 0
    assert (clone / "large").read_bytes() == content


async def test_a_push_over_the_limit_is_refused(tmp_path: Path, work: WorkingCopy) -> None:
    async with serving(tmp_path / "server", GitLimits(push=1_000_000)) as served:
        await served.source.create(REPO)
        work.commit({"large": os.urandom(3_000_000)})
        done = await git(work, "push", served.address(), "main")
        assert done.returncode != 0
        assert await served.source.branches(REPO) == {}
        assert served.pushes == []


@pytest.mark.parametrize(("user", "expected"), [("nobody", "Authentication failed"), ("reader", "403")])
async def test_who_may_not_push_cannot(served: Served, work: WorkingCopy, user: str, expected: str) -> None:
    work.commit({"a": b"1"})
    done = await git(work, "push", served.address(user), "main")
    assert done.returncode != 0
    assert expected in done.stderr
    assert await served.source.branches(REPO) == {}


async def test_addresses_that_are_not_repositories_answer_nothing(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, auth=("ada", TOKEN)) as client:
        for path in (
            "/git/ada/none.git/info/refs",
            "/git/%2e%2e/x.git/info/refs",
            "/git/ada/engine.git/objects/x",
        ):
            found = await client.get(path, params={"service": "git-upload-pack"})
            assert found.status_code in {400, 404}, path
        found = await client.get(f"/git/{REPO}.git/info/refs", params={"service": "git-evil"})
        assert found.status_code == 403
        assert (await client.get(f"/git/{REPO}.git/info/refs")).status_code == 403
        wrong = await client.post(f"/git/{REPO}.git/git-upload-pack", content=b"0000")
        assert wrong.status_code == 400, "a form of another site cannot send git's content type"
    async with httpx.AsyncClient(base_url=served.url) as client:
        found = await client.get(f"/git/{REPO}.git/info/refs", params={"service": "git-upload-pack"})
        assert found.status_code == 401
        assert found.headers["www-authenticate"].startswith("Basic")


async def test_a_mirror_of_a_forge_is_not_served(served: Served, work: WorkingCopy, tmp_path: Path) -> None:
    sha = work.commit({"a": b"1"})
    source = Source(tmp_path / "server", allow_file=True)
    await source.fetch("ada/private", sha, Remote(work.url))
    done = await git(work, "ls-remote", served.address(repo="ada/private"))
    assert done.returncode != 0
    assert "not found" in done.stderr


async def test_a_body_that_unfolds_without_end_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path / "server", GitLimits(push=1_000_000)) as served:
        await served.source.create(REPO)
        async with httpx.AsyncClient(base_url=served.url, auth=("ada", TOKEN)) as client:
            found = await client.post(
                f"/git/{REPO}.git/git-receive-pack",
                content=gzip.compress(b"0" * 50_000_000),
                headers={
                    "content-type": "application/x-git-receive-pack-request",
                    "content-encoding": "gzip",
                },
            )
        assert found.status_code == 413


async def test_a_push_that_cannot_be_taken_in_is_still_there_to_find(
    served: Served, work: WorkingCopy
) -> None:
    sha, served.fails = work.commit({"a": b"1"}), True
    assert "will try again" in await push(work, served)
    assert await served.source.ref_snapshot(REPO) == {"refs/heads/main": sha}


async def test_the_first_branch_becomes_the_default_one(
    served: Served, work: WorkingCopy, tmp_path: Path
) -> None:
    work.commit({"a": b"1"})
    await push(work, served, "main:trunk")
    assert await served.source.default_branch(REPO) == "trunk"
    clone = tmp_path / "clone"
    assert (await git(work, "clone", "-q", served.address(), str(clone))).returncode == 0
    assert (clone / "a").exists()


async def test_nothing_in_a_served_repository_runs(served: Served, work: WorkingCopy, tmp_path: Path) -> None:
    witness, hooks = tmp_path / "witness", served.source.path(REPO) / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("pre-receive", "update", "post-receive", "post-update", "reference-transaction"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {witness}\n")
        (hooks / name).chmod(0o755)
    work.commit({"a": b"1"})
    await push(work, served)
    assert not witness.exists()


async def test_a_damaged_commit_is_refused_at_the_door(served: Served, work: WorkingCopy) -> None:
    work.commit({"a": b"1"})
    blob = bytes.fromhex(work.git("rev-parse", "HEAD:a"))
    tree = subprocess.run(  # noqa: ASYNC221
        ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
        cwd=work.path,
        input=b"100644 .git\0" + blob,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    sha = work.git("commit-tree", tree.strip(), "-m", "x")
    done = await git(work, "push", served.address(), f"{sha}:refs/heads/evil")
    assert done.returncode != 0
    assert await served.source.branches(REPO) == {}


@pytest.mark.parametrize("version", [0, 2])
async def test_a_mirror_is_fetched_from_a_server_old_or_new(
    served: Served, work: WorkingCopy, tmp_path: Path, version: int
) -> None:
    older = work.commit({"a": b"1"})
    newer = work.commit({"a": b"2"})
    pull = work.commit({"a": b"3"})
    served.protocols = version == 2
    await push(work, served, f"{newer}:refs/heads/main", f"{pull}:refs/pull/7/head")
    mirror, remote = Source(tmp_path / "mirror"), Remote(f"{served.url}/git/{REPO}.git", ("ada", TOKEN))
    await mirror.fetch("x/y", pull, remote, ref="refs/pull/7/head")
    await mirror.fetch("x/y", newer, remote, ref="refs/heads/main")
    await mirror.fetch("x/y", older, remote, ref="refs/heads/gone")
    for sha, content in ((older, b"1"), (newer, b"2"), (pull, b"3")):
        assert await mirror.read_file("x/y", sha, "a") == content
    with pytest.raises(FailedError):
        await mirror.fetch("x/y", "3" * 40, remote, ref="refs/heads/main")
    with pytest.raises(UnavailableError) as caught:
        await mirror.fetch("x/y", "3" * 40, Remote(remote.url, ("ada", "wrong-s3cret")))
    assert "s3cret" not in str(caught.value)


async def test_a_redirect_to_another_server_gets_no_credentials(tmp_path: Path) -> None:
    seen: list[str | None] = []

    def answers(status: int, location: str | None) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            del receive
            headers = dict(scope["headers"])
            seen.append(headers.get(b"authorization", b"").decode() or None)
            extra = [(b"location", location.encode())] if location else []
            extra.append((b"www-authenticate", b'Basic realm="x"'))
            await send({"type": "http.response.start", "status": status, "headers": extra})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        return app

    async with (
        listening(answers(401, None)) as thief,
        listening(answers(302, f"{thief}/git/info/refs?service=git-upload-pack")) as front,
    ):
        with pytest.raises((UnavailableError, FailedError)):
            await Source(tmp_path / "mirror").fetch(
                "x/y", "3" * 40, Remote(f"{front}/git", ("ada", "s3cret"))
            )
    assert seen
    assert set(seen) == {None}


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener])
            with anyio.fail_after(10):
                while not server.started:
                    await anyio.lowlevel.checkpoint()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True
