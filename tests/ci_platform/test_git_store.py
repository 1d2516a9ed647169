"""Repositories of our own as a store: forked, read, deleted; ten thousand of them; killed at any point."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
import pytest

from ci_platform.errors import ConflictError, InvalidInputError, LimitExceededError, NotFoundError
from ci_platform.source import Source
from tests.ci_platform.git_repositories import ENVIRONMENT, Link, Script, WorkingCopy, working_copy

REPO, FORK = "ada/engine", "bob/engine"


@pytest.fixture
async def source(tmp_path: Path) -> Source:
    made = Source(tmp_path / "source")
    await made.create(REPO)
    return made


@pytest.fixture
def work(tmp_path: Path) -> WorkingCopy:
    return working_copy(tmp_path / "work")


def put(source: Source, repo: str, work: WorkingCopy, *refs: str) -> None:
    """Push past the server, as packs."""
    work.git("-c", "transfer.unpackLimit=1", "push", "--quiet", str(source.path(repo)), *(refs or ("main",)))


def fsck(source: Source, repo: str) -> str:
    command = ["git", "--git-dir", str(source.path(repo)), "fsck", "--full", "--strict"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def inodes(source: Source, repo: str) -> set[int]:
    return {path.stat().st_ino for path in (source.path(repo) / "objects").rglob("*") if path.is_file()}


# Forks


async def test_a_fork_has_every_ref_and_shares_every_object(source: Source, work: WorkingCopy) -> None:
    work.commit({"a": b"1"})
    work.git("tag", "--annotate", "--message", "one", "v1")
    work.commit({"a": b"2"})
    put(source, REPO, work, "main", "v1", "main:trunk", "main:refs/notes/x")
    await source.fork(REPO, FORK)
    assert await source.ref_snapshot(FORK) == await source.ref_snapshot(REPO)
    assert await source.default_branch(FORK) == "main"
    assert inodes(source, FORK) == inodes(source, REPO)
    assert fsck(source, FORK) == ""
    assert WorkingCopy(source.path(FORK)).git("rev-parse", "v1") == work.git("rev-parse", "v1"), (
        "the tag itself"
    )


async def test_a_fork_goes_its_own_way(source: Source, work: WorkingCopy) -> None:
    first = work.commit({"a": b"1"})
    put(source, REPO, work)
    await source.fork(REPO, FORK)
    second = work.commit({"a": b"2"})
    put(source, FORK, work)
    assert await source.branches(REPO) == {"main": first}
    assert await source.branches(FORK) == {"main": second}
    third = work.commit({"a": b"3"})
    put(source, REPO, work)
    assert not await source.has(FORK, third), "what the parent gets later is the parent's alone"


async def test_a_fork_survives_that_its_parent_is_packed_pruned_and_deleted(
    source: Source, work: WorkingCopy
) -> None:
    shas = [work.commit({"a": os.urandom(1000)}) for _ in range(3)]
    put(source, REPO, work)
    await source.fork(REPO, FORK)
    await source.fork(FORK, "eve/engine")
    parent = WorkingCopy(source.path(REPO))
    parent.git("update-ref", "-d", "refs/heads/main")
    parent.git("repack", "-a", "-d", "-q")
    parent.git("prune", "--expire=now")
    assert not await source.has(REPO, shas[0])
    await source.delete(REPO)
    await source.delete(FORK)
    assert fsck(source, "eve/engine") == ""
    assert [info.sha for info in await source.log("eve/engine", "main")] == shas[::-1]


async def test_a_fork_is_made_while_its_parent_is_pushed_to(source: Source, work: WorkingCopy) -> None:
    work.commit({"a": b"0"})
    put(source, REPO, work)
    done = anyio.Event()

    async def push_on() -> None:
        for number in range(25):
            work.commit({"a": b"%d" % number})
            await anyio.to_thread.run_sync(put, source, REPO, work)
            async with source.writing(REPO):
                pass
            await source.maintain()
        done.set()

    made = 0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(push_on)
        while not done.is_set():
            await source.fork(REPO, f"forks/f{made}")
            made += 1
    for number in range(0, made, max(1, made // 20)):
        assert fsck(source, f"forks/f{number}") == ""


async def test_a_fork_of_nothing_or_onto_something_is_refused(source: Source) -> None:
    await source.fork(REPO, FORK)
    with pytest.raises(ConflictError):
        await source.fork(REPO, FORK)
    with pytest.raises(NotFoundError):
        await source.fork("no/where", "no/there")
    with pytest.raises(InvalidInputError):
        await source.fork(REPO, "../escape")


async def test_many_who_fork_to_one_name_make_one_fork(source: Source, work: WorkingCopy) -> None:
    work.commit({"a": b"1"})
    put(source, REPO, work)
    outcomes: list[str] = []

    async def fork() -> None:
        try:
            await source.fork(REPO, FORK)
            outcomes.append("made")
        except ConflictError:
            outcomes.append("refused")

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(fork)
    assert sorted(outcomes) == ["made"] + 5 * ["refused"]
    assert fsck(source, FORK) == ""
    assert list((source.path(FORK).parent).glob(".new-*")) == []


# Reading


async def test_a_log_is_what_git_log_says(source: Source, work: WorkingCopy) -> None:
    dates = iter(range(1_700_000_000, 1_800_000_000, 60))

    def commit(*arguments: str) -> None:
        date = f"{next(dates)} +0000"
        work.git(*arguments, GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)

    for number in range(5):
        commit("commit", "--quiet", "--allow-empty", "--message", f"main {number}")
    work.git("checkout", "--quiet", "-b", "side", "HEAD~3")
    for number in range(3):
        commit("commit", "--quiet", "--allow-empty", "--message", f"side {number}")
    work.git("checkout", "--quiet", "main")
    commit("merge", "--quiet", "--no-ff", "--message", "merge", "side")
    put(source, REPO, work)
    expected = work.git("log", "--format=%H").split()
    assert [info.sha for info in await source.log(REPO, "main")] == expected
    assert [info.sha for info in await source.log(REPO, "main", limit=3, skip=2)] == expected[2:5]
    assert await source.log(REPO, "main", skip=100) == []
    with pytest.raises(NotFoundError):
        await source.log(REPO, "nowhere")
    with pytest.raises(InvalidInputError):
        await source.log(REPO, "main", limit=0)


async def test_a_commit_is_read_whole(source: Source, work: WorkingCopy) -> None:
    first = work.commit({"a": b"1"}, "first")
    second = work.commit({"a": b"2"}, "title\n\nbody: ümläut")
    put(source, REPO, work)
    found = await source.read_commit(REPO, second)
    assert (found.sha, found.parents) == (second, (first,))
    assert found.tree == work.git("rev-parse", "HEAD^{tree}")
    assert (found.author, found.committer_email) == ("Ada", "ada@example.org")
    assert found.message == "title\n\nbody: ümläut\n"
    with pytest.raises(NotFoundError):
        await source.read_commit(REPO, "1" * 40)
    with pytest.raises(NotFoundError):
        await source.read_commit(REPO, found.tree)


async def test_a_folder_is_listed_with_kinds_and_sizes(source: Source, work: WorkingCopy) -> None:
    sha = work.commit(
        {"file": b"four", "run": Script(b"#!"), "link": Link("/etc/passwd"), "deep/er/x": b"", "deep/y": b"1"}
    )
    put(source, REPO, work)
    listed = {(entry.name, entry.kind, entry.size) for entry in await source.read_tree(REPO, sha)}
    assert listed == {
        ("deep", "folder", None), ("file", "file", 4), ("link", "symlink", 11), ("run", "script", 2),
    }  # fmt: skip
    assert [entry.name for entry in await source.read_tree(REPO, sha, "deep")] == ["er", "y"]
    for path in ("none", "file", "..", "deep/..", "/", "deep//er", "link"):
        with pytest.raises(NotFoundError):
            await source.read_tree(REPO, sha, path)


async def test_a_hostile_commit_is_read_without_harm(source: Source, work: WorkingCopy) -> None:
    work.commit({"a": b"1"})
    tree = work.git("rev-parse", "HEAD^{tree}")

    def write(text: bytes) -> str:
        command = ["git", "hash-object", "-t", "commit", "-w", "--literally", "--stdin"]
        done = subprocess.run(command, cwd=work.path, input=text, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode().strip()

    who = b"\xff\x00\xfe <x@y> 99999999999999 +0000"
    odd = write(b"tree %s\nauthor %s\ncommitter %s\n\n\xff\xfe title\x00\n" % (tree.encode(), who, who))
    large = write(
        b"tree %s\nauthor A <a> 1 +0000\ncommitter A <a> 1 +0000\n\n%s" % (tree.encode(), b"x" * 2**21)
    )
    for name, sha in (("odd", odd), ("large", large)):
        (source.path(REPO) / "refs" / "heads" / name).write_text(sha + "\n")
        for loose in (work.path / ".git" / "objects").glob("??/*"):
            target = source.path(REPO) / "objects" / loose.parent.name / loose.name
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                target.hardlink_to(loose)
    found = await source.read_commit(REPO, odd)
    assert found.message.encode(), "text that can be sent on"
    assert (await source.log(REPO, "odd"))[0].author.encode()
    with pytest.raises(LimitExceededError):
        await source.read_commit(REPO, large)
    with pytest.raises(LimitExceededError):
        await source.log(REPO, "large")


# Being many, being deleted


async def test_a_repository_goes_when_what_is_being_built_of_it_is_whole(source: Source) -> None:
    path = source.path(REPO)
    async with anyio.create_task_group() as group, source._builds(REPO):
        group.start_soon(source.delete, REPO)
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert path.is_dir()
    assert not path.exists()


async def test_a_deleted_repository_is_gone_and_its_name_is_free(source: Source, work: WorkingCopy) -> None:
    sha = work.commit({"a": b"1"})
    put(source, REPO, work)
    await source.delete(REPO)
    assert not await source.exists(REPO)
    with pytest.raises(NotFoundError):
        await source.branches(REPO)
    await source.delete(REPO)
    await source.create(REPO)
    assert not await source.has(REPO, sha)


@pytest.mark.slow
async def test_ten_thousand_idle_repositories_cost_nothing_but_their_place(
    tmp_path: Path, source: Source
) -> None:
    own = psutil.Process()
    await source.fork(REPO, "many/warm")
    descriptors, threads, memory = own.num_fds(), own.num_threads(), own.memory_info().rss
    for number in range(10_000):
        await source.create(f"many/r{number}")
    assert len(await source.repositories()) == 10_002
    assert own.num_fds() <= descriptors + 2
    assert own.num_threads() <= threads + 4
    assert own.memory_info().rss - memory < 16 << 20
    assert own.children() == []
    restarted = Source(tmp_path / "source")
    assert len(await restarted.sweep()) == 10_002, "the first look at what an older release left"
    await restarted.reconciled()
    assert await Source(tmp_path / "source").sweep() == set(), "from then on nobody has to look"
