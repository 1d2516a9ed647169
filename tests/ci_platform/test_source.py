"""Mirrors, commits' trees and what repositories cannot do with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from ci_platform.errors import (
    ConflictError,
    FailedError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
    UnavailableError,
)
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.source import Remote, Source
from ci_platform.trees import TreeLimits
from tests.ci_platform.git_repositories import (
    ENVIRONMENT,
    Content,
    Link,
    Script,
    WorkingCopy,
    merged,
    snapshot,
    working_copy,
)

REPO = "ada/engine"
FILES: dict[str, Content] = {
    "README.md": b"hello\n",
    "crlf.txt": b"a\r\nb\r\n",
    "lines.eol": b"a\nb\n",
    ".gitattributes": b"*.eol text eol=crlf\n*.bin filter=lfs\n",
    "large.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "empty": b"",
    "run.sh": Script(b"#!/bin/sh\necho hi\n"),
    "link": Link("README.md"),
    "outside": Link("/etc/passwd"),
    "a folder/ümläut \n newline": b"\xff\x00binary",
    "deep/er/and/deeper/file": b"x",
    ".dynflow/ci.py": b"pass\n",
    ".dynflow/lib/more.py": b"more\n",
    ".dynflow/notes.txt": b"no\n",
}
AS_COMMITTED = {"lines.eol": ("file", b"a\nb\n")}
"""`git archive` follows .gitattributes; commands get the bytes that were committed."""


@pytest.fixture
def remote(tmp_path: Path) -> WorkingCopy:
    return working_copy(tmp_path / "remote")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "source", allow_file=True)


async def fetched(source: Source, remote: WorkingCopy, sha: str) -> str:
    await source.fetch(REPO, sha, Remote(remote.url))
    return sha


@pytest.mark.parametrize(
    "name",
    [
        "",
        "one",
        "a/b/c",
        "../x",
        "a/..",
        "a/.",
        "/etc/passwd",
        "-a/b",
        "a/b.git",
        "a/b c",
        "a/b\n",
        ".a/b",
        "a\\b/c",
    ],
)
async def test_a_name_that_could_leave_the_folder_is_refused(source: Source, name: str) -> None:
    with pytest.raises(InvalidInputError):
        await source.exists(name)


async def test_a_commit_is_fetched_once_and_then_the_remote_is_not_asked(
    source: Source, remote: WorkingCopy
) -> None:
    sha = remote.commit(FILES)
    await fetched(source, remote, sha)
    remote.path.rename(remote.path.with_name("gone"))
    await fetched(source, remote, sha)
    assert await source.has(REPO, sha)


async def test_fetches_of_one_commit_at_the_same_time_all_succeed(
    source: Source, remote: WorkingCopy
) -> None:
    sha = remote.commit(FILES)
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(fetched, source, remote, sha)
    assert await source.has(REPO, sha)


async def test_history_stays_at_the_remote(source: Source, remote: WorkingCopy) -> None:
    first = remote.commit({"a": b"1"})
    second = remote.commit({"a": b"2"})
    await fetched(source, remote, second)
    assert not await source.has(REPO, first)
    await fetched(source, remote, first)
    assert await source.has(REPO, first)


async def test_a_commit_that_is_not_there_is_the_repositorys_fault(
    source: Source, remote: WorkingCopy
) -> None:
    remote.commit(FILES)
    with pytest.raises(FailedError, match="has no commit"):
        await source.fetch(REPO, "1" * 40, Remote(remote.url), ref="refs/heads/main")
    with pytest.raises(FailedError, match="not to be found"):
        await source.fetch("ada/other", "1" * 40, Remote(f"{remote.url}-missing"))


async def test_a_remote_that_does_not_answer_is_ours_and_tells_no_secret(source: Source) -> None:
    with pytest.raises(UnavailableError) as caught:
        await source.fetch(REPO, "1" * 40, Remote("http://127.0.0.1:1/x.git", ("user", "s3cret-token")))
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(Remote("https://x", ("user", "s3cret-token")))


@pytest.mark.parametrize(
    "url", ["ext::sh -c id", "ssh://host/x", "https://user:token@host/x", "--upload-pack=id", "file:///x"]
)
async def test_an_address_that_is_more_than_an_address_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await Source(tmp_path / "strict").fetch(REPO, "1" * 40, Remote(url))
    assert "token@" not in str(caught.value)


KILLED_WRITING = """
import os, signal, sys, anyio
from pathlib import Path
from ci_platform.source import Source
async def main():
    source = Source(Path(sys.argv[1]))
    async with source.writing(sys.argv[2]):
        (source.path(sys.argv[2]) / "shallow.lock").touch()
        os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""


