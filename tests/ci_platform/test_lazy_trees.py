"""Large trees are used before they are on disk, and nobody can tell; whatever dies, nobody hangs and nothing stays."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
import psutil
import pytest

from ci_platform import copy_on_write, layers
from ci_platform.caches.specs import needs_files
from ci_platform.cones import Cone
from ci_platform.errors import FailedError, LimitExceededError, UnavailableError
from ci_platform.execution import Execution
from ci_platform.hydration import mounts
from ci_platform.hydration.mounts import Mounts
from ci_platform.hydration.plan import Threshold
from ci_platform.hydration.table import TableWriter
from ci_platform.logs import Logs
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Source
from ci_platform.source.hydrating import unavailable
from ci_platform.survival import Survival
from ci_platform.trees import TreeLimits
from ci_platform.workspaces import LayerAuthor, Workspaces
from pipelines import hash_files
from pipelines.contract import Command, CommandResult, Workspace
from tests.ci_platform import cache_desk
from tests.ci_platform.git_repositories import Content, Link, Script
from tests.ci_platform.workspace_desk import REPO, Desk, opened_desk

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no lazy trees here: {unavailable()}")

SOON = 30.0
RUN, ID = "run1", "run1.build"

FILES: dict[str, Content] = {
    "README.md": b"hello\n",
    "empty": b"",
    "run.sh": Script(b"#!/bin/sh\necho it runs\n"),
    "link": Link("src/a.py"),
    "src/dangling": Link("../../nowhere"),
    "src/folder-link": Link("deep"),
    "src/a.py": b"a\n",
    "src/deep/er/b.py": b"b\n",
    "src/deep.txt": b"sorted before the folder\n",
    "src/deep-er": b"and this one as well\n",
    "large": bytes(range(256)) * 4 * 4200,
    "n/" + "x" * 200: b"a long name",
    "n/\udcff": b"no UTF-8",
    **{f"many/file{n}": b"%d\n" % n * (n % 50) for n in range(400)},
}

IS_LAZY = "grep -qs 'lowerdir+=/*lazy,' /proc/self/mountinfo && echo lazy || true"

LOOK = r"""
find . -mindepth 1 -name .git -prune -o -type f -printf '%m %u %s %T@ %p\n' -o -printf '%y %m %u %T@ %p %l\n' | sort
find . -name .git -prune -o -type f -print0 | sort -z | xargs -0 sha1sum
"""
"""All that can be seen of a tree but inodes and what folders take on disk."""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened_desk(tmp_path, lazy=Threshold(files=100)) as desk:
        yield desk
    await eventually(lambda: programs(tmp_path) == [])


def programs(root: Path, what: str = "") -> list[psutil.Process]:
    """Servers of lazy trees, their gits and writers of trees that work below a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        text = " ".join(process.info["cmdline"] or ())
        if str(root) in text and what in text and process.pid != os.getpid():
            found.append(process)
    return found


