"""The cache of untracked files that a workspace's index has: used, and right whatever a command does to its files."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ci_platform.cones import Cone
from ci_platform.git_untracked import Untracked
from tests.ci_platform.git_repositories import Content, Link
from tests.ci_platform.workspace_desk import Desk, opened_desk

FILES: dict[str, Content] = {
    **{f"part{n}/inner/{name}": b"12345678" for n in range(20) for name in ("one", "two")},
    # Sorted in another way as folders of git's trees than as names.
    "a/x": b"x",
    "a.b/x": b"x",
    "a-b/x": b"x",
    "a0/x": b"x",
    ".gitignore": b"*.tmp\n",
    "part1/.gitignore": b"*.o\n",
    "part2/link": Link("inner"),
    "only/here": b"x",
}
FOLDERS = 46

LOOK = """
git --no-optional-locks status --porcelain >/tmp/with
git --no-optional-locks -c core.untrackedCache=false status --porcelain >/tmp/without
diff /tmp/with /tmp/without
cat /tmp/with
git clean -ndx >/tmp/with; git -c core.untrackedCache=false clean -ndx >/tmp/without; diff /tmp/with /tmp/without
"""

BACK = "t=$(stat -c %Y {0}); {1}; touch -d @$t {0}"
"""Does something in a folder, whose time of modification is afterwards what it was."""

TRICKS = {
    "a new file": ("touch part3/inner/new", "?? part3/inner/new"),
    "a new file, times set back": (BACK.format("part3/inner", "touch part3/inner/new"), "?? part3/inner/new"),
    "a new folder, times set back": (
        BACK.format("part3", "mkdir part3/more; touch part3/more/new"),
        "?? part3/more/",
    ),
    "an empty folder": ("mkdir part3/empty", ""),
    "a deleted file, times set back": (
        BACK.format("part3/inner", "rm part3/inner/one"),
        " D part3/inner/one",
    ),
    "as many bytes, times set back": (
        "touch -r part3/inner/one /tmp/t; printf 87654321 >part3/inner/one; touch -r /tmp/t part3/inner/one",
        " M part3/inner/one",
    ),
    "a new name": (
        BACK.format("part3/inner", "mv part3/inner/one part3/inner/new"),
        " D part3/inner/one\n?? part3/inner/new",
    ),
    "a folder made again": (
        "cp -a part3/inner /tmp/i; rm -r part3/inner; touch /tmp/i/new; touch -r part4 /tmp/i; mv /tmp/i part3/inner",
        "?? part3/inner/new",
    ),
    "an ignored file": ("touch part3/x.tmp part1/inner/x.o", ""),
    "other things ignored, by as many bytes": (
        BACK.format("part1/.gitignore", "touch part1/inner/x.o; printf '*.a\\n' >part1/.gitignore"),
        " M part1/.gitignore\n?? part1/inner/x.o",
    ),
    "nothing ignored": (
        "touch part1/inner/x.o; rm part1/.gitignore",
        " D part1/.gitignore\n?? part1/inner/x.o",
    ),
    "something ignored now": ("touch part3/inner/x; echo x >part3/.gitignore", "?? part3/.gitignore"),
    "something ignored here alone": ("touch part3/inner/x; echo x >.git/info/exclude", ""),
    "a folder and a link": (
        "rm -r part3; ln -s part4 part3",
        " D part3/inner/one\n D part3/inner/two\n?? part3",
    ),
    "added, then removed": ("touch part3/n; git add part3/n; rm part3/n", "AD part3/n"),
    "added, then forgotten": ("touch part3/n; git add part3/n; git rm -q --cached part3/n", "?? part3/n"),
    "a tracked file forgotten": (
        "git rm -q --cached part3/inner/one",
        "D  part3/inner/one\n?? part3/inner/one",
    ),
    "another branch": (
        "git rm -qr part3; git commit -qm x; git checkout -q HEAD~1; touch part3/n",
        "?? part3/n",
    ),
    "a repository inside": ("git init -q part3/own; touch part3/own/x", "?? part3/own/"),
}


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened_desk(tmp_path) as desk:
        yield desk


async def later(desk: Desk) -> str:
    """Return a commit upon one whose tree has been on disk for a while: only old folders are in the cache."""
    first = desk.remote.commit(FILES)
    await desk.fork(first, "run0.build")
    made = time.time()
    with anyio.fail_after(10):
        while int(time.time() - 0.5) <= int(made):  # noqa: ASYNC110 - nobody tells the time
            await anyio.sleep(0.02)
    return desk.remote.commit({"only/here": b"y", "only/new": b"z"})


async def listed(desk: Desk, workspace: str) -> int:
    """Return how many folders `git status` has listed."""
    text = await desk.run("GIT_TRACE2_PERF=1 git --no-optional-locks status --porcelain 2>&1", workspace)
    assert "warning" not in text
    (found,) = re.findall(r"opendir:(\d+)", text)
    return int(found)


async def test_git_status_lists_the_folders_alone_that_are_not_as_they_were(desk: Desk) -> None:
    sha = await later(desk)
    await desk.fork(sha)
    assert await listed(desk, "run1.build") == 2  # the root, and the one that the commit changes
    await desk.run("touch part5/inner/new")
    assert await listed(desk, "run1.build") == 3 + 1  # part5, too, whose layer is another one
    assert await desk.run("git status --porcelain") == "?? part5/inner/new\n"


async def test_what_git_says_is_right_whatever_was_done(desk: Desk) -> None:
    sha = await later(desk)
    for number, (name, (script, expected)) in enumerate(TRICKS.items()):
        workspace = await desk.fork(sha, f"run{number + 1}.build")
        found = await desk.run(f"git status --porcelain; {script}; {LOOK}", workspace)
        assert found.strip("\n") == expected.strip("\n"), name
        # And for the next command, which has it in a layer below its own.
        assert (await desk.run(LOOK, workspace, "next")).strip("\n") == expected.strip("\n"), name


async def test_ignored_by_the_user_is_ignored(desk: Desk) -> None:
    workspace = await desk.fork(await later(desk))
    script = "mkdir -p ~/.config/git; echo x >~/.config/git/ignore; touch part3/x part3/y;"
    assert await desk.run(script + LOOK, workspace) == "?? part3/y\n"


async def test_a_folder_as_young_as_the_cache_is_not_in_it(desk: Desk) -> None:
    """Its time of change would be the same second when a command makes something in it."""
    sha = desk.remote.commit(FILES)
    await desk.fork(sha)
    (base,) = (desk.root / "source" / "trees").rglob("base-*")
    cache = Untracked.from_bytes((base / "untracked").read_bytes())
    assert len(cache.paths.split(b"\0")) == FOLDERS
    newest = max(path.stat().st_ctime for path in (base / "tree").rglob("*"))
    written = (base / "index").stat().st_mtime
    if int(written) - int(newest) < 1:  # all in one second, as good as ever
        assert await listed(desk, "run1.build") == FOLDERS


async def test_a_sparse_workspace_has_none(desk: Desk) -> None:
    sha = await later(desk)
    await desk.fork(sha, cone=Cone.of(["part3"]))
    assert await desk.run("grep -c UNTR .git/index || true") == "0\n"
    assert await desk.run("touch part3/inner/new; git status --porcelain") == "?? part3/inner/new\n"


async def test_where_commands_get_copies_git_does_without(tmp_path: Path) -> None:
    """There, times of change say nothing."""
    async with opened_desk(tmp_path, method="copy") as desk:
        workspace = await desk.fork(await later(desk))
        for name in ("a new file, times set back", "a new folder, times set back"):
            script, expected = TRICKS[name]
            assert expected in await desk.run(f"{script}; git status --porcelain", workspace)
