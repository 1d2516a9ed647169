"""What every sandbox promises: one suite over the isolate sandbox and the container sandbox."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import anyio
import psutil
import pytest

from ci_platform import layers
from ci_platform.errors import FailedError, UnavailableError
from ci_platform.sandboxes import (
    MEBIBYTE,
    SANDBOX_UID,
    Mount,
    Sandbox,
    SandboxJob,
    SandboxLimits,
    SandboxOutcome,
    Tree,
    cgroups,
)
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.sandboxes.isolate import IsolateSandbox
from tests.docker_engine import IMAGE, require_image

KINDS = [
    "isolate",
    pytest.param("container", marks=pytest.mark.docker),
    pytest.param("warm container", marks=pytest.mark.docker),
]
NAP = str(100_000 + os.getpid())
"""Seconds to sleep that tell our processes from those of tests that run beside this one."""

SOON = 20.0
"""Seconds that something which happens at once may take on a busy machine."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if "container" in request.param:
        require_image()
    if request.param == "warm container" and os.geteuid() != 0:
        pytest.skip("containers are kept warm by root alone")
    return str(request.param)


@pytest.fixture
async def sandbox(kind: str) -> AsyncIterator[Sandbox]:
    made = IsolateSandbox() if kind == "isolate" else ContainerSandbox(image=IMAGE)
    yield made
    await made.close()


class Run:
    """Runs shell commands over trees of its own and keeps what they print."""

    def __init__(self, sandbox: Sandbox, home: Path) -> None:
        self.sandbox, self.home = sandbox, home
        self.printed = b""
        self.pieces: list[bytes] = []
        self.on_output: Callable[[], None] = lambda: None
        self._count = 0
        self.scope = ""

    def layer(self, name: str, files: dict[str, str] | None = None) -> Path:
        folder = self.home / name
        folder.mkdir()
        for file, text in (files or {}).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        if os.geteuid() == 0:
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, SANDBOX_UID, SANDBOX_UID)
        return folder

    def tree(self, *lowers: Path) -> Tree:
        self._count += 1
        below = lowers or (self.layer(f"lower{self._count}"),)
        return Tree(self.layer(f"upper{self._count}"), self.layer(f"work{self._count}"), tuple(below))

    def job(self, script: str | tuple[str, ...], tree: Tree | None = None, **options: object) -> SandboxJob:
        argv = ("sh", "-c", script) if isinstance(script, str) else script
        name = f"test-{os.getpid()}-{self._count}"
        return SandboxJob(id=name, argv=argv, tree=tree or self.tree(), scope=self.scope, **options)  # type: ignore[arg-type]

    async def __call__(
        self, script: str | tuple[str, ...], tree: Tree | None = None, **options: object
    ) -> SandboxOutcome:
        self.printed, self.pieces = b"", []
        return await self.sandbox.run(self.job(script, tree, **options), self._take)

    def _take(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.printed += piece
        self.on_output()

    @property
    def text(self) -> str:
        return self.printed.decode()


@pytest.fixture
def run(sandbox: Sandbox, tmp_path: Path, kind: str) -> Run:
    run = Run(sandbox, tmp_path)
    # What is kept between two commands is kept for one run.
    run.scope = "one run" if kind == "warm container" else ""
    return run


def limits(**values: object) -> SandboxLimits:
    return SandboxLimits(**values)  # type: ignore[arg-type]


async def eventually(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - what other processes do tells nobody
            await anyio.sleep(0.01)


# --- how commands end ---


async def test_a_command_that_succeeds_exits_with_0(run: Run) -> None:
    outcome = await run("echo hello")
    assert (outcome.exit_code, outcome.reason, run.text) == (0, "exited", "hello\n")
    assert timedelta() < outcome.duration < timedelta(seconds=SOON)


@pytest.mark.parametrize("code", [1, 42, 255])
async def test_an_exit_code_is_passed_on(run: Run, code: int) -> None:
    outcome = await run(f"exit {code}")
    assert (outcome.exit_code, outcome.reason) == (code, "exited")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_a_command_ended_by_a_signal_exits_with_128_and_its_number(run: Run, number: int) -> None:
    outcome = await run(f"kill -{number} $$; sleep 60")
    assert (outcome.exit_code, outcome.reason) == (128 + number, "exited")


async def test_what_a_command_was_killed_by_is_said_and_cannot_be_pretended(run: Run, kind: str) -> None:
    if kind == "container":
        pytest.skip("a container's engine tells the exit code alone")
    assert (await run("kill -11 $$; sleep 60")).ended == "killed by signal 11 (SIGSEGV)"
    assert (await run("exit 139")).ended == ""
    assert (await run("sh -c 'kill -9 $$'; exit $?")).ended == ""


async def test_why_a_program_does_not_start_is_said(run: Run, kind: str) -> None:
    if kind == "container":
        pytest.skip("a container's engine tells the exit code alone")
    assert (await run(("no-such-program",))).ended == "not found"
    tree = run.tree(run.layer("data", {"data": "x"}))
    assert (await run(("/workspace/data",), tree)).ended == "Permission denied"
    assert (await run("no-such-program")).ended == ""


async def test_a_program_that_is_not_there_exits_with_127_and_is_named(run: Run) -> None:
    assert (await run(("no-such-program",))).exit_code == 127
    assert "no-such-program" in run.text


async def test_a_file_that_cannot_be_executed_exits_with_126(run: Run) -> None:
    assert (await run(("/workspace/data",), run.tree(run.layer("data", {"data": "x"})))).exit_code == 126
    assert "/workspace/data" in run.text


async def test_arguments_arrive_as_they_are(run: Run) -> None:
    odd = ("a b", "$HOME", "'\"", "*", "", "ünïcödé", "new\nline", "--", "-x")
    await run(("printf", "<%s>", *odd))
    assert run.text == "".join(f"<{argument}>" for argument in odd)


async def test_a_job_that_is_cancelled_before_it_begins_leaves_nothing(sandbox: Sandbox, run: Run) -> None:
    kept = []

    async def begin() -> None:
        try:
            await run("sleep 600")
        except BaseException as error:
            kept.append(error)  # and with it everything that the job held
            raise

    await sandbox.sweep()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin)
        await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    with anyio.fail_after(SOON):
        await sandbox.close()


# --- output ---


async def test_output_comes_before_the_command_ends(run: Run) -> None:
    started = anyio.Event()
    run.on_output = started.set
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, "echo first; sleep 600")
        with anyio.fail_after(SOON):
            await started.wait()
        assert run.text == "first\n"
        tasks.cancel_scope.cancel()


