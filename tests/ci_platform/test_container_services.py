"""Services beside a run's commands, in containers on a real engine."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from ci_platform.errors import ImageNotFoundError, InvalidInputError, ServiceNotReadyError
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.service_checks import check_services
from pipelines.contract import Service
from tests.contracts.test_sandboxes import SOON, Run, eventually
from tests.docker_engine import IMAGE, killed_platform, require_image
from tests.tiny_image import docker

pytestmark = pytest.mark.docker

SERVE = "use IO::Socket::INET; $| = 1; my $s = IO::Socket::INET->new(LocalPort => 8000, Listen => 5, ReuseAddr => 1);"
"""Debian's minimal system has Perl, and no Python."""

ECHO = Service(
    image=IMAGE,
    name="echo",
    port=8000,
    command=(
        "perl",
        "-e",
        SERVE + ' print "up\\n"; while (my $c = $s->accept) { print $c "served\\n"; close $c }',
    ),
)
WEB = replace(
    ECHO,
    name="web",
    command=(
        "perl",
        "-e",
        SERVE + "my $n = 0; while (my $c = $s->accept) { my $line = <$c>; print $line; $n++;"
        'my $code = $n < 3 ? "503 Not yet" : "200 OK"; print $c "HTTP/1.1 $code\\r\\nContent-Length: 0\\r\\n\\r\\n";'
        "close $c }",
    ),
)
ASK = "exec 3<>/dev/tcp/echo/8000; cat <&3"


class Scope(Run):
    """Runs commands of one run, and keeps what the sandbox says."""

    said: list[str]
    scope: str

    def job(self, script: str | tuple[str, ...], tree: Tree | None = None, **options: Any) -> SandboxJob:
        job = super().job(("bash", "-c", script) if isinstance(script, str) else script, tree, **options)
        return replace(job, scope=self.scope, say=self.said.append)


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Scope]:
    require_image()
    sandbox = ContainerSandbox(image=IMAGE, warm=None)  # so that services are all that is left
    run = Scope(sandbox, tmp_path)
    run.said, run.scope = [], f"run-{os.getpid()}-{tmp_path.name}"
    yield run
    await sandbox.release(run.scope)
    await sandbox.close()
    assert left(run.scope) == []


def left(scope: str) -> list[str]:
    """Return containers and networks of a run."""
    chosen = ["--filter", f"label=dynflow.run={scope}"]
    return [
        *docker("ps", "--all", "--quiet", *chosen).split(),
        *docker("network", "ls", "--quiet", *chosen).split(),
    ]


async def test_a_command_finds_its_services_ready_by_name(run: Scope) -> None:
    assert (await run(ASK, services=(ECHO,))).exit_code == 0, run.said
    assert run.text == "served\n"
    assert run.said[0].startswith("service echo is ready after ")
    assert "echo | up" in run.said


async def test_a_service_goes_on_for_the_later_commands_of_its_run_alone(run: Scope) -> None:
    await run(ASK, services=(ECHO,))
    (container, _network) = left(run.scope)
    run.said.clear()
    await run(ASK, services=(ECHO,))
    assert run.text == "served\n"
    assert left(run.scope)[0] == container
    assert run.said == []  # neither started nor repeated in the log
    mine, run.scope = run.scope, f"{run.scope}-other"
    try:
        await run(ASK, services=(ECHO,))
        assert set(left(run.scope)).isdisjoint(left(mine))
        # Another run's network is another one.
        await run("exec 3<>/dev/tcp/echo/8000", services=(replace(ECHO, name="mine"),))
    finally:
        await run.sandbox.release(run.scope)
        assert left(run.scope) == []
        run.scope = mine
    assert len(left(mine)) == 2


async def test_a_service_that_has_ended_is_started_anew(run: Scope) -> None:
    await run(ASK, services=(ECHO,))
    docker("kill", left(run.scope)[0])
    await run(ASK, services=(ECHO,))
    assert run.text == "served\n"
    assert "service echo: starting anew" in run.said


async def test_readiness_over_http_waits_for_a_good_answer(run: Scope) -> None:
    if os.geteuid() != 0:
        pytest.skip("entering a network needs root")
    assert (await run("true", services=(replace(WEB, ready="/health"),))).exit_code == 0
    assert run.said.count("web | GET /health HTTP/1.1") == 3, run.said


async def test_readiness_by_a_command_waits_until_it_exits_with_0(run: Scope) -> None:
    service = replace(
        ECHO,
        name="slow",
        command=("sh", "-c", "echo begun; touch /tmp/ready; sleep 600"),
        ready=("test", "-e", "/tmp/ready"),
    )
    assert (await run("true", services=(service,))).exit_code == 0


async def test_a_service_that_never_gets_ready_is_an_error_of_its_own_with_its_last_lines(run: Scope) -> None:
    silent = replace(
        ECHO,
        name="silent",
        command=("sh", "-c", "for n in $(seq 40); do echo line $n; done; sleep 600"),
        timeout=timedelta(seconds=1),
    )
    with pytest.raises(ServiceNotReadyError) as caught:
        await run("true", services=(silent,))
    text = str(caught.value)
    assert "service silent is not ready after 1 s" in text
    assert "line 40" in text
    assert "line 20\n" not in text
    assert (caught.value.code, caught.value.conclusion) == ("service_not_ready", "failure")
    assert len(left(run.scope)) == 1  # the network, until the run ends


