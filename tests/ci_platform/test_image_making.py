"""Images that runs make, through their capability, on a real engine: builds, pushes, snapshots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from ci_platform import copy_on_write
from ci_platform.capabilities import RunIdentity
from ci_platform.dockerfiles import checked
from ci_platform.errors import FailedError, ForbiddenError, ImageNotFoundError, InvalidInputError
from ci_platform.garbage import Allowance
from ci_platform.garbage.collector import Collector
from ci_platform.garbage.images import MadeImages
from ci_platform.image_capability import ImagesCapability
from ci_platform.image_making import ImageMaking
from ci_platform.images import PinnedImages
from ci_platform.logs import LogKey, Logs
from ci_platform.model import Repository, Run, RunImage
from ci_platform.sandboxes import SandboxLimits
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.settings import load_settings
from ci_platform.source import Remote, Source
from ci_platform.store import Store, Transaction
from ci_platform.workspaces import Workspaces
from dynflow.clock import SystemClock
from pipelines.contract import Workspace
from tests.ci_platform.git_repositories import working_copy
from tests.ci_platform.test_capabilities import called_by
from tests.contracts.test_sandboxes import Run as Commands
from tests.docker_engine import IMAGE, require_image
from tests.registry import serve_registry
from tests.tiny_image import docker, forget_image, make_image

REPO, RUN = "ada/engine", "1" * 32
DOCKERFILE = f"FROM {IMAGE}\nCOPY hello /hello\nRUN cat /hello && id -u\n"


@dataclass
class Bench:
    images: ImagesCapability
    workspace: Workspace
    logs: Logs
    sandbox: ContainerSandbox
    sha: str
    home: Path
    store: Store
    pinned: PinnedImages
    step: int = 0

    def calling(self, *, trusted: bool = True, repo: str = REPO) -> Any:
        self.step += 1
        identity = RunIdentity(RUN, repo, self.sha, None, trusted)
        return called_by(identity, step=f"step{self.step}")

    async def log(self) -> str:
        chunk = await self.logs.read(LogKey(RUN, f"step{self.step}", 1))
        return "\n".join(line.text for line in chunk.lines)

    async def run(self, script: str, image: str) -> str:
        commands = Commands(self.sandbox, self.home)
        outcome = await commands(script, image=image)
        assert outcome.exit_code == 0, commands.text
        return commands.text


async def make_bench(home: Path, files: dict[str, bytes], **settings: Any) -> Bench:
    remote = working_copy(home / "remote")
    sha = remote.commit(files)
    source = Source(home / "source", allow_file=True)
    await source.fetch(REPO, sha, Remote(remote.url))
    workspaces = Workspaces(
        home / "workspaces", source, copy_on_write.probe(home / "workspaces"), durable=False
    )
    store, clock = Store(f"sqlite:///{home / 'platform.db'}"), SystemClock()
    await store.open()

    def add(tx: Transaction) -> None:
        tx.add(Repository(name=REPO, forge="local", created_at=clock.now()))
        tx.add(
            Run(
                id=RUN,
                repo=REPO,
                number=1,
                event="push",
                action="push",
                sha=sha,
                ref="refs/heads/main",
                branch="main",
                created_at=clock.now(),
            )
        )

    await store.write(add)
    logs, sandbox, pinned = Logs(home / "logs"), ContainerSandbox(image=IMAGE), PinnedImages(store, clock)
    making = ImageMaking(
        store,
        clock,
        workspaces=workspaces,
        logs=logs,
        images=pinned,
        sandbox=sandbox,
        limits=SandboxLimits(),
    )
    images = ImagesCapability(making, load_settings({"data": home / "data", **settings}, {}))
    workspace = await workspaces.fork(f"{RUN}.fork", REPO, sha)
    return Bench(images, workspace, logs, sandbox, sha, home, store, pinned)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    require_image()
    files = {
        "Dockerfile": DOCKERFILE.encode(),
        "hello": b"hello from the workspace\n",
        "broken.dockerfile": f"FROM {IMAGE}\nRUN echo out of luck && exit 3\n".encode(),
        "opinion.dockerfile": b"FROM dynflow-test/onbuild:1\n",
    }
    bench = await make_bench(tmp_path, files)
    (tmp_path / "commands").mkdir()
    bench.home = tmp_path / "commands"
    yield bench
    await bench.sandbox.close()
    left = docker("images", "--quiet", "--filter", "reference=dynflow-made/*").split()
    forget_image(*left)


@pytest.mark.docker
async def test_a_build_has_the_workspaces_files_and_its_image_runs_commands(bench: Bench) -> None:
    with bench.calling():
        built = await bench.images.build(bench.workspace)
    assert built.image.startswith("sha256:")
    assert built.pushed == ()
    assert "hello from the workspace" in await bench.log()
    assert await bench.run("cat /hello", built.image) == "hello from the workspace\n"


@pytest.mark.docker
async def test_a_build_that_fails_is_the_tenants_with_what_it_said(bench: Bench) -> None:
    with bench.calling(), pytest.raises(FailedError, match="returned a non-zero code: 3"):
        await bench.images.build(bench.workspace, "broken.dockerfile")
    assert "out of luck" in await bench.log()


@pytest.mark.docker
@pytest.mark.parametrize("name", ["nowhere", "../../etc/passwd", "/etc/passwd", "."])
async def test_a_dockerfile_is_a_file_of_the_workspace(bench: Bench, name: str) -> None:
    with bench.calling(), pytest.raises(FailedError, match="Dockerfile"):
        await bench.images.build(bench.workspace, name)


@pytest.mark.docker
async def test_a_base_image_may_not_bring_instructions_of_its_own(bench: Bench) -> None:
    made = make_image("dynflow-test/plain:1")
    text = b"FROM dynflow-test/plain:1\nONBUILD ADD http://127.0.0.1/secret /\n"
    subprocess.run(  # noqa: ASYNC221 - nothing else goes on
        ["docker", "build", "--quiet", "--tag", "dynflow-test/onbuild:1", "-"],
        input=text,
        check=True,
        capture_output=True,
    )
    try:
        with bench.calling(), pytest.raises(FailedError, match="ONBUILD"):
            await bench.images.build(bench.workspace, "opinion.dockerfile")
    finally:
        forget_image("dynflow-test/onbuild:1", "dynflow-test/plain:1", made)


@pytest.mark.docker
async def test_a_build_is_pushed_under_the_repositorys_name_alone(tmp_path: Path) -> None:
    require_image()
    made = make_image("dynflow-test/tiny:1")
    with serve_registry() as registry:
        files = {"Dockerfile": b"FROM dynflow-test/tiny:1\nCOPY Dockerfile /\n"}
        bench = await make_bench(tmp_path, files, push_images=f"{registry.host}/ci")
        try:
            with bench.calling():
                built = await bench.images.build(bench.workspace, tags=["1.0", "latest"], push=True)
            digest = registry.tags[f"ci/{REPO}:1.0"]
            assert built.pushed[0] == f"{registry.host}/ci/{REPO}:1.0@{digest}"
            assert registry.tags[f"ci/{REPO}:latest"] == digest
            # The name stays no image of this machine, where another run could take it for the registry's.
            listed = docker("images", "--format", "{{.Repository}}:{{.Tag}}")
            assert f"{registry.host}/ci/{REPO}:1.0" not in listed
            for tags in ([], ["a b"], ["other/repo:1"], ["x:y"], [1], "latest", ["t"] * 11):
                with bench.calling(), pytest.raises(InvalidInputError, match="tags"):
                    await bench.images.build(bench.workspace, tags=tags, push=True)
        finally:
            await bench.sandbox.close()
            left = docker("images", "--quiet", "--filter", "reference=dynflow-made/*").split()
            forget_image(*left, "dynflow-test/tiny:1", made)


@pytest.mark.docker
async def test_a_snapshot_is_made_once_and_later_commands_start_from_it(bench: Bench) -> None:
    install = ["sh", "-c", 'mkdir /opt/tool && echo "made by $(id -u)" >/opt/tool/it && echo installing']
    with bench.calling():
        first = await bench.images.snapshot(bench.workspace, install, key="tool 1", env={"TOKEN": "hush"})
    assert "installing" in await bench.log()
    assert await bench.run("cat /opt/tool/it", first) == "made by 0\n"
    with bench.calling():
        again = await bench.images.snapshot(bench.workspace, ["false"], key="tool 1")
    assert again == first
    assert "snapshot 'tool 1' is there" in await bench.log()
    kept = json.loads(docker("image", "inspect", first))[0]["Config"]
    assert "hush" not in json.dumps(kept)
    assert not any(kept["Labels"].values())
    with bench.calling(repo="somebody/else"):
        other = await bench.images.snapshot(bench.workspace, ["true"], key="tool 1")
    assert other != first


@pytest.mark.docker
async def test_a_snapshot_that_is_gone_is_made_anew(bench: Bench) -> None:
    with bench.calling():
        first = await bench.images.snapshot(bench.workspace, ["true"], key="k")
    forget_image(first)
    bench.sandbox._images.forget(first)
    with bench.calling():
        second = await bench.images.snapshot(bench.workspace, ["sh", "-c", "echo x >/new"], key="k")
    assert second != first
    assert "made anew" in await bench.log()


@pytest.mark.docker
async def test_images_that_runs_have_made_are_collected_when_no_run_may_use_them(bench: Bench) -> None:
    still_open = {RUN}

    async def open_runs() -> set[str]:
        return still_open

    with bench.calling():
        snapshot = await bench.images.snapshot(bench.workspace, ["sh", "-c", "echo x >/new"], key="k")
    with bench.calling():
        built = (await bench.images.build(bench.workspace)).image
    allowance = Allowance(1, timedelta())
    store = MadeImages(bench.sandbox, bench.pinned, bench.store, allowance, still_open=open_runs)
    items = {item.name: item for item in await store.items()}
    assert {items[name].pinned for name in (snapshot, built)} == {"a run that has not ended may use it"}
    assert (items[snapshot].repo, items[snapshot].size < 1_000_000) == (REPO, True), "its own bytes alone"
    assert await store.collect(snapshot) is False
    still_open.clear()
    user = docker("run", "--detach", built, "sleep", "60").strip()
    assert await store.collect(built) is False, "a container uses it"
    docker("rm", "--force", user)
    report = await Collector([store], SystemClock()).collect()
    assert {item.name for item in report.items} >= {snapshot, built}
    assert await store.items() == []
    other = MadeImages(
        ContainerSandbox(home="other"), bench.pinned, bench.store, allowance, still_open=open_runs
    )
    with bench.calling():
        again = await bench.images.snapshot(bench.workspace, ["true"], key="k")
    assert again != snapshot
    assert (await other.items(), await other.collect(again)) == ([], False), "it is another platform's"
    await other._maker.close()


@pytest.mark.docker
async def test_a_snapshot_is_never_given_to_a_run_while_it_is_being_collected(bench: Bench) -> None:
    """Whichever comes first: the run holds it, and it stays; or it goes, and is made anew."""
    with bench.calling():
        first = await bench.images.snapshot(bench.workspace, ["true"], key="k")
    await bench.store.write(lambda tx: tx.remove(RunImage))
    asked, answer = anyio.Event(), anyio.Event()

    async def open_runs() -> set[str]:
        asked.set()
        await answer.wait()
        return {RUN}

    store = MadeImages(
        bench.sandbox, bench.pinned, bench.store, Allowance(1, timedelta()), still_open=open_runs
    )
    given = list[str]()

    async def ask() -> None:
        with bench.calling():
            given.append(await bench.images.snapshot(bench.workspace, ["sh", "-c", "echo >/new"], key="k"))

    async with anyio.create_task_group() as group:

        async def collect() -> None:
            assert await store.collect(first), "nobody had it when it was asked"

        group.start_soon(collect)
        await asked.wait()  # the collection knows by now that no run was given it
        group.start_soon(ask)
        while bench.pinned._turns._locks[first][1] < 2:  # and the run waits
            await anyio.lowlevel.checkpoint()
        answer.set()
    assert given != [first]
    assert await store.collect(given[0]) is False, "the run has it"
    assert await bench.run("ls /new", given[0]) == "/new\n"


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_before_any_request_to_the_engine_leaves_whole_images_and_no_container(tmp_path: Path) -> None:
    require_image()
    every = "12" if os.environ.get("CI") else "1"
    command = [sys.executable, "-m", "tests.ci_platform.killed_images", str(tmp_path / "platform"), every]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 10


@pytest.mark.docker
async def test_an_engine_that_counts_for_minutes_holds_up_nothing_else(bench: Bench) -> None:
    async def none() -> set[str]:
        return set()

    allowance = Allowance(1, timedelta())
    store = MadeImages(bench.sandbox, bench.pinned, bench.store, allowance, still_open=none, patience=0)
    (kind,) = (await Collector([store], SystemClock()).collect()).kinds
    assert "does not say within 0 s" in (kind.trouble or "")


@pytest.mark.docker
async def test_a_name_that_is_gone_is_held_by_nobody(bench: Bench) -> None:
    with bench.calling():
        first = await bench.images.snapshot(bench.workspace, ["true"], key="k")
    await bench.store.write(lambda tx: tx.remove(RunImage))
    assert await bench.sandbox.remove_made(first)
    for hold in (bench.pinned.hold, bench.pinned.pin):
        with pytest.raises(ImageNotFoundError):
            await hold(bench.sandbox, RUN, first, print)
    assert await bench.store.read(lambda tx: tx.all(RunImage)) == []


@pytest.mark.docker
async def test_an_install_that_fails_leaves_no_snapshot(bench: Bench) -> None:
    with bench.calling(), pytest.raises(FailedError, match="exited with 5: there is no snapshot"):
        await bench.images.snapshot(bench.workspace, ["sh", "-c", "echo trouble; exit 5"], key="k")
    assert "trouble" in await bench.log()
    with bench.calling():
        assert (await bench.images.snapshot(bench.workspace, ["true"], key="k")).startswith("sha256:")


@pytest.mark.docker
async def test_an_install_reaches_neither_engine_nor_host(bench: Bench) -> None:
    probe = (
        "test ! -e /var/run/docker.sock && ! mount -t tmpfs none /mnt 2>/dev/null && ! ls /sys/class/net | grep eth"
        " && grep -q '^NoNewPrivs:.1' /proc/self/status"
    )
    with bench.calling():
        await bench.images.snapshot(bench.workspace, ["sh", "-c", probe], key="probe")


@pytest.mark.docker
async def test_who_may_make_no_images_is_told_why(bench: Bench) -> None:
    with bench.calling(trusted=False), pytest.raises(ForbiddenError, match="pull requests from forks"):
        await bench.images.build(bench.workspace)
    with bench.calling(trusted=False), pytest.raises(ForbiddenError, match="pull requests from forks"):
        await bench.images.snapshot(bench.workspace, ["true"], key="k")
    with bench.calling(), pytest.raises(ForbiddenError, match="push_images"):
        await bench.images.build(bench.workspace, tags=["1"], push=True)
    with bench.calling(), pytest.raises(ForbiddenError, match="does not belong to this run"):
        await bench.images.build(Workspace("2" * 32 + ".x", REPO, bench.sha))
    off = ImagesCapability(None, load_settings({"data": bench.home, "allow_containers": False}, {}))
    with bench.calling(), pytest.raises(ForbiddenError, match="allow_containers"):
        await off.build(bench.workspace)


@pytest.mark.docker
@pytest.mark.parametrize(
    "options",
    [
        {"argv": [], "key": "k"},
        {"argv": "true", "key": "k"},
        {"argv": ["true"], "key": ""},
        {"argv": ["true"], "key": "k" * 201},
        {"argv": ["true"], "key": 1},
        {"argv": ["a\0b"], "key": "k"},
        {"argv": ["true"], "key": "k", "env": {"A": 1}},
        {"argv": ["true"], "key": "k", "image": 5},
    ],
)
async def test_what_is_no_snapshot_is_refused(bench: Bench, options: dict[str, Any]) -> None:
    with bench.calling(), pytest.raises(InvalidInputError):
        await bench.images.snapshot(bench.workspace, **options)


# --- Dockerfiles ---


async def pin(name: str) -> str:
    if name.startswith("missing"):
        raise ImageNotFoundError(name)
    return f"exact-{name}"


async def test_a_dockerfile_starts_from_exact_images() -> None:
    text = "\n# a comment\nFROM a:1 AS one\nRUN echo a \\\n  # inside\n  b\nFROM one\nCOPY --from=one /x /x\nFROM b\n"
    assert await checked(text, pin) == (
        "FROM exact-a:1 AS one\nRUN echo a   b\nFROM one\nCOPY --from=one /x /x\nFROM exact-b\n"
    )
    with pytest.raises(ImageNotFoundError):
        await checked("FROM missing", pin)


@pytest.mark.parametrize(
    "text",
    [
        "FROM a\nADD http://169.254.169.254/ /x",
        "FROM a\nadd x /x",
        "FROM a\nRUN true\nAD\\\nD http://127.0.0.1/ /x",
        "FROM a\nONBUILD RUN true",
        "ARG B=a\nFROM $B",
        "FROM ${B:-a}",
        "# escape=`\nFROM a\nRUN x `\nADD http://x /",
        "#syntax=docker/dockerfile:1\nFROM a",
        "\ufeff# escape=`\nFROM a",
        "FROM a\nCOPY --from=other/image /x /x",
        "RUN true",
        "",
        "FROM a b c",
        "FROM a\nRUN " + "x" * 200_001,
    ],
)
async def test_a_dockerfile_that_could_reach_further_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="Dockerfile"):
        await checked(text, pin)
