"""Files that LFS keeps, in workspaces: the right ones, once, clean; from hosts that may be asked, by the protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ci_platform import layers, lfs_pointers
from ci_platform.cones import Cone
from ci_platform.copy_on_write import MethodName
from ci_platform.errors import FailedError, ForbiddenError, LimitExceededError, UnavailableError
from ci_platform.garbage import Allowance
from ci_platform.garbage.lfs import LfsFiles
from ci_platform.guarded import Guard
from ci_platform.lfs_pointers import Pointer
from tests.ci_platform.forge_server import TOKEN, Answer, Asked, ForgeServer
from tests.ci_platform.git_repositories import Content, Script, WorkingCopy
from tests.ci_platform.grafting import REPO, Platform, opened_platform
from tests.ci_platform.test_submodules import add
from tests.dynflow.disks import memory_disk

CLEAN = "git status --porcelain; git diff HEAD"


@dataclass
class Lfs:
    """An LFS server beside git's: `keeps` by id; `href` and `twist` change what it says."""

    forge: ForgeServer
    keeps: dict[str, bytes] = field(default_factory=dict)
    href: Callable[[str], str] | None = None
    header: dict[str, str] = field(default_factory=lambda: {"Authorization": "Bearer of-the-action"})
    twist: Callable[[Asked], Answer | None] = lambda _asked: None

    def pointer(self, content: bytes) -> bytes:
        """Keep a file, and return what git has of it."""
        oid = hashlib.sha256(content).hexdigest()
        self.keeps[oid] = content
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()

    def answer(self, asked: Asked) -> Answer | None:
        if "/info/lfs/" not in asked.path and not asked.path.startswith("/kept/"):
            return None
        if (answer := self.twist(asked)) is not None:
            return answer
        if asked.path.startswith("/kept/"):
            return 200, {}, self.keeps[asked.path.rpartition("/")[2]]
        assert asked.path.endswith("/info/lfs/objects/batch")
        assert asked.headers["accept"] == asked.headers["content-type"] == "application/vnd.git-lfs+json"
        name = asked.path.partition(".git")[0].lstrip("/")
        if name in self.forge.private and not self.forge.who(asked).endswith(f":{TOKEN}"):
            return 401, {}, b"{}"
        wanted = json.loads(asked.body)
        assert (wanted["operation"], wanted["transfers"]) == ("download", ["basic"])
        said = {"transfer": "basic", "objects": [self._object(each) for each in wanted["objects"]]}
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, json.dumps(said).encode()

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid = wanted["oid"]
        if oid not in self.keeps:
            return wanted | {"error": {"code": 404, "message": "Object does not exist"}}
        href = self.href(oid) if self.href else f"{self.forge.url}/kept/{oid}"
        return wanted | {"actions": {"download": {"href": href, "header": self.header}}}

    def asked(self, part: str) -> list[Asked]:
        return [asked for asked in self.forge.asked if part in asked.path]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Platform]:
    async with opened_platform(tmp_path) as opened:
        yield opened


@pytest.fixture
def lfs(world: Platform) -> Lfs:
    made = Lfs(world.forge)
    world.forge.more = made.answer
    return made


@pytest.fixture
async def app(world: Platform) -> WorkingCopy:
    world.forge.private.add(REPO)
    return await world.register(REPO)


async def fork(world: Platform, sha: str, **how: Any) -> str:
    return await world.fork(sha, **({"submodules": False, "lfs": True} | how))


