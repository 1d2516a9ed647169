"""Capabilities: what a pipeline may ask for is decided by who it is, not by what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from ci_platform import copy_on_write
from ci_platform.capabilities import RunIdentity, SandboxCapability
from ci_platform.errors import ConflictError, FailedError, ForbiddenError, InvalidInputError, NotFoundError
from ci_platform.execution import Execution
from ci_platform.image_capability import ImagesCapability
from ci_platform.logs import Logs
from ci_platform.repository_capability import RepositoryCapability
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.settings import Settings
from ci_platform.source import Remote, Source
from ci_platform.workspace_forks import WorkspaceForks
from ci_platform.workspaces import Workspaces
from dynflow.isolates import Caller, current_caller
from dynflow.types import StepContext, StepInfo
from pipelines.contract import Command, Service, Workspace
from tests.scenarios.pipelines import git, make_repository

REPO = "owner/app"


@dataclass
class World:
    """Real rooms below one folder."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source = Source(self.root / "source", allow_file=True)
        method = copy_on_write.probe(self.root / "workspaces")
        self.workspaces = Workspaces(self.root / "workspaces", self.source, method, durable=False)
        self.sandbox = IsolateSandbox()
        execution = Execution(self.workspaces, Logs(self.root / "logs"), {"isolate": self.sandbox})
        settings = Settings(data=self.root / "data", **self.settings)
        self.artifacts = RepositoryCapability(self.workspaces, self.source)
        self.commands = SandboxCapability(execution, settings)


@contextmanager
def called_by(
    identity: RunIdentity | None, *, step: str | None = "a step", attempt: int = 1
) -> Iterator[None]:
    """Call as this run's pipeline does from inside a step."""
    ctx = None if step is None else StepContext(StepInfo(step, 1), attempt, {})
    token = current_caller.set(
        Caller("worker", props=identity, instance_id="i", workflow_name="ci", step=ctx)
    )
    try:
        yield
    finally:
        current_caller.reset(token)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path / "platform")
    yield made
    await made.sandbox.close()


@pytest.fixture
async def commits(world: World, tmp_path: Path) -> tuple[str, str]:
    """Two commits of the repository, fetched."""
    bare, first = make_repository(tmp_path / "repo")
    work = tmp_path / "repo" / "work"
    git(work, "commit", "--quiet", "--allow-empty", "-m", "Say nothing")
    git(work, "push", "--quiet", str(bare), "main")
    second = git(work, "rev-parse", "HEAD")
    for sha in (first, second):
        await world.source.fetch(REPO, sha, Remote(bare.as_uri()), ref="refs/heads/main")
    return first, second


def run_of(sha: str, *, run_id: str = "1" * 32, trusted: bool = True) -> RunIdentity:
    return RunIdentity(run_id, REPO, sha, None, trusted)


async def test_a_workspace_is_of_the_runs_own_commit_unless_another_is_named(
    world: World, commits: tuple[str, str]
) -> None:
    first, second = commits
    with called_by(run_of(second)):
        assert (await world.artifacts.fork(REPO)).sha == second
        with called_by(run_of(second), step="older"):
            assert (await world.artifacts.fork(REPO, sha=first)).sha == first


async def test_forking_again_in_the_same_step_gives_the_same_workspace(
    world: World, commits: tuple[str, str]
) -> None:
    with called_by(run_of(commits[0])):
        once = await world.artifacts.fork(REPO)
    with called_by(run_of(commits[0]), attempt=2):
        assert await world.artifacts.fork(REPO) == once


async def test_a_forks_pull_request_reads_its_own_commit_alone(
    world: World, commits: tuple[str, str]
) -> None:
    first, second = commits
    with called_by(run_of(second, trusted=False)):
        assert (await world.artifacts.fork(REPO)).sha == second
        with pytest.raises(ForbiddenError, match="its own commit"):
            await world.artifacts.fork(REPO, sha=first)


async def test_a_forks_pull_request_finds_no_other_commit_in_its_git(
    world: World, commits: tuple[str, str]
) -> None:
    first, second = commits
    look = ("git", "cat-file", "-e", first)
    for trusted in (True, False):
        with called_by(run_of(second, run_id=str(int(trusted)) * 32, trusted=trusted)):
            workspace = await world.artifacts.fork(REPO)
            result = await world.commands.run(Command(workspace, look))
            assert (result.exit_code == 0) == trusted
            assert (await world.commands.run(Command(workspace, ("git", "status", "-s")))).output == ""


