"""Commits that mean harm: each is refused with an error of its own that has the value, or is harmless."""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ci_platform.errors import FailedError, InvalidInputError, LimitExceededError, NotFoundError
from ci_platform.trees import TreeLimits
from tests.ci_platform.git_repositories import ENVIRONMENT
from tests.ci_platform.workspace_desk import REPO, Desk, opened_desk

LIMITS = TreeLimits(files=2000, size=1 << 20)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened_desk(tmp_path, limits=LIMITS) as desk:
        await desk.source.create(REPO)
        yield desk
        assert list((tmp_path / "source/trees/.building").iterdir()) == []


def written(desk: Desk, kind: str, content: bytes) -> str:
    """Write an object into the repository as if git had never looked at it."""
    command = [
        "git",
        "--git-dir",
        str(desk.source.path(REPO)),
        "hash-object",
        "-t",
        kind,
        "-w",
        "--literally",
    ]
    return subprocess.run(
        [*command, "--stdin"], input=content, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True
    ).stdout.decode().strip()  # fmt: skip


def tree(desk: Desk, *entries: tuple[bytes, bytes, str]) -> str:
    content = b"".join(mode + b" " + name + b"\0" + bytes.fromhex(oid) for mode, name, oid in entries)
    return written(desk, "tree", content)


def commit(desk: Desk, root: str) -> str:
    who = b"Ada <ada@example.org> 1 +0000"
    return written(desk, "commit", b"tree %b\nauthor %b\ncommitter %b\n\nx\n" % (root.encode(), who, who))


def blob(desk: Desk, content: bytes = b"x") -> str:
    return written(desk, "blob", content)


async def fork(desk: Desk, sha: str) -> None:
    await desk.workspaces.fork("run1.build", REPO, sha)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (b"..", r"'\.\.'"),
        (b".", r"'\.'"),
        (b".git", r"'\.git'"),
        (b".GiT", r"'\.GiT'"),
        (b"../../etc/passwd", "passwd"),
        (b"/etc/passwd", "passwd"),
        (b"", "no tree may have"),
        (b"n" * 10_000, "nnnn"),
    ],
)
@pytest.mark.parametrize("mode", [b"100644", b"40000", b"120000", b"160000"])
@pytest.mark.parametrize("sooner", [False, True])
async def test_a_name_that_no_file_may_have_is_refused(
    desk: Desk, name: bytes, says: str, mode: bytes, *, sooner: bool
) -> None:
    inner = tree(desk, (b"100644", b"file", blob(desk)))
    oid = {b"40000": inner, b"160000": "1" * 40}.get(mode, blob(desk))
    if sooner:  # also where the commit is a delta upon another
        await desk.workspaces.fork("run0.build", REPO, commit(desk, inner))
        inner_with = tree(desk, (b"100644", b"file", blob(desk)), (mode, name, oid))
        sha = commit(desk, inner_with)
    else:
        sha = commit(desk, tree(desk, (mode, name, oid)))
    with pytest.raises(FailedError, match=says) as refused:
        await fork(desk, sha)
    assert len(str(refused.value)) < 500
    assert await desk.workspaces.of_run("run1") == []


async def test_two_entries_of_one_name_are_refused_with_it(desk: Desk) -> None:
    link = blob(desk, b"/tmp")
    inner = tree(desk, (b"100644", b"file", blob(desk)))
    with pytest.raises(FailedError, match="two entries named 'twice'"):
        await fork(desk, commit(desk, tree(desk, (b"120000", b"twice", link), (b"40000", b"twice", inner))))


async def test_names_that_clash_by_case_are_different_files(desk: Desk) -> None:
    entries = [(b"100644", name, blob(desk, name)) for name in (b"A", b"README", b"a", b"readme")]
    await fork(desk, commit(desk, tree(desk, *entries)))
    assert await desk.run("cat A README a readme; git status --porcelain") == "AREADMEareadme"


@pytest.mark.parametrize("mode", [b"20000", b"60000", b"10000", b"140000", b"100000", b"7777777"])
async def test_a_mode_of_devices_makes_a_plain_file_or_nothing(desk: Desk, mode: bytes) -> None:
    await fork(desk, commit(desk, tree(desk, (mode, b"device", blob(desk)))))
    assert await desk.run("stat -c %F device; stat -c %a device") in {
        "regular file\n644\n",
        "regular file\n755\n",
    }


