"""The agent in warm containers: what it runs has the engine's walls, and what commands do to it harms them alone."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.container import ContainerSandbox, agent_kit
from ci_platform.sandboxes.container.agents import Agent, End
from ci_platform.sandboxes.container.tails import KILLED
from tests.ci_platform.test_container_warm import containers, places
from tests.contracts.test_sandboxes import SOON, Run, eventually, limits
from tests.docker_engine import IMAGE, require_image
from tests.tiny_image import docker, forget_image, make_image

pytestmark = [
    pytest.mark.docker,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers are kept warm by root alone"),
]

EVERYTHING = """
grep -vE '^(Name|State|Pid|Tgid|NS|PPid|Vm|Rss|Hugetlb|.*ctxt|Sig(Q|Cgt)|Thr|x86)' /proc/self/status
grep -v 'pending signals' /proc/self/limits; umask; pwd; env | sort; tty; ulimit -a
cat /proc/self/oom_score_adj /proc/self/cgroup /proc/self/timerslack_ns /proc/self/coredump_filter
for n in cgroup ipc mnt net pid user uts; do
    [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] && echo $n; done
ls /proc/self/fd | grep -vx 3; readlink /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2
set -- $(cat /proc/$$/stat); echo $7; cat /proc/self/mountinfo | cut -d' ' -f5 | grep -v agent | sort
"""
"""What one process may be, have and do, as far as the kernel tells it."""

AGENT = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline | grep -q '^/.dynflow-agent' && echo ${p#/proc/}; done"
"""Prints the agent's pid."""


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


def first_process(run: Run) -> int:
    (container,) = containers(run.scope)
    return int(docker("inspect", "--format", "{{.State.Pid}}", container))


def agent_of(run: Run) -> int:
    """Return the agent's pid on the host: it is what docker-init has started."""
    first = first_process(run)
    return int(Path(f"/proc/{first}/task/{first}/children").read_text().split()[0])


async def test_a_command_of_the_agents_is_all_that_one_of_the_engines_is(run: Run) -> None:
    """Namespaces, capabilities, filter, groups, limits, signals, environment, descriptors, session: everything."""
    tree = run.tree(run.layer("base", {"here/file": "x"}))
    options: dict[str, object] = {"env": {"SECRET": "s3cr3t"}, "cwd": "here"}
    await run(EVERYTHING, tree, **options)
    by_agent = run.text
    engine = Run(ContainerSandbox(image=IMAGE, warm="engine"), run.home / "engine")
    engine.home.mkdir()
    engine.scope = f"{run.scope}-engine"
    try:
        await engine(EVERYTHING, engine.tree(engine.layer("base", {"here/file": "x"})), **options)
    finally:
        await engine.sandbox.close()
    (first,) = containers(run.scope)
    assert by_agent.replace(first, "ID").splitlines() == [
        line if "/docker/" not in line else line.rpartition("/")[0] + "/ID"
        for line in engine.text.splitlines()
    ]
    assert {"Seccomp:\t2", "NoNewPrivs:\t1", "CapBnd:\t0000000000000000", "pid", "SECRET=s3cr3t"} <= set(
        by_agent.splitlines()
    )


async def test_what_an_image_sets_for_programs_is_there_for_commands_and_not_for_the_agent(run: Run) -> None:
    made = make_image("dynflow-test/preloading:0")
    file = run.home / "Dockerfile"
    file.write_text(
        "FROM dynflow-test/preloading:0\nENV LD_PRELOAD=/no/such.so MINE='a b'\nENTRYPOINT [\"/no\"]\n"
    )
    docker("build", "--quiet", "--tag", "dynflow-test/preloading:1", str(run.home))
    try:
        for _ in range(2):
            assert (
                await run("echo $LD_PRELOAD $MINE $PATH", image="dynflow-test/preloading:1")
            ).exit_code == 0
            assert "/no/such.so a b /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" in run.text
        assert b"LD_PRELOAD" not in environment_of(agent_of(run))
    finally:
        await run.sandbox.release(run.scope)
        forget_image("dynflow-test/preloading:1", "dynflow-test/preloading:0", made)


