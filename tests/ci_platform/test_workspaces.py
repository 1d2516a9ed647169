"""Layers of commands: what the next command sees, in every way of making trees, whatever a tenant leaves."""

from __future__ import annotations

import base64
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from ci_platform import copy_on_write, layers
from ci_platform.copy_on_write import MethodName
from ci_platform.errors import ConflictError, InvalidInputError, LimitExceededError, NotFoundError
from ci_platform.sandboxes import SANDBOX_UID, Tree
from ci_platform.source import Remote, Source
from ci_platform.workspaces import CommitReport, Conflict, LayerAuthor, Workspaces, describe
from tests.ci_platform.git_repositories import (
    Content,
    Link,
    Script,
    WorkingCopy,
    run_in,
    snapshot,
    working_copy,
)

REPO, ID = "ada/engine", "run1.build"
FILES: dict[str, Content] = {
    "README.md": b"hello\n",
    "src/a.py": b"a\n",
    "src/b.py": b"b\n",
    "docs/old/page": b"page\n",
    "run.sh": Script(b"#!/bin/sh\n"),
    "link": Link("src/a.py"),
}


@pytest.fixture(params=["overlay" if os.geteuid() == 0 else "user-overlay", "copy"])
def method(request: pytest.FixtureRequest) -> MethodName:
    """A method that a machine must have to be ours: where it cannot be used, tests fail, not skip."""
    name: MethodName = request.param
    return name


@dataclass
class Bench:
    workspaces: Workspaces
    source: Source
    remote: WorkingCopy
    method: MethodName
    root: Path
    sha: str = ""
    trees: int = 0

    async def prepare(
        self, step: str = "step", count: int = 1, attempt: int = 1, workspace: str = ID
    ) -> Tree:
        return await self.workspaces.prepare(workspace, LayerAuthor(step, count, attempt))

    def run(self, tree: Tree, script: str) -> str:
        self.trees += 1
        return run_in(tree, script, self.method, self.root / f"mount{self.trees}")

    async def do(self, script: str, step: str = "step", count: int = 1, attempt: int = 1) -> CommitReport:
        tree = await self.prepare(step, count, attempt)
        self.run(tree, script)
        return await self.workspaces.commit(tree)

    async def look(self, script: str, workspace: str = ID) -> str:
        tree = await self.prepare("look", workspace=workspace)
        try:
            return self.run(tree, script)
        finally:
            await self.workspaces.drop(tree)

    def restarted(self) -> Workspaces:
        chosen = copy_on_write.probe(self.root / "workspaces", self.method)
        self.workspaces = Workspaces(self.root / "workspaces", self.source, chosen)
        return self.workspaces


@pytest.fixture
async def bench(tmp_path: Path, method: MethodName) -> Bench:
    remote = working_copy(tmp_path / "remote")
    sha = remote.commit(FILES)
    source = Source(tmp_path / "source", allow_file=True)
    await source.fetch(REPO, sha, Remote(remote.url))
    for folder in [tmp_path, *tmp_path.parents][:2]:
        folder.chmod(0o755)
    chosen = copy_on_write.probe(tmp_path / "workspaces", method)
    workspaces = Workspaces(tmp_path / "workspaces", source, chosen)
    if not chosen.mounts and os.geteuid() == 0:
        # Without mounts a command's uid walks to its tree; the isolate binds it instead.
        (tmp_path / "workspaces").chmod(0o711)
    await workspaces.fork(ID, REPO, sha)
    return Bench(workspaces, source, remote, method, tmp_path, sha)


@pytest.fixture(autouse=True)
def nothing_left_that_cannot_be_removed(tmp_path: Path) -> Iterator[None]:
    yield
    layers.remove_tree(tmp_path / "workspaces")


async def test_a_command_sees_the_commit_and_what_commands_before_it_did(bench: Bench) -> None:
    report = await bench.do(
        "cat README.md > copy; echo new > src/new; rm src/b.py; mkdir -p x/y; echo z > x/y/z"
    )
    assert report.order == 1
    assert await bench.look("cat copy src/new x/y/z; ls src") == "hello\nnew\nz\na.py\nnew\n"
    assert await bench.workspaces.read(ID, "src/new") == b"new\n"
    assert await bench.workspaces.read(ID, "src/b.py") is None