async def test_stdout_and_stderr_come_together_in_order(run: Run, kind: str) -> None:
    await run("for n in 1 2 3 4 5; do echo out$n; echo err$n >&2; done")
    lines, expected = run.text.splitlines(), [f"{name}{n}" for n in range(1, 6) for name in ("out", "err")]
    # A container's two streams pass through the engine apart: each keeps its own order.
    assert (sorted(lines) if kind == "container" else lines) == (
        sorted(expected) if kind == "container" else expected
    )


async def test_output_may_be_any_bytes_and_long(run: Run) -> None:
    await run("head -c 1000000 /dev/zero; printf '\\377\\376\\0\\n'")
    assert run.printed == bytes(1_000_000) + b"\xff\xfe\0\n"


async def test_standard_streams_can_be_opened_by_name(run: Run, kind: str) -> None:
    if kind == "container":
        pytest.skip("the engine's pipes belong to root: a program in a container has to use descriptor 1")
    await run("echo one >/dev/stdout; echo two >/dev/stderr")
    assert run.text == "one\ntwo\n"


async def test_standard_input_is_empty(run: Run) -> None:
    assert (await run("cat; echo end")).exit_code == 0
    assert run.text == "end\n"


async def test_a_command_that_closes_its_output_is_still_waited_for(run: Run, kind: str) -> None:
    if kind == "container":
        pytest.skip("the engine keeps the stream open until the container ends")
    outcome = await run("exec >&- 2>&-; sleep 0.2; exit 7")
    assert outcome.exit_code == 7


# --- environment ---


async def test_the_environment_is_the_jobs_and_a_few_names_more(run: Run) -> None:
    os.environ["PLATFORM_SECRET"] = "do-not-tell"
    try:
        await run("env", env={"GREETING": "hi there", "CI": "yes"})
    finally:
        del os.environ["PLATFORM_SECRET"]
    found = dict(line.split("=", 1) for line in run.text.splitlines())
    assert (found["GREETING"], found["CI"], found["DYNFLOW"], found["HOME"]) == (
        "hi there",
        "yes",
        "true",
        "/home/ci",
    )
    names = {
        "CI",
        "DYNFLOW",
        "GREETING",
        "HOME",
        "HOSTNAME",
        "LANG",
        "PATH",
        "PWD",
        "SHLVL",
        "USER",
        "_",
        "OLDPWD",
    }
    assert set(found) <= names


