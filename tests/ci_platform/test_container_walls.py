"""What a container of commands may use and whose its files are, on a real engine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ci_platform.sandboxes import MEBIBYTE, SANDBOX_UID, SandboxLimits
from ci_platform.sandboxes.container import ContainerSandbox
from tests.contracts.test_sandboxes import Run
from tests.docker_engine import IMAGE, require_image
from tests.tiny_image import docker, forget_image, make_image

pytestmark = pytest.mark.docker

QUOTA = "cat /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us"
MEMORY = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
PROCESSES = "cat /sys/fs/cgroup/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids/pids.max"


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    require_image()
    sandbox = ContainerSandbox(image=IMAGE)
    yield Run(sandbox, tmp_path)
    await sandbox.close()


async def test_processors_memory_and_processes_are_limited_by_the_kernel(run: Run) -> None:
    limits = SandboxLimits(cpus=0.5, memory=256 * MEBIBYTE, processes=50)
    assert (await run(f"({QUOTA}); ({MEMORY}); ({PROCESSES})", limits=limits)).exit_code == 0
    quota, memory, processes = run.text.splitlines()
    assert quota.split()[0] == "50000"
    assert int(memory) == 256 * MEBIBYTE
    assert 50 <= int(processes) <= 53


async def test_without_a_limit_a_command_may_use_all_processors(run: Run) -> None:
    await run(QUOTA)
    assert run.text.split()[0] in {"-1", "max"}


async def test_files_that_a_container_makes_belong_to_the_workspaces_owner(run: Run) -> None:
    base = run.layer("base", {"mine": "x"})
    tree = run.tree(base)
    script = "mkdir -p d && echo y >d/new && echo z >>mine && id -u && stat -c %u mine d/new"
    assert (await run(script, tree)).exit_code == 0
    inside = SANDBOX_UID if os.geteuid() == 0 else os.geteuid()
    assert run.text.split() == [str(inside)] * 3
    for made in (tree.upper / "mine", tree.upper / "d", tree.upper / "d" / "new"):
        assert (made.stat().st_uid, made.stat().st_gid) == (
            inside,
            inside if os.geteuid() == 0 else os.getegid(),
        )


async def test_an_image_says_neither_who_runs_nor_where_nor_what(run: Run) -> None:
    made = make_image("dynflow-test/opinionated:0")
    file = run.home / "Dockerfile"
    file.write_text(
        'FROM dynflow-test/opinionated:0\nUSER 0\nWORKDIR /etc\nENTRYPOINT ["/bin/cat"]\n'
        "HEALTHCHECK --interval=1s CMD true\nENV OPINION=kept\n"
    )
    docker("build", "--quiet", "--tag", "dynflow-test/opinionated:1", str(run.home))
    try:
        script = "id -u; pwd; echo $OPINION"
        assert (await run(script, image="dynflow-test/opinionated:1")).exit_code == 0
        uid = SANDBOX_UID if os.geteuid() == 0 else os.geteuid()
        assert run.text.split() == [str(uid), "/workspace", "kept"]
    finally:
        forget_image("dynflow-test/opinionated:1", "dynflow-test/opinionated:0", made)


async def test_a_network_is_there_only_where_it_is_asked_for(tmp_path: Path) -> None:
    require_image()
    network = docker("network", "create", "--internal", f"dynflow-test-{os.getpid()}")
    sandbox = ContainerSandbox(image=IMAGE, network=network)
    run = Run(sandbox, tmp_path)
    try:
        await run("ls /sys/class/net", network=True)
        assert "eth0" in run.text.split()
        await run("ls /sys/class/net")
        assert "eth0" not in run.text.split()
    finally:
        await sandbox.close()
        docker("network", "rm", network)
