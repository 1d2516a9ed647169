"""Commands in containers that outlive the platform: killed, it finds them again, with every byte they printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ci_platform.sandboxes import SandboxJob, SandboxOutcome, Tree
from ci_platform.sandboxes.container import ContainerSandbox, Warm
from tests.ci_platform.test_container_warm import containers, mounted, places
from tests.contracts.test_sandboxes import SOON, Run, eventually, limits
from tests.docker_engine import IMAGE, require_image
from tests.tiny_image import docker

pytestmark = [
    pytest.mark.docker,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="commands in containers survive where root keeps them warm"),
]

WAYS: tuple[Warm, ...] = ("agent", "engine")
"""Who runs commands in warm containers."""

PLATFORM = """
import asyncio, sys
from datetime import timedelta
from pathlib import Path
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.container import ContainerSandbox

async def main():
    image, warm, scope, folder, script, leaving, *folders = sys.argv[1:]
    upper, work, lower = map(Path, folders)
    sandbox = ContainerSandbox(image=image, warm=warm)
    job = SandboxJob("job", ("bash", "-c", script), Tree(upper, work, (lower,)), scope=scope, survive=Path(folder))
    begun = asyncio.Event()

    def take(piece):
        print(piece.decode(), end="", flush=True)
        begun.set()

    task = asyncio.ensure_future(sandbox.run(job, take))
    if leaving == "leaving":
        await begun.wait()
        sandbox.detach()
        task.cancel()
        await asyncio.wait([task])
        await sandbox.close()
        print("left", flush=True)
    else:
        await task
        print("over", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


class Survival(Run):
    """Runs commands of one run, and goes on with those of a process that was killed."""

    sandbox: ContainerSandbox


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Survival]:
    require_image()
    sandbox = ContainerSandbox(image=IMAGE)
    run = Survival(sandbox, tmp_path)
    run.scope = f"run-{os.getpid()}-{tmp_path.name}"
    (tmp_path / "folder").mkdir()
    yield run
    await sandbox.close()
    assert containers(run.scope) == []
    assert places(os.getpid()) == []


@contextmanager
def platform(
    run: Run, script: str, tree: Tree, *, leaving: bool = False, warm: Warm = "agent"
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the job in another process, which is killed at the end of the block."""
    folders = [str(path) for path in (tree.upper, tree.work, tree.lowers[0])]
    folder, how = str(run.home / "folder"), "leaving" if leaving else "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", PLATFORM, IMAGE, warm, run.scope, folder, script, how, *folders],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


async def read_until(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdout is not None
    with anyio.fail_after(SOON):
        while await anyio.to_thread.run_sync(process.stdout.readline) != line:
            pass


async def resume(run: Survival, tree: Tree, **options: object) -> SandboxOutcome | None:
    run.printed = b""
    job = run.job("never run", tree, **options)
    return await run.sandbox.resume(replace(job, survive=run.home / "folder"), run._take)


@pytest.mark.parametrize("warm", WAYS)
async def test_a_killed_platforms_command_goes_on_and_its_output_has_no_gap(
    run: Survival, warm: Warm
) -> None:
    tree = run.tree()
    script = "for n in $(seq 1 300); do echo line $n; sleep 0.01; done; echo made >new; exit 3"
    with platform(run, script, tree, warm=warm) as process:
        await read_until(process, b"line 20\n")
    assert await run.sandbox.sweep() >= 0
    outcome = await resume(run, tree)
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason) == (3, "exited")
    assert run.text.splitlines() == [f"line {n}" for n in range(1, 301)]
    assert outcome.duration >= timedelta(seconds=3)
    assert (tree.upper / "new").read_text() == "made\n"
    assert not mounted(f"dynflow-tree-{process.pid}-") or places(process.pid)
    run.sandbox.settled(run.home / "folder")
    assert places(process.pid) == []
    assert await resume(run, tree) is None


@pytest.mark.parametrize("warm", WAYS)
async def test_a_command_that_ended_while_the_platform_was_away_is_found_with_its_end(
    run: Survival, warm: Warm
) -> None:
    tree = run.tree()
    with platform(run, "echo up; sleep 1; echo the last words; exit 7", tree, warm=warm) as process:
        await read_until(process, b"up\n")
    (container,) = containers(run.scope)
    # Its shell and all it ran are gone: docker-init and what keeps the container are left.
    await eventually(lambda: len(docker("top", container, "-o", "pid").splitlines()) == 3)
    await run.sandbox.sweep()
    outcome = await resume(run, tree)
    assert outcome is not None
    assert (outcome.exit_code, run.text) == (7, "up\nthe last words\n")
    run.sandbox.settled(run.home / "folder")


async def test_what_has_ended_is_found_again_until_it_is_settled(run: Survival) -> None:
    tree = run.tree()
    with platform(run, "echo all of it; echo made >new; exit 4", tree) as process:
        await read_until(process, b"over\n")
    await run.sandbox.sweep()
    for _ in range(2):  # also when the next platform is killed before it has settled this
        other = ContainerSandbox(image=IMAGE)
        run.sandbox, mine = other, run.sandbox
        outcome = await resume(run, tree)
        assert outcome is not None
        assert (outcome.exit_code, run.text) == (4, "all of it\n")
        run.sandbox = mine
        await other.close()
    await run.sandbox.sweep()
    await resume(run, tree)
    run.sandbox.settled(run.home / "folder")
    assert places(process.pid) == []


async def test_a_platform_that_stops_leaves_its_command_to_the_next(run: Survival) -> None:
    tree = run.tree()
    with platform(run, "for n in $(seq 1 100); do echo $n; sleep 0.02; done", tree, leaving=True) as process:
        await read_until(process, b"left\n")
    await run.sandbox.sweep()
    outcome = await resume(run, tree)
    assert outcome is not None
    assert outcome.exit_code == 0
    assert run.text.splitlines() == [str(n) for n in range(1, 101)]
    run.sandbox.settled(run.home / "folder")


async def test_limits_hold_for_a_command_that_is_found_again(run: Survival) -> None:
    tree = run.tree()
    with platform(run, "echo up; sleep 600", tree) as process:
        await read_until(process, b"up\n")
    await run.sandbox.sweep()
    outcome = await resume(run, tree, limits=limits(timeout=timedelta(seconds=2)))
    assert outcome is not None
    assert outcome.reason == "timeout"
    run.sandbox.settled(run.home / "folder")


async def test_what_nobody_asks_for_any_more_is_killed(run: Survival) -> None:
    tree = run.tree()
    with platform(run, "echo up; sleep 600", tree) as process:
        await read_until(process, b"up\n")
    await run.sandbox.sweep()
    assert len(containers(run.scope)) == 1
    await run.sandbox.abandon(run.home / "folder")
    assert containers(run.scope) == []
    assert places(process.pid) == []
    assert await resume(run, tree) is None


async def test_without_its_folder_a_command_is_swept(run: Survival) -> None:
    tree = run.tree()
    with platform(run, "echo up; sleep 600", tree) as process:
        await read_until(process, b"up\n")
    (run.home / "folder" / "container.json").unlink()
    assert await run.sandbox.sweep() >= 2
    assert containers(run.scope) == []
    assert places(process.pid) == []


async def test_a_folder_that_says_nonsense_is_no_command(run: Survival) -> None:
    for text in ("", "[]", '{"container": 1}', "{"):
        (run.home / "folder" / "container.json").write_text(text)
        job: SandboxJob = replace(run.job("true"), survive=run.home / "folder")
        assert await run.sandbox.resume(job, lambda _: None) is None
        await run.sandbox.abandon(run.home / "folder")