async def test_a_command_is_an_ordinary_user_without_privileges(run: Run) -> None:
    await run("id -u; grep -E '^(CapEff|CapPrm|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status")
    uid, *status = run.text.splitlines()
    fields = dict(line.split(":\t") for line in status)
    assert uid == str(SANDBOX_UID)
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == int(fields["CapBnd"], 16) == 0
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


async def test_home_and_tmp_can_be_written_and_are_empty_each_time(run: Run) -> None:
    script = (
        'ls -A "$HOME" /tmp /var/tmp /dev/shm; for d in "$HOME" /tmp /var/tmp /dev/shm; do echo x >$d/f; done'
    )
    assert (await run(script)).exit_code == 0
    first = run.text
    assert (await run(script)).exit_code == 0
    assert run.text == first
    assert "f\n" not in first.replace("/f", "")


async def test_a_server_on_loopback_can_be_reached_by_its_own_command(run: Run, kind: str) -> None:
    if "container" in kind:
        pytest.skip(
            "the image has no program to serve with; the loopback of a container is the engine's matter"
        )
    script = (
        "import socket, threading; s = socket.create_server(('127.0.0.1', 8000));"
        "threading.Thread(target=lambda: s.accept()[0].sendall(b'served')).start();"
        "print(socket.create_connection(('localhost', 8000)).recv(9))"
    )
    assert (await run(("python3", "-c", script))).exit_code == 0, run.text
    assert "served" in run.text


# --- the workspace ---


async def test_a_command_starts_in_the_workspace_or_below(run: Run) -> None:
    base = run.layer("base", {"sub/dir/file": "x"})
    await run("pwd", run.tree(base))
    assert run.text == "/workspace\n"
    await run("pwd; ls", run.tree(base), cwd="sub/dir")
    assert run.text == "/workspace/sub/dir\nfile\n"


@pytest.mark.parametrize("cwd", ["..", "../..", "a/../../b", "/", "/etc", "link", "nowhere"])
async def test_a_cwd_outside_of_the_workspace_is_refused(run: Run, cwd: str) -> None:
    base = run.layer("base", {"a/file": "x"})
    (base / "link").symlink_to("/etc")
    with pytest.raises(FailedError, match="cwd"):
        await run("echo ran", run.tree(base), cwd=cwd)
    assert run.printed == b""


async def test_the_workspace_is_all_layers_seen_as_one(run: Run) -> None:
    top = run.layer("top", {"both": "top", "new": "new"})
    base = run.layer("bottom", {"both": "bottom", "old": "old"})
    await run("cat both new old", run.tree(top, base))
    assert run.text == "topnewold"


@pytest.mark.skipif(os.geteuid() != 0, reason="elsewhere the kernel does it by itself")
async def test_layers_are_whole_whatever_the_kernel_does_by_default(run: Run) -> None:
    """With the kernel's own defaults a layer may have the size of a changed file, and none of its bytes."""
    await run("grep ' /workspace ' /proc/self/mounts", run.tree(run.layer("one", {"a": "a"})))
    words = run.text.splitlines()[-1].split()[3].split(",")
    known = {"redirect_dir": "nofollow", "metacopy": "off"}
    told = dict(word.split("=", 1) for word in words if "=" in word)
    # What is as the kernel has it by default is not shown.
    parameters = Path("/sys/module/overlay/parameters")
    follows = "Y" in {
        (parameters / f"redirect_{name}").read_text().strip() for name in ("dir", "always_follow")
    }
    if not follows:
        del known["redirect_dir"]
    if (parameters / "metacopy").read_text().strip() == "N":
        del known["metacopy"]
    assert {name: told.get(name) for name in known} == known