async def eventually(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - processes set no event
            await anyio.sleep(0.01)


async def prepare(desk: Desk, step: str = "step", workspace: str = ID, attempt: int = 1) -> Tree:
    return await desk.workspaces.prepare(workspace, LayerAuthor(step, 1, attempt), lazy=True)


async def run(desk: Desk, tree: Tree, script: str) -> tuple[int, str]:
    printed = bytearray()
    outcome = await desk.sandbox.run(
        SandboxJob(tree.upper.parent.name, ("sh", "-ec", script), tree), printed.extend
    )
    return outcome.exit_code, printed.decode(errors="surrogateescape")


@contextmanager
def not_written_yet(root: Path) -> Iterator[None]:
    """Hold up whoever writes trees to disk: on a busy machine they may be faster than what comes next."""
    with layers.directory(root / "source/trees/.building") as builders:
        fcntl.flock(builders, fcntl.LOCK_EX)
        yield


async def lazily(desk: Desk, script: str, *, workspace: str = ID) -> str:
    """Run a command that must find its tree lazy, and keep what it changed."""
    tree = await prepare(desk, "lazily", workspace)
    assert tree.lazy is not None
    code, printed = await run(desk, tree, script)
    assert code == 0, printed
    await desk.workspaces.check(tree)
    await desk.workspaces.commit(tree)
    return printed


async def on_disk(desk: Desk, script: str, *, workspace: str = ID) -> str:
    """The same, of one that must be on disk."""
    await desk.source.hydration.written(REPO)
    tree = await prepare(desk, "on disk", workspace)
    assert tree.lazy is None
    await desk.workspaces.drop(tree)
    return await desk.run(script, workspace)


async def test_a_lazy_tree_is_the_tree_that_is_written(desk: Desk, tmp_path: Path) -> None:
    sha = desk.remote.commit(FILES)
    with not_written_yet(desk.root):
        await desk.fork(sha)
        lazy = await lazily(desk, LOOK)
    assert "100755" not in lazy
    assert lazy == await on_disk(desk, LOOK)
    # And the one that somebody has written who knows of no lazy trees, but for the time at which that was.
    eager = Source(tmp_path / "eager", allow_file=True)
    await eager.create(REPO)
    desk.remote.git("push", "--quiet", "--mirror", str(eager.path(REPO)))
    (written,) = await eager.materialise(REPO, sha)
    theirs = (await anyio.run_process(["sh", "-c", LOOK], cwd=written)).stdout
    assert without_times(os.fsencode(lazy)) == without_times(theirs)
    assert b"it runs" in os.fsencode(await desk.run("./run.sh"))


def without_times(look: bytes) -> list[bytes]:
    found = []
    for line in look.splitlines():
        words = line.split(b" ")
        found.append(b" ".join(word for word in words if b"." not in word or not word[:9].isdigit()))
    return [line.replace(b" 64801 ", b" ci ") for line in found]


def with_submodule(desk: Desk) -> str:
    """Commit the files, and a submodule, whose folder is there and empty."""
    first = desk.remote.commit(FILES)
    desk.remote.git("update-index", "--add", "--cacheinfo", f"160000,{first},modules/one")
    desk.remote.git("commit", "--quiet", "--message", "a submodule")
    return desk.remote.git("rev-parse", "HEAD")


async def test_git_finds_nothing_to_do_before_and_after_the_tree_is_on_disk(desk: Desk) -> None:
    first = with_submodule(desk)
    status = "git diff-files; git status --porcelain; git fsck --connectivity-only 2>&1; git rev-parse HEAD"
    with not_written_yet(desk.root):
        await desk.fork(first)
        assert await lazily(desk, status) == f"{first}\n"
    assert await on_disk(desk, status) == f"{first}\n"
    # A fork of the same commit later is as if nothing had ever been lazy.
    await desk.fork(first, "run2.build")
    assert await desk.run(status + "; git config core.checkStat || true", "run2.build") == f"{first}\n"


async def test_layers_upon_a_lazy_tree_fit_on_the_one_on_disk(desk: Desk) -> None:
    change = """
    echo more >>README.md; rm src/a.py empty; rm -r many; mkdir many; echo new >many/new
    mv n/x* n/short; chmod 600 run.sh; ln -s x src/new-link; mkdir -p src/deep/er/est; echo 1 >src/deep/er/est/1
    rm link; mkdir link; echo in >link/file; printf x | dd of=large bs=1 seek=4000000 conv=notrunc 2>/dev/null
    """
    with not_written_yet(desk.root):
        await desk.fork(desk.remote.commit(FILES))
        seen = await lazily(desk, change + LOOK + "git status --porcelain")
    assert await on_disk(desk, LOOK + "git status --porcelain") == seen
    assert "many/new" in seen


async def test_the_next_commit_is_a_delta_upon_the_lazy_tree(desk: Desk) -> None:
    first = desk.remote.commit(FILES)
    second = desk.remote.commit({"src/a.py": b"changed\n", "README.md": None, "src/deep/er": b"a file now\n"})
    with not_written_yet(desk.root):
        await desk.fork(first)
        tree = await prepare(desk)
        await desk.fork(second, "run2.build")
        seen = await lazily(desk, LOOK + "git diff-files; git status --porcelain", workspace="run2.build")
    assert "src/a.py" in seen
    assert "README.md" not in seen
    await desk.workspaces.drop(tree)
    assert (
        await on_disk(desk, LOOK + "git diff-files; git status --porcelain", workspace="run2.build") == seen
    )
    await desk.fork(second, "run3.build")
    assert await desk.run(LOOK + "git diff-files; git status --porcelain", "run3.build") == seen


async def test_a_sparse_tree_is_lazy_too(desk: Desk) -> None:
    sha = with_submodule(desk)
    look = LOOK + "git diff-files; git status --porcelain; git sparse-checkout list; git ls-files | wc -l"
    with not_written_yet(desk.root):
        await desk.fork(sha, cone=Cone.of(["many", "src/deep"]))
        seen = await lazily(desk, look)
    assert "./src/deep/er/b.py" in seen
    assert not any(line.partition(" ./")[2].startswith("n") for line in seen.splitlines())
    assert await on_disk(desk, look) == seen


async def test_two_commands_side_by_side_stack_upon_a_lazy_tree(desk: Desk) -> None:
    await desk.fork(desk.remote.commit(FILES))
    one, other = await prepare(desk, "one"), await prepare(desk, "other")
    for tree, name in ((one, "one"), (other, "other")):
        script = f"mkdir -p new; echo {name} >new/{name}; rm -r src; mkdir src; echo {name} >src/{name}"
        assert await run(desk, tree, script) == (0, "")
        await desk.workspaces.commit(tree)
    assert (await desk.run("ls new src")).split() == ["new:", "one", "other", "src:", "other"]


@pytest.mark.parametrize(("files", "lazy"), [(99, False), (100, True), (1, True)])
async def test_small_trees_are_written_at_once(tmp_path: Path, files: int, lazy: bool) -> None:  # noqa: FBT001
    """By number, or by size: one large file is reason enough."""
    async with opened_desk(tmp_path, lazy=Threshold(files=100, size=1 << 20)) as desk:
        size = 1 << 20 if files == 1 else 10
        await desk.fork(desk.remote.commit({f"file{number}": b"x" * size for number in range(files)}))
        tree = await prepare(desk)
        assert (tree.lazy is not None) == lazy
        await desk.workspaces.drop(tree)


async def test_commands_that_need_all_files_on_disk_wait_for_them(desk: Desk) -> None:
    await desk.fork(desk.remote.commit(FILES))
    tree = await desk.workspaces.prepare(ID, LayerAuthor("container", 1, 1))
    assert tree.lazy is None
    assert (tree.lowers[-1] / "many/file7").read_bytes() == b"7\n" * 7
    assert await desk.workspaces.read(ID, "src/a.py") == b"a\n"
    await desk.workspaces.drop(tree)


async def test_a_command_with_a_cache_in_its_home_alone_does_not_wait_for_files(tmp_path: Path) -> None:
    """Of others keys, or what is on the way to a mount, would have to be looked for where nothing is yet."""
    at_home, in_workspace = cache_desk.spec("k", "~/.cache/x"), cache_desk.spec("k", "deps")
    by_files = cache_desk.spec(f"k-{hash_files('README.md')}", "~/.cache/y")
    async with cache_desk.opened_desk(tmp_path, lazy=Threshold(files=1)) as desk:
        script = "cat README.md ~/.cache/x/x 2>/dev/null || true; echo kept >~/.cache/x/x"
        with not_written_yet(tmp_path):
            assert (await desk.run(script + "; " + IS_LAZY, at_home)).output == "hello\nlazy\n"
        assert (await desk.run(script, at_home)).output == "hello\nkept\n"
    assert [needs_files((each,)) for each in (at_home, in_workspace, by_files)] == [False, True, True]
    assert needs_files("no caches at all")
    await eventually(lambda: programs(tmp_path) == [])


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([(b"100644", b".git", None)], FailedError),
        ([(b"100644", b"..", None)], FailedError),
        ([(b"100644", b"a", None), (b"100644", b"a", None)], FailedError),
        ([(b"100644", b"x" * 300, None)], FailedError),
        ([(b"120000", b"link", b"")], FailedError),
        ([(b"100644", b"bomb", b"0" * (3 << 20))], LimitExceededError),
    ],
    ids=["git", "parent", "twice", "long", "link", "bomb"],
)
async def test_what_no_tree_may_have_no_lazy_tree_has(
    tmp_path: Path, entries: list[tuple[bytes, bytes, bytes | None]], error: type[Exception]
) -> None:
    async with opened_desk(tmp_path, limits=TreeLimits(size=2 << 20), lazy=Threshold(files=1)) as desk:
        await desk.source.create(REPO)
        git = [
            "git",
            "--git-dir",
            str(desk.source.path(REPO)),
            "hash-object",
            "-w",
            "--literally",
            "--stdin",
            "-t",
        ]

        def write(kind: str, content: bytes) -> bytes:
            return subprocess.run(
                [*git, kind], input=content, stdout=subprocess.PIPE, check=True
            ).stdout.strip()

        listed = [(mode, name, write("blob", b"x" if text is None else text)) for mode, name, text in entries]
        body = b"".join(
            mode + b" " + name + b"\0" + bytes.fromhex(oid.decode()) for mode, name, oid in listed
        )
        who = b"Ada <ada@example.org> 1 +0000"
        sha = write("commit", b"tree %b\nauthor %b\ncommitter %b\n\nx\n" % (write("tree", body), who, who))
        with pytest.raises(error):
            await desk.workspaces.fork(ID, REPO, sha.decode())


