"""One command from the workspace to the log and the layer, in a real sandbox over a real repository."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from ci_platform import copy_on_write
from ci_platform.connections import ConnectionLog
from ci_platform.egress import Connection
from ci_platform.errors import FailedError, InvalidInputError, LimitExceededError, UnavailableError
from ci_platform.execution import Execution
from ci_platform.logs import LogKey, LogLine, Logs
from ci_platform.printing import KEPT_OUTPUT
from ci_platform.sandboxes import MEBIBYTE, SandboxLimits
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Remote, Source
from ci_platform.workspaces import LayerAuthor, Workspaces
from pipelines.contract import Command, CommandResult, Workspace
from tests.ci_platform.git_repositories import working_copy

AUTHOR = LayerAuthor("unit tests", 1, 1)
KEY = LogKey("run1", "unit tests", 1)


@dataclass
class Bench:
    execution: Execution
    workspaces: Workspaces
    logs: Logs
    workspace: Workspace

    def command(self, script: str, **options: object) -> Command:
        return Command(self.workspace, ("sh", "-c", script), **options)  # type: ignore[arg-type]

    async def run(self, script: str, author: LayerAuthor = AUTHOR, **options: object) -> CommandResult:
        given = {name: options.pop(name) for name in ("limits", "redact") if name in options}
        command = self.command(script, **options)
        return await self.execution.run(command, run_id="run1", author=author, **given)  # type: ignore[arg-type]

    async def lines(self) -> list[LogLine]:
        found: list[LogLine] = []
        offset = 0
        while (chunk := await self.logs.read(KEY, offset)).lines:
            found += chunk.lines
            offset = chunk.next_offset
        return found

    async def log(self, *kinds: str) -> list[str]:
        return [line.text for line in await self.lines() if line.kind in kinds or not kinds]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    remote = working_copy(tmp_path / "remote")
    sha = remote.commit({"README.md": b"hello\n", "src/main.c": b"int main;\n"})
    source = Source(tmp_path / "source", allow_file=True)
    await source.fetch("ada/engine", sha, Remote(remote.url))
    method = copy_on_write.probe(tmp_path / "workspaces")
    workspaces = Workspaces(tmp_path / "workspaces", source, method, durable=False)
    logs = Logs(tmp_path / "logs")
    sandbox = IsolateSandbox()
    missing = ContainerSandbox(url=f"unix://{tmp_path}/none.sock")
    execution = Execution(workspaces, logs, {"isolate": sandbox, "container": missing})
    yield Bench(execution, workspaces, logs, await workspaces.fork("run1.fork", "ada/engine", sha))
    await sandbox.close()
    await missing.close()


async def test_a_command_runs_over_the_commits_files(bench: Bench) -> None:
    result = await bench.run("cat README.md; ls src")
    assert (result.exit_code, result.output, result.ok) == (0, "hello\nmain.c\n", True)
    assert result.argv == ("sh", "-c", "cat README.md; ls src")
    assert result.duration > timedelta()


async def test_what_a_successful_command_changed_is_there_for_the_next(bench: Bench) -> None:
    await bench.run("echo built >out; rm src/main.c")
    other = LayerAuthor("next", 1, 1)
    assert (await bench.run("cat out; ls src", other)).output == "built\n"


async def test_what_a_failing_command_changed_is_dropped(bench: Bench) -> None:
    result = await bench.run("echo half >out; exit 3")
    assert (result.exit_code, result.ok) == (3, False)
    assert (await bench.run("ls")).output == "README.md\nsrc\n"


async def test_the_log_frames_output_with_the_command_and_its_end(bench: Bench) -> None:
    await bench.run("echo one; echo two >&2")
    kinds = [(line.kind, line.text) for line in await bench.lines()]
    assert kinds[:3] == [("command", "sh -c 'echo one; echo two >&2'"), ("output", "one"), ("output", "two")]
    assert kinds[3][0] == "result"
    assert kinds[3][1].startswith("exited with 0 after ")
    await bench.run("exit 7")
    assert (await bench.log("result"))[1].startswith("exited with 7 after ")


async def test_output_reaches_the_log_while_the_command_runs(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.run, "echo early; sleep 600")
        with anyio.fail_after(20):
            async for chunk in bench.logs.follow(KEY):
                if any(line.text == "early" for line in chunk.lines):
                    break
        tasks.cancel_scope.cancel()


async def test_a_cancelled_command_is_killed_and_its_layer_dropped(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.run, "echo x >out; echo ready; sleep 600")
        with anyio.fail_after(20):
            async for chunk in bench.logs.follow(KEY):
                if any(line.text == "ready" for line in chunk.lines):
                    break
        tasks.cancel_scope.cancel()
    assert (await bench.log("notice"))[0].startswith("stopped after ")
    assert (await bench.run("ls")).output == "README.md\nsrc\n"
    await bench.workspaces.delete("run1.fork")


async def test_the_result_carries_the_end_of_a_long_output(bench: Bench) -> None:
    result = await bench.run("i=0; while [ $i -lt 3000 ]; do echo äöü $i; i=$((i+1)); done")
    assert len(result.output.encode()) <= KEPT_OUTPUT
    assert result.output.endswith("äöü 2999\n")
    assert "\ufffd" not in result.output
    assert len(await bench.log("output")) == 3000


async def test_bytes_that_are_no_text_do_no_harm(bench: Bench) -> None:
    result = await bench.run("head -c 9000 /dev/urandom; printf '\\0\\377end'")
    assert result.output.endswith("\ufffd\ufffdend")
    assert len(result.output.encode()) <= KEPT_OUTPUT


async def test_secrets_appear_neither_in_the_result_nor_in_the_log(bench: Bench) -> None:
    secret = "s3cr3t-value"
    script = "printf s3cr3t; printf -- -value; echo; echo $TOKEN | base64; echo fine"
    result = await bench.run(f"{script}; : {secret}", env={"TOKEN": secret}, redact=[secret])
    assert "fine" in result.output
    everything = result.output + "".join(await bench.log())
    assert secret not in everything
    assert "czNjcjN0" not in everything
    assert "***" in result.output


LIMITS: dict[str, tuple[str, SandboxLimits, str]] = {
    "timeout": ("sleep 600", SandboxLimits(timeout=timedelta(seconds=0.5)), "(timeout) of 0.5 s"),
    "output": (
        "yes a line that is not too short to be read back in good time",
        SandboxLimits(output=MEBIBYTE),
        "(output) is 1 MiB",
    ),
    "memory": ("tail /dev/zero", SandboxLimits(memory=64 * MEBIBYTE), "(memory) is 64 MiB"),
    "cpu": ("while :; do :; done", SandboxLimits(cpu=timedelta(seconds=0.5)), "(cpu) is 0.5 s"),
    "disk": (
        "head -c 100000000 /dev/zero >big; sleep 600",
        SandboxLimits(disk=9 * MEBIBYTE),
        "(disk) is 9 MiB",
    ),
    "files": ("for n in $(seq 300); do mkdir d$n; done; sleep 600", SandboxLimits(files=99), "(files) is 99"),
    "processes": (
        "for n in $(seq 99); do sleep 600 & done; wait",
        SandboxLimits(processes=9),
        "(processes) is 9",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
async def test_going_over_a_limit_fails_and_names_it(bench: Bench, name: str) -> None:
    if name in {"memory", "processes"} and os.geteuid() != 0:
        pytest.skip("without control groups a command that asks for too much is told so and ends by itself")
    script, limits, told = LIMITS[name]
    with pytest.raises(LimitExceededError) as caught:
        await bench.run(f"echo x >out; {script}", limits=limits)
    assert told in str(caught.value)
    assert told in (await bench.log("notice"))[0]
    assert (await bench.run("ls")).output == "README.md\nsrc\n"


async def test_a_commands_own_timeout_holds_up_to_the_platforms(bench: Bench) -> None:
    limits = SandboxLimits(timeout=timedelta(seconds=0.6))
    with pytest.raises(LimitExceededError, match=r"0\.5 s"):
        await bench.run("sleep 600", timeout=timedelta(seconds=0.5), limits=limits)
    with pytest.raises(LimitExceededError, match=r"0\.6 s"):
        await bench.run("sleep 600", timeout=timedelta(hours=5), limits=limits)


async def test_parallel_commands_of_one_step_share_workspace_and_log(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        for name in ("a", "b", "c"):
            tasks.start_soon(bench.run, f"echo {name} >{name}; echo did {name}")
    assert sorted(await bench.log("output")) == ["did a", "did b", "did c"]
    assert (await bench.run("cat a b c", LayerAuthor("next", 1, 1))).output == "a\nb\nc\n"


async def test_a_retry_starts_from_the_files_before_the_first_attempt(bench: Bench) -> None:
    await bench.run("echo first >>out")
    await bench.run("echo second >>out", LayerAuthor("unit tests", 1, 2))
    assert (await bench.run("cat out", LayerAuthor("next", 1, 1))).output == "second\n"


async def test_a_cwd_outside_of_the_workspace_is_the_commands_failure(bench: Bench) -> None:
    with pytest.raises(FailedError, match="leaves the workspace"):
        await bench.run("true", cwd="../..")
    assert "leaves the workspace" in (await bench.log("notice"))[0]


async def test_a_sandbox_that_is_not_there_is_the_platforms_failure(bench: Bench) -> None:
    with pytest.raises(UnavailableError, match="Docker"):
        await bench.run("true", sandbox="container")
    assert (await bench.run("ls")).ok


async def test_an_unforeseen_error_of_a_sandbox_is_the_platforms_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explode(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(IsolateSandbox, "run", explode)
    with pytest.raises(UnavailableError, match="boom"):
        await bench.run("true")


async def test_connections_are_on_the_record_of_the_step(bench: Bench) -> None:
    sandbox = IsolateSandbox(allow_network=True)
    execution = Execution(bench.workspaces, bench.logs, {"isolate": sandbox})
    program = """