async def test_files_of_their_own_are_mounted_in_the_workspace_and_in_the_home_folder(run: Run) -> None:
    held = run.tree(run.layer("cached", {"old": "old", "gone": "gone"}))
    fresh = Tree(run.layer("fresh"), run.layer("unused"))
    mounts = (Mount("workspace", "deep/deps", held), Mount("home", ".cache/tool/a", fresh))
    way = run.layer("way", {"deep/deps/hidden": "hidden", "deep/file": "beside"})
    tree = run.tree(way)
    script = (
        "set -e; ls deep/deps; cat deep/file; cd deep/deps; rm gone; echo new >new; cd ~; mkdir .cache/other;"
        " mkdir .cache/tool/a/b; echo made >.cache/tool/a/b/c"
    )
    assert (await run(script, tree, mounts=mounts)).exit_code == 0, run.text
    assert run.text == "gone\nold\nbeside"
    assert [path.name for path in tree.upper.rglob("*")] == []
    assert (held.upper / "new").read_text() == "new\n"
    assert (held.lowers[0] / "gone").exists()
    assert (fresh.upper / "b/c").read_text() == "made\n"


async def test_what_is_written_to_mounts_counts_for_the_limits(run: Run, kind: str) -> None:
    if "container" in kind:
        pytest.skip("the disk of containers is not limited")
    mounts = (Mount("home", "tool", Tree(run.layer("fresh"), run.layer("unused"))),)
    script = "head -c 100000000 /dev/zero >~/tool/big; sleep 600"
    outcome = await run(script, limits=limits(disk=9 * MEBIBYTE), mounts=mounts)
    assert outcome.reason == "disk"


async def test_changes_go_to_the_upper_folder_alone(run: Run) -> None:
    base = run.layer("base", {"kept": "kept", "changed": "before", "gone": "gone"})
    tree = run.tree(base)
    assert (await run("echo after >changed; rm gone; mkdir -p d; echo new >d/new", tree)).exit_code == 0
    assert (base / "changed").read_text() == "before"
    assert (base / "gone").exists()
    assert (tree.upper / "changed").read_text() == "after\n"
    assert (tree.upper / "d/new").read_text() == "new\n"
    assert not (tree.upper / "kept").exists()
    await run("ls; cat changed d/new", run.tree(tree.upper, base))
    assert run.text == "changed\nd\nkept\nafter\nnew\n"


async def test_a_plain_folder_serves_as_a_tree_too(run: Run) -> None:
    folder = run.layer("plain", {"file": "text"})
    assert (await run("cat file; echo more >made", Tree(folder, run.layer("unused")))).exit_code == 0
    assert (folder / "made").read_text() == "more\n"


async def test_a_hundred_layers_with_long_names_are_no_problem(run: Run) -> None:
    layers = [run.layer(f"layer-{n:03}-{'x' * 120}", {f"file{n}": ""}) for n in range(100)]
    await run("ls | wc -l", run.tree(*layers))
    assert run.text.strip() == "100"


async def test_commands_run_side_by_side_without_seeing_each_other(run: Run, tmp_path: Path) -> None:
    base = run.layer("base")
    printed: dict[int, bytes] = {}

    async def one(number: int) -> None:
        printed[number] = b""

        def take(piece: bytes) -> None:
            printed[number] += piece

        script = f"echo {number} >mine; echo {number} >/tmp/mine; cat mine /tmp/mine; ls; ls /tmp"
        outcome = await run.sandbox.run(run.job(script, run.tree(base)), take)
        assert outcome.exit_code == 0

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(one, number)
    assert printed == {number: f"{number}\n{number}\nmine\nmine\n".encode() for number in range(6)}


# --- limits ---


async def test_a_timeout_kills_grandchildren_too(run: Run) -> None:
    started = time.monotonic()
    outcome = await run(
        f"(setsid sleep {NAP} &) ; (sleep {NAP} & wait) & echo up; wait",
        limits=limits(timeout=timedelta(seconds=1)),
    )
    assert (outcome.reason, run.text) == ("timeout", "up\n")
    assert 1 <= time.monotonic() - started < SOON
    assert sleepers() == []


async def test_processes_left_in_the_background_end_with_the_command(run: Run) -> None:
    outcome = await run(f"setsid sleep {NAP} & exit 3")
    assert outcome.exit_code == 3
    assert sleepers() == []


async def test_cancelling_kills_everything_first(run: Run) -> None:
    up = anyio.Event()
    run.on_output = up.set
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, f"trap '' TERM INT; sleep {NAP} & echo up; wait; sleep {NAP}")
        with anyio.fail_after(SOON):
            await up.wait()
        await eventually(lambda: len(sleepers()) == 1)
        tasks.cancel_scope.cancel()
    assert sleepers() == []