@asynccontextmanager
async def platform(root: Path) -> AsyncIterator[tuple[Execution, Source]]:
    """Start what of a platform runs commands over `root`, and end it as a server that is told to stop."""
    source = Source(root / "source", allow_file=True, lazy=Threshold(files=100))
    workspaces = Workspaces(
        root / "workspaces", source, copy_on_write.probe(root / "workspaces"), durable=False
    )
    sandbox = IsolateSandbox()
    survival = Survival(root / "commands")
    execution = Execution(workspaces, Logs(root / "logs"), {"isolate": sandbox}, survival=survival)
    await source.sweep()
    await execution.recover([RUN])
    await workspaces.sweep([RUN])
    try:
        yield execution, source
    finally:
        await sandbox.close()
        await source.close()


async def execute(execution: Execution, script: str, attempt: int) -> CommandResult:
    command = Command(Workspace(ID, REPO, "0" * 40), ("sh", "-c", script))
    return await execution.run(command, run_id=RUN, author=LayerAuthor("step", 1, attempt))


async def be_doomed(root: Path, script: str) -> None:
    """Be a platform that runs a command until it is killed."""
    async with platform(root) as (execution, _):
        await execute(execution, script, 1)


DOOMED = """
import asyncio, sys
from pathlib import Path
from tests.ci_platform import test_lazy_trees

asyncio.run(test_lazy_trees.be_doomed(Path(sys.argv[1]), sys.argv[2]))
"""
UP = "echo up $(cat README.md /proc/sys/kernel/random/uuid); for i in 1 2 3 4 5 6 7 8; do sleep 0.1; done; "
READ = "cat many/* >/dev/null 2>&1 || echo lost; ls many | wc -l"


