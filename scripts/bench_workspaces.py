"""Measure workspaces: fork, git, commands' layers, beside what git itself does for a writable tree of a commit.

    .venv/bin/python scripts/bench_workspaces.py [--files 80000] [--rounds 50] [--root /tmp]

The repository is made here: small source files in folders, a root commit, then commits that change 15 files each.
Prints a Markdown table. 80,000 files take some four minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ci_platform import copy_on_write, layers
from ci_platform.copy_on_write import Method, MethodName
from ci_platform.errors import UnavailableError
from ci_platform.hydration.plan import Threshold
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Source, hydrating
from ci_platform.workspaces import LayerAuthor, Workspaces
from scripts.measuring import Timings, markdown, number, percentile, say, timed

REPO = "bench/repository"
IDENTITY = {f"GIT_{role}_{part}": "bench" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
SMALL = 1000
"""Files of the small repository."""

COMMITS = 24
CHANGED = 15
SLOW_ROUNDS = 3
"""Rounds of what takes seconds for each."""

READ_ALL = ("sh", "-c", "find . -path ./.git -prune -o -type f -print0 | xargs -0 cat | wc -c")


def git(repository: Path, *arguments: str) -> str:
    """Run git and return what it printed."""
    environment = {**os.environ, **IDENTITY, "GIT_CONFIG_GLOBAL": "/dev/null"}
    done = subprocess.run(
        ["git", *arguments], cwd=repository, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_repository(path: Path, files: int) -> list[str]:
    """Write a bare repository by a stream of its commits; return their ids, the oldest first."""
    path.mkdir()
    git(path, "init", "--quiet", "--bare", "--initial-branch=main")
    lines = list[bytes]()
    names = [f"part{n % 40}/package{n % 1600}/module{n}.py" for n in range(files)]
    for commit in range(COMMITS):
        lines.append(b"commit refs/heads/main\ncommitter bench <bench> %d +0000\ndata 1\nx\n" % (commit + 1))
        for name in names if commit == 0 else names[commit::997][:CHANGED]:
            text = f"# {name} {commit}\n".encode() + b"x = 1\n" * 40
            lines.append(b"M 644 inline %b\ndata %d\n%b\n" % (name.encode(), len(text), text))
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    subprocess.run(
        ["git", "fast-import", "--quiet"], cwd=path, env=environment, input=b"".join(lines), check=True
    )
    git(path, "repack", "-a", "-d", "--quiet")
    git(path, "tag", "v1", "main~10")
    return git(path, "rev-list", "--reverse", "main").split()


def usage(*folders: Path) -> int:
    """Return the bytes on disk of folders, shared files not counted."""
    found = 0
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            status = path.lstat()
            if path.is_dir() or status.st_nlink == 1:
                found += status.st_blocks * 512
    return found


class Bench:
    """One repository and its forks."""

    def __init__(self, root: Path, files: int, method: Method, *, durable: bool = True) -> None:
        self.root, self.method, self.timings = root, method, Timings(list)
        self.shas = make_repository(root / "repository", files)
        self.source = Source(root / "source")
        self.workspaces = Workspaces(root / "workspaces", self.source, method, durable=durable)
        self.sandbox = IsolateSandbox()
        self._jobs = 0

    async def start(self) -> None:
        """Take the repository over, and write the first tree."""
        await self.source.create(REPO)
        git(self.root / "repository", "push", "--quiet", "--mirror", str(self.source.path(REPO)))
        with timed(self.timings, "first fork of a repository"):
            await self.workspaces.fork("first.bench", REPO, self.shas[0])

    async def forks(self, rounds: int) -> None:
        """Fork one commit again and again, then one commit after the other."""
        for turn in range(rounds):
            with timed(self.timings, "fork, same commit"):
                await self.workspaces.fork(f"same{turn}.bench", REPO, self.shas[0])
        for turn, sha in enumerate(self.shas[1:]):
            with timed(self.timings, "fork, next commit"):
                await self.workspaces.fork(f"next{turn}.bench", REPO, sha)

    async def commands(self, rounds: int) -> None:
        """Seal a layer of ten files and prepare the tree for the next command, in one workspace."""
        for turn in range(rounds):
            with timed(self.timings, "prepare a command's tree"):
                tree = await self.workspaces.prepare("first.bench", LayerAuthor(f"s{turn}", 1, 1))
            for name in range(10):
                (tree.upper / f"result{turn}-{name}").write_bytes(b"x" * 1024)
            with timed(self.timings, "seal a layer of 10 files and prepare the next tree"):
                with timed(self.timings, "seal a layer of 10 files"):
                    await self.workspaces.commit(tree)
                following = await self.workspaces.prepare("first.bench", LayerAuthor("look", 1, 1))
            await self.workspaces.drop(following)

    async def inside(self, argv: tuple[str, ...], name: str, rounds: int, workspace: str) -> None:
        """Run a command in a sandbox over a workspace that nobody wrote to."""
        for _ in range(rounds):
            tree = await self.workspaces.prepare(workspace, LayerAuthor("inside", 1, 1))
            with timed(self.timings, name):
                await self._run(argv, tree)
            await self.workspaces.drop(tree)

    async def _run(self, argv: tuple[str, ...], tree: Tree) -> None:
        self._jobs += 1
        printed = bytearray()
        outcome = await self.sandbox.run(SandboxJob(f"bench{self._jobs}", argv, tree), printed.extend)
        if outcome.exit_code or (argv[:2] == ("git", "status") and printed):
            raise RuntimeError(f"{argv} ended with {outcome.exit_code}: {printed.decode()}")

    async def first_commands(self, rounds: int) -> None:
        """Run the first command ever of a repository, and read all files, with the tree on disk and without."""
        for turn in range(rounds):
            await self._first_command("its tree is written first", f"eager{turn}", None)
            await self._first_command("lazy", f"lazy{turn}", Threshold(files=1, size=1))

    async def _first_command(self, how: str, name: str, lazy: Threshold | None) -> None:
        source = Source(self.root / name / "source", lazy=lazy)
        await source.create(REPO)
        git(self.root / "repository", "push", "--quiet", "--mirror", str(source.path(REPO)))
        workspaces = Workspaces(self.root / name / "workspaces", source, self.method)
        try:
            with timed(self.timings, f"first command ever, {how}"):
                await workspaces.fork("first.bench", REPO, self.shas[0])
                await self._command(workspaces, ("true",), lazy)
            with timed(self.timings, f"the next command reads all files, {how}"):
                await self._command(workspaces, READ_ALL, lazy)
        finally:
            await source.close()
            layers.remove_tree(self.root / name)

    async def _command(self, workspaces: Workspaces, argv: tuple[str, ...], lazy: Threshold | None) -> None:
        tree = await workspaces.prepare("first.bench", LayerAuthor("first", 1, 1), lazy=True)
        if (tree.lazy is None) != (lazy is None):
            raise RuntimeError("the tree is not as it was to be")
        await self._run(argv, tree)
        await workspaces.check(tree)
        await workspaces.drop(tree)

    async def deletes(self, rounds: int) -> None:
        """Remove forks."""
        for turn in range(rounds):
            with timed(self.timings, "delete a fork"):
                await self.workspaces.delete(f"same{turn}.bench")

    def by_git(self) -> None:
        """Do what git offers for the same, from the same objects."""
        repository = self.source.path(REPO)
        for turn in range(SLOW_ROUNDS):
            place = self.root / f"git{turn}"
            with timed(self.timings, "git clone --shared"):
                git(self.root, "clone", "--quiet", "--shared", str(repository), str(place))
            layers.remove_tree(place)
            with timed(self.timings, "git worktree add"):
                git(repository, "worktree", "add", "--quiet", "--detach", str(place), self.shas[0])
            if turn == 0:
                for _ in range(5):
                    with timed(self.timings, "git status, in a worktree of git's"):
                        git(place, "status", "--porcelain")
            git(repository, "worktree", "remove", "--force", str(place))


def a_checkout(bench: Bench) -> int:
    """Return the bytes on disk of one whole tree."""
    (base,) = (bench.root / "source" / "trees" / REPO).glob("base-*")
    return usage(base / "tree")


async def measure(root: Path, files: int, rounds: int, method: Method) -> tuple[Timings, dict[str, float]]:
    """Measure one repository."""
    say(f"a repository of {files:,} files")
    bench = Bench(root, files, method)
    try:
        await bench.start()
        say("forks")
        await bench.forks(rounds)
        forks = [root / "workspaces" / f"same{turn}.bench" for turn in range(rounds)]
        share = usage(*forks) / rounds / a_checkout(bench) * 100
        await bench.commands(min(rounds, 40))
        if method.mounts:
            say("git in sandboxes")
            await bench.inside(("git", "status", "--porcelain"), "git status, in a fork", 10, "same0.bench")
            last = f"next{COMMITS - 2}.bench"
            await bench.inside(("git", "status", "--porcelain"), "git status, some commits later", 10, last)
            await bench.inside(("git", "describe", "--tags"), "git describe, in a fork", 10, last)
            await bench.inside(("true",), "true, in a fork", 20, "same0.bench")
            if hydrating.unavailable() is None:
                say("first commands")
                await bench.first_commands(SLOW_ROUNDS)
        await bench.deletes(rounds)
        say("git's own ways")
        bench.by_git()
    finally:
        await bench.sandbox.close()
    return bench.timings, {"a fork's disk, % of a checkout": share}


def row(name: str, value: Callable[[str], list[float]], unit: str = "ms") -> list[str]:
    """Return a row: median and 95th percentile of small and large."""
    cells = [name]
    for size in ("small", "large"):
        found = value(size)
        cells += [f"{number(statistics.median(found))} {unit}" if found else "-"]
        cells += [f"{number(percentile(found, 95))} {unit}" if found else "-"]
    return cells


async def main_async(root: Path, files: int, rounds: int, name: MethodName | None) -> None:
    """Measure everything and print it."""
    method = copy_on_write.probe(root, name)
    results = {}
    for size, count in {"small": SMALL, "large": files}.items():
        folder = root / size
        folder.mkdir()
        results[size] = await measure(folder, count, rounds, method)
        shutil.rmtree(folder, ignore_errors=True)
    names = list(results["large"][0])
    rows = [row(each, lambda size, each=each: results[size][0].get(each, [])) for each in names]  # type: ignore[misc]
    rows += [
        row(each, lambda size, each=each: [results[size][1][each]], "%")  # type: ignore[misc]
        for each in results["large"][1]
    ]
    times = statistics.median(results["large"][0]["git clone --shared"])
    faster = times / statistics.median(results["large"][0]["fork, same commit"])
    rows.append(["a fork against git clone --shared", "", "", f"{faster:,.0f} times", ""])
    header = [f"workspaces: {method.name}", f"{SMALL:,} files", "p95", f"{files:,} files", "p95"]
    print(markdown(header, rows))


def main() -> None:
    """Read the arguments, measure in a folder of its own, remove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=80_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--method", choices=copy_on_write.METHODS)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="dynflow-bench-", dir=given.root))
    root.chmod(0o755)
    try:
        anyio.run(main_async, root, given.files, given.rounds, given.method)
    except UnavailableError as error:
        raise SystemExit(str(error)) from None
    finally:
        layers.remove_tree(root)


if __name__ == "__main__":
    main()
