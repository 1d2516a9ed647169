"""Layers as moments to go back to: listed, looked at, downloaded, forked; and what failed commands left."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ci_platform import layer_views
from ci_platform.copy_on_write import MethodName
from ci_platform.errors import ConflictError, InvalidInputError, LimitExceededError, NotFoundError
from ci_platform.snapshots import Overruled
from ci_platform.workspaces import LayerAuthor
from tests.ci_platform.git_repositories import Content, Link, Script
from tests.ci_platform.workspace_desk import Desk, opened_desk

ID = "run1.build"
FILES: dict[str, Content] = {
    "README.md": b"hello\n",
    "src/a.py": b"a\n",
    "src/b.py": b"b\n",
    "docs/old/page": b"page\n",
    "run.sh": Script(b"#!/bin/sh\n"),
    "link": Link("src/a.py"),
}


@pytest.fixture(params=[None, "copy"])
async def desk(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    method: MethodName | None = request.param
    async with opened_desk(tmp_path, method=method) as desk:
        await desk.fork(desk.remote.commit(FILES))
        yield desk


async def files(desk: Desk, name: str, workspace_id: str = ID) -> dict[str, bytes | str]:
    output = io.BytesIO()
    async with desk.workspaces.view(workspace_id, name) as view:
        layer_views.write_tar(view.lowers, output)
    found: dict[str, bytes | str] = {}
    output.seek(0)
    with tarfile.open(fileobj=output) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member) if member.isreg() else None
            found[member.name] = file.read() if file else member.linkname or "folder"
    return found


async def names(desk: Desk) -> list[tuple[str, str, str | None]]:
    return [(each.name, each.outcome, each.step) for each in await desk.workspaces.snapshots(ID)]


async def test_each_step_can_be_gone_back_to(desk: Desk) -> None:
    await desk.run("echo 1 > one; rm src/b.py", step="a")
    await desk.run("true", step="nothing")
    await desk.run(
        "rm -r src; mkdir src; echo 2 > src/two; rm link; mkdir -p link/x; echo x > docs/old/y", step="b"
    )
    await desk.run("rm -r docs link; echo file > docs; ln -s one link", step="c")
    assert await names(desk) == [
        ("0", "forked", None), ("1", "committed", "a"), ("2", "committed", "b"), ("3", "committed", "c"),
    ]  # fmt: skip
    whole = {"README.md": b"hello\n", "run.sh": b"#!/bin/sh\n"}
    docs = {"docs": "folder", "docs/old": "folder", "docs/old/page": b"page\n"}
    assert await files(desk, "0") == whole | docs | {
        "src": "folder", "src/a.py": b"a\n", "src/b.py": b"b\n", "link": "src/a.py",
    }  # fmt: skip
    assert await files(desk, "1") == whole | docs | {
        "src": "folder", "src/a.py": b"a\n", "one": b"1\n", "link": "src/a.py",
    }  # fmt: skip
    assert await files(desk, "2") == whole | docs | {
        "src": "folder", "src/two": b"2\n", "one": b"1\n", "link": "folder", "link/x": "folder", "docs/old/y": b"x\n",
    }  # fmt: skip
    assert await files(desk, "3") == whole | {
        "docs": b"file\n", "src": "folder", "src/two": b"2\n", "one": b"1\n", "link": "one",
    }  # fmt: skip


async def test_what_a_layer_holds_is_counted(desk: Desk) -> None:
    await desk.run("head -c 5000 /dev/zero > big; echo x > small", step="a")
    found = (await desk.workspaces.snapshots(ID))[1]
    assert (found.paths, found.size, found.step, found.attempt) == (2, 5002, "a", 1)
    assert found.at is not None


async def test_a_conflict_is_on_the_snapshot_of_who_overruled(desk: Desk) -> None:
    one = await desk.workspaces.prepare(ID, LayerAuthor("one", 1, 1))
    other = await desk.workspaces.prepare(ID, LayerAuthor("other", 2, 1))
    for tree in (one, other):
        (tree.upper / "report").write_text(str(tree.upper))
        await desk.workspaces.commit(tree)
    first, second = (await desk.workspaces.snapshots(ID))[1:]
    assert (first.conflict_count, first.conflicts) == (0, ())
    assert (second.conflict_count, second.conflicts) == (1, (Overruled("report", "one", 1),))


async def test_what_a_failed_command_left_is_kept_for_a_while(desk: Desk) -> None:
    await desk.run("echo 1 > one", step="a")
    await fail(desk, "echo partly > report; rm README.md")
    assert [each[1:] for each in await names(desk)][2:] == [("failed", "test")]
    failed = (await desk.workspaces.snapshots(ID))[-1]
    assert failed.paths is not None
    seen = await files(desk, failed.name)
    assert (seen["report"], seen["one"], "README.md" in seen) == (b"partly\n", b"1\n", False)
    assert "report" not in await files(desk, "1"), "nobody stands on it"
    folder = failed.name.removeprefix("failed-")
    async with desk.workspaces.view(ID, failed.name):
        assert await desk.workspaces.remove_failure(ID, folder) is False, "somebody looks at it"
    assert await desk.workspaces.remove_failure(ID, folder) is True
    with pytest.raises(NotFoundError, match="failed-"):
        await files(desk, failed.name)


async def fail(desk: Desk, script: str) -> None:
    with pytest.raises(AssertionError):
        await desk.run(f"{script}; exit 3", step="test", keep=True)


async def test_a_snapshot_can_be_forked_and_both_go_on(desk: Desk) -> None:
    await desk.run("echo 1 > one; rm -r docs", step="a")
    await desk.run("echo 2 > two; mkdir docs; echo new > docs/new", step="b")
    await desk.run("echo 3 > three; rm one", step="c")
    for _ in range(2):
        await desk.workspaces.fork_snapshot("run1.again", ID, "2")
    assert await desk.run("cat one two docs/new; ls; git status --porcelain", "run1.again") == (
        "1\n2\nnew\nREADME.md\ndocs\nlink\none\nrun.sh\nsrc\ntwo\n D docs/old/page\n?? docs/new\n?? one\n?? two\n"
    )
    await desk.run("echo changed > one; rm two", "run1.again")
    assert (await files(desk, "2"))["one"] == b"1\n"
    await desk.workspaces.delete(ID)
    assert await desk.run("cat one docs/new", "run1.again") == "changed\nnew\n"
    await desk.workspaces.fork_snapshot("run2.build", "run1.again", "0")
    assert "one" not in await files(desk, "0", "run2.build")
    with pytest.raises(ConflictError, match="snapshot"):
        await desk.workspaces.fork_snapshot("run2.build", "run1.again", "1")


async def test_a_failed_commands_files_can_be_forked(desk: Desk) -> None:
    await fail(desk, "echo partly > report")
    failed = (await desk.workspaces.snapshots(ID))[-1]
    await desk.workspaces.fork_snapshot("run1.look", ID, failed.name)
    assert await desk.run("cat report README.md", "run1.look") == "partly\nhello\n"


@pytest.mark.parametrize("name", ["1", "-1", "00", "x", "failed-", "failed-1", "", "../0", "0/.."])
async def test_a_snapshot_that_is_not_there_is_named(desk: Desk, name: str) -> None:
    with pytest.raises(NotFoundError, match="snapshot"):
        await files(desk, name)
    with pytest.raises(NotFoundError, match="snapshot"):
        await desk.workspaces.fork_snapshot("run1.again", ID, name)
    assert await desk.workspaces.of_run("run1") == [ID]


async def test_a_step_that_is_taken_back_is_no_snapshot(desk: Desk) -> None:
    await desk.run("echo 1 > one", step="a")
    await desk.run("echo 2 > two", step="b")
    async with desk.workspaces.view(ID, "2") as view:
        await desk.workspaces.rewind(ID, [("b", 1)])
        await desk.run("true", step="c")
        assert layer_views.read(view.lowers, "two", 10) == b"2\n", "who looks may look on"
    assert await names(desk) == [("0", "forked", None), ("1", "committed", "a")]
    with pytest.raises(NotFoundError):
        await files(desk, "2")


async def test_folders_are_listed_and_links_not_followed(desk: Desk) -> None:
    await desk.run(
        "ln -s /etc etc; ln -s ../../../../etc/passwd src/passwd; mkfifo pipe; chmod 000 src", step="a"
    )
    async with desk.workspaces.view(ID, "1") as view:
        listed = {entry.name: entry.kind for entry in layer_views.listing(view.lowers)}
        assert listed | {"pipe": "", ".git": ""} == {
            "README.md": "file", "docs": "folder", "etc": "symlink", "link": "symlink", "run.sh": "script",
            "src": "folder", "pipe": "", ".git": "",
        }  # fmt: skip
        assert "pipe" not in listed
        assert [entry.path for entry in layer_views.listing(view.lowers, "src")] == [
            "src/a.py", "src/b.py", "src/passwd",
        ]  # fmt: skip
        assert layer_views.read(view.lowers, "src/passwd", 1 << 20) is None
        assert layer_views.read(view.lowers, "etc/passwd", 1 << 20) is None
        for folder in ("etc", "README.md", "nowhere", "link"):
            with pytest.raises(NotFoundError):
                layer_views.listing(view.lowers, folder)
        for folder in ("..", "src/..", "/etc", "src//a", "a\0b", "/".join("a" * 500)):
            with pytest.raises(InvalidInputError):
                layer_views.listing(view.lowers, folder)
        with pytest.raises(LimitExceededError, match="more than 2"):
            layer_views.listing(view.lowers, "src", most=2)
    assert (await files(desk, "1"))["etc"] == "/etc"


async def test_who_looks_may_look_on_when_the_workspace_is_deleted(desk: Desk) -> None:
    await desk.run("echo 1 > one", step="a")
    async with desk.workspaces.view(ID, "1") as view:
        await desk.workspaces.delete(ID)
        assert layer_views.read(view.lowers, "one", 10) == b"1\n"
        with pytest.raises(NotFoundError):
            await desk.workspaces.snapshots(ID)
    with pytest.raises(FileNotFoundError):
        layer_views.read(view.lowers, "one", 10)


async def test_a_cancelled_fork_of_a_snapshot_is_whole_or_not_there(desk: Desk) -> None:
    await desk.run("for i in $(seq 300); do echo $i > f$i; done", step="a")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await desk.workspaces.fork_snapshot("run1.again", ID, "1")
    await desk.workspaces.fork_snapshot("run1.again", ID, "1")
    assert await desk.run("ls | grep -c '^f[0-9]'", "run1.again") == "300\n"
    assert os.listdir(desk.root / "workspaces" / ".new") == []  # noqa: PTH208
