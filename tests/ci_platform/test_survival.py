"""Commands of isolate sandboxes go on while the platform is away: stopped, or killed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import anyio
import psutil
import pytest

from ci_platform import copy_on_write
from ci_platform.errors import LimitExceededError
from ci_platform.execution import Execution
from ci_platform.logs import LogKey, Logs
from ci_platform.sandboxes import SandboxLimits, cgroups, watch
from ci_platform.sandboxes.isolate import IsolateSandbox
from ci_platform.source import Remote, Source
from ci_platform.survival import Progress, Survival
from ci_platform.workspaces import LayerAuthor, Workspaces
from pipelines.contract import Command, CommandResult, Workspace
from tests.ci_platform.git_repositories import working_copy

RUN, STEP = "run1", "unit tests"
NAP = str(400_000 + os.getpid())
SOON = 30.0

DOOMED = """
import asyncio, sys
from pathlib import Path
from tests.ci_platform import test_survival

asyncio.run(test_survival.be_doomed(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"))
"""


@dataclass
class Platform:
    """What of a platform runs commands, over one folder."""

    root: Path
    workspaces: Workspaces
    logs: Logs
    sandbox: IsolateSandbox
    execution: Execution
    workspace: Workspace

    async def run(self, script: str, attempt: int = 1, **options: object) -> CommandResult:
        limits = options.pop("limits", None)
        command = Command(self.workspace, ("sh", "-c", script), **options)  # type: ignore[arg-type]
        author = LayerAuthor(STEP, 1, attempt)
        return await self.execution.run(command, run_id=RUN, author=author, limits=limits)  # type: ignore[arg-type]

    async def log(self, kind: str = "output") -> list[str]:
        lines, offset = list[str](), 0
        while (chunk := await self.logs.read(LogKey(RUN, STEP), offset)).lines:
            lines += [line.text for line in chunk.lines if line.kind == kind]
            offset = chunk.next_offset
        return lines

    async def printed(self, text: str) -> None:
        """Wait until the log has this line."""
        with anyio.fail_after(SOON):
            async for chunk in self.logs.follow(LogKey(RUN, STEP)):
                if any(line.text == text for line in chunk.lines):
                    return


@asynccontextmanager
async def platform(
    root: Path, *, live: tuple[str, ...] = (RUN,), **options: object
) -> AsyncIterator[Platform]:
    """Start a platform over `root`, and end it as a server that is told to stop."""
    remote = working_copy(root / "remote") if not (root / "remote").exists() else None
    if remote is not None:
        sha = remote.commit({"README.md": b"hello\n"})
        (root / "commit").write_text(f"{sha} {remote.url}")
    sha, url = (root / "commit").read_text().split()
    source = Source(root / "source", allow_file=True)
    await source.fetch("ada/engine", sha, Remote(url))
    method = copy_on_write.probe(root / "workspaces")
    if not method.mounts:
        pytest.skip("copies of trees do not survive")
    workspaces = Workspaces(root / "workspaces", source, method, durable=False)
    logs = Logs(root / "logs")
    sandbox = IsolateSandbox(**options)  # type: ignore[arg-type]
    execution = Execution(workspaces, logs, {"isolate": sandbox}, survival=Survival(root / "commands"))
    await execution.recover(live)
    await workspaces.sweep(live)
    workspace = await workspaces.fork(f"{RUN}.fork", "ada/engine", sha)
    try:
        yield Platform(root, workspaces, logs, sandbox, execution, workspace)
    finally:
        await sandbox.close()


async def be_doomed(root: Path, script: str, attempt: int, network: bool) -> None:  # noqa: FBT001
    """Be a platform that runs a command until it is killed."""
    async with platform(root, allow_network=network) as doomed:
        await doomed.run(script, attempt, network=network)


class Doomed:
    """A platform in a process of its own."""

    def __init__(self, root: Path, script: str, attempt: int = 1, *, network: bool = False) -> None:
        command = [sys.executable, "-c", DOOMED, str(root), script, str(attempt), str(network)]
        self.root = root
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2])

    async def printed(self, text: str) -> None:
        await eventually(lambda: text in self.lines())

    def lines(self) -> list[str]:
        files = (self.root / "logs" / RUN).glob("*.log")
        return [line.split(" ", 2)[2][1:] for file in files for line in file.read_text().splitlines()]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


WAITING = "echo up; echo started >>made; while [ ! -e /tmp/go ] && [ $((i=i+1)) -lt 20 ]; do sleep 0.1; done; echo down"


async def test_a_command_goes_on_when_the_platform_is_killed(root: Path) -> None:
    doomed = Doomed(root, WAITING)
    await doomed.printed("up")
    doomed.kill()
    async with platform(root) as second:
        result = await second.run(WAITING, 2)
        assert (result.exit_code, result.output) == (0, "up\ndown\n")
        assert await second.log() == ["up", "down"]
        assert await second.log("command") == [f"sh -c '{WAITING}'"]
        # It ran once, and what it changed is there for the next.
        assert (await second.run("cat made", 2)).output == "started\n"
    await nothing_is_left(root)


async def test_a_command_goes_on_when_the_platform_is_stopped(root: Path) -> None:
    async with platform(root) as first, anyio.create_task_group() as tasks:
        tasks.start_soon(first.run, WAITING)
        await first.printed("up")
        first.execution.leave()
        tasks.cancel_scope.cancel()
    async with platform(root) as second:
        assert (await second.run(WAITING, 2)).output == "up\ndown\n"
        assert await second.log() == ["up", "down"]
        assert await second.log("notice") == []
    await nothing_is_left(root)


async def test_a_command_that_ended_meanwhile_is_heard(root: Path) -> None:
    script = f"echo up; sleep 1; touch {root.name}; echo {NAP}; exit 7"
    doomed = Doomed(root, script)
    await doomed.printed("up")
    supervisors = psutil.Process(doomed.process.pid).children(recursive=True)
    doomed.kill()
    await eventually(lambda: len([each for each in supervisors if each.is_running()]) == 1)
    async with platform(root) as second:
        result = await second.run(script, 2)
        assert (result.exit_code, result.output) == (7, f"up\n{NAP}\n")
        assert await second.log() == ["up", NAP]
    await nothing_is_left(root)


async def test_the_log_is_unbroken_however_often_the_platform_is_killed(root: Path) -> None:
    """At moments that nobody chose: each line is in the log once, in order, and the command ran once."""
    last = 3000
    script = f"i=0; while [ $((i=i+1)) -le {last} ]; do echo line $i; [ $((i % 10)) = 0 ] && sleep 0.02; done; echo end"
    for attempt in range(1, 6):
        doomed = Doomed(root, script, attempt)
        await doomed.printed(f"line {attempt * 300 - 7}")
        doomed.kill()
    async with platform(root) as final:
        result = await final.run(script, 6)
        assert result.output.endswith(f"line {last}\nend\n")
        assert await final.log() == [*(f"line {n}" for n in range(1, last + 1)), "end"]
        assert len(await final.log("command")) == 1
    await nothing_is_left(root)


async def test_an_attempt_that_asks_for_something_else_finds_a_clean_tree(root: Path) -> None:
    script = f"echo up; echo half >made; sleep {NAP}"
    doomed = Doomed(root, script)
    await doomed.printed("up")
    doomed.kill()
    assert len(sleepers()) == 1
    async with platform(root) as second:
        assert (await second.run("ls", 2)).output == "README.md\n"
        assert sleepers() == []
    await nothing_is_left(root)


async def test_what_nobody_waits_for_is_killed_at_the_start(root: Path) -> None:
    doomed = Doomed(root, f"echo up; sleep {NAP}")
    await doomed.printed("up")
    doomed.kill()
    async with platform(root, live=()):
        assert sleepers() == []
    await nothing_is_left(root)


async def test_commands_of_runs_that_ended_meanwhile_are_killed(root: Path) -> None:
    doomed = Doomed(root, f"echo up; sleep {NAP}")
    await doomed.printed("up")
    doomed.kill()
    async with platform(root) as second:
        await second.execution.release("run2")
        assert len(sleepers()) == 1
        await second.execution.release(RUN)
        assert sleepers() == []
    await nothing_is_left(root)


async def test_commands_of_runs_that_ended_unseen_are_killed(root: Path) -> None:
    doomed = Doomed(root, f"echo up; sleep {NAP}")
    await doomed.printed("up")
    doomed.kill()
    async with platform(root) as second:
        answers = [[RUN], []]

        async def live() -> list[str]:
            return answers.pop(0)

        await second.execution.see_off(live)
        assert sleepers() == []
    await nothing_is_left(root)


async def test_cancelling_holds_for_a_command_that_was_found_again(root: Path) -> None:
    script = f"echo up; sleep {NAP}"
    doomed = Doomed(root, script)
    await doomed.printed("up")
    doomed.kill()
    async with platform(root) as second:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(second.run, script, 2)
            await eventually(lambda: bool(second.sandbox._launcher) or len(sleepers()) == 1)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await eventually(lambda: sleepers() == [])
    await nothing_is_left(root)


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 6, 9, 14])
async def test_who_is_cancelled_while_it_looks_for_its_command_leaves_none(root: Path, turns: int) -> None:
    """As a run is that was cancelled, and whose platform was killed, in the same moment."""
    script = f"echo up; sleep {NAP}"
    doomed = Doomed(root, script)
    await doomed.printed("up")
    doomed.kill()
    async with platform(root) as second:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(second.run, script, 2)
            for _ in range(turns):  # a thread's work is over in a few of these
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        await eventually(lambda: sleepers() == [])
    await nothing_is_left(root)


@pytest.mark.parametrize(
    ("script", "limit", "told"),
    [
        (f"echo up; sleep {NAP}", {"timeout": timedelta(seconds=4)}, "timeout"),
        ("echo up; sleep 0.5; yes", {"output": 100_000}, "output"),
        ("echo up; sleep 0.5; head -c 50000000 /dev/zero >big; sleep 600", {"disk": 10_000_000}, "disk"),
    ],
    ids=["timeout", "output", "disk"],
)
async def test_limits_hold_while_no_platform_is_there(
    root: Path, script: str, limit: dict[str, object], told: str
) -> None:
    limits = replace(SandboxLimits(), **limit)  # type: ignore[arg-type]
    async with platform(root) as first, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: first.run(script, limits=limits))
        await first.printed("up")
        first.execution.leave()
        tasks.cancel_scope.cancel()
    await eventually(lambda: not inits(root))
    async with platform(root) as second:
        with pytest.raises(LimitExceededError, match=told):
            await second.run(script, 2, limits=limits)
        assert (await second.run("ls", 3)).output == "README.md\n"
    await nothing_is_left(root)


async def test_a_supervisor_that_nobody_comes_for_ends_by_itself(root: Path) -> None:
    async with platform(root, kept=timedelta(seconds=1)) as first, anyio.create_task_group() as tasks:
        tasks.start_soon(first.run, "echo up; sleep 0.5")
        await first.printed("up")
        first.execution.leave()
        tasks.cancel_scope.cancel()
    await eventually(lambda: not supervisors(root))
    async with platform(root) as second:
        # Nothing is there any more, so it runs again.
        assert (await second.run("echo up; sleep 0.5", 2)).output == "up\n"
        assert await second.log() == ["up", "up"]
    await nothing_is_left(root)


async def test_a_supervisor_of_another_version_ends_its_command(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"echo up; sleep {NAP} & sleep 1; kill $!"
    doomed = Doomed(root, script)
    await doomed.printed("up")
    doomed.kill()
    monkeypatch.setattr(watch, "VERSION", watch.VERSION + 1)
    async with platform(root) as second:
        assert (await second.run(script, 2)).exit_code == 0
        assert await second.log() == ["up", "up"]
    await nothing_is_left(root)


async def test_a_network_goes_on_too_and_each_connection_is_told_once(root: Path) -> None:
    ask = "printf 'CONNECT 10.0.0.%s:443 HTTP/1.1\\r\\n\\r\\n' $1 >&3; head -n 1 <&3 | tr -d '\\r'"
    script = f"ask() {{ exec 3<>/dev/tcp/127.0.0.1/3128; {ask}; }}; ask 1; sleep 2; ask 2"
    script = f'bash -c "{script.replace("$", chr(92) + "$")}"'
    doomed = Doomed(root, script, network=True)
    await doomed.printed("network: 10.0.0.1:443 refused: 10.0.0.1 is a private address")
    doomed.kill()
    async with platform(root, allow_network=True) as second:
        result = await second.run(script, 2, network=True)
        assert result.output == "HTTP/1.1 403 Forbidden\n" * 2
        hosts = [each.host for each in second.logs.connections(LogKey(RUN, STEP)).read()]
        assert hosts == ["10.0.0.1", "10.0.0.2"]
        assert len([line for line in await second.log("notice") if "refused" in line]) == 2
    await nothing_is_left(root)


async def test_who_is_another_user_is_not_let_in(root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    doomed = Doomed(root, f"echo up; sleep {NAP}")
    await doomed.printed("up")
    (place,) = (root / "commands").glob("*/supervisor")
    program = f"""
import os, socket
os.chdir({str(place.parent)!r})
s = socket.socket(socket.AF_UNIX)
os.setresuid(65534, 65534, 65534)
try:
    s.connect("supervisor")
    print(s.recv(1))
except OSError:
    print(b"")
"""
    done = await anyio.run_process([sys.executable, "-c", program])
    assert done.stdout == b"b''\n"
    doomed.kill()
    async with platform(root, live=()):
        pass
    await nothing_is_left(root)


async def test_a_folder_that_makes_no_sense_is_removed(root: Path) -> None:
    for name, text in {"torn": '{"run_id": "r', "odd": json.dumps({"a": 1}), "empty": ""}.items():
        (root / "commands" / name).mkdir(parents=True)
        (root / "commands" / name / "about.json").write_text(text)
    async with platform(root):
        pass
    assert list((root / "commands").iterdir()) == []


def test_progress_tells_whether_what_was_about_to_be_written_has_been(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress")
    progress.will_write(0, 10)
    progress.will_write(100, 25)
    progress.close()
    for size, expected in ((100, 10), (130, 25)):
        again = Progress(tmp_path / "progress")
        assert again.recover(size) == expected
        again.close()


async def nothing_is_left(root: Path) -> None:
    """Assert that of all commands nothing is left: process, folder, control group, mount."""
    await eventually(lambda: not supervisors(root) and not sleepers())
    assert list((root / "commands").iterdir()) == []
    assert list((root / "workspaces").glob("*/pending/*")) == []
    assert str(root) not in await anyio.Path("/proc/self/mountinfo").read_text()
    await asyncio.to_thread(cgroups.sweep)


def supervisors(root: Path) -> list[int]:
    """Return the processes that hold a file of these commands' folders."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(root / "commands") in str(fd.readlink()) for fd in (process / "fd").iterdir()):
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def inits(root: Path) -> list[int]:
    """Return the first processes of these commands' namespaces."""
    found = [child for pid in supervisors(root) for child in psutil.Process(pid).children()]
    return [each.pid for each in found if len(namespace_pids(each.pid)) > 1]


def namespace_pids(pid: int) -> list[str]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return []
    return status.split("NSpid:")[1].splitlines()[0].split()


def sleepers() -> list[int]:
    return [each.pid for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", NAP]]


async def eventually(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - what other processes do tells nobody
            await anyio.sleep(0.02)