async def test_a_command_may_write_everywhere_in_its_tree(bench: Bench) -> None:
    await bench.do(
        "echo x >> README.md; echo y > root; rm -r docs; chmod 700 src; mv run.sh src/; ln -sf /etc link"
    )
    assert await bench.look("cat README.md root; ls; readlink link; test -x src/run.sh && echo yes") == (
        "hello\nx\ny\nREADME.md\nlink\nroot\nsrc\n/etc\nyes\n"
    )


async def test_a_command_that_changes_nothing_makes_no_layer(bench: Bench) -> None:
    assert await bench.do("cat README.md; ls -R") == CommitReport(None)


async def test_a_dropped_tree_changes_nothing(bench: Bench) -> None:
    tree = await bench.prepare()
    bench.run(tree, "rm -rf src; echo x > README.md")
    await bench.workspaces.drop(tree, keep=True)
    await bench.workspaces.drop(tree)
    assert await bench.look("cat README.md src/a.py") == "hello\na\n"
    with pytest.raises(ConflictError):
        await bench.workspaces.commit(tree)


async def test_only_the_last_three_failures_are_kept(bench: Bench) -> None:
    for attempt in range(5):
        tree = await bench.prepare(attempt=attempt)
        bench.run(tree, "echo x > leftover")
        await bench.workspaces.drop(tree, keep=True)
    assert len(list((bench.root / "workspaces" / ID / "kept").iterdir())) == 3


async def test_a_folder_removed_and_made_again_is_empty(bench: Bench) -> None:
    await bench.do("rm -r src; mkdir src; echo c > src/c", step="a")
    assert await bench.look("ls src") == "c\n"
    await bench.do("rm -r docs; echo file > docs", step="b")
    await bench.do("rm docs; mkdir docs; echo d > docs/d", step="c")
    assert await bench.look("ls docs") == "d\n"


async def test_a_new_attempt_starts_from_before_the_old_one(bench: Bench) -> None:
    await bench.do("echo 0 > other", step="before")
    await bench.do("echo 1 > first", attempt=1)
    await bench.do("echo 2 > second; test ! -e first", attempt=2)
    await bench.do("test -e second; echo 3 > third", attempt=2)
    assert await bench.look("ls first second third other 2>/dev/null || true") == "other\nsecond\nthird\n"


async def test_an_attempt_that_a_crash_cut_short_starts_clean(bench: Bench) -> None:
    await bench.do("echo 1 > first", attempt=1)
    bench.restarted()
    await bench.do("test ! -e first; echo 2 > second", attempt=1)
    assert await bench.look("ls first second 2>/dev/null || true") == "second\n"


async def test_parallel_commands_do_not_see_each_other_and_both_stay(bench: Bench) -> None:
    one, other = await bench.prepare("one"), await bench.prepare("other")
    bench.run(one, "mkdir -p dist src/gen; echo 1 > dist/one; echo 1 > src/gen/one; echo same > shared")
    bench.run(other, "test ! -e dist; mkdir -p dist src/gen; echo 2 > dist/other; echo same > shared")
    assert (await bench.workspaces.commit(one)).conflicts == ()
    assert (await bench.workspaces.commit(other)).conflicts == ()
    assert await bench.look("cat dist/* src/gen/* shared") == "1\n2\n1\nsame\n"


async def test_where_parallel_commands_differ_the_later_wins_and_it_is_said(bench: Bench) -> None:
    one, other = await bench.prepare("one"), await bench.prepare("other")
    bench.run(
        one, "echo 1 > cache; echo 1 > src/a.py; rm -r docs; ln -s x l; echo x > kind; chmod +x README.md"
    )
    bench.run(
        other, "echo 2 > cache; rm src/a.py; echo 2 > docs/old/page; ln -s y l; mkdir kind; echo > kind/x"
    )
    assert (await bench.workspaces.commit(one)).conflicts == ()
    report = await bench.workspaces.commit(other)
    assert [conflict.path for conflict in report.conflicts] == ["cache", "docs", "kind", "l", "src/a.py"]
    assert {conflict.other.step for conflict in report.conflicts} == {"one"}
    assert "cache" in describe(report)
    assert await bench.look("cat cache docs/old/page; readlink l; ls src kind; test -x README.md") == (
        "2\n2\ny\nkind:\nx\n\nsrc:\nb.py\n"
    )