async def test_a_sparse_fork_shows_its_folders_alone(world: World, commits: tuple[str, str]) -> None:
    with called_by(run_of(commits[0])):
        workspace = await world.artifacts.fork(REPO, sparse=["src"])
        assert "app.py" in (await world.commands.run(Command(workspace, ("ls", "src")))).output
        assert (await world.commands.run(Command(workspace, ("ls", ".dynflow")))).exit_code == 2
        with pytest.raises(ConflictError, match="sparse"):
            await world.artifacts.fork(REPO)
        with pytest.raises(InvalidInputError, match=r"\.\./x"):
            await world.artifacts.fork(REPO, sparse=["../x"])


async def test_a_workspace_is_forked_as_a_step_left_it(world: World, commits: tuple[str, str]) -> None:
    with called_by(run_of(commits[0])):
        workspace = await world.artifacts.fork(REPO)
        for step in ("one", "two"):
            with called_by(run_of(commits[0]), step=step):
                await world.commands.run(Command(workspace, ("touch", step)))
        with called_by(run_of(commits[0]), step="go back"):
            again = await world.artifacts.fork_snapshot(workspace, "one")
            assert again != workspace
            assert await world.artifacts.fork_snapshot(workspace, "one") == again
        listed = (await world.commands.run(Command(again, ("ls",)))).output.split()
        assert ("one" in listed, "two" in listed) == (True, False)
        with called_by(run_of(commits[0]), step="other"):
            with pytest.raises(NotFoundError, match="three"):
                await world.artifacts.fork_snapshot(workspace, "three")
            for wrong in (None, "x", 5):
                with pytest.raises(InvalidInputError):
                    await world.artifacts.fork_snapshot(wrong, "one")
            with pytest.raises(InvalidInputError):
                await world.artifacts.fork_snapshot(workspace, 5)
    with called_by(run_of(commits[0], run_id="2" * 32)), pytest.raises(ForbiddenError, match="not belong"):
        await world.artifacts.fork_snapshot(workspace, "one")


@pytest.mark.parametrize("option", ["submodules", "lfs"])
@pytest.mark.parametrize("value", ["yes", 1, None])
async def test_what_a_fork_brings_is_said_by_true_or_false(
    world: World, commits: tuple[str, str], option: str, value: Any
) -> None:
    with called_by(run_of(commits[0])), pytest.raises(InvalidInputError, match=f"{option}=…"):
        await world.artifacts.fork(REPO, **{option: value})


async def test_a_commit_that_is_not_there_is_named(world: World, commits: tuple[str, str]) -> None:
    with called_by(run_of(commits[0])), pytest.raises(NotFoundError, match="2" * 40):
        await world.artifacts.fork(REPO, sha="2" * 40)


@pytest.mark.parametrize("sha", ["main", "", 5, "0" * 39, "../../x"])
async def test_a_commit_is_named_in_full(world: World, commits: tuple[str, str], sha: Any) -> None:
    with called_by(run_of(commits[0])), pytest.raises(InvalidInputError, match="full commit id"):
        await world.artifacts.fork(REPO, sha=sha)


async def test_another_repository_is_out_of_reach(world: World, commits: tuple[str, str]) -> None:
    with called_by(run_of(commits[0])), pytest.raises(ForbiddenError, match="somebody/else"):
        await world.artifacts.fork("somebody/else", sha=commits[0])


async def test_a_command_runs_in_a_workspace_of_its_own_run_only(
    world: World, commits: tuple[str, str]
) -> None:
    with called_by(run_of(commits[0])):
        workspace = await world.artifacts.fork(REPO)
        result = await world.commands.run(Command(workspace, ("cat", "src/app.py")))
        assert "def answer" in result.output
    with (
        called_by(run_of(commits[0], run_id="2" * 32)),
        pytest.raises(ForbiddenError, match="not belong to this run"),
    ):
        await world.commands.run(Command(workspace, ("cat", "src/app.py")))


@pytest.mark.parametrize("argument", [None, "rm -rf", {"argv": ["true"]}, 5])
async def test_what_is_no_command_is_refused(world: World, commits: tuple[str, str], argument: Any) -> None:
    with called_by(run_of(commits[0])), pytest.raises(InvalidInputError, match="takes a Command"):
        await world.commands.run(argument)


async def test_a_workspace_id_that_is_no_text_is_refused(world: World, commits: tuple[str, str]) -> None:
    hostile = Workspace(cast("str", ["x"]), REPO, commits[0])
    with called_by(run_of(commits[0])), pytest.raises(ForbiddenError):
        await world.commands.run(Command(hostile, ("true",)))