def printed(root: Path) -> str:
    return "".join(path.read_text() for path in (root / "logs").glob(f"{RUN}/*.log"))


def used(root: Path) -> bool:
    """Whether a command has a lazy tree mounted."""
    return bool(programs(root, "hydration.server")) and "oup hello " in printed(root)


async def forked(desk: Desk) -> Path:
    """Fork a commit whose tree is not on disk."""
    await desk.fork(desk.remote.commit(FILES))
    await desk.source.close()
    return desk.root


async def test_a_command_whose_server_is_killed_is_our_failure_and_tried_again(desk: Desk) -> None:
    """Whatever it made of it: this one exits with 0. The next attempt runs over the tree on disk."""
    async with platform(await forked(desk)) as (execution, _):
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:

                async def kill() -> None:
                    await eventually(lambda: used(desk.root))
                    for server in programs(desk.root, "hydration.server"):
                        server.kill()

                tasks.start_soon(kill)
                with pytest.raises(UnavailableError, match="lazy tree"):
                    await execute(execution, UP + READ, 1)
        assert (await execute(execution, READ, 2)).output == "400\n"
        assert programs(desk.root, "hydration.server") == []


@pytest.mark.parametrize("server", ["lives", "killed"])
async def test_a_command_on_a_lazy_tree_goes_on_when_the_platform_is_killed(desk: Desk, server: str) -> None:
    """With its server; where that is dead, too, the next attempt begins anew."""
    root = await forked(desk)
    command = [sys.executable, "-c", DOOMED, str(root), UP + READ]
    process = await anyio.open_process(command, stdout=None, stderr=None, cwd=Path(__file__).parents[2])
    await eventually(lambda: used(root))
    process.kill()
    await process.wait()
    (lives,) = programs(root, "hydration.server")
    if server == "killed":
        lives.kill()
    first = printed(root).partition("oup hello ")[2][:36]
    async with platform(root) as (execution, source):
        result = await execute(execution, UP + READ, 2)
        assert (result.exit_code, result.output[-4:], len(first)) == (0, "400\n", 36)
        assert (first in result.output, "lost" in result.output) == (server == "lives", False)
        await source.hydration.written(REPO)
    await eventually(lambda: programs(root, "hydration.server") == [])
    assert not list((root / "source/trees/.lazy").iterdir())