import socket
for host in (b"10.0.0.1", b"other.example"):
    with socket.create_connection(("127.0.0.1", 3128)) as s:
        s.sendall(b"GET http://%s/path?token=secret HTTP/1.1\\r\\n\\r\\n" % host)
        s.recv(10)
"""
    command = Command(bench.workspace, ("python3", "-c", program), network=("10.0.0.1",))
    await execution.run(command, run_id="run1", author=AUTHOR)
    await sandbox.close()
    told = [line for line in await bench.log("notice") if line.startswith("network: ")]
    assert sorted(told) == [
        "network: 10.0.0.1:80 refused: 10.0.0.1 is a private address",
        "network: other.example:80 refused: it is not on the command's list of hosts",
    ]
    stored = list(bench.logs.connections(KEY).read())
    assert sorted((each.host, each.port) for each in stored) == [("10.0.0.1", 80), ("other.example", 80)]
    assert "secret" not in str(stored)


def test_a_list_of_connections_survives_a_torn_line_and_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ConnectionLog(tmp_path / "list")
    assert list(log.read()) == []
    log.append(Connection("example.org", 443))
    with (tmp_path / "list").open("ab") as file:
        file.write(b'{"host": "half\n')
    monkeypatch.setattr("ci_platform.connections.MOST", 3)
    for port in range(1, 10):
        log.append(Connection("more.example", port))
    assert [each.port for each in ConnectionLog(tmp_path / "list").read()] == [443, 1, 2]


BROKEN: list[Callable[[Workspace], Command]] = [
    lambda workspace: Command(workspace, ()),
    lambda workspace: Command(workspace, "ls"),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls", 1)),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls", "a\0b")),
    lambda workspace: Command(workspace, ("ls",), env={"A=B": "c"}),
    lambda workspace: Command(workspace, ("ls",), env={"A": 1}),  # type: ignore[dict-item]
    lambda workspace: Command(workspace, ("ls",), env=[("A", "b")]),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls",), cwd=None),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls",), timeout=timedelta(0)),
    lambda workspace: Command(workspace, ("ls",), timeout=5),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls", "x" * 2_000_000)),
    lambda workspace: Command(workspace, ("ls",), network="example.org"),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls",), network=["example.org"]),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls",), network=(1,)),  # type: ignore[arg-type]
    lambda workspace: Command(workspace, ("ls",), network=("*.org",)),
    lambda workspace: Command(workspace, ("ls",), network=("a.test",) * 1000),
    lambda workspace: Command(workspace, ("ls",), sandbox="container", network=("a.test",)),
]


@pytest.mark.parametrize("make", BROKEN)
async def test_values_of_wrong_types_are_refused_before_anything_happens(
    bench: Bench, make: Callable[[Workspace], Command]
) -> None:
    with pytest.raises(InvalidInputError):
        await bench.execution.run(make(bench.workspace), run_id="run1", author=AUTHOR)
    assert await bench.lines() == []


@pytest.mark.parametrize("text", ["\ud800", "nul\0"])
async def test_text_that_cannot_be_passed_on_is_refused(bench: Bench, text: str) -> None:
    for command in (
        Command(bench.workspace, ("echo", text)),
        Command(bench.workspace, ("true",), env={"A": text}),
        Command(bench.workspace, ("true",), cwd=text),
    ):
        with pytest.raises(InvalidInputError, match="without NUL"):
            await bench.execution.run(command, run_id="run1", author=AUTHOR)


async def test_more_arguments_than_a_program_takes_are_refused(bench: Bench) -> None:
    with pytest.raises(InvalidInputError, match="items"):
        await bench.execution.run(Command(bench.workspace, ("",) * 200_000), run_id="run1", author=AUTHOR)


async def test_a_log_shows_the_beginning_of_a_very_long_command(bench: Bench) -> None:
    await bench.run("true " + "x" * 100_000)
    (shown,) = await bench.log("command")
    assert len(shown) < 5000
    assert "characters" in shown


async def test_a_run_that_asks_for_many_commands_at_once_leaves_room_for_others(bench: Bench) -> None:
    execution = bench.execution
    execution._of_one_run, execution._all = 2, anyio.CapacityLimiter(3)

    async def endless(number: int) -> None:
        command = bench.command("echo begun; while :; do sleep 0.05; done")
        await execution.run(command, run_id="run1", author=LayerAuthor(f"step{number}", 1, 1))

    async def begun(number: int) -> None:
        with anyio.fail_after(30):
            async for chunk in bench.logs.follow(LogKey("run1", f"step{number}", 1)):
                if any(line.text == "begun" for line in chunk.lines):
                    return

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(endless, number)
        await begun(0)
        await begun(1)
        other = LayerAuthor("other", 1, 1)
        result = await execution.run(bench.command("echo mine"), run_id="run2", author=other)
        assert result.output == "mine\n"
        assert execution._started == 3
        tasks.cancel_scope.cancel()