async def test_a_service_that_ends_is_not_waited_for(run: Scope) -> None:
    broken = replace(ECHO, name="broken", command=("sh", "-c", "echo no config >&2; exit 3"))
    with pytest.raises(
        ServiceNotReadyError, match=r"ended with exit code 3 before it was ready(.|\n)*no config"
    ):
        await run("true", services=(broken,))


async def test_listening_on_its_own_loopback_is_not_ready(run: Scope) -> None:
    hidden = replace(
        ECHO,
        command=(
            "perl",
            "-e",
            SERVE.replace("LocalPort", "LocalAddr => '127.0.0.1', LocalPort") + "sleep 600",
        ),
        timeout=timedelta(seconds=1),
    )
    with pytest.raises(ServiceNotReadyError):
        await run("true", services=(hidden,))


async def test_a_service_whose_image_is_missing_is_refused_by_name(run: Scope) -> None:
    with pytest.raises(ImageNotFoundError, match="dynflow/nothing:1"):
        await run("true", services=(replace(ECHO, image="dynflow/nothing:1"),))


async def test_beside_services_there_is_neither_host_nor_outside(run: Scope) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        await run("true", services=(ECHO,))
        gateway = "{{(index .IPAM.Config 0).Gateway}}"
        host = docker("network", "inspect", left(run.scope)[1], "--format", gateway)
        probe = f"timeout 2 bash -c 'exec 3<>/dev/tcp/{host}/{port}'"
        assert (await run(probe, services=(ECHO,))).exit_code != 0
        # Where the host has its address in the network, the same attempt succeeds.
        docker("network", "create", "--internal", f"open-{os.getpid()}")
        try:
            host = docker("network", "inspect", f"open-{os.getpid()}", "--format", gateway)
            probe = f"exec 3<>/dev/tcp/{host}/{port}"
            docker(
                "run", "--rm", "--network", f"open-{os.getpid()}", IMAGE, "timeout", "5", "bash", "-c", probe
            )
        finally:
            docker("network", "rm", f"open-{os.getpid()}")
    await run("timeout 5 getent hosts example.org", services=(ECHO,))
    assert run.text == ""


async def test_cancelling_while_a_service_starts_leaves_nothing(run: Scope) -> None:
    never = replace(ECHO, port=9, timeout=timedelta(minutes=5))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run("true", services=(never,)))
        await eventually(lambda: len(left(run.scope)) == 2)
        tasks.cancel_scope.cancel()
    assert len(left(run.scope)) == 1


DOOMED = """
import asyncio, sys
from pathlib import Path
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.container import ContainerSandbox
from pipelines.contract import Service

async def main():
    image, scope, *folders = sys.argv[1:]
    upper, work, lower = map(Path, folders)
    service = Service(image=image, name="doomed", port=1, command=("sleep", "600"), ready=("true",))
    job = SandboxJob("doomed", ("sh", "-c", "echo up; sleep 600"), Tree(upper, work, (lower,)),
                     scope=scope, services=(service,))
    await ContainerSandbox(image=image).run(job, lambda piece: print(piece.decode(), end="", flush=True))

asyncio.run(main())
"""


async def test_services_and_networks_of_a_killed_platform_are_swept(run: Scope) -> None:
    await killed_platform(DOOMED, run.scope, run.tree(), "up", SOON)
    assert len(left(run.scope)) == 3
    assert await run.sandbox.sweep() >= 3
    assert left(run.scope) == []


GOOD = Service("postgres:16", port=5432)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"port": 0}, "port is 1 to 65535, not 0"),
        ({"port": "5432"}, "not '5432'"),
        ({"port": True}, "not True"),
        ({"name": "Post gres"}, "'Post gres' cannot be the name"),
        ({"name": "localhost"}, "'localhost' cannot be the name"),
        ({"image": 7}, "text, not"),
        ({"timeout": timedelta()}, "timeout is up to 10 minutes"),
        ({"timeout": timedelta(hours=1)}, "timeout is up to 10 minutes"),
        ({"env": {"A=B": "c"}}, "without '='"),
        ({"env": {"A": 1}}, "env is text"),
        ({"env": {"A": "\0"}}, "env is text"),
        ({"command": "sh"}, "command is text"),
        ({"ready": "health"}, "a path such as"),
        ({"ready": "/a b"}, "a path such as"),
        ({"ready": ()}, "empty command"),
        ({"ready": 5}, "ready is text"),
    ],
)
def test_what_is_no_service_is_refused_by_name(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        check_services((replace(GOOD, **change),), "container")


def test_services_are_few_different_and_beside_containers() -> None:
    check_services((GOOD, replace(GOOD, name="other")), "container")
    for wrong in ([GOOD], (GOOD, GOOD), (1,), tuple(replace(GOOD, name=f"n{n}") for n in range(9))):
        with pytest.raises(InvalidInputError, match="service"):
            check_services(wrong, "container")
    with pytest.raises(InvalidInputError, match="container"):
        check_services((GOOD,), "isolate")