def stored(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "source" / "lfs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("method", [None, "copy"])
async def test_files_that_lfs_keeps_are_there_once_and_all_is_clean(
    tmp_path: Path, method: MethodName | None
) -> None:
    async with opened_platform(tmp_path, method) as world:
        lfs = Lfs(world.forge)
        world.forge.more = lfs.answer
        app = await world.register(REPO)
        big, tool = b"x" * 100_000, b"#!/bin/sh\necho tool\n"
        files: dict[str, Content] = {
            "a": b"1", "data/big": lfs.pointer(big), "data/same": lfs.pointer(big), "tool": Script(lfs.pointer(tool)),
            "data/plain": b"version https://git-lfs.github.com/spec/v1\nnot really\n", "empty": b"",
        }  # fmt: skip
        first = app.commit(files)
        plain = await fork(world, first, lfs=False)
        assert await world.run(plain, "head -c 7 data/big") == "version"
        workspace = await fork(world, first)
        shown = await world.run(workspace, f"{CLEAN}; sha256sum < data/big; cmp data/big data/same; ./tool")
        assert shown.split() == [hashlib.sha256(big).hexdigest(), "-", "tool"]
        entry = await world.run(
            workspace, "git ls-files -s data/big; git rev-parse HEAD:data/big; head -c 3 data/plain"
        )
        assert entry.split()[1] == entry.split()[4], "git has the pointer"
        assert len(lfs.asked("/kept/")) == 2
        assert len(stored(tmp_path)) == 2
        second = app.commit({"data/new": lfs.pointer(b"new" * 1000), "a": b"2", "data/same": None})
        later = await fork(world, second)
        assert await world.run(
            later, f"{CLEAN}; cat a; tail -c 3 data/new; tail -c 3 data/big; ls data | wc -l"
        ) == ("2newxxx3\n")
        assert await world.run(workspace, CLEAN) == "", "though its files have more links now"
        assert await world.run(await fork(world, second), CLEAN) == ""
        assert len(lfs.asked("/kept/")) == 3, "each is fetched once"
        changed = await world.run(later, "echo y >> data/big; rm data/new; git status --porcelain")
        assert changed == " M data/big\n D data/new\n"
        assert await world.run(workspace, "tail -c 2 data/big") == "xx", "a command changes its own copy"


async def test_a_sparse_fork_gets_the_files_of_its_folders_alone(
    world: Platform, lfs: Lfs, app: WorkingCopy
) -> None:
    sha = app.commit({"in/x": lfs.pointer(b"in"), "out/y": lfs.pointer(b"out")})
    workspace = await fork(world, sha, cone=Cone.of(["in"]))
    assert await world.run(workspace, f"{CLEAN}; ls; cat in/x") == "in\nin"
    assert len(lfs.asked("/kept/")) == 1


async def test_lfs_and_submodules_are_there_together_and_again_after_their_layers_are_gone(
    world: Platform, lfs: Lfs, app: WorkingCopy, tmp_path: Path
) -> None:
    one = world.forge.repository("bob/lib").commit({"lib.txt": b"lib"})
    app.commit({"data": lfs.pointer(b"kept")})
    sha = add(app, "lib", "../../bob/lib.git", one)
    workspace = await fork(world, sha, submodules=True)
    for number in range(2):
        assert (
            await world.run(workspace, f"{CLEAN}; git submodule status | cut -c 1; cat data lib/lib.txt")
            == " \nkeptlib"
        )
        for kind in ("lfs", "modules"):
            (layer,) = (tmp_path / "source" / "trees" / REPO).glob(f"{kind}-*")
            layer.rename(tmp_path / f"{kind}{number}")
        for path in stored(tmp_path):
            path.unlink()


async def test_files_that_no_tree_has_are_garbage_and_fetched_again(
    world: Platform, lfs: Lfs, app: WorkingCopy, tmp_path: Path
) -> None:
    sha = app.commit({"a": lfs.pointer(b"one")})
    workspace = await fork(world, sha)
    garbage = LfsFiles(world.source.lfs, Allowance(1, timedelta()), safe_for=-60)
    (item,) = await garbage.items()
    assert (item.size, item.pinned) == (3, "a tree on disk has it")
    (recent,) = await LfsFiles(world.source.lfs, Allowance(1)).items()
    assert recent.pinned == "used a short while ago"
    assert not await LfsFiles(world.source.lfs, Allowance(1)).collect(item.name)
    layers.remove_tree(tmp_path / "source" / "trees" / REPO)
    (item,) = await garbage.items()
    assert item.pinned is None
    assert await garbage.collect(item.name)
    assert await garbage.collect(item.name), "what is gone is collected"
    assert stored(tmp_path) == []
    assert await world.run(workspace, f"{CLEAN}; cat a") == "one"
    (tmp_path / "source" / "lfs" / ".incoming" / "half").write_bytes(b"what a killed process left")
    await world.source.sweep()
    assert [path.name for path in stored(tmp_path)] == [hashlib.sha256(b"one").hexdigest()]


# Credentials


async def test_credentials_go_to_the_repositorys_own_lfs_server_alone(
    world: Platform, lfs: Lfs, app: WorkingCopy
) -> None:
    port = world.forge.url.rpartition(":")[2]
    world.with_guard(Guard([world.forge.host, f"127.0.0.2:{port}", f"localhost:{port}"]))
    lfs.href = lambda oid: f"http://localhost:{port}/kept/{oid}"
    assert await world.run(await fork(world, app.commit({"a": lfs.pointer(b"one")})), "cat a") == "one"
    assert [world.forge.who(asked) for asked in lfs.asked("/batch")] == [f"x-access-token:{TOKEN}"]
    (kept,) = lfs.asked("/kept/")
    assert kept.headers["authorization"] == "Bearer of-the-action", "what the server says is to be told there"
    # Sent on to another server, nothing goes along.
    lfs.twist = lambda asked: (
        (307, {"Location": f"http://localhost:{port}{asked.path}"}, b"")
        if asked.headers["host"].startswith("127.") else None
    )  # fmt: skip
    lfs.href = None
    world.forge.asked.clear()
    world.forge.private.clear()
    assert await world.run(await fork(world, app.commit({"a": lfs.pointer(b"two")})), "cat a") == "two"
    elsewhere = [asked for asked in world.forge.asked if asked.headers["host"].startswith("localhost")]
    assert {asked.path.split("/")[1] for asked in elsewhere} == {"ada", "kept"}
    assert [asked for asked in elsewhere if "authorization" in asked.headers] == []


async def test_a_server_that_a_commit_names_gets_no_credentials(
    world: Platform, lfs: Lfs, app: WorkingCopy
) -> None:
    """Nor does another repository at the same host, which the platform's token could open."""
    world.forge.private.add("bob/secret")
    named = f"[lfs]\n\turl = {world.forge.url}/bob/secret.git/info/lfs\n[include]\n\tpath = /etc/passwd\n"
    sha = app.commit({"a": lfs.pointer(b"SECRET"), ".lfsconfig": named.encode()})
    with pytest.raises(FailedError, match=r"bob/secret.*401"):
        await fork(world, sha)
    assert [asked for asked in lfs.asked("bob/secret") if "authorization" in asked.headers] == []
    world.forge.private.remove("bob/secret")
    assert await world.run(await fork(world, sha), "cat a") == "SECRET", "what anybody may have"


# Addresses


async def test_lfs_never_leads_to_an_inner_address(
    world: Platform, lfs: Lfs, app: WorkingCopy, tmp_path: Path
) -> None:
    port = world.forge.url.rpartition(":")[2]
    sha = app.commit({"a": lfs.pointer(b"one")})
    for alone in (False, True):
        lfs.href = lambda oid: f"http://127.0.0.2:{port}/kept/{oid}"
        with pytest.raises(ForbiddenError, match=r"127\.0\.0\.2.*loopback"):
            await fork(world, sha, alone=alone)
        lfs.href, lfs.twist = None, lambda asked: (
            (302, {"Location": f"http://127.0.0.2:{port}{asked.path}"}, b"") if asked.path.startswith("/kept") else None
        )  # fmt: skip
        with pytest.raises(ForbiddenError, match=r"127\.0\.0\.2.*loopback"):
            await fork(world, sha, alone=alone)
        lfs.twist = lambda _asked: None
    named = app.commit({".lfsconfig": f"[lfs]\n\turl = http://127.0.0.2:{port}/x/info/lfs\n".encode()})
    with pytest.raises(ForbiddenError, match=r"127\.0\.0\.2.*loopback"):
        await fork(world, named)
    assert stored(tmp_path) == []
    # The host of the repository itself is the administrator's word, also where nothing else is let out.
    world.with_guard(Guard(allowed=False))
    assert await world.run(await fork(world, sha, alone=True), "cat a") == "one"
    with pytest.raises(ForbiddenError, match="allow_network"):
        await fork(world, named)


async def test_what_trusted_runs_fetched_is_not_what_a_forks_pull_request_gets(
    world: Platform, lfs: Lfs, app: WorkingCopy, tmp_path: Path
) -> None:
    named = f"[lfs]\n\turl = {world.forge.url}/inner.git/info/lfs\n".encode()
    sha = app.commit({"a": lfs.pointer(b"of an inner host"), ".lfsconfig": named})
    assert await world.run(await fork(world, sha), "cat a") == "of an inner host"
    with pytest.raises(ForbiddenError, match="loopback"):
        await fork(world, sha, alone=True)
    assert len(stored(tmp_path)) == 1
    await world.source.delete(REPO)
    assert stored(tmp_path) == []


# Limits and hostile servers


async def test_files_that_are_too_large_together_are_refused(
    world: Platform, lfs: Lfs, app: WorkingCopy
) -> None:
    sha = app.commit({f"f{number}": lfs.pointer(b"%d" % number * 600_000) for number in range(2)})
    with pytest.raises(LimitExceededError, match=r"1,200,000 bytes.*1,048,576.*max_lfs"):
        await fork(world, sha)
    assert lfs.asked("/info/lfs") == []


@pytest.mark.parametrize("content", [b"", b"on", b"two", b"one and more"])
async def test_a_file_that_is_not_what_its_pointer_says_is_not_kept(
    world: Platform, lfs: Lfs, app: WorkingCopy, tmp_path: Path, content: bytes
) -> None:
    sha = app.commit({"a": lfs.pointer(b"one")})
    lfs.twist = lambda asked: (200, {}, content) if asked.path.startswith("/kept/") else None
    with pytest.raises(FailedError, match=r"pointer|something else"):
        await fork(world, sha)
    assert stored(tmp_path) == []
    lfs.twist = lambda _asked: None
    assert await world.run(await fork(world, sha), "cat a") == "one"


def said(**action: Any) -> bytes:
    return json.dumps(
        {"objects": [{"oid": hashlib.sha256(b"one").hexdigest(), "size": 3, **action}]}
    ).encode()


def download(href: str, **header: str) -> bytes:
    return said(actions={"download": {"href": href, "header": header}})


ODD = [
    (200, b"<html>", "does not answer as an LFS server"),
    (200, b"[" * 100_000, "does not answer as an LFS server"),
    (200, b'{"objects": 7}', "does not answer as an LFS server"),
    (200, b'{"objects": []}', "says nothing of"),
    (200, b" " * (5 << 20), "more than 4,194,304 bytes"),
    (200, said(), "does not answer as an LFS server"),
    (200, said(error={"code": 410, "message": "\x1b[31mgone"}), r"410 '\\x1b\[31mgone'"),
    (200, download("file:///etc/passwd"), "file:///etc/passwd"),
    (200, download("ftp://example.org/x"), "ftp://example.org/x"),
    (200, download("http://u:p@example.org/x"), r"\*\*\*@example.org"),
    (200, download("http://example.org/a b"), "https or http"),
    (200, download("http://example.org/x", **{"A\r\nB": "x"}), "header"),
    (200, download("http://example.org/x", A="x\r\nB: y"), "header"),
    (200, download("http://example.org/x", **{"Proxy-Authorization": "x"}), "header 'Proxy-Authorization'"),
    (200, download("http://example.org/x", Host="inner"), "header 'Host'"),
    (404, b"", "404: there is no such repository"),
    (403, b"", "403: it refuses"),
    (501, b"", "501"),
]  # fmt: skip
"""Status and body of a server's answer, and what is told of it."""


async def test_a_server_that_answers_anything_else_is_refused_by_what_it_says(
    world: Platform, lfs: Lfs, app: WorkingCopy
) -> None:
    sha = app.commit({"a": lfs.pointer(b"one")})
    for status, body, told in ODD:
        lfs.twist = lambda _asked, answer=(status, {}, body): answer  # type: ignore[misc]
        with pytest.raises(FailedError, match=told) as caught:
            await fork(world, sha)
        assert TOKEN not in str(caught.value)


async def test_a_server_that_is_away_is_asked_again_later_and_one_that_sends_on_for_ever_is_not(
    world: Platform, lfs: Lfs, app: WorkingCopy
) -> None:
    sha = app.commit({"a": lfs.pointer(b"one")})
    lfs.twist = lambda _asked: (503, {}, b"")
    with pytest.raises(UnavailableError, match="503"):
        await fork(world, sha)
    lfs.twist = lambda asked: (302, {"Location": asked.path}, b"")
    with pytest.raises(FailedError, match="more than 5 times"):
        await fork(world, sha)


@pytest.mark.root
async def test_a_full_disk_is_the_platforms_trouble_and_leaves_nothing_half(
    world: Platform, lfs: Lfs, app: WorkingCopy, tmp_path: Path
) -> None:
    sha = app.commit({f"f{number}": lfs.pointer(b"%d" % number * 200_000) for number in range(4)})
    with contextmanager(memory_disk)(tmp_path / "source" / "lfs") as disk:
        disk.fill(leave=500_000)
        with pytest.raises(UnavailableError, match="disk is full"):
            await fork(world, sha)
        assert not list((disk.folder / ".incoming").iterdir())
        disk.empty()
        assert await world.run(await fork(world, sha), f"{CLEAN}; cat f3 | wc -c") == "200000\n"


async def test_an_import_from_this_machine_has_its_lfs_files_beside_it(
    world: Platform, tmp_path: Path
) -> None:
    """As git-lfs keeps them; an administrator has named the folder."""
    remote = world.forge.repository("bob/local")
    lfs = Lfs(world.forge)
    sha = remote.commit({"a": lfs.pointer(b"one")})
    await world.repositories.register("bob/local", forge="github", clone_url=remote.url)
    with pytest.raises(FailedError, match=hashlib.sha256(b"one").hexdigest()):
        await fork(world, sha, repo="bob/local")
    ((oid, content),) = lfs.keeps.items()
    kept = remote.path / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"two")
    with pytest.raises(FailedError, match="something else"):
        await fork(world, sha, repo="bob/local")
    kept.write_bytes(content)
    assert await world.run(await fork(world, sha, repo="bob/local"), "cat a") == "one"


