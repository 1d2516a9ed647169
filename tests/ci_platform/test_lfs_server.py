"""The LFS server of our own repositories: spoken to by git-lfs where that is installed, and by hand."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from litestar import Litestar
from litestar.connection import ASGIConnection

from ci_platform.api.git import GitServer, git_handler
from ci_platform.api.lfs import KIND, LfsServer
from ci_platform.serving import running
from ci_platform.settings import load_settings
from ci_platform.source import Source
from ci_platform.source.own_lfs import OwnLfs, place_of
from tests.ci_platform.git_repositories import ENVIRONMENT, working_copy
from tests.ci_platform.grafting import opened_platform
from tests.ci_platform.test_git_server import REPO, TOKEN, Served

FORK = "bob/engine"
LARGEST, MOST = 1 << 20, 3 << 20


@dataclass
class Client:
    """Asks as git-lfs does, by the documents of its protocol."""

    http: httpx.AsyncClient
    user: str = "ada"
    repo: str = REPO

    def url(self, action: str) -> str:
        return f"/git/{self.repo}.git/info/lfs/{action}"

    async def post(self, action: str, value: Any, **headers: str) -> httpx.Response:
        known = {"Accept": KIND, "Content-Type": KIND, **headers}
        return await self.http.post(
            self.url(action), json=value, headers=known, auth=(self.user, TOKEN), timeout=30
        )

    async def batch(self, operation: str, *contents: bytes) -> list[dict[str, Any]]:
        asked = [{"oid": oid(each), "size": len(each)} for each in contents]
        said = await self.post(
            "objects/batch", {"operation": operation, "transfers": ["basic"], "objects": asked}
        )
        assert said.status_code == 200, said.text
        assert said.headers["content-type"] == KIND
        return list(said.json()["objects"])

    async def send(self, content: bytes, name: str | None = None) -> httpx.Response:
        """Send a file without having asked."""
        url = self.url(f"objects/{name or oid(content)}")
        return await self.http.put(url, content=content, auth=(self.user, TOKEN), timeout=30)

    async def push(self, *contents: bytes) -> None:
        """Send files as they are asked for."""
        for found, content in zip(await self.batch("upload", *contents), contents, strict=True):
            if not (actions := found.get("actions")):
                continue
            for action in ("upload", "verify"):
                href, headers = actions[action]["href"], actions[action]["header"]
                if action == "upload":
                    said = await self.http.put(href, content=content, headers=headers)
                else:
                    said = await self.http.post(
                        href, json={"oid": found["oid"], "size": found["size"]}, headers=headers
                    )
                assert said.status_code == 200, said.text

    async def pull(self, content: bytes) -> bytes:
        (found,) = await self.batch("download", content)
        place = found["actions"]["download"]
        return (await self.http.get(place["href"], headers=place["header"])).content


def oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@asynccontextmanager
async def serving(source: Source) -> AsyncIterator[Served]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", source)
        lfs = LfsServer(source, served.authorize, served.url, largest=LARGEST, most=MOST)
        handler = git_handler(GitServer(source, served.authorize, served.on_push), lfs)
        app = Litestar([handler], openapi_config=None)
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
    source = Source(tmp_path / "server")
    await source.create(REPO)
    async with serving(source) as running:
        yield running


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=served.url) as http:
        yield Client(http)


def stored(served: Served, repo: str = REPO) -> dict[str, bytes]:
    folder = served.source.path(repo) / "lfs"
    assert not list(folder.glob("incoming/*")), "nothing half sent stays"
    return {path.name: path.read_bytes() for path in folder.glob("objects/*/*/*")}


@pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed")
async def test_git_lfs_pushes_to_a_repository_of_ours_and_clones_it(served: Served, tmp_path: Path) -> None:
    large = os.urandom(300_000)
    work = working_copy(tmp_path / "work")
    home = {**ENVIRONMENT, "HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": str(tmp_path / "config")}

    async def run(folder: Path, *command: str) -> str:
        done = await anyio.run_process(command, cwd=folder, env=home, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout.decode()
        return done.stdout.decode()

    await run(work.path, "git", "lfs", "install", "--skip-smudge")
    await run(work.path, "git", "lfs", "track", "*.bin")
    (work.path / "data.bin").write_bytes(large)
    await run(work.path, "git", "add", "--all")
    await run(work.path, "git", "commit", "--quiet", "--message", "large")
    await run(work.path, "git", "push", "--quiet", served.address(), "HEAD:refs/heads/main")
    assert stored(served) == {oid(large): large}
    await run(tmp_path, "git", "clone", "--quiet", served.address("reader"), "clone")
    await run(tmp_path / "clone", "git", "lfs", "pull")
    assert (tmp_path / "clone/data.bin").read_bytes() == large
    assert TOKEN not in "".join(path.name for path in (tmp_path / "server").rglob("*"))


async def test_files_are_sent_once_verified_and_had_again(served: Served, client: Client) -> None:
    await client.push(b"one", b"two", b"")
    assert stored(served) == {oid(each): each for each in (b"one", b"two", b"")}
    (known, new) = await client.batch("upload", b"one", b"three")
    assert "actions" not in known, "it is here"
    assert set(new["actions"]) == {"upload", "verify"}
    assert [await client.pull(each) for each in (b"one", b"two", b"")] == [b"one", b"two", b""]
    (missing,) = await client.batch("download", b"nothing")
    assert missing["error"]["code"] == 404
    assert "actions" not in missing
    said = await client.post("verify", {"oid": oid(b"one"), "size": 4})
    assert said.status_code == 404
    assert (await client.send(b"one")).status_code == 200, "again is the same"


async def test_a_file_that_is_here_is_safe_for_a_while_when_it_is_announced_again(
    served: Served, client: Client
) -> None:
    contents = [b"one", b"two"]
    await client.push(*contents)
    places = [place_of(served.source.path(REPO), oid(content)) for content in contents]
    for place in places:
        os.utime(place, (1, 1))
    await client.batch("download", *contents)
    assert [place.stat().st_mtime for place in places] == [1, 1]
    assert not any("actions" in each for each in await client.batch("upload", contents[0]))
    assert (await client.send(contents[1])).status_code == 200
    assert all(place.stat().st_mtime > 1 for place in places)


async def test_what_is_not_what_its_name_says_is_not_kept(served: Served, client: Client) -> None:
    said = await client.send(b"something else", oid(b"what was promised"))
    assert said.status_code == 422
    assert (
        said.json()["message"] == f"what was sent as {oid(b'what was promised')} is {oid(b'something else')}"
    )
    assert stored(served) == {}


async def test_an_upload_that_breaks_off_leaves_nothing(served: Served, client: Client) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    request = f"PUT {client.url('objects/' + oid(b'x' * 100))} HTTP/1.1\r\nHost: {host}\r\n"
    login = httpx.BasicAuth("ada", TOKEN)._auth_header
    request += f"Authorization: {login}\r\nContent-Length: 100\r\n\r\n{'x' * 50}"
    async with await anyio.connect_tcp(host, int(port)) as stream:
        await stream.send(request.encode())
        incoming = served.source.path(REPO) / "lfs/incoming"
        with anyio.fail_after(10):
            while not incoming.exists() or not list(incoming.iterdir()):
                await anyio.lowlevel.checkpoint()
    with anyio.fail_after(10):
        while list(incoming.iterdir()):
            await anyio.lowlevel.checkpoint()
    assert stored(served) == {}


async def test_sizes_have_an_end_for_one_file_and_for_a_repository(served: Served, client: Client) -> None:
    (large,) = await client.batch("upload", b"x" * (LARGEST + 1))
    assert (large["error"]["code"], "max_lfs" in large["error"]["message"]) == (413, True)
    assert (await client.send(b"x" * (LARGEST + 1))).status_code == 413
    contents = [bytes([number]) * LARGEST for number in range(4)]
    found = await client.batch("upload", *contents)
    assert [each.get("error", {}).get("code") for each in found] == [None, None, None, 507]
    await client.push(*contents[:3])
    assert (await client.send(contents[3])).status_code == 413
    assert len(stored(served)) == 3


async def test_files_that_are_sent_at_once_count_together(served: Served, client: Client) -> None:
    said = list[int]()
    async with anyio.create_task_group() as group:

        async def send(number: int) -> None:
            said.append((await client.send(bytes([number]) * LARGEST)).status_code)

        for number in range(6):
            group.start_soon(send, number)
    assert sorted(said) == [200, 200, 200, 413, 413, 413]
    assert sum(map(len, stored(served).values())) == MOST


async def test_a_client_behind_tls_is_never_sent_to_plain_http(served: Served) -> None:
    lfs = LfsServer(served.source, served.authorize, "https://ci.example.org", largest=LARGEST, most=MOST)
    scopes = [
        (b"ci.example.org", "https://ci.example.org"),
        (b"other.example.org", "https://other.example.org"),
    ]
    for host, home in scopes:
        scope: Any = {"type": "http", "scheme": "http", "headers": [(b"host", host)]}
        assert lfs._home(ASGIConnection(scope)) == home


async def test_who_may_read_may_not_send_and_others_learn_nothing(served: Served, client: Client) -> None:
    await client.push(b"one")
    reader, stranger = Client(client.http, "reader"), Client(client.http, "eve")
    assert await reader.pull(b"one") == b"one"
    asked = {"operation": "upload", "objects": [{"oid": oid(b"two"), "size": 3}]}
    for said in (await reader.post("objects/batch", asked), await reader.send(b"two")):
        assert (said.status_code, said.json()) == (403, {"message": "the token may not write"})
    assert (await reader.post("verify", {"oid": oid(b"one"), "size": 3})).status_code == 403
    for said in (
        await stranger.post("objects/batch", {"operation": "nonsense"}),
        await stranger.send(b"two"),
        await client.http.get(client.url(f"objects/{oid(b'one')}")),
        await client.http.get(client.url(f"objects/{oid(b'none')}")),
    ):
        assert (said.status_code, said.json()) == (401, {"message": "send a token"})
        assert said.headers["lfs-authenticate"] == 'Basic realm="dynflow"'
    elsewhere = Client(client.http, repo="no/where")
    assert (await elsewhere.post("objects/batch", asked)).status_code == 404
    assert list(stored(served)) == [oid(b"one")]


async def test_the_platforms_own_tokens_open_it_and_those_that_may_not_write_do_not(tmp_path: Path) -> None:
    settings = load_settings({"data": tmp_path / "data", "port": 0, "allow_containers": False}, {})
    async with running(settings) as platform, httpx.AsyncClient(base_url=platform.url, timeout=30) as http:
        owner = {"Authorization": f"Bearer {platform.token}"}
        made = await http.post("/api/v1/repos", json={"name": "o/r", "forge": "local"}, headers=owner)
        assert made.status_code == 201, made.text
        logins = {}
        for scope in ("read", "write"):
            body = {"name": scope, "scopes": [scope]}
            secret = (await http.post("/api/v1/tokens", json=body, headers=owner)).json()["secret"]
            logins[scope] = ("x", secret)
        said = {}
        for scope, login in logins.items():
            asked = {"operation": "upload", "objects": [{"oid": oid(b"one"), "size": 3}]}
            said[scope] = await http.post("/git/o/r.git/info/lfs/objects/batch", json=asked, auth=login)
        assert [each.status_code for each in said.values()] == [403, 200]
        place = said["write"].json()["objects"][0]["actions"]["upload"]
        assert (await http.put(place["href"], content=b"one", headers=place["header"])).status_code == 200
        got = await http.get(place["href"], auth=logins["read"])
        assert (got.status_code, got.content) == (200, b"one")
        assert (await http.get(place["href"])).status_code == 401


@pytest.mark.parametrize(
    "asked",
    [
        [],
        {},
        {"operation": "delete", "objects": []},
        {"operation": "download", "objects": []},
        {"operation": ["download"], "objects": [{"oid": "a" * 64, "size": 1}]},
        {"operation": "download", "transfers": 5, "objects": [{"oid": "a" * 64, "size": 1}]},
        {"operation": "download", "objects": {}},
        {"operation": "download", "objects": [7]},
        {"operation": "download", "objects": [{"oid": "../../../etc/passwd", "size": 1}]},
        {"operation": "download", "objects": [{"oid": "A" * 64, "size": 1}]},
        {"operation": "download", "objects": [{"oid": "a" * 64, "size": -1}]},
        {"operation": "download", "objects": [{"oid": "a" * 64, "size": True}]},
        {"operation": "download", "objects": [{"oid": "a" * 64, "size": 1 << 70}]},
        {"operation": "download", "objects": [{"oid": "a" * 64, "size": 1}] * 1001},
        {"operation": "download", "transfers": ["ssh"], "objects": [{"oid": "a" * 64, "size": 1}]},
        {"operation": "download", "hash_algo": "md5", "objects": [{"oid": "a" * 64, "size": 1}]},
    ],
)
async def test_what_is_no_request_is_refused_politely(client: Client, asked: Any) -> None:
    said = await client.post("objects/batch", asked)
    assert said.status_code == 400
    assert said.json()["message"]


async def test_other_addresses_have_nothing(client: Client) -> None:
    for action in ("locks", "locks/verify", "objects/x", f"objects/{'A' * 64}", "objects/../../config", ""):
        assert (await client.post(action, {})).status_code in {400, 404}
    assert (
        await client.http.delete(client.url(f"objects/{'a' * 64}"), auth=("ada", TOKEN))
    ).status_code == 400


async def test_a_fork_shares_files_and_keeps_its_own(served: Served, client: Client) -> None:
    await client.push(b"one")
    await served.source.fork(REPO, FORK)
    assert stored(served, FORK) == {oid(b"one"): b"one"}
    paths = [place_of(served.source.path(repo), oid(b"one")) for repo in (REPO, FORK)]
    assert paths[0].stat().st_ino == paths[1].stat().st_ino
    await Client(client.http, repo=FORK).push(b"two")
    assert oid(b"two") not in stored(served)
    await served.source.delete(REPO)
    assert await Client(client.http, repo=FORK).pull(b"one") == b"one"


def test_what_killed_uploads_have_left_goes_with_a_later_one(tmp_path: Path) -> None:
    files = OwnLfs(tmp_path)
    left, going_on = files.begin(), files.begin()
    for part in (left, going_on):
        part.write_bytes(b"half")
    os.utime(left, (0, 0))
    files.begin()
    assert [path.name for path in left.parent.iterdir()] == [going_on.name]


async def test_a_run_of_our_own_repository_has_the_files_that_were_pushed(tmp_path: Path) -> None:
    async with opened_platform(tmp_path) as world:
        await world.repositories.register("ada/own", forge="local")
        await world.source.create("ada/own")
        content = b"pushed with git lfs"
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid(content)}\nsize {len(content)}\n"
        )
        work = world.forge.repository("work/own")
        sha = work.commit({"data.bin": pointer.encode()})
        work.git("push", "--quiet", str(world.source.path("ada/own")), "main")
        with pytest.raises(Exception, match=f"has no LFS file {oid(content)}"):
            await world.fork(sha, "ada/own", submodules=False, lfs=True)
        files = OwnLfs(world.source.path("ada/own"))
        part = files.begin()
        part.write_bytes(content)
        files.keep(part, oid(content))
        workspace = await world.fork(sha, "ada/own", submodules=False, lfs=True)
        assert await world.run(workspace, "cat data.bin; git status --porcelain") == content.decode()
