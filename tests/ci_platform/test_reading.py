"""History as pipelines read it: paged, bounded, and no further than a run may fork."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ci_platform.errors import FailedError, ForbiddenError, InvalidInputError, NotFoundError
from ci_platform.fetching import Remote
from ci_platform.repository_capability import RepositoryCapability
from ci_platform.source import Source
from dynflow import serialization
from tests.ci_platform.git_repositories import WorkingCopy, working_copy
from tests.ci_platform.test_capabilities import REPO, World, called_by, run_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "platform")


@pytest.fixture
def work(tmp_path: Path) -> WorkingCopy:
    return working_copy(tmp_path / "work")


async def own(world: World, work: WorkingCopy) -> None:
    await world.source.create(REPO)
    work.git("push", "--quiet", "--mirror", str(world.source.path(REPO)))


async def test_a_pipeline_reads_commits_and_folders_page_by_page(world: World, work: WorkingCopy) -> None:
    shas = [
        work.commit({f"f{number}": b"%d" % number, "sub/x": b"1"}, f"commit {number}") for number in range(5)
    ]
    work.git("tag", "v1", shas[1])
    await own(world, work)
    with called_by(run_of(shas[4])):
        read = world.artifacts
        assert [info.sha for info in await read.log(REPO)] == shas[::-1]
        pages = [await read.log(REPO, "main", limit=2, skip=skip) for skip in (0, 2, 4, 6)]
        assert [[info.title for info in page] for page in pages] == [
            ["commit 4", "commit 3"], ["commit 2", "commit 1"], ["commit 0"], [],
        ]  # fmt: skip
        assert [info.sha for info in await read.log(REPO, "v1")] == [shas[1], shas[0]]
        commit = await read.read_commit(REPO, shas[1])
        assert (commit.parents, commit.message) == ((shas[0],), "commit 1\n")
        names = [
            entry.name for skip in (0, 2, 4, 6) for entry in await read.read_tree(REPO, limit=2, skip=skip)
        ]
        assert names == ["f0", "f1", "f2", "f3", "f4", "sub"]
        (entry,) = await read.read_tree(REPO, shas[0], "sub/")
        assert (entry.name, entry.kind, entry.size) == ("x", "file", 1)
        for value in (commit, entry, pages[0]):
            assert serialization.decode(serialization.encode(value)) == value, "it crosses to an isolate"


async def test_a_run_reads_no_other_repository_and_a_forks_pull_request_its_own_commit_alone(
    world: World, work: WorkingCopy
) -> None:
    first, second = work.commit({"a": b"1"}), work.commit({"a": b"2"})
    await own(world, work)
    read = world.artifacts
    with called_by(run_of(second)):
        for call in (
            read.log("other/app"),
            read.read_commit("other/app"),
            read.read_tree("other/app", second),
        ):
            with pytest.raises(ForbiddenError, match="other/app"):
                await call
    with called_by(run_of(second, trusted=False)):
        assert [info.sha for info in await read.log(REPO)] == [second], "not what came before"
        assert await read.log(REPO, skip=1) == []
        assert (await read.read_commit(REPO)).sha == second
        assert [entry.name for entry in await read.read_tree(REPO, second)] == ["a"]
        for call in (
            read.log(REPO, "main"), read.log(REPO, first), read.read_commit(REPO, first), read.read_tree(REPO, first),
        ):  # fmt: skip
            with pytest.raises(ForbiddenError, match="its own commit"):
                await call
    with called_by(run_of(second), step=None), pytest.raises(FailedError, match="step"):
        await read.log(REPO)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("log", {"limit": 0}), ("log", {"limit": 1001}), ("log", {"limit": True}), ("log", {"skip": -1}),
        ("log", {"skip": 10**30}), ("log", {"ref": ["main"]}), ("log", {"ref": "x" * 5000}), ("log", {"ref": "a\0b"}),
        ("log", {"ref": "\ud800"}), ("read_commit", {"sha": "main"}), ("read_commit", {"sha": "../HEAD"}),
        ("read_commit", {"sha": 7}), ("read_tree", {"path": 7}), ("read_tree", {"path": "\ud800"}),
        ("read_tree", {"path": "a" * 5000}), ("read_tree", {"limit": 5001}), ("read_tree", {"sha": "HEAD"}),
    ],
)  # fmt: skip
async def test_what_cannot_be_read_is_refused_by_name(
    world: World, work: WorkingCopy, call: str, arguments: dict[str, Any]
) -> None:
    sha = work.commit({"a": b"1"})
    await own(world, work)
    with called_by(run_of(sha)), pytest.raises(InvalidInputError):
        await getattr(world.artifacts, call)(REPO, **arguments)


async def test_what_is_not_there_is_not_found(world: World, work: WorkingCopy) -> None:
    sha = work.commit({"a": b"1"})
    await own(world, work)
    read = world.artifacts
    with called_by(run_of(sha)):
        for call in (
            read.log(REPO, "nowhere"), read.log(REPO, "HEAD~1"), read.log(REPO, "refs/heads/../main"),
            read.read_commit(REPO, "1" * 40), read.read_tree(REPO, sha, "../.."), read.read_tree(REPO, sha, "a"),
        ):  # fmt: skip
            with pytest.raises(NotFoundError):
                await call


async def test_a_commit_that_is_not_here_yet_comes_from_the_repositorys_remote_alone(
    tmp_path: Path, work: WorkingCopy
) -> None:
    work.git("config", "uploadpack.allowAnySHA1InWant", "true")
    older, sha = work.commit({"a": b"1"}), work.commit({"a": b"2"})

    async def remote(_repo: str) -> Remote:
        return Remote(work.url)

    world = World(tmp_path / "platform")
    world.source = Source(tmp_path / "other", allow_file=True, remote_of=remote)
    world.artifacts = RepositoryCapability(world.workspaces, world.source)
    await world.source.fetch(REPO, sha, Remote(work.url))
    with pytest.raises(NotFoundError):
        await world.source.read_commit(REPO, older)
    with called_by(run_of(sha)):
        assert [info.sha for info in await world.artifacts.log(REPO)] == [sha], "as far as it is here"
        assert (await world.artifacts.read_commit(REPO, older)).parents == ()