async def test_files_that_cannot_be_read_are_our_failure(desk: Desk) -> None:
    """The repository is taken away under a running command: that one gets an error, and is not blamed."""
    await desk.fork(desk.remote.commit(FILES))
    tree = await prepare(desk)
    path = desk.source.path(REPO)
    shutil.move(path, path.with_name("away"))
    for git in programs(desk.root, "cat-file"):
        git.kill()  # it may have the pack open already
    code, _ = await run(desk, tree, "cat src/deep/er/b.py")
    assert code != 0
    with pytest.raises(UnavailableError, match="could not be read"):
        await desk.workspaces.check(tree)
    shutil.move(path.with_name("away"), path)
    await desk.workspaces.drop(tree)


HOLDER = """
import sys, time
from pathlib import Path
from ci_platform.hydration.mounts import Mounts
root = Path(sys.argv[1])
held = Mounts(root / "programs").hold(root, root, {})
mounted = held.mount() if sys.argv[2] == "mounted" else -1
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["held", "mounted"])
def test_a_platform_that_is_killed_leaves_no_server_and_no_mount(tmp_path: Path, how: str) -> None:
    TableWriter().write(tmp_path / "table", modified_at=0, uid=0, gid=0)
    command = [sys.executable, "-c", HOLDER, str(tmp_path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert len(list((tmp_path / "programs").iterdir())) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    anyio.run(eventually, lambda: list((tmp_path / "programs").iterdir()) == [])
    assert "fuse.dynflow" not in facts(os.getpid(), "mountinfo")


async def test_a_server_that_is_killed_leaves_a_folder_that_is_swept(tmp_path: Path) -> None:
    TableWriter().write(tmp_path / "table", modified_at=0, uid=0, gid=0)
    servers = Mounts(tmp_path / "programs")
    held = servers.hold(tmp_path, tmp_path, {})
    (folder,) = (tmp_path / "programs").iterdir()
    found = mounts.find(folder)
    assert found is not None
    found.close()
    servers.sweep()
    assert folder.exists()
    (server,) = programs(folder)
    server.kill()
    await eventually(lambda: mounts.find(folder) is None)
    with pytest.raises(UnavailableError):
        held.check()
    await eventually(lambda: not folder.exists())
    folder.mkdir()  # as a killed platform would leave it, which cannot see to that itself
    servers.sweep()
    assert not folder.exists()
    held.close()
    servers.close()


@pytest.mark.parametrize("word", [None, '{"trouble": null}', '{"trouble": "lost"}'])
def test_a_server_that_ends_while_a_platform_connects_is_taken_at_its_word(
    tmp_path: Path, word: str | None
) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    if word is not None:
        (folder / "ended").write_text(word)
    ours, theirs = socket.socketpair()
    theirs.close()
    found = mounts.LazyLower(folder, ours)
    if word is not None and "lost" not in word:
        found.check()
    else:
        with pytest.raises(UnavailableError, match=r"has ended|does not answer|could not be read: lost"):
            found.check()
    with pytest.raises(UnavailableError):
        found.mount()
    found.close()
    assert folder.exists() == (word is None)


async def test_a_git_that_hangs_does_not_hang_the_command(tmp_path: Path) -> None:
    """An answer that takes too long ends the server, and with it every wait for it."""
    async with opened_desk(tmp_path, lazy=Threshold(files=100)) as desk:
        await desk.fork(desk.remote.commit(FILES))
        stand_in = next((tmp_path / "source/trees").glob(f"{REPO}/lazy-*"))
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "git").write_text("#!/bin/sh\nexec sleep 600\n")
        (tools / "git").chmod(0o755)
        servers = Mounts(tmp_path / "programs", stuck_after=0.3)
        with anyio.fail_after(SOON):
            environment = {"PATH": f"{tools}:/usr/bin:/bin"}
            held = await anyio.to_thread.run_sync(
                lambda: servers.hold(stand_in, desk.source.path(REPO), environment)
            )
            prepared = await prepare(desk)
            tree = Tree(prepared.upper, prepared.work, prepared.lowers, held)
            with suppress(UnavailableError):  # where not even the mount was in time
                assert (await run(desk, tree, "cat many/file3"))[0] != 0
        with pytest.raises(UnavailableError):
            held.check()
        held.close()
        servers.close()
        await desk.workspaces.drop(prepared)


async def test_whatever_a_hostile_command_reads_its_server_answers_and_lives(desk: Desk) -> None:
    with not_written_yet(desk.root):
        await desk.fork(desk.remote.commit(FILES))
        tree = await prepare(desk)
    assert tree.lazy is not None
    script = (Path(__file__).parent / "lazy_attacks.py.txt").read_text()
    with anyio.fail_after(2 * SOON):
        code, said = await run(
            desk, tree, f"cat >/tmp/attack.py <<'END'\n{script}\nEND\npython3 /tmp/attack.py"
        )
    assert code == 0, said
    await desk.workspaces.check(tree)
    (server,) = programs(desk.root, "hydration.server")
    assert server.memory_info().rss < 200 << 20
    await desk.workspaces.drop(tree)


async def test_a_lazy_tree_cannot_be_written_to_and_its_server_has_nothing(desk: Desk) -> None:
    """Neither an environment, nor a network, nor a path by which others would come to its mount."""
    await desk.fork(desk.remote.commit(FILES))
    tree = await prepare(desk)
    (server,) = programs(desk.root, "hydration.server")
    assert server.environ() == {}
    assert facts(server.pid, "net/dev").count(":") == 1  # loopback
    assert "fuse.dynflow" not in facts(os.getpid(), "mountinfo")
    (mount,) = (line for line in facts(server.pid, "mountinfo").splitlines() if "fuse.dynflow" in line)
    assert {"ro", "nosuid", "nodev"} <= set(mount.split()[5].split(","))
    await desk.workspaces.drop(tree)


def facts(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()
