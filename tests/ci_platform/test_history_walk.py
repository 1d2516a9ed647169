"""Forks of every commit of a history, against `git archive`: byte by byte, mode by mode."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.ci_platform.git_repositories import ENVIRONMENT, Content, Link, Script, WorkingCopy
from tests.ci_platform.workspace_desk import REPO, Desk, opened_desk

LOOK = r"""
find . -path ./.git -prune -o -mindepth 1 -printf '%y %m %P\t%l\0'
printf '\0'
find . -path ./.git -prune -o -type f -print0 | xargs -0 --no-run-if-empty sha256sum --zero
printf '\0'
git diff-files; git status --porcelain
"""
OWN = Path(__file__).resolve().parents[2]
MOST = 120 if os.environ.get("CI") else 400  # all of them take a minute
"""Commits of our own history that are walked: some tenths of a second each."""

Manifest = dict[str, tuple[str, str]]
"""Path -> type and mode, digest or target."""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened_desk(tmp_path) as desk:
        yield desk


def archived(repository: Path, sha: str) -> Manifest:
    command = ["git", "--git-dir", str(repository), "archive", "--format=tar", sha]
    packed = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True).stdout
    found: Manifest = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            name = member.name.rstrip("/")
            if member.isdir():
                found[name] = ("d 755", "")
            elif member.issym():
                found[name] = ("l 777", member.linkname)
            else:
                file = archive.extractfile(member)
                assert file is not None
                mode = 755 if member.mode & 0o100 else 644
                found[name] = (f"f {mode}", hashlib.sha256(file.read()).hexdigest())
    return found


async def seen(desk: Desk, workspace_id: str) -> Manifest:
    printed = await desk.run(LOOK, workspace_id)
    listed, summed, git = printed.split("\0\0")
    assert git == "", "git finds nothing to compare"
    parted = [line.partition("  ./") for line in summed.split("\0") if line]
    digests = {name: digest for digest, _, name in parted}
    found: Manifest = {}
    for line in listed.split("\0"):
        kind, mode, rest = line.split(" ", 2)
        name, target = rest.split("\t")
        found[name] = (f"{kind} {mode}", digests.get(name, target))
    return found


async def walk(desk: Desk, shas: list[str]) -> None:
    for number, sha in enumerate(shas):
        workspace_id = f"run{number}.walk"
        await desk.workspaces.fork(workspace_id, REPO, sha)
        assert await seen(desk, workspace_id) == archived(desk.source.path(REPO), sha), sha
        await desk.workspaces.delete(workspace_id)


def change(remote: WorkingCopy, chance: random.Random, number: int) -> str:
    """Commit something at random: files, scripts, links, folders, each in the place of each other."""
    files: dict[str, Content] = {}
    for _ in range(chance.randint(1, 12)):
        depth = chance.randint(1, 4)
        path = "/".join(chance.choice(["a", "b", "a.b", "a-b", "ab"]) for _ in range(depth))
        taken = [other for other in files if other.startswith(f"{path}/") or path.startswith(f"{other}/")]
        content = chance.choice([b"%d" % number, b"", Script(b"#!/bin/sh\n"), Link("../x"), None])
        parents = [remote.path.joinpath(*path.split("/")[:up]) for up in range(1, depth)]
        if taken:
            continue
        for parent in parents:
            if parent.is_symlink() or parent.is_file():
                parent.unlink()
        files[path] = content
    return remote.commit(files)


async def test_each_commit_of_a_random_history_is_what_git_archive_gives(desk: Desk) -> None:
    chance = random.Random(11)
    shas = [change(desk.remote, chance, number) for number in range(120)]
    await desk.fetch(shas[-1])
    await walk(desk, shas)
    chance.shuffle(shas)
    await walk(desk, shas[:20])
    kinds = {path.name.partition("-")[0] for path in (desk.root / "source/trees" / REPO).iterdir()}
    assert kinds == {"base", "delta", "git"}


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_each_commit_of_our_own_history_is_what_git_archive_gives(desk: Desk) -> None:
    if not (OWN / ".git").exists():
        pytest.skip("this is no git repository")
    here = WorkingCopy(OWN)
    shas = here.git("rev-list", "--reverse", f"--max-count={MOST}", "HEAD").split()
    if len(shas) < 100:
        pytest.skip(f"this is a shallow clone: {len(shas)} commits")
    await desk.source.create(REPO)
    here.git("push", "--quiet", str(desk.source.path(REPO)), "HEAD:refs/heads/main")
    await walk(desk, shas)
