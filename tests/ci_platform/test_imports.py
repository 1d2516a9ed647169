"""Repositories that are filled from a URL: as they are there, kept so, mended, and nobody learns the password."""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ci_platform.access import Access
from ci_platform.cones import Cone
from ci_platform.deliveries import Deliveries
from ci_platform.encryption import Encryption
from ci_platform.errors import (
    ConflictError,
    FailedError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from ci_platform.fetching import Remote
from ci_platform.forges.github import GitHubForge
from ci_platform.git_store import GitStore
from ci_platform.imports import Imports, ImportView
from ci_platform.mirroring import Shape
from ci_platform.pushes import Pushes
from ci_platform.refreshing import Refresher
from ci_platform.remotes import Remotes
from ci_platform.repositories import Repositories
from ci_platform.source import GitFolder, Source
from ci_platform.store import Store
from dynflow.clock import ManualClock
from tests.ci_platform.git_repositories import ENVIRONMENT, WorkingCopy, working_copy
from tests.ci_platform.harness import Harness
from tests.ci_platform.test_git_server import git, serving

REPO = "ada/mirror"


@dataclass
class World:
    source: Source
    repositories: Repositories
    imports: Imports
    refresher: Refresher
    git_store: GitStore
    deliveries: Deliveries
    store: Store
    clock: ManualClock

    async def imported(self, remote: WorkingCopy, shape: Shape | None = None) -> ImportView:
        await self.imports.start(REPO, remote.url, shape=shape)
        return await self.work()

    async def refresh(self, *, verify: bool = False) -> ImportView:
        await self.imports.refresh(REPO, verify=verify)
        return await self.work()

    async def work(self) -> ImportView:
        await self.refresher.work(REPO)
        return await self.imports.get(REPO)

    async def until(self, wanted: Callable[[ImportView], bool]) -> None:
        with anyio.fail_after(30):
            while True:
                if wanted(await self.imports.get(REPO)):
                    return
                await anyio.sleep(0.01)

    async def told(self) -> list[tuple[str, str]]:
        """Return what refreshes told, the newest first."""
        views, _ = await self.deliveries.list()
        return [(view.state, view.event) for view in views]


@pytest.fixture
async def world(platform: Harness, tmp_path: Path) -> World:
    store, clock = platform.store, platform.clock
    repositories = Repositories(store, ["local", "github"], clock)
    encryption = Encryption(tmp_path / "encryption.key")
    imports = Imports(store, clock, repositories=repositories, encryption=encryption, allow_file=True)
    remotes = Remotes(repositories, imports, {"github": GitHubForge(url=f"file://{tmp_path}")})
    source = Source(tmp_path / "source", allow_file=True, remote_of=remotes, on_damage=imports.suspect)
    pushes = Pushes(store, platform.deliveries, source)
    refresher = Refresher(
        store, clock, imports=imports, source=source, pushes=pushes, protocols=source.protocols
    )
    git_store = GitStore(repositories, source, imports, pushes, Access(store, clock))
    return World(source, repositories, imports, refresher, git_store, platform.deliveries, store, clock)


@pytest.fixture
def remote(tmp_path: Path) -> WorkingCopy:
    made = working_copy(tmp_path / "remote")
    made.commit({"a": b"1", "folder/b": b"2"})
    return made


def fsck(source: Source) -> str:
    command = ["git", "--git-dir", str(source.path(REPO)), "fsck", "--full"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote_file(remote: WorkingCopy, sha: str, path: str) -> bytes:
    command = ["git", "cat-file", "blob", f"{sha}:{path}"]
    return subprocess.run(command, cwd=remote.path, stdout=subprocess.PIPE, check=True).stdout


async def test_an_import_has_the_branches_tags_and_default_branch_of_its_remote(
    world: World, remote: WorkingCopy
) -> None:
    remote.git("branch", "other")
    remote.git("tag", "--annotate", "--message", "one", "v1")
    remote.git("checkout", "--quiet", "-b", "trunk")
    remote.commit({"a": b"2"})
    view = await world.imported(remote)
    assert (view.state, view.last_error, view.due_at) == ("ready", None, None)
    sha = remote.git("rev-parse", "HEAD")
    assert await world.source.ref_snapshot(REPO) == {
        "refs/heads/main": remote.git("rev-parse", "main"),
        "refs/heads/other": remote.git("rev-parse", "other"),
        "refs/heads/trunk": sha,
        "refs/tags/v1": remote.git("rev-parse", "v1^{commit}"),
    }
    assert await world.source.default_branch(REPO) == "trunk"
    assert (await world.repositories.get(REPO)).read_only
    assert fsck(world.source) == ""
    assert await world.told() == [], "what was there before is no push"


async def test_a_refresh_follows_the_remote_and_tells_what_moved(world: World, remote: WorkingCopy) -> None:
    remote.git("branch", "folder")
    await world.imported(remote)
    remote.commit({"a": b"2"})
    remote.git("branch", "--delete", "folder")
    remote.git("branch", "folder/inside")
    view = await world.refresh()
    assert (view.state, view.last_error) == ("ready", None)
    assert await world.source.branches(REPO) == {
        "main": remote.git("rev-parse", "main"),
        "folder/inside": remote.git("rev-parse", "main"),
    }
    assert len(await world.told()) == 3
    remote.git("reset", "--quiet", "--hard", "HEAD~1")
    await world.refresh()
    assert (await world.source.branches(REPO))["main"] == remote.git("rev-parse", "main")
    assert len(await world.told()) == 4
    await world.refresh()
    assert len(await world.told()) == 4, "nothing moved"


async def test_a_shallow_import_ends_where_it_was_asked_to(world: World, remote: WorkingCopy) -> None:
    shas = [remote.commit({"a": b"%d" % number}) for number in range(5)]
    await world.imported(remote, Shape(depth=2))
    assert [info.sha for info in await world.source.log(REPO, "main")] == [shas[4], shas[3]]
    newer = remote.commit({"a": b"newer"})
    await world.refresh()
    assert (await world.source.log(REPO, "main", limit=1))[0].sha == newer
    assert fsck(world.source) == ""
    await world.git_store.fork(REPO, "bob/fork")
    assert [info.sha for info in await world.source.log("bob/fork", "main", limit=1)] == [newer]


async def test_a_partial_import_has_all_of_history_and_no_file(world: World, remote: WorkingCopy) -> None:
    remote.git("config", "uploadpack.allowFilter", "true")
    remote.git("config", "uploadpack.allowAnySHA1InWant", "true")
    shas = [remote.commit({"a": os.urandom(50_000)}) for _ in range(5)]
    view = await world.imported(remote, Shape(blobs=False))
    assert view.state == "ready", view.last_error
    assert len(await world.source.log(REPO, "main")) == 6
    (entry,) = [entry for entry in await world.source.read_tree(REPO, shas[-1]) if entry.name == "a"]
    assert entry.size is None
    size = sum(path.stat().st_size for path in world.source.path(REPO).rglob("*") if path.is_file())
    assert size < 50_000
    view = await world.refresh(verify=True)
    assert (view.state, view.last_error) == ("ready", None), "what was never here is not missed"
    (tree,) = await world.source.materialise(REPO, shas[2])
    assert (tree / "a").read_bytes() == remote_file(remote, shas[2], "a")
    assert await world.source.read_file(REPO, shas[4], "folder/b") == b"2"
    remote.path.rename(remote.path.with_name("away"))
    assert await world.source.materialise(REPO, shas[2]) == (tree,)
    with pytest.raises(FailedError, match="no repository"):
        await world.source.read_file(REPO, shas[0], "a")


async def test_a_partial_import_gets_what_is_read_in_one_request_and_nothing_else(
    world: World, remote: WorkingCopy, tmp_path: Path
) -> None:
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        remote.git("config", key, "true")
    files = {f"{folder}/{number}": os.urandom(50) for folder in ("in", "out") for number in range(40)}
    sha = remote.commit({**files, ".dynflow/ci.py": b"code", ".dynflow/x.py": b"more", "top": b"t"})
    await world.imported(remote, Shape(blobs=False))
    packs = world.source.path(REPO) / "objects" / "pack"

    def here() -> tuple[int, set[str]]:
        """How many packs came, and what the repository has of the commit's files."""
        listed = {
            line.split()[2]: line.split("\t")[1] for line in remote.git("ls-tree", "-r", sha).splitlines()
        }
        command = ["git", "cat-file", "--batch-all-objects", "--batch-check=%(objectname)"]
        done = subprocess.run(
            command, cwd=world.source.path(REPO), capture_output=True, text=True, check=True
        )
        found = {listed[oid] for oid in done.stdout.split() if oid in listed}
        return len(list(packs.glob("*.pack"))), found

    begun, found = here()
    assert found == set()
    assert await world.source.read_folder(REPO, sha, ".dynflow", suffix=".py") == {
        "ci.py": b"code",
        "x.py": b"more",
    }
    assert here() == (begun + 1, {".dynflow/ci.py", ".dynflow/x.py"})
    folder = GitFolder(sha, Cone.of(["in"]))
    await world.source.checkout(REPO, folder)
    wanted = {".dynflow/ci.py", ".dynflow/x.py", "top", "a"} | {
        name for name in files if name.startswith("in/")
    }
    assert here() == (begun + 2, wanted), "of a sparse fork, its folders alone"
    await world.source.materialise(REPO, sha)
    assert here()[0] == begun + 3
    assert set(files) <= here()[1]


async def test_beyond_the_depth_of_an_import_there_is_a_clear_end(world: World, remote: WorkingCopy) -> None:
    shas = [remote.commit({"a": b"%d" % number}) for number in range(5)]
    await world.imported(remote, Shape(depth=2))
    assert (await world.source.read_commit(REPO, shas[3])).parents == (), "here it ends"
    for sha in (shas[2], shas[0]):
        with pytest.raises(NotFoundError, match="kept down to a depth"):
            await world.source.read_commit(REPO, sha, fetch=True)
        with pytest.raises(NotFoundError, match="kept down to a depth"):
            await world.source.log(REPO, sha, fetch=True)
    assert await world.source.log(REPO, shas[4], skip=2) == []
    (tree,) = await world.source.materialise(REPO, shas[3])
    assert (tree / "a").read_bytes() == b"3"


@pytest.mark.parametrize("shape", [Shape(), Shape(depth=1), Shape(blobs=False)])
async def test_an_import_in_which_something_damaged_is_read_is_fetched_anew(
    world: World, remote: WorkingCopy, shape: Shape
) -> None:
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        remote.git("config", key, "true")
    sha = remote.commit({"a": os.urandom(20_000)})
    await world.imported(remote, shape)
    await world.source.read_file(REPO, sha, "a")
    world.clock.advance(timedelta(hours=1).total_seconds())
    for pack in (world.source.path(REPO) / "objects" / "pack").glob("*.pack"):
        pack.chmod(0o600)
        content = pack.read_bytes()
        pack.write_bytes(content[:40] + b"x" * (len(content) - 60) + content[-20:])
    with pytest.raises(UnavailableError, match="fetched anew"):
        await world.source.read_file(REPO, sha, "a")
    await world.work()
    assert await world.source.read_file(REPO, sha, "a") == remote_file(remote, sha, "a")


async def test_packing_a_partial_import_misses_nothing_and_loses_nothing(
    world: World, remote: WorkingCopy
) -> None:
    remote.git("config", "uploadpack.allowFilter", "true")
    remote.git("config", "uploadpack.allowAnySHA1InWant", "true")
    shas = [remote.commit({"a": b"%d" % number}) for number in range(25)]
    await world.imported(remote, Shape(blobs=False))
    for sha in shas[:24]:
        await world.source.read_file(REPO, sha, "a")
    packs = world.source.path(REPO) / "objects" / "pack"
    before = len(list(packs.glob("*.pack")))
    await world.source.maintain()
    assert len(list(packs.glob("*.pack"))) < min(before, 5)
    assert await world.source.read_file(REPO, shas[24], "a") == b"24"
    remote.path.rename(remote.path.with_name("away"))
    assert await world.source.read_file(REPO, shas[0], "a") == b"0"


async def test_a_clone_of_a_partial_import_gets_the_files_from_where_it_comes_from(
    world: World, remote: WorkingCopy, tmp_path: Path
) -> None:
    remote.git("config", "uploadpack.allowFilter", "true")
    remote.git("config", "uploadpack.allowAnySHA1InWant", "true")
    await world.imported(remote, Shape(blobs=False))
    clone = tmp_path / "clone"
    async with serving(tmp_path / "source", source=world.source) as served:
        done = await git(remote, "clone", "-q", served.address(repo=REPO), str(clone))
        assert done.returncode == 0, done.stderr
    assert (clone / "folder" / "b").read_bytes() == b"2"


@pytest.mark.parametrize("harm", ["object", "pack", "commit", "repository"])
async def test_a_damaged_mirror_of_a_forge_is_fetched_anew_when_it_is_read(
    world: World, tmp_path: Path, harm: str
) -> None:
    work = working_copy(tmp_path / "ada" / "engine.git")
    work.git("config", "uploadpack.allowAnySHA1InWant", "true")
    older, sha = work.commit({"a": b"1"}), work.commit({"a": b"2"})
    await world.repositories.register("ada/engine", forge="github")
    source = world.source
    for one in (older, sha):
        await source.fetch("ada/engine", one, Remote(work.url))
    folder = source.path("ada/engine")
    for pack in folder.glob("objects/pack/*.pack"):
        if harm in {"object", "pack"}:
            pack.chmod(0o600)
            content = pack.read_bytes()
            pack.write_bytes(content[:-60] + b"x" * 60 if harm == "object" else content[:20])
        elif harm == "commit":
            pack.with_suffix(".idx").unlink()
    if harm == "repository":
        folder.rename(tmp_path / "lost")
    (tree,) = await source.materialise("ada/engine", sha)
    assert (tree / "a").read_bytes() == b"2"
    assert await source.read_file("ada/engine", older, "a") == b"1"


@pytest.mark.parametrize("harm", ["cut", "flipped", "lost", "ref"])
async def test_a_damaged_mirror_is_noticed_and_fetched_anew(
    world: World, remote: WorkingCopy, harm: str
) -> None:
    await world.imported(remote)
    newer = remote.commit({"a": os.urandom(20_000)})
    await world.refresh()
    before = await world.source.ref_snapshot(REPO)
    packs = sorted(
        (world.source.path(REPO) / "objects" / "pack").glob("*.pack"), key=lambda p: p.stat().st_size
    )
    packs[-1].chmod(0o600)
    content = packs[-1].read_bytes()
    if harm == "cut":
        packs[-1].write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        packs[-1].write_bytes(content[:9000] + bytes([content[9000] ^ 1]) + content[9001:])
    elif harm == "lost":
        packs[-1].unlink()
    else:
        (world.source.path(REPO) / "refs/heads/main").write_text("1" * 40 + "\n")
    view = await world.refresh(verify=True)
    assert (view.state, view.last_error) == ("ready", None)
    assert fsck(world.source) == ""
    assert await world.source.ref_snapshot(REPO) == before
    assert await world.source.read_file(REPO, newer, "folder/b") == b"2"


async def test_every_object_is_looked_at_once_a_week_without_being_asked(
    world: World, remote: WorkingCopy
) -> None:
    first = await world.imported(remote)
    world.clock.advance(3600)
    assert (await world.refresh()).verified_at == first.verified_at
    (pack,) = (world.source.path(REPO) / "objects" / "pack").glob("*.pack")
    pack.chmod(0o600)
    pack.write_bytes(pack.read_bytes()[:-30] + b"x" * 30)
    world.clock.advance(timedelta(days=8).total_seconds())
    assert (await world.refresh()).verified_at == world.clock.now()
    assert fsck(world.source) == ""


async def test_an_object_that_git_refuses_is_not_let_in(world: World, remote: WorkingCopy) -> None:
    blob = bytes.fromhex(remote.git("rev-parse", "HEAD:a"))
    tree = subprocess.run(  # noqa: ASYNC221
        ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
        cwd=remote.path, input=b"100644 .git\0" + blob, stdout=subprocess.PIPE, check=True,
    ).stdout.decode().strip()  # fmt: skip
    remote.git("update-ref", "refs/heads/evil", remote.git("commit-tree", tree, "-m", "x"))
    view = await world.imported(remote)
    assert view.state == "failed"
    assert "refuses" in (view.last_error or "")
    assert not await world.source.exists(REPO)
    assert list(world.source.path(REPO).parent.glob("*")) == []


async def test_a_remote_that_is_away_is_tried_again_and_what_is_here_stays(
    world: World, remote: WorkingCopy
) -> None:
    await world.imported(remote)
    refs = await world.source.ref_snapshot(REPO)
    gone = remote.path.with_name("gone")
    (remote.path / ".git" / "HEAD").rename(gone)
    view = await world.refresh()
    assert view.last_error
    assert await world.source.ref_snapshot(REPO) == refs
    gone.rename(remote.path / ".git" / "HEAD")
    assert (await world.refresh()).last_error is None


async def test_the_service_does_what_is_due_also_what_a_crash_left(world: World, remote: WorkingCopy) -> None:
    await world.imports.start(REPO, remote.url)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.refresher.serve)
        await world.until(lambda view: view.state == "ready")
        sha = remote.commit({"a": b"2"})
        for _ in range(20):
            await world.imports.refresh(REPO)
        await world.until(lambda view: view.due_at is None)
        tasks.cancel_scope.cancel()
    assert (await world.source.branches(REPO))["main"] == sha
    assert len(await world.told()) == 1


async def test_an_import_under_a_taken_name_is_refused(world: World, remote: WorkingCopy) -> None:
    await world.repositories.register("ada/own", forge="local")
    with pytest.raises(ConflictError):
        await world.imports.start("ada/own", remote.url)
    await world.imports.start(REPO, remote.url)
    with pytest.raises(ConflictError, match="delete it first"):
        await world.imports.start(REPO, remote.url + "-other")
    with pytest.raises(NotFoundError, match="no import"):
        await world.imports.refresh("ada/own")


@pytest.mark.parametrize(
    "url", ["ext::sh -c id", "https://u:p@h/x", "ssh://h/x", "--upload-pack=id", "https://h/a\nb", "http://"]
)
async def test_an_import_from_what_is_no_plain_address_is_refused(world: World, url: str) -> None:
    with pytest.raises(InvalidInputError):
        await world.imports.start(REPO, url)
    with pytest.raises(NotFoundError):
        await world.repositories.get(REPO)


# Secrets


async def test_the_password_of_an_import_is_nowhere_in_the_clear(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "s3cret-pässword"
    view, hook = await world.imports.start(REPO, "http://127.0.0.1:1/x.git", credentials=("ada", secret))
    view = await world.work()
    assert view.last_error
    for text in (repr(view), caplog.text, repr(await world.imports.remote(REPO))):
        assert secret not in text
    for path, content in contents(tmp_path).items():
        assert secret.encode() not in content, path
        assert hook.encode() not in content, path
    remote = await world.imports.remote(REPO)
    assert remote is not None
    assert remote.credentials == ("ada", secret)
    assert (tmp_path / "encryption.key").stat().st_mode & 0o077 == 0


async def test_a_sealed_secret_opens_for_its_own_purpose_and_key_alone(tmp_path: Path) -> None:
    one, other = Encryption(tmp_path / "one"), Encryption(tmp_path / "other")
    sealed = one.seal("import a/b", "text")
    assert Encryption(tmp_path / "one").open("import a/b", sealed) == "text"
    for encryption, purpose, text in (
        (one, "import a/c", sealed),
        (other, "import a/b", sealed),
        (one, "import a/b", sealed[:-2] + "AA"),
        (one, "import a/b", "nonsense"),
    ):
        with pytest.raises(UnavailableError, match="give it anew"):
            encryption.open(purpose, text)


async def test_a_refresh_is_asked_for_by_who_has_the_secret_alone(world: World, remote: WorkingCopy) -> None:
    _, hook = await world.imports.start(REPO, remote.url)
    await world.work()
    body = b'{"ref": "refs/heads/main"}'
    signature = "sha256=" + hmac.new(hook.encode(), body, hashlib.sha256).hexdigest()
    for headers in (
        {},
        {"x-hub-signature-256": ""},
        {"x-gitlab-token": ""},
        {"x-hub-signature-256": signature[:-1] + "x"},
        {"x-gitlab-token": hook + "x"},
        {"x-hub-signature-256": "é"},
    ):
        with pytest.raises(UnauthorizedError):
            await world.imports.receive(REPO, headers, body)
    empty = "sha256=" + hmac.new(b"", body, hashlib.sha256).hexdigest()
    for headers in ({"x-hub-signature-256": empty}, {"x-gitlab-token": ""}):
        with pytest.raises(UnauthorizedError):
            await world.imports.receive("no/import", headers, body)
    assert (await world.imports.get(REPO)).due_at is None
    for headers in ({"x-hub-signature-256": signature}, {"x-gitlab-token": hook}):
        assert (await world.imports.receive(REPO, headers, body)).due_at is not None


# Forks and deletion, with what is stored of them


async def test_a_fork_starts_nothing_and_its_first_push_does(world: World, remote: WorkingCopy) -> None:
    await world.imported(remote)
    view = await world.git_store.fork(REPO, "bob/fork")
    assert (view.parent, view.read_only, view.enabled) == (REPO, False, True)
    assert await world.told() == []
    for name in ("bob/fork", "BOB/fork", REPO):
        with pytest.raises(ConflictError):
            await world.git_store.fork(REPO, name)
    with pytest.raises(NotFoundError):
        await world.git_store.fork("no/where", "bob/other")


async def test_of_two_forks_to_one_name_one_is_made_and_whole(world: World, remote: WorkingCopy) -> None:
    await world.imported(remote)
    await world.repositories.register("eve/empty", forge="local")
    refused: list[str] = []

    async def fork(parent: str) -> None:
        try:
            await world.git_store.fork(parent, "bob/fork")
        except ConflictError:
            refused.append(parent)

    async with anyio.create_task_group() as tasks:
        for parent in (REPO, "eve/empty", REPO, "eve/empty"):
            tasks.start_soon(fork, parent)
    assert len(refused) == 3
    made = await world.repositories.get("bob/fork")
    assert await world.source.exists("bob/fork") == (made.parent == REPO), "the content is its parent's"


async def test_a_deleted_import_is_gone_with_its_secrets_and_its_name_is_free(
    world: World, remote: WorkingCopy
) -> None:
    await world.imported(remote)
    await world.git_store.delete(REPO)
    assert [view.name for view in await world.repositories.list()] == ["o/r"]
    assert not await world.source.exists(REPO)
    assert await world.imports.remote(REPO) is None
    await world.refresher.work(REPO)
    assert not await world.source.exists(REPO)
    with pytest.raises(NotFoundError):
        await world.git_store.delete(REPO)
    again = await world.imported(remote)
    assert again.state == "ready"


async def test_a_repository_with_a_run_that_goes_on_is_not_deleted(world: World, platform: Harness) -> None:
    await platform.at_gate()
    with pytest.raises(ConflictError, match="cancel it first"):
        await world.git_store.delete("o/r")


async def test_a_fork_or_deletion_that_a_kill_cut_short_is_finished_at_the_start(
    world: World, remote: WorkingCopy
) -> None:
    await world.imported(remote)
    await world.repositories.claim("bob/half")
    await world.source.fork(REPO, "bob/half")
    await world.repositories.forget(REPO)
    await world.git_store.sweep()
    assert await world.source.repositories() == []
    assert not await world.imports.has(REPO)


# Killed

IMPORT = """
import sys, anyio
from datetime import timedelta
from pathlib import Path
from ci_platform.fetching import Remote
from ci_platform.mirroring import Mirror, Shape
from ci_platform.source import GitFolder, Source
async def main():
    source = Source(Path(sys.argv[1]), allow_file=True)
    repo, remote = sys.argv[2], Remote(sys.argv[3])
    async with source.writing(repo):
        if await source.exists(repo):
            await Mirror(source.path(repo), remote, "file", timedelta(minutes=1)).fill(Shape())
        else:
            async with source.making(repo) as scratch:
                await Mirror(scratch, remote, "file", timedelta(minutes=1)).fill(Shape())
anyio.run(main)
"""


MOMENTS = (
    "writing/*",
    "git/*/.new-*",
    "git/*/.new-*/objects/pack/tmp_*",
    "git/*/.new-*/objects/pack/*.idx",
    "git/*/.new-*/refs/heads/b1*",
    "git/*/*.git",
    "git/*/*.git/*.lock",
    "git/*/*.git/objects/pack/tmp_*",
    "git/*/*.git/refs/**/*.lock",
)
"""What there is to be seen when the process is killed, below the folder of all repositories."""


@pytest.mark.slow
async def test_a_kill_at_any_moment_leaves_no_torn_repository(tmp_path: Path, remote: WorkingCopy) -> None:
    for number in range(60):
        remote.commit({f"f{number}": os.urandom(20_000)})
        remote.git("branch", f"b{number}")
    root, seen = tmp_path / "killed", set[bool]()
    arguments = [sys.executable, "-c", IMPORT, str(root), REPO, remote.url]
    for moment in MOMENTS:
        process = subprocess.Popen(arguments, cwd=Path.cwd(), start_new_session=True)  # noqa: ASYNC220
        while process.poll() is None and not list(root.glob(moment)):
            await anyio.lowlevel.checkpoint()
        process.send_signal(signal.SIGKILL)
        process.wait()
        source = Source(root, allow_file=True)
        await source.sweep()
        await source.reconciled()
        assert list(root.glob("git/*/.new-*")) == []
        assert list(root.glob("git/*/*.git/**/*.lock")) == []
        seen.add(await source.exists(REPO))
        if await source.exists(REPO):
            assert fsck(source) == ""
            remote.commit({"more": os.urandom(20_000)})
    assert seen == {False, True}, "killed before it was there, and after"
    done = subprocess.run(arguments, cwd=Path.cwd(), check=False)  # noqa: ASYNC221
    assert done.returncode == 0
    found = await Source(root, allow_file=True).branches(REPO)
    assert found["main"] == remote.git("rev-parse", "main")
    assert len(found) == 61
