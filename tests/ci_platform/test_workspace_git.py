"""The `.git` of a workspace, used by the git of a sandbox as who commands are there."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ci_platform.cones import Cone
from ci_platform.errors import InvalidInputError, MissingObjectError
from ci_platform.sandboxes import SANDBOX_UID
from ci_platform.source import Remote
from tests.ci_platform.git_repositories import Content, Link, Script
from tests.ci_platform.workspace_desk import REPO, Desk, opened_desk

FILES: dict[str, Content] = {
    "README.md": b"hello\n",
    "src/a.py": b"a\n",
    "src/deep/er/b.py": b"b\n",
    "src/deep.txt": b"sorted before the folder\n",
    "src/deep-er": b"and this one as well\n",
    "docs/page": b"page\n",
    "docs/api/page": b"page\n",
    "empty": b"",
    "run.sh": Script(b"#!/bin/sh\n"),
    "link": Link("src/a.py"),
    "n/" + "x" * 200: b"a long name",
}

CLEAN = f"""
test "$(id -u)" = {SANDBOX_UID}
git diff-files            # what differs by lstat alone: nothing is read
git status --porcelain
git rev-parse HEAD
git ls-files --stage | sha1sum
git ls-tree -r HEAD | sed 's/^\\(......\\) [a-z]* \\([^\\t]*\\)\\t/\\1 \\2 0\\t/' | sha1sum
git write-tree
git rev-parse HEAD^{{tree}}
"""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened_desk(tmp_path) as desk:
        yield desk


async def check_clean(desk: Desk, sha: str, workspace: str) -> None:
    head, staged, listed, written, tree = (await desk.run(CLEAN, workspace)).split("\n")[:5]
    assert head == sha
    assert staged == listed
    assert written == tree


async def test_a_fork_is_clean_and_git_compares_no_file(desk: Desk) -> None:
    first = desk.remote.commit(FILES)
    await check_clean(desk, first, await desk.fork(first))
    changes: list[dict[str, Content]] = [
        {
            "src/a.py": b"A\n",
            "docs/page": None,
            "docs/api/page": None,
            "new/one": b"1",
            "run.sh": b"#!/bin/sh\n",
        },
        {"link": b"a file now", "empty": Link("x"), "src/deep": None, "src/deep/new": b"1", "a": b"first"},
        {"src/deep": b"a file now", "new": None, "zzz/y/x": b"last", "README.md": Script(b"hello\n")},
        {"src": None, "src/again": b"1", "zzz/y": b"file"},
        {"a": None, "b": b"x", "zzz": None, "src/again": None},
        {f"many/{n}": b"%d" % n for n in range(50)},
    ]
    for number, change in enumerate(changes):
        sha = desk.remote.commit(change)
        await check_clean(desk, sha, await desk.fork(sha, f"run2.{number}"))


async def test_a_commit_that_needs_a_tree_of_its_own_is_clean(desk: Desk) -> None:
    await desk.fork(desk.remote.commit({f"{n}": b"1" for n in range(1100)}))
    sha = desk.remote.commit({f"{n}": b"2" for n in range(1100)})
    await check_clean(desk, sha, await desk.fork(sha, "run2.build"))


async def test_history_tags_and_branches_are_there(desk: Desk) -> None:
    desk.remote.commit(FILES, "the first")
    desk.remote.git("tag", "-a", "v1.0", "-m", "a release")
    desk.remote.git("branch", "other")
    sha = desk.remote.commit({"src/a.py": b"changed\n"}, "the second")
    await desk.fork(sha)
    assert await desk.run("git describe") == desk.remote.git("describe") + "\n"
    assert await desk.run("git log --format=%s") == "the second\nthe first\n"
    assert (
        await desk.run("git diff --stat HEAD~1 | tail -1")
        == " 1 file changed, 1 insertion(+), 1 deletion(-)\n"
    )
    assert await desk.run("git rev-parse origin/main") == f"{sha}\n"
    assert await desk.run("git log --format=%s origin/other") == "the first\n"
    assert await desk.run("git show v1.0:README.md") == "hello\n"
    assert await desk.run("git fsck 2>&1") == ""


async def test_a_command_may_change_and_commit(desk: Desk) -> None:
    await desk.fork(desk.remote.commit(FILES))
    await desk.run("echo changed >> src/a.py; rm docs/page; echo new > src/deep/new")
    assert await desk.run("git status --porcelain") == " D docs/page\n M src/a.py\n?? src/deep/new\n"
    assert "+changed" in await desk.run("git diff src/a.py")
    await desk.run("git add --all; git commit --quiet -m 'by a command'")
    assert (
        await desk.run("git status --porcelain; git log -1 --format='%s by %an'")
        == "by a command by dynflow\n"
    )
    assert await desk.run("git diff --name-status HEAD~1") == "D\tdocs/page\nM\tsrc/a.py\nA\tsrc/deep/new\n"
    await desk.run("git gc --quiet; git fsck")
    written = sum(
        path.stat().st_size
        for path in (desk.root / "workspaces").rglob("*.pack")
        if path.stat().st_nlink == 1
    )
    assert written < 4096, "history is nowhere copied"
    assert (
        await desk.run("git stash list; git checkout --quiet HEAD~1; cat src/a.py docs/page") == "a\npage\n"
    )


async def test_names_of_any_bytes(desk: Desk) -> None:
    names = [b"\xff\xfe", b"new\nline", "ä".encode(), b" ", b"a b/c\td"]
    for name in names:
        path = os.fsencode(desk.remote.path) + b"/" + name
        await anyio.Path(os.path.dirname(os.fsdecode(path))).mkdir(exist_ok=True)  # noqa: PTH120
        await anyio.Path(os.fsdecode(path)).write_bytes(name)
    first = desk.remote.commit({})
    await check_clean(desk, first, await desk.fork(first))
    second = desk.remote.commit({"a b": None, os.fsdecode(b"\xff\xfe"): b"changed"})
    await check_clean(desk, second, await desk.fork(second, "run2.build"))


async def test_a_submodule_is_clean_and_empty(desk: Desk) -> None:
    desk.remote.commit(FILES)
    desk.remote.git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},vendor/lib")
    desk.remote.git("commit", "--quiet", "--message", "submodule")
    sha = desk.remote.git("rev-parse", "HEAD")
    await desk.fork(sha)
    assert (
        await desk.run("git status --porcelain; ls -A vendor/lib; git ls-files -s vendor | cut -c 1-6")
        == "160000\n"
    )


async def test_a_sparse_fork_has_its_folders_alone(desk: Desk) -> None:
    first = desk.remote.commit(FILES)
    cone = Cone.of(["src/deep/", "n"])
    await desk.fork(first, cone=cone)
    seen = "find . -path ./.git -prune -o -type f -print | sort"
    listed = [
        "./README.md", "./empty", f"./n/{'x' * 200}", "./run.sh", "./src/a.py",
        "./src/deep-er", "./src/deep.txt", "./src/deep/er/b.py",
    ]  # fmt: skip
    assert (await desk.run(seen)).splitlines() == listed
    await check_clean(desk, first, "run1.build")
    assert await desk.run("git sparse-checkout list") == "n\nsrc/deep\n"
    second = desk.remote.commit(
        {"docs/page": b"changed", "docs/api/page": None, "src/deep/x": b"1", "docs/z/z": b"1"}
    )
    await check_clean(desk, second, await desk.fork(second, "run2.build", cone=cone))
    assert (await desk.run(seen, "run2.build")).splitlines() == sorted([*listed, "./src/deep/x"])
    third = desk.remote.commit({"docs": b"a file of the root now", "src/a.py": None})
    await check_clean(desk, third, await desk.fork(third, "run3.build", cone=cone))
    assert "./docs" in await desk.run(seen, "run3.build")
    await desk.run("git sparse-checkout disable", "run2.build")
    assert await desk.run("cat docs/page; git status --porcelain", "run2.build") == "changed"


async def test_a_sparse_fork_of_nothing_has_the_files_of_the_root(desk: Desk) -> None:
    await desk.fork(desk.remote.commit(FILES), cone=Cone.of([]))
    assert await desk.run("ls; git status --porcelain") == "README.md\nempty\nlink\nrun.sh\n"


@pytest.mark.parametrize(
    "paths",
    [
        "src",
        None,
        7,
        ["../x"],
        ["/"],
        [""],
        ["a//b"],
        [".git"],
        ["a/.GIT/b"],
        ["*"],
        ["a\nb"],
        [b"x"],
        ["a"] * 2000,
    ],
)
def test_what_is_no_list_of_folders_is_refused_with_its_value(paths: object) -> None:
    with pytest.raises(InvalidInputError, match="sparse"):
        Cone.of(paths)


async def test_a_fork_of_one_commit_alone_reaches_no_other(desk: Desk) -> None:
    desk.remote.commit({"secret": b"of another commit"})
    other = desk.remote.git("rev-parse", "HEAD")
    sha = desk.remote.commit(FILES | {"secret": None})
    await desk.fork(sha, alone=True)
    await check_clean(desk, sha, "run1.build")
    assert await desk.run(f"git cat-file -e {other} 2>/dev/null && echo reached || true") == ""
    assert await desk.run("git cat-file --batch-all-objects --batch-check | grep -c commit") == "1\n"
    assert "another" not in await desk.run("git cat-file --batch-all-objects --batch | strings || true")
    await desk.run(
        "echo x >> README.md; git diff --exit-code >/dev/null && exit 1; git commit --quiet -am x; git fsck"
    )
    assert await desk.run("git log --format=%s") == "x\na commit\n"


async def test_a_tag_that_comes_later_is_not_seen_by_who_runs_already(desk: Desk) -> None:
    sha = desk.remote.commit(FILES)
    await desk.fork(sha)
    desk.remote.git("tag", "v1")
    await desk.fork(sha, "run2.build")
    assert await desk.run("git tag") == ""
    assert await desk.run("git describe --tags", "run2.build") == "v1\n"


async def test_a_mirror_of_one_commit_is_enough(desk: Desk) -> None:
    """What the platform fetches of a forge has no history: it says so to git."""
    desk.remote.commit({"old": b"x"})
    sha = desk.remote.commit(FILES)
    await desk.source.fetch("ada/mirror", sha, Remote(desk.remote.url))
    await desk.workspaces.fork("run1.mirror", "ada/mirror", sha)
    await check_clean(desk, sha, "run1.mirror")
    assert await desk.run("git log --format=%s; git fsck", "run1.mirror") == "a commit\n"


HOSTILE = """
git config core.fsmonitor "$PWD/evil"; git config core.hooksPath "$PWD"; git config core.pager "$PWD/evil"
git config filter.x.clean "$PWD/evil"; echo '* filter=x' > .gitattributes
printf '#!/bin/sh\\ntouch %s\\n' "$WITNESS" > evil; chmod 777 evil
for hook in post-checkout pre-commit reference-transaction post-index-change; do cp evil $hook; done
cp -r .git .git2; rm -rf .git/objects; ln -s / .git/objects; rm -f .git/packed-refs; ln -s /etc/passwd .git/packed-refs
"""


async def test_what_a_command_makes_of_its_git_concerns_nobody_else(desk: Desk) -> None:
    sha = desk.remote.commit(FILES)
    witness = desk.root / "witness"
    await desk.fork(sha)
    before = objects_of(desk)
    await desk.run(HOSTILE.replace("$WITNESS", str(witness)))
    assert await desk.run("ls -l .git/packed-refs | grep -c passwd") == "1\n"
    assert await desk.workspaces.read("run1.build", ".git/packed-refs") is None
    await check_clean(desk, sha, await desk.fork(sha, "run2.build"))
    next_one = desk.remote.commit({"x": b"x"})
    await check_clean(desk, next_one, await desk.fork(next_one, "run3.build"))
    await desk.source.maintain()
    assert not witness.exists()
    assert before.items() <= objects_of(desk).items()


async def test_a_command_cannot_change_the_repositorys_objects(desk: Desk) -> None:
    await desk.fork(desk.remote.commit(FILES))
    before = objects_of(desk)
    spoil = 'chmod u+w "$f" 2>/dev/null || true; echo spoiled 2>/dev/null > "$f" || true'
    await desk.run(f"find .git/objects -type f | while read f; do {spoil}; done")
    assert objects_of(desk) == before
    await desk.fork(desk.remote.git("rev-parse", "HEAD"), "run2.build")
    assert await desk.run("git fsck", "run2.build") == ""


def objects_of(desk: Desk) -> dict[str, tuple[str, int]]:
    folder = desk.source.path(REPO) / "objects"
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), stat.S_IMODE(path.stat().st_mode))
        for path in folder.rglob("*")
        if path.is_file()
    }


async def test_no_address_and_no_secret_is_in_it(desk: Desk) -> None:
    sha = desk.remote.commit(FILES)
    remote = Remote(desk.remote.url, ("ada", "hunter2hunter2"))
    await desk.source.fetch("ada/mirror", sha, remote)
    await desk.workspaces.fork("run1.mirror", "ada/mirror", sha)
    assert await desk.run("grep -rl -e hunter2 -e file:// -e /source/ .git || true", "run1.mirror") == ""
    assert (
        await desk.run("git remote; git config --get-regexp 'remote|url|credential' || true", "run1.mirror")
        == ""
    )


async def test_packing_the_repository_takes_nothing_from_forks(desk: Desk) -> None:
    shas = [desk.remote.commit({"f": b"%d" % n}) for n in range(25)]
    for sha in shas:
        await desk.source.fetch("ada/mirror", sha, Remote(desk.remote.url))
    await desk.workspaces.fork("run1.mirror", "ada/mirror", shas[0])
    await desk.source.maintain()
    assert await desk.run("git status --porcelain; git fsck --no-dangling", "run1.mirror") == ""
    await desk.workspaces.fork("run2.mirror", "ada/mirror", shas[1])
    assert await desk.run(f"git show {shas[24]}:f", "run2.mirror") == "24"


async def test_a_commit_that_lacks_an_object_is_refused_and_leaves_nothing(desk: Desk) -> None:
    sha = desk.remote.commit(FILES)
    await desk.fork(sha)
    for path in (desk.source.path(REPO) / "objects").glob("??/*"):
        path.unlink()
    for path in (desk.source.path(REPO) / "objects").glob("pack/*"):
        path.unlink()
    desk.remote.git("repack", "-adq")
    blob = desk.remote.git("rev-parse", f"{sha}:README.md")
    listed = desk.remote.git("rev-list", "--objects", "--no-object-names", sha).split()
    kept = "\n".join(oid for oid in listed if oid != blob)
    await anyio.run_process(
        ["git", "pack-objects", "-q", str(desk.source.path(REPO) / "objects" / "pack" / "pack")],
        input=kept.encode(),
        cwd=desk.remote.path,
    )
    with pytest.raises(MissingObjectError):
        await desk.fork(sha, "run2.build", alone=True)
    assert list((desk.root / "source" / "trees" / ".building").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="this is the run without root")
def test_all_of_this_holds_without_root() -> None:
    unshare = ["unshare", "--user", f"--map-user={SANDBOX_UID}", f"--map-group={SANDBOX_UID}"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    snapshots = Path(__file__).with_name("test_snapshots.py")
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, str(snapshots)]
    done = subprocess.run([*unshare, *pytest_here], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