async def test_a_stale_lock_of_a_killed_fetch_is_swept(
    tmp_path: Path, source: Source, remote: WorkingCopy
) -> None:
    await fetched(source, remote, remote.commit({"a": b"1"}))
    arguments = [sys.executable, "-c", KILLED_WRITING, str(tmp_path / "source"), REPO]
    killed = subprocess.run(arguments, cwd=Path.cwd(), check=False)  # noqa: ASYNC221
    assert killed.returncode == -signal.SIGKILL
    assert (source.path(REPO) / "shallow.lock").exists()
    sha = remote.commit({"a": b"2"})
    await source.sweep()
    await fetched(source, remote, sha)


async def test_what_failed_while_it_was_written_is_unlocked_at_once(
    source: Source, remote: WorkingCopy
) -> None:
    await fetched(source, remote, remote.commit({"a": b"1"}))

    async def fail() -> None:
        async with source.writing(REPO):
            (source.path(REPO) / "shallow.lock").touch()
            raise TimeoutError

    with pytest.raises(TimeoutError):
        await fail()
    await fetched(source, remote, remote.commit({"a": b"2"}))


async def test_maintenance_packs_and_loses_nothing(source: Source, remote: WorkingCopy) -> None:
    shas = [await fetched(source, remote, remote.commit({"a": b"%d" % number})) for number in range(21)]
    packs = source.path(REPO) / "objects" / "pack"
    assert len(list(packs.glob("*.pack"))) == 21
    await source.maintain()
    assert len(list(packs.glob("*.pack"))) == 1
    for number, sha in enumerate(shas):
        assert await source.read_file(REPO, sha, "a") == b"%d" % number


async def test_a_tree_on_disk_is_what_git_archive_gives(source: Source, remote: WorkingCopy) -> None:
    sha = await fetched(source, remote, remote.commit(FILES))
    (tree,) = await source.materialise(REPO, sha)
    assert snapshot(tree) == remote.archive(sha) | AS_COMMITTED
    owner = SANDBOX_UID if os.geteuid() == 0 else os.geteuid()
    assert {path.lstat().st_uid for path in [tree, *tree.rglob("*")]} == {owner}


async def test_a_submodule_is_an_empty_folder(source: Source, remote: WorkingCopy) -> None:
    remote.commit({"a": b"1"})
    remote.git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},vendor/lib")
    remote.git("commit", "--quiet", "--message", "submodule")
    sha = await fetched(source, remote, remote.git("rev-parse", "HEAD"))
    (tree,) = await source.materialise(REPO, sha)
    assert list((tree / "vendor" / "lib").iterdir()) == []


async def test_the_next_commit_is_a_delta_with_fresh_files(
    source: Source, remote: WorkingCopy, tmp_path: Path
) -> None:
    first = await fetched(source, remote, remote.commit(FILES | {"gone/file": b"x", "now a folder": b"x"}))
    second = await fetched(
        source,
        remote,
        remote.commit(
            {
                "gone/file": None,
                "now a folder": None,
                "README.md": b"changed\n",
                "run.sh": b"no longer a script",
                "link": Link("run.sh"),
                "deep/er/and/deeper/file": None,
                "new/file": b"new",
            }
        ),
    )
    third = await fetched(source, remote, remote.commit({"now a folder/file": b"x", "deep": b"a file now"}))
    (base,) = await source.materialise(REPO, first)
    delta, below = await source.materialise(REPO, second)
    assert below == base
    assert (delta / "README.md").stat().st_mtime_ns > (base / "README.md").stat().st_mtime_ns
    assert sorted(path.name for path in delta.iterdir()) == [
        "README.md", "deep", "gone", "link", "new", "now a folder", "run.sh",
    ]  # fmt: skip
    for number, sha in enumerate([second, third]):
        lowers = await source.materialise(REPO, sha)
        assert snapshot(merged(lowers, tmp_path / str(number))) == remote.archive(sha) | AS_COMMITTED


