"""Artifacts: what a step keeps is what later steps, other runs and people get, byte by byte, and nobody else's."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from ci_platform import layers
from ci_platform.artifacts import Limits
from ci_platform.artifacts.asking import Retentions
from ci_platform.copy_on_write import MethodName
from ci_platform.errors import (
    ConflictError,
    FailedError,
    ForbiddenError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
    UnavailableError,
)
from ci_platform.model import Repository, RunFork
from ci_platform.run_files import RunFiles
from ci_platform.store import col
from pipelines.contract import Artifact
from tests.ci_platform.artifact_desk import NOW, ArtifactDesk, opened_desk
from tests.ci_platform.cache_desk import REPO
from tests.ci_platform.test_capabilities import called_by


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[ArtifactDesk]:
    async with opened_desk(tmp_path) as desk:
        yield desk


TREE = (
    "mkdir -p dist/deep/er dist/empty other; echo wheel >dist/a.whl; echo log >dist/deep/b.log; "
    "echo '#!/bin/sh' >dist/deep/er/run; chmod 751 dist/deep/er/run; chmod 600 dist/a.whl; "
    "ln -s deep/er/run dist/start; ln -s ../a.whl dist/deep/up; echo x >other/x; "
    "truncate -s 3000000 dist/sparse; printf end >>dist/sparse"
)


@pytest.mark.parametrize("method", ["overlay", "copy"])
async def test_what_is_kept_is_what_a_later_step_gets(tmp_path: Path, method: MethodName) -> None:
    async with opened_desk(tmp_path, method=method) as desk:
        await desk.make(TREE)
        made = await desk.upload("built", "dist")
        assert (made.name, made.run, made.files) == ("built", "main", 7)
        assert made.size == len("wheel\n") + len("log\n") + len("#!/bin/sh\n") + 3_000_003
        assert made.expires_at - made.created_at == timedelta(days=30)
        # Onto what is there: a file where a folder is to be, a link that leads away, an older file.
        before = "rm -rf dist other; mkdir -p put/dist; echo old >put/dist/a.whl; ln -s /etc put/dist/deep"
        await desk.make(f"{before}; echo file >put/dist/empty; chmod 700 put")
        assert await desk.download("built", path="put") == made
        listed = await desk.shown(
            "cd put/dist; stat -c '%a %F %n' .. * deep/* deep/er/*; cat a.whl deep/up start"
        )
        assert listed.splitlines() == [
            "700 directory ..",
            "600 regular file a.whl",
            "755 directory deep",
            "755 directory empty",
            "644 regular file sparse",
            "777 symbolic link start",
            "644 regular file deep/b.log",
            "755 directory deep/er",
            "777 symbolic link deep/up",
            "751 regular file deep/er/run",
            "wheel",
            "wheel",
            "#!/bin/sh",
        ]
        assert (await desk.shown("tail -c 4 put/dist/sparse | od -An -c; stat -c %b put/dist/sparse")).split()[:4] == [
            "\\0", "e", "n", "d",
        ]  # fmt: skip
        row = await desk.artifacts.records.named("main", "built")
        assert method == "copy" or row.taken < 100_000, "holes stay holes"
        # The same files under another name are the same artifact, and cost nothing.
        again = await desk.upload("again", "put/dist", step="other")
        assert again.digest != made.digest, "the paths are others"
        assert desk.objects() == 4


PATTERNS: list[tuple[list[str], list[str], list[str]]] = [
    (["dist/*.whl"], [], ["dist/a.whl"]),
    (["dist/*"], ["dist/deep", "dist/s*"], ["dist/a.whl", "dist/empty"]),
    (["**/b.log", "other/"], [], ["dist/deep/b.log", "other/x"]),
    (["dist/**"], ["**/er", "dist/empty", "dist/s*"], ["dist/a.whl", "dist/deep/b.log", "dist/deep/up"]),
    (["dist/d?ep/**/r[au]n"], [], ["dist/deep/er/run"]),
    (["./other", "other/x", "other/**"], [], ["other/x"]),
    (["."], ["dist", "**/*.txt", "sub"], ["README.md", "other/x"]),
]


async def test_patterns_say_what_is_kept(desk: ArtifactDesk) -> None:
    await desk.make(TREE)
    for paths, exclude, found in PATTERNS:
        await desk.upload("some", *paths, exclude=exclude, replace=True)
        assert await desk.paths("some") == found


async def test_what_matches_nothing_fails_unless_it_may(desk: ArtifactDesk) -> None:
    await desk.make("mkdir full none; echo 1 >full/one; mkfifo none/pipe")
    with pytest.raises(FailedError, match=r"nothing matches 'dist/\*\.whl', 'none/pipe'"):
        await desk.upload("some", "dist/*.whl", "full", "none/pipe")
    assert (await desk.upload("some", "dist/*.whl", "full", missing_ok=True)).files == 1
    assert await desk.upload("none", "dist/*.whl", missing_ok=True, step="other") is None
    assert await desk.listed() == [("main", "some")]


async def test_what_a_failed_command_left_can_be_kept(desk: ArtifactDesk) -> None:
    await desk.make("echo before >before")
    for number in range(2):
        result = await desk.desk.run(
            f"echo {number} >report.xml; rm README.md; exit 1", step="test", attempt=number + 1
        )
        assert not result.ok
    with pytest.raises(FailedError, match=r"nothing matches 'report.xml'"):
        await desk.upload("x", "report.xml")
    await desk.upload("x", "report.xml", "before", "README.md", failed="test", missing_ok=True)
    assert await desk.paths("x") == ["before", "report.xml"]
    await desk.download("x", path="out")
    assert await desk.shown("cat out/report.xml; ls README.md") == "1\nREADME.md\n"
    with pytest.raises(NotFoundError, match="no command of the step 'other' that failed"):
        await desk.upload("y", "report.xml", failed="other")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "../x"}, "an artifact's name"),
    ({"name": "a/b"}, "an artifact's name"),
    ({"name": ""}, "an artifact's name"),
    ({"name": "x" * 129}, "an artifact's name"),
    ({"name": 5}, "an artifact's name"),
    ({"paths": "dist"}, "is a list"),
    ({"paths": []}, "names what is to be kept"),
    ({"paths": ["/etc/passwd"]}, "stays in it"),
    ({"paths": ["../x"]}, "stays in it"),
    ({"paths": ["a/../../x"]}, "stays in it"),
    ({"paths": ["~/x"]}, "stays in it"),
    ({"paths": ["a\0b"]}, "stays in it"),
    ({"paths": [""]}, "stays in it"),
    ({"paths": ["x/" * 50]}, "longer than"),
    ({"paths": ["x"] * 101}, "at most 100"),
    ({"paths": [5]}, "list of text"),
    ({"exclude": ["."]}, "whole workspace"),
    ({"retention": "91 days"}, "90 days"),
    ({"retention": "a while"}, "not a duration"),
    ({"retention": 0}, "between one minute"),
    ({"replace": "yes"}, "True or False"),
    ({"missing_ok": 1}, "True or False"),
    ({"failed": True}, "name of a step"),
    ({"workspace": "main.fork"}, "not a workspace"),
]


async def test_what_is_no_artifact_is_refused_by_the_value(desk: ArtifactDesk) -> None:
    workspace = await desk.workspace()
    for wrong, why in WRONG:
        given: dict[str, Any] = {"name": "x", "workspace": workspace, "paths": ["README.md"], **wrong}
        with called_by(desk.identity("main")), pytest.raises(InvalidInputError, match=why):
            await desk.env.upload(**given)
    assert await desk.listed() == []


DANGEROUS = [
    ("ln -s /etc/passwd dist/l", "'/etc/passwd', which leads out"),
    ("ln -s ../../x dist/l", "leads out"),
    ("ln -s a/../../../x dist/l", "leads out"),
    ("ln -s . dist/here; ln -s here/../../x dist/l", "leads out"),
    ("printf x >'dist/a\\b'", "without backslashes"),
    ("printf x >\"dist/$(printf 'a\\nb')\"", "printable"),
    ("printf x >\"dist/$(printf 'a\\377b')\"", "UTF-8"),
]


async def test_names_and_links_that_are_dangerous_to_unpack_are_refused_or_left_out(
    desk: ArtifactDesk,
) -> None:
    for script, why in DANGEROUS:
        await desk.make(f"rm -rf dist; mkdir dist; echo ok >dist/ok; {script}")
        with pytest.raises(InvalidInputError, match=why):
            await desk.upload("x", "dist")
    await desk.upload("x", "dist", exclude=["dist/[!o]*"])
    assert await desk.paths("x") == ["dist/ok"]


async def test_links_and_devices_never_bring_in_files_of_the_host(desk: ArtifactDesk) -> None:
    """A link on the way is no folder, whatever a pattern says; what is no file, folder or link is not there."""
    await desk.make(
        "ln -s /etc etc; mkfifo pipe; mkdir -p real .git/x sub/.git sub/.Git; echo n >sub/.Git/config; "
        "echo y >sub/.git/y; echo z >real/z"
    )
    for pattern in ("etc/passwd", "etc/**", "pipe", ".git/**", "sub/.[gG]it", "etc/pass*"):
        with pytest.raises(FailedError, match="nothing matches"):
            await desk.upload("x", pattern)
    await desk.upload("x", ".", exclude=["etc", "*.md", "*.txt"])
    assert await desk.paths("x") == ["real/z", "sub/lock.json"]
    with pytest.raises(InvalidInputError, match="path="):
        await desk.download("x", path="../out")
    for path in (".git/hooks", "/etc", "a/../../b"):
        with pytest.raises(InvalidInputError, match="path="):
            await desk.download("x", path=path)


async def test_a_run_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    async with opened_desk(tmp_path, limits=Limits(size=10_000, files=6)) as desk:
        await desk.make(
            "mkdir d big; for n in 1 2 3 4 5 6 7; do echo $n >d/$n; done; truncate -s 9G big/hole"
        )
        with pytest.raises(LimitExceededError, match=r"max_artifacts.* it has 9,663,676,416"):
            await desk.upload("x", "big")
        with pytest.raises(LimitExceededError, match="more than 6 files"):
            await desk.upload("x", "d")
        await desk.upload("x", "d/[1234]")
        with pytest.raises(LimitExceededError, match="more than 2 files"):
            await desk.upload("y", "d/[567]")
        await desk.make("head -c 9000 /dev/zero >e1; head -c 1900 /dev/zero >e3")
        await desk.upload("y", "e1", step="other")
        with pytest.raises(LimitExceededError, match=r"max_artifacts.*room for 992 bytes, and it has 1,900"):
            await desk.upload("z", "e3", step="fourth")
        assert await desk.listed() == [("main", "x"), ("main", "y")]
        assert len(desk.on_disk()) == 2


async def test_a_name_is_taken_once_and_a_repeated_step_replaces_its_own(desk: ArtifactDesk) -> None:
    await desk.make("echo 1 >f")
    first = await desk.upload("x", "f")
    with pytest.raises(ConflictError, match="'x' already, of the step 'keep'"):
        await desk.upload("x", "f")  # twice in one attempt
    with pytest.raises(ConflictError, match="replace=True"):
        await desk.upload("x", "f", step="another")
    await desk.make("echo 2 >f")
    second = await desk.upload("x", "f", attempt=2)
    assert second.digest != first.digest
    assert (len(desk.on_disk()), desk.objects()) == (1, 1)
    rows = await desk.artifacts.records.of_run("main", deleted=True)
    assert len(rows) == 1, "nothing is left of those that were replaced, however many"
    third = await desk.upload("x", "f", step="another", replace=True)
    assert third.digest == second.digest
    assert await desk.listed() == [("main", "x")]
    # A run that is run again has no later attempts than it had, and still repeats its step.
    await desk.change("main", attempt=2)
    await desk.upload("x", "f", step="another")
    # What a step that is taken back has uploaded is taken back; two steps at once are one.
    await RunFiles(desk.desk.workspaces, desk.artifacts).rewind_run("main", [("another", 1)])
    with pytest.raises(NotFoundError, match="was deleted at 2026-01-01 00:00 UTC: the step that uploaded it"):
        await desk.artifacts.records.named("main", "x")
    assert (desk.on_disk(), desk.objects()) == ([], 0)
    problems = list[Exception]()

    async def race(step: str) -> None:
        try:
            await desk.upload("raced", "f", step=step)
        except ConflictError as error:
            problems.append(error)

    async with anyio.create_task_group() as group:
        for step in ("one", "two", "three"):
            group.start_soon(race, step)
    assert len(problems) == 2
    assert len(desk.on_disk()) == 1


async def test_whose_artifacts_a_run_may_have_follows_from_what_it_is(desk: ArtifactDesk) -> None:
    for of in ("main", "feature", "pull", "fork", "pretender", "other"):
        await desk.make(f"echo {of} >f", of=of)
        await desk.upload("x", "f", of=of)
    for of in ("main", "feature", "pretender", "pull"):
        await desk.change(of, conclusion="success")
    # A fork's pull request: its own. Others never take it for the repository's, by id, branch or name.
    with pytest.raises(ForbiddenError, match="its own artifacts only"):
        await desk.download("x", of="fork", run="main")
    with pytest.raises(ForbiddenError, match="its own artifacts only"):
        await desk.listed(of="fork", branch="main")
    assert await desk.listed(of="fork") == [("fork", "x")]
    for run in ("fork", "pretender"):
        with pytest.raises(ForbiddenError, match="pull request from a fork"):
            await desk.download("x", of="release", run=run)
    assert await desk.listed(of="release", branch="main", name="x") == [("main", "x")]
    assert (await desk.download("x", of="release", branch="main")).run == "main"
    assert await desk.shown("cat f", of="release") == "main\n"
    # Of a run by its id, also of a pull request from the repository itself; not of another repository.
    assert (await desk.download("x", of="release", run="pull", step="again")).run == "pull"
    for run in ("other", "nothing"):
        with pytest.raises(NotFoundError, match="has no run"):
            await desk.download("x", of="release", run=run)
    with pytest.raises(NotFoundError, match="'feature' that succeeded has no artifact 'y'"):
        await desk.download("y", of="release", branch="feature")
    await desk.change("main", conclusion="failure")
    assert await desk.listed(of="release", branch="main") == []
    # A repository that is made anew under the same name finds nothing of the one before.
    await desk.change("main", conclusion="success")
    anew = {"created_at": NOW + timedelta(days=1)}
    await desk.desk.store.write(lambda tx: tx.change(Repository, anew, col(Repository.name) == REPO))
    assert await desk.listed(of="release", branch="main") == []
    assert await desk.listed(of="release", run="main") == []
    with pytest.raises(NotFoundError, match="deleted with its repository"):
        await desk.artifacts.records.named("main", "x")
    with pytest.raises(InvalidInputError, match="not both"):
        await desk.listed(run="main", branch="main")
    for wrong in ({"run": 5}, {"branch": ""}, {"name": "a b"}, {"limit": 0}):
        with pytest.raises(InvalidInputError):
            await desk.listed(**wrong)


async def test_a_what_if_has_what_its_kept_steps_uploaded_and_gives_nothing(desk: ArtifactDesk) -> None:
    await desk.make("echo kept >f")
    kept = await desk.upload("kept", "f", step="keep")
    await desk.upload("later", "f", step="later")
    fork = RunFork(
        run_id="tag", ancestors=["main"], kept=[["keep", 1, ""]], asked_by="a", inputs={}, patched_files=[]
    )
    await desk.desk.store.write(lambda tx: tx.add(fork))
    await desk.change("tag", forked_from="main")
    tried: dict[str, Any] = {"of": "tag", "ancestors": ("main",)}
    assert await desk.listed(**tried) == [("main", "kept")]
    assert await desk.download(kept, **tried) == kept
    await desk.upload("kept", "f", step="again", **tried)
    assert await desk.listed(**tried) == [("tag", "kept")], "its own comes first"
    with pytest.raises(ForbiddenError, match="what-if"):
        await desk.download("kept", of="release", run="tag")


async def test_what_is_damaged_is_never_given_out(desk: ArtifactDesk) -> None:
    await desk.make("echo good >f; head -c 3000000 /dev/zero >g")
    await desk.upload("x", "f", "g")
    for path in desk.shelf.glob("*/*/files/*"):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
    with pytest.raises(UnavailableError, match="damaged"):
        await desk.download("x", path="out")
    assert "out" not in (await desk.shown("ls")).split()
    async with desk.artifacts.opened("main", "x") as opened:
        for entry in opened.entries:
            sent = list[bytes]()
            with pytest.raises(UnavailableError, match="damaged"):
                sent.extend(opened.pieces(entry))
            assert sum(map(len, sent)) < entry.size
    (listed,) = desk.shelf.glob("*/*/contents")
    listed.write_bytes(listed.read_bytes().replace(b'"f"', b'"e"'))
    with pytest.raises(UnavailableError, match="damaged"):
        async with desk.artifacts.opened("main", "x"):
            raise AssertionError("it was opened")


async def test_who_reads_an_artifact_keeps_it_until_the_end(desk: ArtifactDesk) -> None:
    await desk.make("head -c 3000000 /dev/urandom >f")
    made = await desk.upload("x", "f")
    async with desk.artifacts.opened("main", "x") as opened:
        await desk.artifacts.delete_run("main")
        (entry,) = opened.entries
        assert sum(map(len, opened.pieces(entry))) == made.size
        assert len(desk.on_disk()) == 1
    assert (desk.on_disk(), desk.objects()) == ([], 0)


async def test_an_upload_that_is_cancelled_leaves_nothing(desk: ArtifactDesk) -> None:
    await desk.make("truncate -s 8G f")  # seconds, were it not cut off
    with anyio.move_on_after(0) as scope:
        await desk.upload("x", "f")
    assert scope.cancelled_caught
    assert (desk.on_disk(), await desk.listed()) == ([], [])
    with anyio.CancelScope() as late:

        async def cancel() -> None:
            while not list(desk.shelf.glob(".new/*/part")):  # noqa: ASYNC110 - of a thread
                await anyio.sleep(0.001)
            late.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(cancel)
            await desk.upload("x", "f")
    assert late.cancelled_caught
    assert (desk.on_disk(), await desk.listed()) == ([], [])
    assert list((desk.desk.root / "workspaces").glob("*/pending/*")) == []


async def test_files_without_permissions_are_kept_as_they_are(desk: ArtifactDesk) -> None:
    await desk.make("mkdir d; echo x >d/secret; chmod 000 d/secret; chmod 4755 README.md")
    await desk.upload("x", "d", "README.md")
    async with desk.artifacts.opened("main", "x") as opened:
        assert [entry.mode for entry in opened.entries] == [0o755, 0]
    await desk.download("x", path="out")
    assert (await desk.shown("stat -c %a out/d/secret out/README.md")).split() == ["0", "755"]
    # On the shelf nothing is anybody's but the platform's.
    modes = {stat.S_IMODE(path.stat().st_mode) for path in desk.shelf.glob("*/*/files/*")}
    assert modes == {0o600}
    assert stat.S_IMODE(desk.shelf.stat().st_mode) == 0o700


async def test_how_long_is_said_or_set(tmp_path: Path) -> None:
    limits = Limits(retentions=Retentions(timedelta(days=9), timedelta(days=5)))
    async with opened_desk(tmp_path, limits=limits) as desk:
        made = await desk.upload("x", "README.md")
        assert made.expires_at == NOW + timedelta(days=5), "the most is the most, also of the default"
        made = await desk.upload("y", "README.md", retention="36 hours")
        assert made.expires_at == NOW + timedelta(hours=36)
        (said,) = [line for line in await notices(desk) if "'y'" in line]
        assert said == f"artifact 'y': kept 1 file, 6 bytes until 2026-01-02 12:00 UTC, {made.digest}"
        assert isinstance(made, Artifact)


async def notices(desk: ArtifactDesk) -> list[str]:
    from ci_platform.logs import LogKey

    chunk = await desk.desk.logs.read(LogKey("main", "keep", 1))
    return [line.text for line in chunk.lines if line.kind == "notice"]


async def test_a_start_takes_away_what_a_kill_has_left(tmp_path: Path) -> None:
    async with opened_desk(tmp_path) as desk:
        await desk.upload("x", "README.md")
        (kept,) = desk.on_disk()
        (tenant,) = desk.shelf.glob("[!.]*")
        for left in (tenant / ("0" * 32) / "files", desk.shelf / ".new/y/files", desk.shelf / ".trash/z"):
            left.mkdir(parents=True)
        (tenant / ".objects" / ("1" * 64)).write_text("of nobody")
        (desk.shelf / "2" / ".objects").mkdir(parents=True)
    async with opened_desk(tmp_path) as desk:
        assert (desk.on_disk(), desk.objects()) == ([kept], 1)
        assert [path.name for path in desk.shelf.glob("[!.]*")] == [tenant.name]
        assert (await desk.download("x", path="out")).files == 1
        layers.remove_tree(desk.shelf)
