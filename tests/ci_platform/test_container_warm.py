"""Containers kept warm between the commands of one run, on a real engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ci_platform.sandboxes.container import ContainerSandbox
from tests.contracts.test_sandboxes import NAP, SOON, Run, sleepers
from tests.docker_engine import IMAGE, killed_platform, require_image
from tests.tiny_image import docker, forget_image, make_image

pytestmark = [
    pytest.mark.docker,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers are kept warm by root alone"),
]


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    require_image()
    sandbox = ContainerSandbox(image=IMAGE)
    run = Run(sandbox, tmp_path)
    run.scope = f"run-{os.getpid()}-{tmp_path.name}"
    yield run
    await sandbox.close()
    assert containers(run.scope) == []
    assert places(os.getpid()) == []


def containers(scope: str) -> list[str]:
    return docker("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label=dynflow.run={scope}").split()


def places(pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"dynflow-tree-{pid}-*"))


def mounted(name: str) -> bool:
    return name in Path("/proc/self/mountinfo").read_text()


async def test_the_next_command_of_a_run_enters_the_container_of_the_last(run: Run) -> None:
    base = run.layer("base", {"file": "first"})
    assert (await run("cat file; echo made >new", run.tree(base))).exit_code == 0
    (first,) = containers(run.scope)
    # Another tree: what is mounted in the container is each command's own.
    tree = run.tree(run.layer("other", {"file": "second"}))
    assert (await run("cat file; ls; echo changed >file", tree)).exit_code == 0
    assert run.text == "secondfile\n"
    assert (tree.upper / "file").read_text() == "changed\n"
    assert containers(run.scope) == [first]


async def test_commands_side_by_side_have_containers_of_their_own(run: Run) -> None:
    async with anyio.create_task_group() as tasks:
        for tree in [run.tree(), run.tree()]:
            job = run.job("test -z $(ls /tmp); touch /tmp/here; sleep 1; ls /proc | grep -c '^[0-9]'", tree)
            tasks.start_soon(run.sandbox.run, job, lambda _: None)
    assert len(containers(run.scope)) == 2


async def test_neither_another_run_nor_another_image_enters_it(run: Run) -> None:
    other = make_image("dynflow-test/other:1")
    try:
        await run("true")
        (mine,) = containers(run.scope)
        await run("true", image="dynflow-test/other:1")
        assert len(containers(run.scope)) == 2
        job = replace(run.job("true"), scope=f"{run.scope}-other")
        await run.sandbox.run(job, lambda _: None)
        assert len(containers(f"{run.scope}-other")) == 1
        await run.sandbox.release(f"{run.scope}-other")
        assert containers(f"{run.scope}-other") == []
        assert mine in containers(run.scope)
    finally:
        await run.sandbox.release(run.scope)
        forget_image("dynflow-test/other:1", other)


async def test_what_is_left_running_takes_its_container_with_it(run: Run) -> None:
    assert (await run(f"setsid sleep {NAP} & exit 0")).exit_code == 0
    assert containers(run.scope) == []
    assert sleepers() == []


async def test_a_container_let_go_of_while_a_command_runs_ends_with_it(run: Run) -> None:
    up = anyio.Event()
    run.on_output = up.set
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, "echo up; sleep 1; echo done")
        with anyio.fail_after(SOON):
            await up.wait()
        await run.sandbox.release(run.scope)
        assert len(containers(run.scope)) == 1
    assert run.text == "up\ndone\n"
    assert containers(run.scope) == []


async def test_the_engine_runs_each_command_of_an_image_without_a_shell_in_a_fresh_container(
    run: Run,
) -> None:
    made = make_image("dynflow-test/shell-less:1", programs=("true", "cat"))
    run.sandbox = ContainerSandbox(image=IMAGE, warm="engine")
    try:
        for _ in range(2):
            assert (await run(("true",), image="dynflow-test/shell-less:1")).exit_code == 0
            assert (await run(("no-such",), image="dynflow-test/shell-less:1")).exit_code == 127
            assert containers(run.scope) == []
    finally:
        await run.sandbox.close()
        forget_image("dynflow-test/shell-less:1", made)


async def test_emptying_a_container_never_leaves_it(run: Run, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "ci").mkdir(parents=True)
    (victim / "ci" / "precious").write_text("x")
    # Followed from outside, the image's link leads to a folder of the host's.
    made = make_image("dynflow-test/linked:1", links={"home": str(victim)})
    try:
        assert (await run("true", image="dynflow-test/linked:1")).exit_code == 0
        assert (victim / "ci" / "precious").read_text() == "x"
        (pid,) = [
            docker("inspect", "--format", "{{.State.Pid}}", name) for name in containers(run.scope)
        ] or ["0"]
        assert pid == "0"  # it was not used again
    finally:
        forget_image("dynflow-test/linked:1", made)


async def test_a_command_that_opens_its_output_by_name_loses_nothing(run: Run) -> None:
    script = "for n in 1 2 3; do echo $n >/dev/stdout; echo -$n >/dev/stderr; done"
    for _ in range(3):
        await run(script)
        assert run.text == "1\n-1\n2\n-2\n3\n-3\n"


DOOMED = """
import asyncio, sys
from pathlib import Path
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.container import ContainerSandbox

async def main():
    image, scope, *folders = sys.argv[1:]
    upper, work, lower = map(Path, folders)
    sandbox = ContainerSandbox(image=image)
    tree = Tree(upper, work, (lower,))
    await sandbox.run(SandboxJob("first", ("true",), tree, scope=scope), lambda piece: None)
    print("warm", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_warm_containers_of_a_killed_platform_are_swept_with_their_places(run: Run) -> None:
    pid = await killed_platform(DOOMED, run.scope, run.tree(), "warm", SOON)
    left = f"dynflow-tree-{pid}-"
    assert len(containers(run.scope)) == 1
    assert mounted(left)
    assert await run.sandbox.sweep() >= 2
    assert containers(run.scope) == []
    assert not mounted(left)
    assert places(pid) == []