async def test_an_image_of_one_program_is_entered_too(run: Run) -> None:
    made = make_image("dynflow-test/only-true:1", programs=("true",))
    try:
        assert (await run(("true",), image="dynflow-test/only-true:1")).exit_code == 0
        (first,) = containers(run.scope)
        assert (await run(("no-such",), image="dynflow-test/only-true:1")).ended == "not found"
        assert containers(run.scope) == [first]
    finally:
        await run.sandbox.release(run.scope)
        forget_image("dynflow-test/only-true:1", made)


async def test_an_image_without_a_single_file_is_entered_too(run: Run) -> None:
    """Neither loader nor library is the image's."""
    made = make_image("dynflow-test/empty:1", programs=())
    try:
        for _ in range(2):
            outcome = await run(("no-such",), image="dynflow-test/empty:1")
            assert (outcome.exit_code, outcome.ended, run.text) == (127, "not found", "no-such: not found\n")
            assert len(containers(run.scope)) == 1
    finally:
        await run.sandbox.release(run.scope)
        forget_image("dynflow-test/empty:1", made)


async def test_a_script_without_an_interpreter_is_the_shells(run: Run) -> None:
    tree = run.tree(run.layer("base", {"script": "echo of a shell $1\n"}))
    (tree.lowers[0] / "script").chmod(0o755)
    assert (await run(("./script", "it is"), tree)).exit_code == 0
    assert run.text == "of a shell it is\n"


async def test_no_command_can_look_into_the_agent(run: Run) -> None:
    looks = "; ".join(
        f"cat /proc/$a/{name} >/dev/null && echo {name}" for name in ("environ", "mem", "maps", "auxv")
    )
    await run(
        f"a=$({AGENT}); [ $a ] && echo found; {looks}; ls /proc/$a/fd | head -1;"
        "cat /proc/1/environ >/dev/null && echo control"
    )
    assert [line for line in run.text.splitlines() if not line.startswith(("cat: ", "ls: "))] == [
        "found",
        "control",
    ]
    # What the next command is told does not stay there either.
    await run("true", env={"PASSWORD": "correct horse battery staple"})
    assert b"correct horse" not in memory_of(agent_of(run))
    assert b"dynflow" in memory_of(agent_of(run))


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def memory_of(pid: int) -> bytes:
    found = b""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, mode, *_ = line.split()
            if mode.startswith("rw"):
                begin, end = (int(part, 16) for part in area.split("-"))
                memory.seek(begin)
                found += memory.read(end - begin)
    return found


async def test_what_a_command_is_told_is_in_no_command_line_and_not_known_to_the_engine(run: Run) -> None:
    up = anyio.Event()
    run.on_output = up.set
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run("echo up; sleep 600", env={"PASSWORD": "correct horse"}))
        with anyio.fail_after(SOON):
            await up.wait()
        (container,) = containers(run.scope)
        assert "correct horse" not in docker("inspect", container) + docker(
            "top", container, "-o", "pid,args"
        )
        tasks.cancel_scope.cancel()


async def test_who_kills_the_agent_ends_with_it_and_the_next_command_has_another(run: Run) -> None:
    outcome = await run(f"echo first; kill -9 $({AGENT}); sleep 600")
    assert (outcome.exit_code, outcome.reason, run.text) == (KILLED, "exited", "first\n")
    assert containers(run.scope) == []
    assert (await run("echo well")).exit_code == 0
    assert run.text == "well\n"


async def test_who_stops_the_agent_waits_for_the_end_of_its_own_time(run: Run) -> None:
    outcome = await run(f"kill -STOP $({AGENT})", limits=limits(timeout=timedelta(seconds=1)))
    assert outcome.reason == "timeout"
    assert containers(run.scope) == []