async def test_a_command_that_prints_too_much_is_killed(run: Run) -> None:
    outcome = await run("yes", limits=limits(output=100_000, timeout=timedelta(minutes=1)))
    assert outcome.reason == "output"
    assert len(run.printed) == 100_000


async def test_printing_exactly_the_limit_is_allowed(run: Run) -> None:
    outcome = await run("head -c 1000 /dev/zero", limits=limits(output=1000))
    assert (outcome.reason, outcome.exit_code, len(run.printed)) == ("exited", 0, 1000)


async def test_a_command_that_takes_too_much_memory_is_killed(run: Run) -> None:
    outcome = await run("tail /dev/zero", limits=limits(memory=64 * MEBIBYTE, timeout=timedelta(minutes=1)))
    assert outcome.exit_code != 0
    if os.geteuid() == 0:
        assert outcome.reason == "memory"


async def test_private_files_count_as_memory(run: Run) -> None:
    script = "head -c 200000000 /dev/zero >/tmp/big"
    outcome = await run(script, limits=limits(memory=64 * MEBIBYTE, timeout=timedelta(minutes=1)))
    assert outcome.exit_code != 0


async def test_a_command_that_takes_too_much_of_the_processors_is_killed(run: Run, kind: str) -> None:
    if "container" in kind:
        pytest.skip("time of processors is not limited in containers")
    spin = "(while :; do :; done) & (while :; do :; done) & while :; do :; done"
    outcome = await run(spin, limits=limits(cpu=timedelta(seconds=1), timeout=timedelta(minutes=1)))
    assert (outcome.reason, outcome.exit_code) == ("cpu", 137)
    assert outcome.used >= 1


async def test_a_command_gets_its_share_of_the_processors_and_no_more(run: Run, kind: str) -> None:
    if "container" in kind or not any(group.is_dir() for group in cpu_groups()):
        pytest.skip("of the isolate sandbox, where it has a control group for processors")
    spin = "import time; end = time.monotonic() + 2\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    await run(("python3", "-c", spin), limits=limits(cpus=0.2))
    assert 0 < float(run.text) < 1


async def test_time_of_ended_children_counts(run: Run, kind: str) -> None:
    if "container" in kind:
        pytest.skip("time of processors is not limited in containers")
    burn = "python3 -c 'while True: pass' & sleep 0.5; kill $!; wait $!"
    script = f"while :; do {burn}; done"
    outcome = await run(script, limits=limits(cpu=timedelta(seconds=1), timeout=timedelta(minutes=1)))
    assert outcome.reason == "cpu"


FILL = {
    "one large file": ("head -c 100000000 /dev/zero >big; sleep 600", "disk"),
    "many files": ("for n in $(seq 1000); do mkdir d$n; echo x >d$n/f; done; sleep 600", "files"),
    "a file without a name": ("exec 3>big; rm big; head -c 100000000 /dev/zero >&3; sleep 600", "disk"),
    "a hidden folder": ("mkdir -m 700 .x; head -c 100000000 /dev/zero >.x/y; chmod 0 .x; sleep 600", "disk"),
    "at the last moment": ("head -c 100000000 /dev/zero >big", "disk"),
}


@pytest.mark.parametrize("way", FILL)
async def test_a_command_that_fills_the_disk_is_killed(run: Run, kind: str, way: str) -> None:
    if "container" in kind:
        pytest.skip("the disk is not limited in containers")
    script, reason = FILL[way]
    # A place of the disk's own: what others write meanwhile is looked at, but not counted.
    outcome = await run(script, limits=limits(disk=20_000_000, files=1000, timeout=timedelta(minutes=1)))
    assert outcome.reason == reason
    assert outcome.used > {"disk": 20_000_000, "files": 1000}[reason]
    assert sleepers() == []


async def test_what_stays_within_the_limit_of_disk_is_no_matter(run: Run) -> None:
    base = run.layer("base", {"large": "x" * 10_000_000, "small": "y"})
    script = """
        for n in 1 2 3 4 5; do head -c 3000000 /dev/zero >f; rm f; done
        for n in $(seq 20); do ln small link$n; done
        echo z >>small
        head -c 3000000 /dev/zero >g; ln g h; ln g i; sleep 0.5
    """
    outcome = await run(script, run.tree(base), limits=limits(disk=5_000_000, files=100))
    assert (outcome.reason, outcome.exit_code) == ("exited", 0), run.text