async def test_a_replaced_folder_conflicts_with_files_that_the_other_put_there(bench: Bench) -> None:
    one, other = await bench.prepare("one"), await bench.prepare("other")
    bench.run(one, "echo 1 > src/one")
    bench.run(other, "rm -r src; mkdir src; echo 2 > src/other")
    await bench.workspaces.commit(one)
    report = await bench.workspaces.commit(other)
    seen = await bench.look("ls src")
    # A plain copy cannot tell a replaced folder from one that was emptied: then both files stay.
    assert (seen, bool(report.conflicts)) in [("other\n", True), ("one\nother\n", False)]


async def test_rewinding_forgets_the_steps_and_keeps_the_others(bench: Bench) -> None:
    for step in ("a", "b", "c"):
        await bench.do(f"echo {step} > {step}", step=step)
    assert await bench.workspaces.rewind(ID, [("b", 1), ("c", 1), ("d", 1)]) == 2
    assert await bench.look("ls a b c 2>/dev/null || true") == "a\n"
    await bench.do("test ! -e b; echo again > b", step="b")
    assert await bench.look("cat a b") == "a\nagain\n"


async def test_files_under_a_running_command_outlive_a_rewind(bench: Bench) -> None:
    await bench.do("echo a > a", step="a")
    running = await bench.prepare("running")
    await bench.workspaces.rewind(ID, [("a", 1)])
    await bench.do("test ! -e a; echo b > b", step="b")
    assert bench.run(running, "cat a") == "a\n"
    await bench.workspaces.drop(running)
    assert [path.name for path in (bench.root / "workspaces" / ID / "layers").iterdir()] == ["00000002"]


async def test_many_layers_are_merged_and_show_the_same(bench: Bench) -> None:
    random.seed(7)
    expected = {"README.md": "hello"}
    for number in range(45):
        name = f"f{number % 11}"
        if name in expected and random.random() < 0.5:
            del expected[name]
            script = f"rm {name}; rm -rf d; mkdir d; echo {number} > d/only"
        else:
            expected[name] = str(number)
            script = f"echo {number} > {name}; mkdir -p d; echo {number} > d/{number}"
        await bench.do(script, step=f"s{number}")
    tree = await bench.prepare("look")
    assert len(tree.lowers) <= 19
    seen = bench.run(tree, "for f in f* README.md; do echo $f $(cat $f); done; ls d | wc -l")
    await bench.workspaces.drop(tree)
    lines = [f"{name} {expected[name]}" for name in sorted(name for name in expected if name != "README.md")]
    assert seen.splitlines()[:-1] == [*lines, "README.md hello"]
    before = await bench.look("find . | sort")
    bench.restarted()
    shutil.rmtree(bench.root / "workspaces" / ID / "squashed", ignore_errors=True)
    assert await bench.look("find . | sort") == before
    await bench.workspaces.rewind(ID, [(f"s{number}", 1) for number in range(45)])
    assert await bench.look("ls") == "README.md\ndocs\nlink\nrun.sh\nsrc\n"


async def test_forking_again_is_the_same_workspace(bench: Bench) -> None:
    await bench.do("echo x > x")
    await bench.workspaces.fork(ID, REPO, bench.sha)
    assert await bench.look("cat x") == "x\n"
    other = bench.remote.commit({"new": b"x\n"})
    await bench.source.fetch(REPO, other, Remote(bench.remote.url))
    with pytest.raises(ConflictError):
        await bench.workspaces.fork(ID, REPO, other)
    await bench.workspaces.fork("run1.other", REPO, other)
    assert await bench.look("cat new; test ! -e x", "run1.other") == "x\n"


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\n", "x" * 200])
async def test_an_id_that_is_no_folder_name_is_refused(bench: Bench, name: str) -> None:
    with pytest.raises(InvalidInputError):
        await bench.workspaces.fork(name, REPO, bench.sha)
    with pytest.raises(InvalidInputError):
        await bench.workspaces.delete(name)