async def test_a_damaged_tree_is_said_to_be(desk: Desk) -> None:
    for content in (b"100644 a\0short", b"abc", b"100644 a" + b"\0" * 21 + b"x", b"888 a\0" + b"1" * 20):
        with pytest.raises(FailedError, match="damaged tree"):
            await fork(desk, commit(desk, written(desk, "tree", content)))


async def test_links_out_of_the_workspace_lead_nowhere(desk: Desk) -> None:
    (desk.root / "secret").write_text("secret")
    targets = [b"/etc/shadow", b"../../../../../../etc/shadow", str(desk.root / "secret").encode()]
    entries = [(b"120000", b"l%d" % n, blob(desk, target)) for n, target in enumerate(targets)]
    await fork(desk, commit(desk, tree(desk, *entries)))
    for number in range(3):
        assert await desk.workspaces.read("run1.build", f"l{number}") is None
    assert await desk.run("cat l0 l1 l2 2>/dev/null || echo nothing") == "nothing\n"


@pytest.mark.parametrize("target", [b"", b"a\0b", b"x" * 10_000])
async def test_a_link_that_cannot_be_is_refused(desk: Desk, target: bytes) -> None:
    with pytest.raises(FailedError, match="link"):
        await fork(desk, commit(desk, tree(desk, (b"120000", b"link", blob(desk, target)))))


async def test_more_files_than_the_limit_are_refused_soon(desk: Desk) -> None:
    many = tree(desk, *((b"100644", b"f%04d" % n, blob(desk)) for n in range(100)))
    for _ in range(4):
        many = tree(desk, *((b"40000", b"d%03d" % n, many) for n in range(100)))
    sha = commit(desk, many)  # ten thousand million files
    with anyio.fail_after(60):
        with pytest.raises(LimitExceededError, match="2,000 files"):
            await fork(desk, sha)
        with pytest.raises(LimitExceededError, match="2,000"):
            await desk.workspaces.fork("run1.build", REPO, sha, alone=True)


async def test_a_blob_that_unfolds_to_more_than_the_limit_is_refused(desk: Desk) -> None:
    bomb = blob(desk, b"\0" * (8 << 20))
    folder = desk.source.path(REPO) / "objects" / bomb[:2] / bomb[2:]
    assert folder.stat().st_size < 1 << 17
    with pytest.raises(LimitExceededError, match="1,048,576 bytes"):
        await fork(desk, commit(desk, tree(desk, (b"100644", b"bomb", bomb))))


async def test_a_blob_that_lies_about_its_size_is_refused(desk: Desk) -> None:
    oid = blob(desk, b"honest")
    path = desk.source.path(REPO) / "objects" / oid[:2] / oid[2:]
    path.chmod(0o644)
    path.write_bytes(zlib.compress(b"blob 5000\0" + b"y" * 10))
    with pytest.raises(FailedError, match=oid):
        await fork(desk, commit(desk, tree(desk, (b"100644", b"lies", oid))))


async def test_what_is_no_file_is_not_taken_for_one(desk: Desk) -> None:
    other = commit(desk, tree(desk, (b"100644", b"a", blob(desk))))
    with pytest.raises(FailedError):
        await fork(desk, commit(desk, tree(desk, (b"40000", b"a", other))))


async def test_what_is_not_there_is_named(desk: Desk) -> None:
    with pytest.raises(NotFoundError, match="2" * 40):
        await fork(desk, "2" * 40)
    with pytest.raises(NotFoundError, match="nobody/nothing"):
        await desk.workspaces.fork("run1.build", "nobody/nothing", "2" * 40)
    with pytest.raises(NotFoundError, match="'no-branch'"):
        await desk.source.resolve(REPO, "no-branch")
    for sha in ("main", "2" * 39, "2" * 41, "G" * 40, "", "../../etc"):
        with pytest.raises(InvalidInputError, match="40 hexadecimal"):
            await fork(desk, sha)
    for repo in ("..", "a/../b", "a", "a/b/c", "a/b.git", "/etc", "a/b\n"):
        with pytest.raises(InvalidInputError, match="owner/name"):
            await desk.workspaces.fork("run1.build", repo, "2" * 40)
    blob_id = blob(desk)
    with pytest.raises(NotFoundError, match=blob_id):
        await fork(desk, blob_id)
    assert await desk.workspaces.of_run("run1") == []