async def test_a_commit_far_from_every_base_gets_a_base(source: Source, remote: WorkingCopy) -> None:
    first = await fetched(source, remote, remote.commit({f"{n}": b"1" for n in range(1100)}))
    second = await fetched(source, remote, remote.commit({f"{n}": b"2" for n in range(1100)}))
    await source.materialise(REPO, first)
    assert len(await source.materialise(REPO, second)) == 1


async def test_concurrent_callers_share_one_tree(source: Source, remote: WorkingCopy) -> None:
    sha = await fetched(source, remote, remote.commit(FILES))
    found = set()

    async def materialise() -> None:
        found.add(await source.materialise(REPO, sha))

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(materialise)
    assert len(found) == 1


MATERIALISE = """
import sys, anyio
from pathlib import Path
from ci_platform.source import Source
async def main():
    await Source(Path(sys.argv[1])).materialise(sys.argv[2], sys.argv[3])
anyio.run(main)
"""


async def test_a_kill_in_the_middle_leaves_no_half_tree(
    tmp_path: Path, source: Source, remote: WorkingCopy
) -> None:
    sha = await fetched(source, remote, remote.commit({f"{n % 20}/{n}": b"%d" % n for n in range(4000)}))
    root = tmp_path / "source"
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", MATERIALISE, root, REPO, sha], cwd=Path.cwd()
    )
    deadline = time.monotonic() + 30
    while not list((root / "trees" / ".building").glob("*/tree/*/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "trees" / REPO).exists()
    restarted = Source(root)
    await restarted.sweep()
    assert list((root / "trees" / ".building").iterdir()) == []
    (tree,) = await restarted.materialise(REPO, sha)
    assert snapshot(tree) == remote.archive(sha)


async def test_a_tree_from_before_a_restart_of_the_machine_is_built_again(
    source: Source, remote: WorkingCopy
) -> None:
    sha = await fetched(source, remote, remote.commit({"a": b"1"}))
    (tree,) = await source.materialise(REPO, sha)
    record = json.loads((tree.parent / "tree.json").read_text())
    (tree.parent / "tree.json").write_text(json.dumps(record | {"boot": "another"}))
    (tree / "a").write_bytes(b"")
    (again,) = await source.materialise(REPO, sha)
    assert (again / "a").read_bytes() == b"1"


def raw_tree(remote: WorkingCopy, *entries: tuple[bytes, bytes, str]) -> str:
    content = b"".join(mode + b" " + name + b"\0" + bytes.fromhex(oid) for mode, name, oid in entries)
    return subprocess.run(
        ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
        cwd=remote.path, input=content, stdout=subprocess.PIPE, check=True,
    ).stdout.decode().strip()  # fmt: skip


@pytest.mark.parametrize("attack", ["symlink then folder", "..", ".git", ".GIT", "slash", "deep"])
async def test_a_commit_cannot_write_outside_its_tree(
    source: Source, remote: WorkingCopy, tmp_path: Path, attack: str
) -> None:
    remote.commit({"evil": b"evil", "target": Link(str(tmp_path / "victim"))})
    (tmp_path / "victim").mkdir(mode=0o777)
    blob, link = remote.git("rev-parse", "HEAD:evil"), remote.git("rev-parse", "HEAD:target")
    inner = raw_tree(remote, (b"100644", b"evil", blob))
    if attack == "symlink then folder":
        tree = raw_tree(remote, (b"120000", b"x", link), (b"40000", b"x", inner))
    elif attack == "slash":
        tree = raw_tree(remote, (b"100644", b"../../victim/evil", blob))
    elif attack == "deep":
        tree = inner
        for _ in range(300):
            tree = raw_tree(remote, (b"40000", b"d", tree))
    else:
        tree = raw_tree(remote, (b"40000", attack.encode(), inner))
    sha = remote.git("commit-tree", tree, "-m", "attack")
    remote.git("update-ref", "refs/heads/main", sha)
    if attack != "deep":
        with pytest.raises(FailedError, match="git refuses"):
            await fetched(source, remote, sha)
    # Behind git's own look at it: as if that had missed it.
    await source.create("past/git")
    remote.git("push", "--quiet", str(source.path("past/git")), "main")
    with pytest.raises((FailedError, LimitExceededError)):
        await source.materialise("past/git", sha)
    assert list((tmp_path / "victim").iterdir()) == []
    assert list((tmp_path / "source" / "trees" / ".building").iterdir()) == []


async def test_a_tree_that_names_billions_of_files_is_refused(tmp_path: Path, remote: WorkingCopy) -> None:
    remote.commit({"a": b"bomb"})
    tree = raw_tree(remote, *((b"100644", b"f%d" % n, remote.git("rev-parse", "HEAD:a")) for n in range(10)))
    for _ in range(9):
        tree = raw_tree(remote, *((b"40000", b"d%d" % n, tree) for n in range(10)))
    sha = remote.git("commit-tree", tree, "-m", "bomb")
    remote.git("update-ref", "refs/heads/main", sha)
    source = Source(tmp_path / "source", allow_file=True, limits=TreeLimits(files=500))
    await fetched(source, remote, sha)
    with pytest.raises(LimitExceededError, match="more than 500 files"):
        await source.materialise(REPO, sha)


async def test_a_folder_that_names_billions_of_files_is_not_searched(
    source: Source, remote: WorkingCopy
) -> None:
    """Looking for a pipeline in there would never end, in a thread that all repositories share."""
    remote.commit({"a": b"bomb"})
    tree = raw_tree(remote, (b"100644", b"no-python", remote.git("rev-parse", "HEAD:a")))
    for _ in range(7):
        tree = raw_tree(remote, *((b"40000", b"d%03d" % n, tree) for n in range(100)))
    sha = remote.git("commit-tree", raw_tree(remote, (b"40000", b".dynflow", tree)), "-m", "bomb")
    remote.git("update-ref", "refs/heads/main", sha)
    await fetched(source, remote, sha)
    with anyio.fail_after(30), pytest.raises(LimitExceededError, match="entries"):
        await source.read_folder(REPO, sha, ".dynflow", suffix=".py")


async def test_a_commit_with_a_message_without_end_is_refused(source: Source, remote: WorkingCopy) -> None:
    remote.commit(FILES)
    message = remote.path / "message"
    message.write_text("x" * (2 << 20))
    sha = remote.git("commit-tree", "HEAD^{tree}", "-F", str(message))
    remote.git("update-ref", "refs/heads/main", sha)
    await fetched(source, remote, sha)
    with pytest.raises(LimitExceededError, match="the commit"):
        await source.commit_message(REPO, sha)


async def test_files_are_read_from_a_commit(source: Source, remote: WorkingCopy) -> None:
    sha = await fetched(source, remote, remote.commit(FILES, "Title\n\nbody [skip ci]"))
    assert await source.read_file(REPO, sha, ".dynflow/ci.py") == b"pass\n"
    assert await source.read_file(REPO, sha, "run.sh") == b"#!/bin/sh\necho hi\n"
    for absent in ("no", "link", "deep", "README.md/x", "../README.md", ""):
        assert await source.read_file(REPO, sha, absent) is None
    with pytest.raises(LimitExceededError):
        await source.read_file(REPO, sha, "README.md", limit=5)
    found = await source.read_folder(REPO, sha, ".dynflow", suffix=".py")
    assert found == {"ci.py": b"pass\n", "lib/more.py": b"more\n"}
    assert await source.read_folder(REPO, sha, "nowhere") == {}
    assert await source.commit_title(REPO, sha) == "Title"
    assert await source.commit_message(REPO, sha) == "Title\n\nbody [skip ci]\n"
    assert (await source.commit(REPO, sha)).author == "Ada"
    with pytest.raises(NotFoundError):
        await source.commit(REPO, "2" * 40)


async def test_our_own_repositories(source: Source) -> None:
    await source.create(REPO, default_branch="trunk")
    with pytest.raises(ConflictError):
        await source.create(REPO)
    assert await source.exists(REPO)
    assert await source.repositories() == [REPO]
    assert await source.default_branch(REPO) == "trunk"
    assert await source.branches(REPO) == {}
    with pytest.raises(NotFoundError):
        await source.resolve(REPO, "trunk")


async def test_a_tree_is_removed_unless_it_was_used_just_now_or_another_one_stands_on_it(
    source: Source, remote: WorkingCopy
) -> None:
    files: dict[str, Content] = {f"1-{m}": b"1" for m in range(20)}
    shas = [await fetched(source, remote, remote.commit(each)) for each in (files, {"1-1": b"2"})]
    (base,), (delta, _) = [await source.materialise(REPO, sha) for sha in shas]
    keys = {path.parent.name: path.parent for path in (delta, base)}
    assert {(repo, tree.key) for repo, tree in await source.trees()} == {(REPO, key) for key in keys}
    assert [await source.remove_tree(REPO, key) for key in keys] == [False, False], "just used"
    for folder in keys.values():
        os.utime(folder, (time.time() - 5000,) * 2)
    assert await source.remove_tree(REPO, base.parent.name) is False
    assert [await source.remove_tree(REPO, key) for key in keys] == [True, True]
    assert await source.trees() == []
    assert (await source.materialise(REPO, shas[1]))[0].exists(), "it is made again"
    assert await source.remove_tree(REPO, "base-nothing") is True


async def test_a_mirror_is_removed_unless_it_was_used_and_fetched_again_when_needed(
    tmp_path: Path, remote: WorkingCopy
) -> None:
    async def remote_of(_repo: str) -> Remote:
        return Remote(remote.url)

    source = Source(tmp_path / "other", allow_file=True, remote_of=remote_of)
    sha = await fetched(source, remote, remote.commit({"a": b"1"}))
    (held,) = await source.mirrors()
    assert (held.repo, held.size > 0, held.files > 5) == (REPO, True, True)
    assert await source.remove_mirror(REPO, time.time() - 600) is False
    assert await source.read_file(REPO, sha, "a") == b"1"
    assert await source.remove_mirror(REPO, time.time() + 1) is True
    assert await source.mirrors() == []
    assert await source.remove_mirror(REPO, 0) is True
    assert await source.read_file(REPO, sha, "a") == b"1"
    assert len(await source.mirrors()) == 1


async def test_a_tree_whose_commit_is_still_to_be_fetched_does_not_keep_out_whom_it_waits_for(
    tmp_path: Path, remote: WorkingCopy
) -> None:
    async def remote_of(_repo: str) -> Remote:
        return Remote(remote.url)

    source = Source(tmp_path / "source", allow_file=True, remote_of=remote_of)
    await fetched(source, remote, remote.commit(FILES))
    later = remote.commit({"README.md": b"later\n"})
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(source.materialise, REPO, later)
            # Keeps writers out, and waits for those who build trees.
            group.start_soon(source.remove_mirror, REPO, time.time() + 60)
    (tree,) = await source.materialise(REPO, later)
    assert (tree / "README.md").read_bytes() == b"later\n"


async def test_a_fork_of_a_shallow_repository_and_its_packing_do_not_wait_for_each_other(
    source: Source, remote: WorkingCopy
) -> None:
    await source.create("ada/shallow")
    path = source.path("ada/shallow")
    remote.commit({f"{number}": str(number).encode() for number in range(25)})
    remote.git("--git-dir", str(path), "hash-object", "-w", *map(str, range(25)))
    (path / "shallow").touch()
    async with source.writing("ada/shallow"):
        pass  # so that there is something to pack
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks, source._builds("ada/shallow"):
            tasks.start_soon(source.maintain)
            while not source._writers:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)
            tasks.start_soon(source.fork, "ada/shallow", "ada/fork")
            await anyio.wait_all_tasks_blocked()
    assert await source.exists("ada/fork")


async def test_hooks_and_configuration_of_users_do_not_run(
    source: Source, remote: WorkingCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness, home = tmp_path / "witness", tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text(f'[core]\n\tfsmonitor = "touch {witness}"\n\thooksPath = {home}\n')
    hook = home / "reference-transaction"
    hook.write_text(f"#!/bin/sh\ntouch {witness}\n")
    hook.chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    sha = remote.commit(FILES)
    await fetched(source, remote, sha)
    own = source.path(REPO) / "hooks" / "reference-transaction"
    own.parent.mkdir(exist_ok=True)
    own.write_text(hook.read_text())
    own.chmod(0o755)
    await fetched(source, remote, remote.commit({"more": b"x"}))
    assert not witness.exists()


async def test_a_ref_whose_name_is_no_text_starts_nothing(source: Source, remote: WorkingCopy) -> None:
    """No database takes such a name: it would keep the platform from starting when refs are compared."""
    sha = remote.commit(FILES)
    await source.create(REPO)
    served = source.path(REPO)
    for name in (b"main", b"bad\xff", "left\u202eright".encode(), b"x" * 200 + b"/" + b"y" * 200):
        refspec = sha.encode() + b":refs/heads/" + name
        command: list[str | bytes] = ["git", "push", "-q", str(served), refspec]
        await anyio.run_process(command, cwd=remote.path, env=ENVIRONMENT)
    assert set(await source.branches(REPO)) == {"main", "x" * 200 + "/" + "y" * 200}