async def test_folders_below_each_other_without_end_are_stopped(run: Run, kind: str) -> None:
    if "container" in kind:
        pytest.skip("the disk is not limited in containers")
    dig = "import os\nfor n in range(3000): os.mkdir('d'); os.chdir('d')\nprint(n)"
    tree = run.tree()
    outcome = await run(("python3", "-c", dig), tree, limits=limits(files=600))
    layers.remove_tree(tree.upper)  # deeper than pytest removes
    assert outcome.reason == "depth"


async def test_a_command_that_may_have_no_more_processes_fails_by_that(run: Run, kind: str) -> None:
    if "container" in kind or os.geteuid() != 0:
        pytest.skip("told by control groups alone")
    script = "for n in 1 2 3 4 5 6 7 8 9; do sleep 60 & done; wait"
    outcome = await run(script, limits=limits(processes=5))
    assert (outcome.reason, outcome.exit_code != 0) == ("processes", True), run.text


async def test_a_fork_bomb_stays_within_its_limit(run: Run) -> None:
    bomb = "b() { b | b & }; b; sleep 2; echo alive"
    outcome = await run(bomb, limits=limits(processes=40, timeout=timedelta(seconds=4)))
    assert outcome.reason in {"exited", "timeout"}
    # The host is well, and so is the next command.
    assert (await run("echo fine")).exit_code == 0


# --- what is left ---


async def test_nothing_is_left_of_a_command(run: Run) -> None:
    for script in (f"sleep {NAP} & exit 0", "exit 1", "kill -9 $$"):
        await run(script)
        assert sleepers() == []
        await run.sandbox.release(run.scope)
        assert mounts(run.home) == []
        assert containers() == []
    # Two sandboxes stand ready for the next command, each with four groups at most.
    await eventually(lambda: len(control_groups()) <= 8)


async def test_what_a_long_command_has_changed_is_there_for_the_next_at_once(run: Run) -> None:
    """The kernel may be busy for a while with forgetting what the first has looked at."""
    base = run.layer("base", {f"{n // 100}/{n}": "x" for n in range(3000)})
    first = run.tree(base)
    assert (
        await run("find . -type f | xargs stat >/dev/null; echo made >new; sleep 0.1", first)
    ).exit_code == 0
    printed: list[bytes] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(
                run.sandbox.run, run.job("cat new; echo x >>new", run.tree(first.upper, base)), printed.append
            )
    assert printed == [b"made\n"] * 2
    layers.remove_tree(first.upper)


async def test_without_any_in_stock_each_command_gets_a_sandbox_all_the_same(tmp_path: Path) -> None:
    sandbox = IsolateSandbox(ready=0)
    run = Run(sandbox, tmp_path)
    for _ in range(3):
        assert (await run("true")).exit_code == 0
        await eventually(lambda: not control_groups())
    await sandbox.close()


async def test_a_tree_can_be_removed_when_the_command_is_over(run: Run) -> None:
    tree = run.tree()
    await run("mkdir d; echo x >d/f", tree)
    if os.geteuid() == 0:
        shutil.rmtree(tree.work)
    shutil.rmtree(tree.upper)


async def test_a_sandbox_says_which_walls_it_has(sandbox: Sandbox) -> None:
    told = await anyio.to_thread.run_sync(sandbox.describe)
    assert all(text for pair in told.items() for text in pair)
    assert "network" in told


async def test_a_job_that_may_have_no_network_is_refused_one(run: Run) -> None:
    with pytest.raises(FailedError, match="network"):
        await run("true", network=True)