async def test_a_forks_pull_request_gets_no_network(world: World, commits: tuple[str, str]) -> None:
    identity = run_of(commits[0], trusted=False)
    with called_by(identity):
        workspace = await world.artifacts.fork(REPO)
        with pytest.raises(ForbiddenError, match="from forks"):
            await world.commands.run(Command(workspace, ("true",), network=True))
        with pytest.raises(ForbiddenError, match="network"):
            await world.commands.run(Command(workspace, ("true",), network=("example.org",)))


async def test_containers_can_be_switched_off(tmp_path: Path) -> None:
    world = World(tmp_path, {"allow_containers": False})
    command = Command(Workspace("1" * 32 + ".x-1", REPO, "0" * 40), ("true",), sandbox="container")
    with called_by(run_of("0" * 40)), pytest.raises(ForbiddenError, match="allow_containers"):
        await world.commands.run(command)


async def test_work_outside_of_a_step_is_refused(world: World, commits: tuple[str, str]) -> None:
    with called_by(run_of(commits[0]), step=None), pytest.raises(FailedError, match="belongs into a step"):
        await world.artifacts.fork(REPO)


async def test_who_is_no_run_reaches_nothing(world: World) -> None:
    with called_by(None), pytest.raises(ForbiddenError):
        await world.artifacts.fork(REPO)


@pytest.mark.parametrize("other", ["a-b", "a.b", "a  b"])
async def test_steps_of_like_names_have_workspaces_of_their_own(
    world: World, commits: tuple[str, str], other: str
) -> None:
    with called_by(run_of(commits[0])):
        with called_by(run_of(commits[0]), step="a b"):
            first = await world.artifacts.fork(REPO)
        with called_by(run_of(commits[0]), step=other):
            second = await world.artifacts.fork(REPO)
        assert first.id != second.id
        with called_by(run_of(commits[0]), step=first.id.partition(".")[2].removesuffix("-1")):
            assert await world.artifacts.fork(REPO) not in (first, second)


async def test_a_forks_pull_request_names_no_image(tmp_path: Path) -> None:
    world = World(tmp_path)
    command = Command(Workspace("1" * 32 + ".x-1", REPO, "0" * 40), ("true",), "container", "private:1")
    with called_by(run_of("0" * 40, trusted=False)), pytest.raises(ForbiddenError, match="image"):
        await world.commands.run(command)
    beside = replace(command, image=None, services=(Service("private:1", port=1),))
    with called_by(run_of("0" * 40, trusted=False)), pytest.raises(ForbiddenError, match="image"):
        await world.commands.run(beside)
    # A trusted run gets past this, to what is not there.
    with called_by(run_of("0" * 40)), pytest.raises(FailedError, match="no sandbox of kind"):
        await world.commands.run(command)


async def test_a_what_if_reaches_its_own_copies_and_publishes_nothing(
    world: World, commits: tuple[str, str]
) -> None:
    source = run_of(commits[0])
    tried = replace(run_of(commits[0], run_id="2" * 32), ancestors=(source.run_id,))
    with called_by(source, step="checkout"):
        theirs = await world.artifacts.fork(REPO)
    with called_by(source, step="install"):
        await world.commands.run(Command(theirs, ("sh", "-c", "echo before > made")))
    kept = [("checkout", 1), ("install", 1)]
    forks = WorkspaceForks(world.root / "workspaces", world.workspaces, durable=False)
    for _ in range(2):
        await forks.fork(source.run_id, tried.run_id, kept, None)
    with called_by(tried, step="test"):  # the result of `checkout` names the other run's
        found = await world.commands.run(Command(theirs, ("sh", "-c", "cat made; echo after > made")))
    assert found.output == "before\n"
    assert await world.workspaces.read(theirs.id, "made") == b"before\n"
    own = theirs.id.replace(source.run_id, tried.run_id)
    assert await world.workspaces.read(own, "made") == b"after\n"
    with called_by(source, step="test"), pytest.raises(ForbiddenError, match="does not belong"):
        await world.commands.run(Command(replace(theirs, id=own), ("true",)))
    making = cast("Any", object())  # nothing of it is reached
    pushes: dict[str, Any] = {"push_images": "registry/x"}
    images = ImagesCapability(making, Settings(data=world.root / "data", **pushes))
    with called_by(tried, step="push"), pytest.raises(ForbiddenError, match="publishes nothing"):
        await images.build(theirs, tags=["v1"], push=True)