async def test_deleting_removes_everything_and_waits_for_nobody(bench: Bench) -> None:
    await bench.do("echo x > x")
    running = await bench.prepare()
    with pytest.raises(ConflictError):
        await bench.workspaces.delete(ID)
    await bench.workspaces.drop(running)
    await bench.workspaces.delete(ID)
    await bench.workspaces.delete(ID)
    assert not (bench.root / "workspaces" / ID).exists()
    with pytest.raises(NotFoundError):
        await bench.prepare()


async def test_a_sweep_keeps_what_lives_and_removes_the_rest(bench: Bench) -> None:
    await bench.do("echo x > x")
    await bench.workspaces.fork("run2.build", REPO, bench.sha)
    await bench.prepare("cut short")
    restarted = bench.restarted()
    assert await restarted.sweep(["run1"]) == 1
    assert list((bench.root / "workspaces" / ID / "pending").iterdir()) == []
    assert await bench.look("cat x") == "x\n"
    assert not (bench.root / "workspaces" / "run2.build").exists()


async def test_a_runs_workspaces_are_rewound_and_removed_together(bench: Bench) -> None:
    await bench.workspaces.fork("run1.other", REPO, bench.sha)
    await bench.workspaces.fork("run10.build", REPO, bench.sha)
    await bench.do("echo x > x", step="a")
    await bench.workspaces.rewind_run("run1", [("a", 1)])
    assert await bench.workspaces.read(ID, "x") is None
    await bench.workspaces.delete_run("run1")
    assert [path.name for path in (bench.root / "workspaces").glob("run*")] == ["run10.build"]


async def test_a_cancelled_prepare_leaves_nothing_or_a_tree_to_drop(bench: Bench) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await bench.workspaces.drop(await bench.prepare())
    assert list((bench.root / "workspaces" / ID / "pending").iterdir()) == []
    await bench.workspaces.delete(ID)


HOSTILE = """
echo target > ../victim 2>/dev/null || true
ln -s / slash; ln -s /etc/passwd passwd; ln -s loop loop; mkfifo pipe
mkdir -p locked/inner; echo x > locked/inner/file; ln -s /etc locked/inner/etc
echo secret > unreadable; chmod 000 unreadable locked/inner locked
mkdir replaced; rm -r src; ln -s /etc src; rm -r docs; ln -s .. docs
touch setuid; chmod 6777 setuid
"""


async def test_what_a_hostile_command_leaves_stays_inside(bench: Bench) -> None:
    await bench.do(HOSTILE, step="hostile")
    sibling = await bench.prepare("sibling")
    await bench.do("chmod 700 locked; echo x > slashes", step="next")
    bench.run(sibling, "chmod 711 locked; echo y > passwd2")
    await bench.workspaces.commit(sibling)
    for path in (
        "src/passwd",
        "docs/README.md",
        "slash/etc/passwd",
        "passwd",
        "pipe",
        "loop",
        "locked/inner/etc/passwd",
    ):
        assert await bench.workspaces.read(ID, path) is None, path
    await bench.workspaces.delete(ID)
    assert os.stat("/etc/passwd")  # noqa: PTH116
    assert list((bench.root / "workspaces" / ".trash").iterdir()) == []


