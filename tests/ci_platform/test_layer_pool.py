"""Layers that several workspaces show: once on disk, as long as somebody does, whatever becomes of the first one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from ci_platform import layer_views
from ci_platform.errors import ConflictError, NotFoundError
from ci_platform.garbage import Allowance
from ci_platform.garbage.workspaces import EndedRuns, Failures
from ci_platform.layer_pool import LayerPool
from ci_platform.lineage import workspace_id_of
from ci_platform.stacks import SQUASH_ABOVE, Stack
from ci_platform.workspace_forks import WorkspaceForks
from ci_platform.workspaces import LayerAuthor, Workspaces
from tests.ci_platform.workspace_desk import REPO, Desk, opened_desk

MANY = 300
NOTHING_AT_ALL = Allowance(1, timedelta())


def of(run_id: str) -> str:
    return workspace_id_of(run_id, "build", 1)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened_desk(tmp_path) as desk:
        await desk.fork(desk.remote.commit({"README.md": b"hello\n"}), of("run1"))
        yield desk


async def write(desk: Desk, step: str, *names: str, run_id: str = "run1", keep: bool = False) -> None:
    """Leave files as a command would that overlayfs has mounted, or copied."""
    tree = await desk.workspaces.prepare(of(run_id), LayerAuthor(step, 1, 1))
    for name in names:
        (tree.upper / name).write_text(step)
    await (desk.workspaces.drop(tree, keep=True) if keep else desk.workspaces.commit(tree))


async def fork(desk: Desk, run_id: str, *steps: str, source: str = "run1") -> None:
    kept = [("build", 1), *((step, 1) for step in steps)]
    await WorkspaceForks(desk.root / "workspaces", desk.workspaces).fork(source, run_id, kept, None)


async def shown(desk: Desk, run_id: str = "run1") -> dict[str, str]:
    """Return the files that steps have left, with what is in them."""
    last = (await desk.workspaces.snapshots(of(run_id)))[-1].name
    async with desk.workspaces.view(of(run_id), last) as view:
        found = [entry for entry in layer_views.walk(view.lowers) if entry.name != "README.md"]
        return {
            entry.path: (layer_views.read(view.lowers, entry.path, 100) or b"").decode() for entry in found
        }


def pooled(desk: Desk) -> list[str]:
    return sorted(path.name for path in LayerPool(desk.root / "workspaces").folder.iterdir())


def paths(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*"))


def restarted(desk: Desk) -> Workspaces:
    desk.workspaces = Workspaces(desk.root / "workspaces", desk.source, desk.workspaces._method)
    return desk.workspaces


async def test_a_fork_costs_a_link_for_each_layer_whatever_is_in_it(desk: Desk) -> None:
    await write(desk, "a", *(f"f{number}" for number in range(MANY)))
    await write(desk, "b", "b")
    before = paths(desk.root / "workspaces")
    await fork(desk, "run2", "a", "b")
    await desk.workspaces.fork_snapshot("run1.again", of("run1"), "2")
    assert paths(desk.root / "workspaces") - before < 20
    assert len(pooled(desk)) == 2
    assert len(await shown(desk, "run2")) == MANY + 1


async def test_a_layer_stays_as_long_as_anybody_shows_it(desk: Desk) -> None:
    await write(desk, "a", "a")
    await write(desk, "test", "left", keep=True)
    failed = (await desk.workspaces.snapshots(of("run1")))[-1].name
    await fork(desk, "run2", "a")
    await desk.workspaces.fork_snapshot("run3.look", of("run1"), failed)
    await write(desk, "b", "b", run_id="run2")
    await desk.workspaces.delete_run("run1")
    await restarted(desk).sweep()
    assert await shown(desk, "run2") == {"a": "a", "b": "b"}
    async with desk.workspaces.view("run3.look", "1") as view:
        assert layer_views.read(view.lowers, "left", 10) == b"test"
    assert await desk.workspaces.rewind(of("run2"), [("a", 1)]) == 1
    await write(desk, "c", "c", run_id="run2")
    assert await shown(desk, "run2") == {"b": "b", "c": "c"}
    assert len(pooled(desk)) == 4, "the third run stands on the first's step still"
    await desk.workspaces.delete_run("run3")
    assert len(pooled(desk)) == 2
    await desk.workspaces.collect(of("run2"))
    assert pooled(desk) == []


async def test_a_step_taken_back_in_one_run_stays_in_its_fork(desk: Desk) -> None:
    await write(desk, "a", "a")
    await fork(desk, "run2", "a")
    await desk.workspaces.rewind(of("run1"), [("a", 1)])
    await write(desk, "b", "b")
    await restarted(desk).sweep()
    assert (await shown(desk), await shown(desk, "run2")) == ({"b": "b"}, {"a": "a"})


async def test_what_stands_on_a_layer_keeps_it_when_nobody_shows_it(desk: Desk) -> None:
    await write(desk, "a", "a")
    tree = await desk.workspaces.prepare(of("run1"), LayerAuthor("b", 1, 1))
    await desk.workspaces.rewind(of("run1"), [("a", 1)])
    await write(desk, "c", "c")
    assert (tree.lowers[0] / "a").exists() or not tree.lowers
    told = desk.workspaces.describe_open(tree)
    if told is not None:  # the command outlives the server
        tree = restarted(desk).reopen(told) or tree
        await desk.workspaces.sweep()
        assert (tree.lowers[0] / "a").exists()
    await desk.workspaces.drop(tree)
    assert len(pooled(desk)) == 1


async def test_forks_and_the_end_of_what_they_fork_may_meet(desk: Desk) -> None:
    await write(desk, "a", *(f"f{number}" for number in range(20)))
    await write(desk, "b", "b")
    made = list[str]()

    async def try_to(run_id: str, source: str) -> None:
        try:
            await fork(desk, run_id, "a", "b", source=source)
            made.append(run_id)
        except (NotFoundError, ConflictError, FileNotFoundError):
            pass

    async with anyio.create_task_group() as tasks:
        for number in range(2, 8):
            tasks.start_soon(try_to, f"run{number}", "run1")
        tasks.start_soon(desk.workspaces.delete_run, "run1")
        for number in range(8, 14):
            tasks.start_soon(try_to, f"run{number}", f"run{number - 6}")
    for run_id in made:
        if (desk.root / "workspaces" / of(run_id)).exists():
            assert await shown(desk, run_id) in ({}, {"b": "b"} | {f"f{number}": "a" for number in range(20)})
    for run_id in made:
        await desk.workspaces.delete_run(run_id)
    assert pooled(desk) == []


async def test_a_fork_that_fails_halfway_keeps_no_layer(desk: Desk) -> None:
    await write(desk, "a", "a")
    await write(desk, "b", "b")
    second = Stack(desk.root / "workspaces" / of("run1")).layers()[1].trees[0].parent
    second.rename(desk.root / "aside")
    with pytest.raises(NotFoundError):
        await fork(desk, "run2", "a", "b")
    with pytest.raises(FileNotFoundError):
        await desk.workspaces.fork_snapshot("run2.look", of("run1"), "2")
    assert list((desk.root / "workspaces/.new").iterdir()) == []
    await desk.workspaces.delete_run("run1")
    assert pooled(desk) == []


async def test_what_was_merged_is_not_merged_again_in_a_fork(desk: Desk) -> None:
    steps = [f"s{number}" for number in range(SQUASH_ABOVE + 2)]
    for step in steps:
        await write(desk, step, step)
    await write(desk, "last", "last")
    before = len(pooled(desk))
    await fork(desk, "run2", *steps)
    tree = await desk.workspaces.prepare(of("run2"), LayerAuthor("look", 1, 1))
    assert len(tree.lowers) < SQUASH_ABOVE or not desk.workspaces._method.mounts
    assert len(pooled(desk)) == before
    await desk.workspaces.drop(tree)
    assert await shown(desk, "run2") == {step: step for step in steps}
    await fork(desk, "run3", *steps[:3])
    assert await shown(desk, "run3") == {step: step for step in steps[:3]}
    for run_id in ("run1", "run2", "run3"):
        await desk.workspaces.delete_run(run_id)
    assert pooled(desk) == []


async def test_an_order_is_not_given_again_to_what_a_merge_or_a_failure_stood_on(desk: Desk) -> None:
    await write(desk, "a", "a")
    await write(desk, "b", "b")
    await write(desk, "test", "left", keep=True)
    failed = (await desk.workspaces.snapshots(of("run1")))[-1].name
    await desk.workspaces.rewind(of("run1"), [("b", 1)])
    await write(desk, "nothing")
    await restarted(desk).sweep()
    await write(desk, "c", "c")
    with pytest.raises(NotFoundError):
        async with desk.workspaces.view(of("run1"), failed):
            pass


async def test_a_data_folder_that_was_copied_without_its_links_is_whole(desk: Desk) -> None:
    await write(desk, "a", "a")
    await write(desk, "test", "left", keep=True)
    await fork(desk, "run2", "a")
    root = desk.root / "workspaces"
    shutil.copytree(root, desk.root / "copy", symlinks=True)
    shutil.rmtree(root)
    (desk.root / "copy").rename(root)
    await restarted(desk).delete_run("run1")  # as `dynflow gc` does it, which may come before the next start
    await restarted(desk).sweep()
    assert len(pooled(desk)) == 1
    assert await shown(desk, "run2") == {"a": "a"}
    await desk.workspaces.delete_run("run2")
    assert pooled(desk) == []


def as_before(workspace: Path) -> None:
    """Turn a workspace into one of the release before, in which each layer was a folder of its own."""
    pool = LayerPool(workspace.parent)
    for link in [*(workspace / "layers").iterdir(), *workspace.glob("kept/*")]:
        part = pool.read(link)
        link.unlink()
        link.mkdir()
        part.tree.rename(link / "tree")
        (link / "layer.json").write_text(json.dumps({**part.record, "pooled": None}))


async def test_workspaces_of_the_release_before_go_on(desk: Desk) -> None:
    for step in ("a", "b", "c"):
        await write(desk, step, step)
    await write(desk, "test", "left", keep=True)
    as_before(desk.root / "workspaces" / of("run1"))
    squashed = desk.root / "workspaces" / of("run1") / "squashed/0123/tree"
    squashed.mkdir(parents=True)
    await restarted(desk).sweep()
    assert pooled(desk) == []
    before = {"a": "a", "b": "b", "c": "c"}
    assert await shown(desk) == before | {"left": "test"}
    await fork(desk, "run2", "a", "b")
    await fork(desk, "run3", "a", source="run2")
    await desk.workspaces.fork_snapshot("run4.look", of("run1"), "2")
    await write(desk, "d", "d")
    await desk.workspaces.rewind(of("run1"), [("c", 1)])
    for number in range(SQUASH_ABOVE):
        await write(desk, f"s{number}", f"s{number}")
    await restarted(desk).sweep()
    async with desk.workspaces.view(of("run1"), "4") as view:
        assert {entry.name for entry in layer_views.listing(view.lowers)} >= {"a", "b", "d"}
        assert layer_views.read(view.lowers, "c", 10) is None
    assert await shown(desk, "run2") == {"a": "a", "b": "b"}
    assert await shown(desk, "run3") == {"a": "a"}
    async with desk.workspaces.view("run4.look", "1") as view:
        assert layer_views.read(view.lowers, "b", 10) == b"b"
    failure = Failures(desk.workspaces, NOTHING_AT_ALL, kept_for=timedelta())
    assert [await failure.collect(item.name) for item in await failure.items()] == [True]
    for run_id in ("run1", "run2", "run3", "run4"):
        await desk.workspaces.delete_run(run_id)
    assert pooled(desk) == []


async def test_a_shared_layer_is_counted_once_for_whom_it_stays(desk: Desk) -> None:
    await write(desk, "a", *(f"f{number}" for number in range(50)))
    await fork(desk, "run2", "a")
    await write(desk, "b", "b", run_id="run2")
    open_runs = {"run1"}

    async def still_open() -> set[str]:
        return open_runs

    store = EndedRuns(desk.workspaces, NOTHING_AT_ALL, still_open=still_open)

    async def sizes() -> dict[str, tuple[int, bool]]:
        return {item.name: (item.size, item.files > 50) for item in await store.items()}

    assert await sizes() == {"run1": (50, True), "run2": (1, False)}
    open_runs.clear()
    assert await sizes() == {"run1": (0, False), "run2": (51, True)}
    assert await store.collect("run1") is True
    assert await sizes() == {"run2": (51, True)}
    assert len(await shown(desk, "run2")) == 51
    assert await store.collect("run2") is True
    assert pooled(desk) == []


async def test_what_a_failure_left_is_not_counted_twice(desk: Desk) -> None:
    await write(desk, "test", "left", keep=True)
    store = Failures(desk.workspaces, NOTHING_AT_ALL, kept_for=timedelta(hours=1))
    (item,) = await store.items()
    assert (item.size, item.repo) == (4, REPO)
    await desk.workspaces.fork_snapshot("run2.look", of("run1"), "failed-" + item.name.partition("/")[2])
    assert [item.size for item in await store.items()] == [0]
    assert await store.collect(item.name) is True
    async with desk.workspaces.view("run2.look", "1") as view:
        assert layer_views.read(view.lowers, "left", 10) == b"test"


def links_of_a_file(folder: Path) -> int:
    return os.pathconf(folder, "PC_LINK_MAX")


async def test_a_layer_that_can_have_no_more_links_is_made_another(desk: Desk) -> None:
    await write(desk, "a", "a")
    (name,) = pooled(desk)
    folder = desk.root / "links"
    folder.mkdir()
    if links_of_a_file(folder) > 100_000:
        pytest.skip("a file may have any number of links here")
    record = LayerPool(desk.root / "workspaces").folder / name / "layer.json"

    def fill() -> None:
        for number in range(100_000):
            os.link(record, folder / str(number))

    with pytest.raises(OSError, match=os.strerror(errno.EMLINK)):
        fill()
    await fork(desk, "run2", "a")
    assert len(pooled(desk)) == 2
    assert await shown(desk, "run2") == {"a": "a"}


async def test_a_workspace_without_its_layers_says_so(desk: Desk) -> None:
    await write(desk, "a", "a")
    shutil.rmtree(LayerPool(desk.root / "workspaces").folder)
    with pytest.raises(NotFoundError, match="'a'"):
        await fork(desk, "run2", "a")
    names: Sequence[str] = [each.name for each in await desk.workspaces.snapshots(of("run1"))]
    assert names == ["0", "1"]
    assert Stack(desk.root / "workspaces" / of("run2")).exists() is False