@pytest.mark.parametrize("how", ["prlimit --nofile=64:64 --pid", "renice -n 19 -p"])
async def test_what_the_next_command_would_inherit_takes_its_container_with_it(run: Run, how: str) -> None:
    await run("true")
    (first,) = containers(run.scope)
    assert (await run(f"{how} $({AGENT})")).exit_code == 0
    await run("true")
    assert containers(run.scope) != [first]


async def test_nobody_is_let_in_after_the_agent(run: Run) -> None:
    await run(
        "for n in out code agent; do [ -e /.dynflow/$n ] && echo $n; done; touch /.dynflow/agent || echo no"
    )
    assert run.text.splitlines()[:2] == ["out", "code"]
    assert run.text.splitlines()[-1] == "no"


async def test_what_a_command_writes_where_its_end_is_kept_takes_no_room_from_its_output(run: Run) -> None:
    fill = "head -c 200000000 /dev/zero >/.dynflow/code; head -c 1000000 /dev/zero | tr '\\0' x; exit 3"
    assert (await run(fill)).exit_code == 3
    assert run.printed.endswith(b"x" * 1_000_000)
    assert (await run("exit 4")).exit_code == 4


async def test_an_agent_that_dies_while_it_waits_costs_no_command(run: Run) -> None:
    await run("true")
    (first,) = containers(run.scope)
    os.kill(agent_of(run), 9)
    await eventually(lambda: docker("ps", "--quiet", "--no-trunc", "--filter", f"id={first}") == "")
    assert (await run("echo well")).exit_code == 0
    assert containers(run.scope) != [first]


async def test_where_no_agent_can_be_the_engine_runs_commands_and_that_is_said_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_image("dynflow-test/obstinate:1", {".dynflow-agent": "in the way"})
    try:
        with caplog.at_level(logging.WARNING, logger="ci_platform"):
            for _ in range(2):
                assert (await run("echo well", image="dynflow-test/obstinate:1")).exit_code == 0
                assert run.text == "well\n"
        assert len(containers(run.scope)) == 1
        assert len([each for each in caplog.messages if "are run by the engine" in each]) == 1
    finally:
        await run.sandbox.release(run.scope)
        forget_image("dynflow-test/obstinate:1", made)


async def test_without_a_kit_there_is_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.sandbox.describe()["containers"] == "commands are run by our agent"
    monkeypatch.setenv("PATH", "/nowhere")  # where ldd is not
    assert "ldd" in str(agent_kit.trouble())
    assert "by the engine" in run.sandbox.describe()["containers"]
    assert (await run("echo well")).exit_code == 0
    assert run.text == "well\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0",
        bytes(12),
        struct.pack("<III", 2, 0, 0),
        struct.pack("<III", 1, 0x7F, 0),
        struct.pack("<III", 1, 1 << 16, 0),
    ],
    ids=["nothing", "little", "zeros", "another number", "stopped", "no status"],
)
async def test_nonsense_from_an_agent_is_the_end_of_its_command(said: bytes, tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    agent = Agent(ours, os.getpid(), {})
    its.sendall(said)
    its.shutdown(socket.SHUT_WR)
    assert await agent.run(1, a_job(tmp_path)) == End(KILLED, lost=True)
    agent.close()
    its.close()


async def test_an_agent_that_says_more_than_it_is_asked_is_not_asked_again(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    agent = Agent(ours, os.getpid(), {})
    assert agent.is_well()
    its.sendall(struct.pack("<III", 1, 3 << 8, 0) + b"x" * 100_000)
    assert await agent.run(1, a_job(tmp_path)) == End(3)
    assert not agent.is_well()
    agent.close()
    its.close()


async def test_an_agent_that_does_not_listen_keeps_nobody_from_cancelling(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    agent = Agent(ours, os.getpid(), {})
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(agent.run, 1, a_job(tmp_path, "x" * 10_000_000))
            await anyio.wait_readable(its)
            tasks.cancel_scope.cancel()
    agent.close()
    its.close()


def a_job(folder: Path, *arguments: str) -> SandboxJob:
    return SandboxJob("job", ("true", *arguments), Tree(folder, folder))