async def test_a_repository_of_the_platforms_own_names_the_file_that_nobody_has_pushed(
    world: Platform,
) -> None:
    await world.repositories.register("bob/own", forge="local")
    await world.source.create("bob/own")
    work = world.forge.repository("work/own")
    sha = work.commit({"a": Lfs(world.forge).pointer(b"one"), "b": b"2"})
    work.git("push", "--quiet", str(world.source.path("bob/own")), "main")
    with pytest.raises(FailedError, match=r"'bob/own'.*no LFS file [0-9a-f]{64}: git lfs push"):
        await fork(world, sha, repo="bob/own")
    plain = work.commit({"a": b"no pointer"})
    work.git("push", "--quiet", str(world.source.path("bob/own")), "main")
    assert await world.run(await fork(world, plain, repo="bob/own"), f"{CLEAN}; cat b") == "2"


OID = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
HEAD = b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (HEAD + f"oid sha256:{OID}\nsize 12\n".encode(), Pointer(OID, 12)),
        (HEAD + f"ext-0-x sha256:{OID}\noid sha256:{OID}\nsize 0\n".encode(), Pointer(OID, 0)),
        (b"", None),
        (HEAD, None),
        (f"oid sha256:{OID}\nsize 12\n".encode(), None),
        (HEAD + f"oid sha256:{OID[:-1]}\nsize 12\n".encode(), None),
        (HEAD + f"oid sha256:../../{OID[6:]}\nsize 12\n".encode(), None),
        (HEAD + f"oid sha256:{OID.upper()}\nsize 12\n".encode(), None),
        (HEAD + f"oid sha256:{OID}\noid sha256:{OID}\nsize 12\n".encode(), None),
        (HEAD + f"oid sha256:{OID}\nsize -1\n".encode(), None),
        (HEAD + f"oid sha256:{OID}\nsize {10**30}\n".encode(), None),
        (HEAD + f"oid sha256:{OID}\nsize 12\nand then something\nelse\0".encode(), None),
        (HEAD + f"oid sha256:{OID}\nsize 12\n".encode() + b"x" * 1024, None),
    ],
)  # fmt: skip
def test_a_pointer_is_what_the_format_says_and_nothing_else(content: bytes, found: Pointer | None) -> None:
    assert lfs_pointers.parse(content) == found