async def test_a_tree_deeper_than_any_path_is_refused_and_removed(bench: Bench) -> None:
    tree = await bench.prepare()
    dig = "import os\nfor _ in range(3000):\n os.mkdir('d'*200)\n os.chdir('d'*200)"
    if shutil.which("python3", path="/usr/bin") is None:
        pytest.skip("needs the system's python3")
    bench.run(tree, f'/usr/bin/python3 -c "{dig}"')
    with pytest.raises(LimitExceededError):
        await bench.workspaces.commit(tree)
    assert await bench.look("ls") == "README.md\ndocs\nlink\nrun.sh\nsrc\n"
    assert list((bench.root / "workspaces" / ".trash").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_files_of_a_containers_root_become_the_tenants(bench: Bench) -> None:
    tree = await bench.prepare()
    (tree.upper / "by-root").write_text("x")
    (tree.upper / "by-root").chmod(0o4755)
    await bench.workspaces.commit(tree)
    assert await bench.look("stat -c '%u %a' by-root; echo y >> by-root") == f"{SANDBOX_UID} 755\n"


async def test_the_next_commit_starts_from_a_delta(bench: Bench) -> None:
    sha = bench.remote.commit({"src/a.py": b"changed\n", "docs/old/page": None, "x/y": b"y"})
    await bench.source.fetch(REPO, sha, Remote(bench.remote.url))
    await bench.workspaces.fork("run2.build", REPO, sha)
    assert (
        await bench.look("cat src/a.py x/y; ls", "run2.build")
        == "changed\nyREADME.md\nlink\nrun.sh\nsrc\nx\n"
    )


async def test_every_method_shows_the_archive_of_the_commit(bench: Bench, tmp_path: Path) -> None:
    packed = base64.b64decode(await bench.look("tar --create --exclude=./.git --file=- . | base64"))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(tmp_path / "seen", filter="tar")
    assert snapshot(tmp_path / "seen") == bench.remote.archive(bench.sha)


COMMIT_FOREVER = """
import sys, anyio
from pathlib import Path
from ci_platform import copy_on_write
from ci_platform.source import Source
from ci_platform.workspaces import LayerAuthor, Workspaces
async def main():
    root = Path(sys.argv[1])
    method = copy_on_write.probe(root / "workspaces", sys.argv[2])
    workspaces = Workspaces(root / "workspaces", Source(root / "source"), method)
    for number in range(100000):
        tree = await workspaces.prepare("run1.build", LayerAuthor(f"s{number}", 1, 1))
        for part in range(20):
            (tree.upper / f"{number}-{part}").write_text(str(number))
        await workspaces.commit(tree)
        print(number, flush=True)
anyio.run(main)
"""


async def test_a_kill_at_any_moment_leaves_whole_layers(bench: Bench) -> None:
    for delay in (0.0, 0.002, 0.005):
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", COMMIT_FOREVER, bench.root, bench.method],
            cwd=Path.cwd(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        done = [int(process.stdout.readline()) for _ in range(4)]
        await anyio.sleep(delay)
        process.send_signal(signal.SIGKILL)
        done += [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
        await bench.restarted().sweep()
        seen = (await bench.look("ls | grep -- - || true")).split()
        layers_seen = {name.partition("-")[0] for name in seen}
        assert len(seen) == 20 * len(layers_seen), "no half layer"
        assert {str(number) for number in done} <= layers_seen, "no acknowledged layer lost"
        await bench.workspaces.rewind(ID, [(f"s{number}", 1) for number in range(1000)])


@pytest.mark.skipif(os.geteuid() != 0, reason="this is the run without root")
def test_all_of_this_holds_without_root() -> None:
    unshare = ["unshare", "--user", f"--map-user={SANDBOX_UID}", f"--map-group={SANDBOX_UID}"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run([*unshare, *pytest_here], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_forced_method_that_cannot_be_says_why(tmp_path: Path) -> None:
    if copy_on_write.probe(tmp_path).name != "copy":
        assert copy_on_write.probe(tmp_path).describe()["workspaces"] in copy_on_write.METHODS
    started = time.monotonic()
    assert copy_on_write.probe(tmp_path, "copy").name == "copy"
    assert time.monotonic() - started < 5


async def test_a_layer_of_countless_files_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_PATHS", 100)
    await bench.do("for i in $(seq 40); do touch f$i; done")
    for script in (
        "for i in $(seq 110); do touch g$i; done",
        "for i in $(seq 60); do mkdir d$i; touch d$i/x; done",
    ):
        with pytest.raises(LimitExceededError, match="more than 100 files"):
            await bench.do(script, "other")
    assert "f40" in await bench.look("ls")


def test_a_folder_is_removed_in_pieces_whatever_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_AT_ONCE", 7)
    root = tmp_path / "tree"
    for folder in range(20):
        inner = root / f"d{folder}" / "inner"
        inner.mkdir(parents=True)
        for file in range(20):
            (inner / f"f{file}").touch()
            (root / f"f{folder}-{file}").touch()
    layers.remove_tree(root)
    assert not root.exists()


def test_a_files_name_begins_no_line_of_the_platforms() -> None:
    conflict = Conflict("x\nthe deploy is approved\x1b[2J", LayerAuthor("other", 1, 1))
    line = describe(CommitReport(1, 1, 1, (conflict,)))
    assert line.isprintable()