async def test_without_a_network_the_hosts_loopback_is_out_of_reach(run: Run, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        probe = f"bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}'"
        assert can_run(probe)
        assert (await run(probe)).exit_code != 0


async def test_sweeping_with_nothing_left_over_finds_nothing(sandbox: Sandbox) -> None:
    with anyio.fail_after(SOON):
        # Other tests on this machine kill platforms meanwhile.
        while await sandbox.sweep():
            pass


# --- one kind only ---


@pytest.mark.docker
async def test_an_image_that_is_missing_fails_and_says_how_to_get_it(tmp_path: Path) -> None:
    require_image()
    sandbox = ContainerSandbox()
    run = Run(sandbox, tmp_path)
    with pytest.raises(
        FailedError, match=r"'dynflow/nothing:latest' is not on this machine.*scripts/build_images"
    ):
        await run("true", image="dynflow/nothing:latest")
    await sandbox.close()


DOOMED = """
import asyncio, sys
from pathlib import Path
from ci_platform.sandboxes import SandboxJob, Tree
from ci_platform.sandboxes.container import ContainerSandbox

async def main():
    upper, work, lower = map(Path, sys.argv[2:5])
    job = SandboxJob(sys.argv[5], ("sh", "-c", "echo up; sleep 600"), Tree(upper, work, (lower,)))
    await ContainerSandbox(image=sys.argv[1]).run(job, lambda piece: print(piece.decode(), end="", flush=True))

asyncio.run(main())
"""


@pytest.mark.docker
async def test_containers_of_a_dead_platform_are_swept(tmp_path: Path) -> None:
    require_image()
    sandbox = ContainerSandbox(image=IMAGE)
    tree = Run(sandbox, tmp_path).tree()
    folders = [str(path) for path in (tree.upper, tree.work, tree.lowers[0])]
    platform = subprocess.Popen(  # noqa: ASYNC220 - it is killed, not waited for
        [sys.executable, "-c", DOOMED, IMAGE, *folders, f"test-{os.getpid()}-doomed"],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert platform.stdout is not None
    with platform.stdout:
        assert await anyio.to_thread.run_sync(platform.stdout.readline) == b"up\n"
    platform.kill()
    platform.wait()
    assert len(containers()) == 1
    assert await sandbox.sweep() >= 1
    assert containers() == []
    assert mounts(tmp_path) == []
    await sandbox.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts on the host")
async def test_a_file_system_mounted_while_a_sandbox_stood_ready_is_seen(tmp_path: Path) -> None:
    sandbox = IsolateSandbox(ready=1)
    run = Run(sandbox, tmp_path)
    assert (await run("true")).exit_code == 0
    late = tmp_path / "late"
    run.layer("late")
    await anyio.run_process(["mount", "-t", "tmpfs", "none", str(late)])
    try:
        run.home = late
        assert (await run("cat file", run.tree(run.layer("base", {"file": "seen"})))).exit_code == 0
        assert run.text == "seen"
    finally:
        await sandbox.close()
        await anyio.run_process(["umount", str(late)])


async def test_without_an_engine_the_container_sandbox_is_unavailable(tmp_path: Path) -> None:
    sandbox = ContainerSandbox(url=f"unix://{tmp_path}/no.sock")
    with pytest.raises(UnavailableError, match="Docker"):
        await Run(sandbox, tmp_path)("true")
    assert await sandbox.sweep() == 0
    assert "none answers" in sandbox.describe()["engine"]
    await sandbox.close()


def sleepers() -> list[int]:
    """Return the processes that commands of these tests have left."""
    return [
        found.pid for found in psutil.process_iter(["cmdline"]) if found.info["cmdline"] == ["sleep", NAP]
    ]


def mounts(home: Path) -> list[str]:
    """Return what is mounted that has to do with trees of these tests."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(home) in line or f"dynflow-tree-{os.getpid()}-" in line]


def can_run(script: str) -> bool:
    """Whether a command succeeds without any confinement."""
    return subprocess.run(["sh", "-c", script], check=False, capture_output=True).returncode == 0


def containers() -> list[str]:
    """Return the containers of these tests' jobs."""
    if shutil.which("docker") is None:
        return []
    command = [
        "docker",
        "ps",
        "--all",
        "--format",
        '{{.Label "dynflow.job"}}',
        "--filter",
        "label=dynflow.job",
    ]
    jobs = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return [job for job in jobs if job.startswith(f"test-{os.getpid()}-")]


def cpu_groups() -> list[Path]:
    """Return the folders of control groups that share out processors."""
    return [
        Path(home)
        for home in (*cgroups._homes_v2(), *cgroups._homes_v1())
        if Path(home).name in {"cpu", "cpu,cpuacct"}
    ]


def control_groups() -> list[Path]:
    homes = (*cgroups._homes_v2(), *cgroups._homes_v1())
    found = [path for home in homes for path in Path(home).glob(f"dynflow-{os.getpid()}-*/*")]
    return [path for path in found if path.is_dir()]
