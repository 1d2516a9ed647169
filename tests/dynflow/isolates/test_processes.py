"""Isolates as processes: none outlives its host, none is left behind, all of it without root too."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dynflow.errors import IsolateCrashedError, IsolateError
from dynflow.isolates import Capability, ProcessLoader, WorkerCode, confinement, describe_walls

ROOT = Path(__file__).parents[3]
NOBODY = 65534

_HOST = textwrap.dedent(
    """
    import asyncio, os, sys
    from dynflow.isolates import Capability, ProcessLoader, WorkerCode

    SOURCE = '''
    import asyncio, os
    async def fetch(request, env):
        return [os.getpid(), os.getuid(), request.json()]
    async def hang():
        from dynflow.workflow import current_env
        await current_env.get().STARTED.now()
        try:
            while True:
                await asyncio.sleep(3600)
        finally:
            while True: pass
    '''

    class Started(Capability):
        async def now(self):
            print("started", flush=True)

    async def main():
        code = WorkerCode("index.py", {"index.py": SOURCE}, env={"STARTED": Started()})
        async with ProcessLoader() as loader:
            stub = loader.get("w", lambda: code).get_entrypoint()
            print(os.geteuid(), loader.walls, await stub.fetch("hello"), flush=True)
            if sys.argv[1] == "hang":
                await stub.hang()

    asyncio.run(main())
    """
)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def all_over(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=0)
    return not [found for found in alive if not is_zombie(found)]


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def uids_above(lowest: int) -> list[int]:
    return [uid for process in descendants(os.getpid()) if (uid := process.uids().real) > lowest]


def descriptors() -> int:
    return psutil.Process().num_fds()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for what no event tells: the state of another process."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        os.sched_yield()


def other_python() -> str:
    """Return an interpreter that an unprivileged user may run."""
    for path in (sys.executable, "/usr/bin/python3.13", "/usr/bin/python3.12", "/usr/bin/python3.11"):
        command = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if (
                subprocess.run(
                    command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=False
                ).returncode
                == 0
            ):
                return path
        except OSError:
            continue
    pytest.skip("no Python 3.11 or newer that an unprivileged user may run")


def host_command(tmp_path: Path, what: str, python: str = sys.executable) -> list[str]:
    program = tmp_path / "host.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{_HOST}")
    program.chmod(0o644)
    return [python, str(program), what]


def test_a_killed_host_leaves_no_process(tmp_path: Path) -> None:
    with subprocess.Popen(host_command(tmp_path, "hang"), stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        host.stdout.readline()
        assert host.stdout.readline() == "started\n"
        family = descendants(host.pid)
        assert len(family) >= 3  # the outer process, the zygote, an isolate
        host.send_signal(signal.SIGKILL)
    wait_until(lambda: not [process for process in family if process.is_running()])


def test_a_killed_zygote_takes_its_isolates_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        host_command(tmp_path, "hang"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as host:
        assert host.stdout is not None
        assert host.stderr is not None
        host.stdout.readline()
        assert host.stdout.readline() == "started\n"
        family = descendants(host.pid)
        (outer,) = psutil.Process(host.pid).children()
        outer.kill()
        assert "IsolateCrashedError" in host.stderr.read()
    wait_until(lambda: not [process for process in family if process.is_running()])


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
def test_the_walls_stand_for_an_unprivileged_user_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.owner() == "root" and folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    done = subprocess.run(
        host_command(tmp_path, "once", other_python()),
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    walls = tuple(
        sorted(set(confinement.WALLS) - {"cgroup"})
    )  # which takes root, or a group that is delegated
    assert done.stderr == ""
    assert done.stdout == f"{NOBODY} {walls} [1, 0, 'hello']\n"


def test_where_the_walls_cannot_be_put_up_the_loader_says_which_and_why(tmp_path: Path) -> None:
    # Inside this user namespace, none may be made: as on hosts that switch unprivileged ones off.
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        script,
        "sh",
        *host_command(tmp_path, "once"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "host.py" not in done.stderr:
        pytest.skip(f"no user namespace here to try it in: {done.stderr}")
    assert done.stdout == ""
    assert "IsolateError: the wall 'namespaces' cannot be put up: " in done.stderr
    assert "user.max_user_namespaces" in done.stderr


def test_the_walls_of_this_host_can_be_asked_for() -> None:
    found = describe_walls()
    assert set(found) == set(confinement.WALLS)
    assert all(found[wall].startswith("up") for wall in confinement.ESSENTIAL)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give each isolate a uid")
async def test_each_isolate_of_a_root_host_has_a_host_uid_of_its_own() -> None:
    source = "import asyncio\nasync def fetch(request, env): await asyncio.sleep(100)"
    async with ProcessLoader(ready=2) as loader:
        calls: list[asyncio.Task[object]] = []
        for name in ("a", "b"):
            stub = loader.get(name, lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
            calls.append(asyncio.create_task(stub.call("fetch")))
        # The zygote, two at work, two ready.
        await until(lambda: len(set(uids_above(2**30))) == 5)
        assert len(uids_above(2**30)) == 5
        for call in calls:
            call.cancel()


async def test_many_sessions_leave_no_process_and_no_descriptor_behind() -> None:
    source = """
import asyncio, os
async def fetch(request, env):
    kind = request.json()
    if kind == 0:
        return 1
    if kind == 1:
        raise ValueError("broken")
    os._exit(3)
"""
    before = early = descriptors()
    async with ProcessLoader(workers=10) as loader:
        for number in range(200):
            code = WorkerCode("index.py", {"index.py": source})
            stub = loader.get(f"w{number}", lambda: code).get_entrypoint()  # noqa: B023 - called at once
            try:
                assert await stub.fetch(number % 3) == 1
            except (ValueError, IsolateCrashedError):
                assert number % 3
            if number == 20:
                early = descriptors()
        assert descriptors() <= early + 32  # warm isolates are kept, sixteen at most
        # Outer process, zygote, the warm, the ready, and some that are just ending.
        assert len(descendants(os.getpid())) <= 2 + 16 + 2 + 5
    assert descendants(os.getpid()) == []
    assert descriptors() <= before + 1


async def test_more_isolates_than_the_control_socket_can_hold_requests_for() -> None:
    class Meet(Capability):
        def __init__(self) -> None:
            self.here = 0
            self.all_here = asyncio.Event()

        async def wait(self) -> None:
            self.here += 1
            if self.here == 100:
                self.all_here.set()
            await self.all_here.wait()

    code = WorkerCode(
        "index.py",
        {"index.py": "async def fetch(request, env): return await env.MEET.wait()"},
        env={"MEET": Meet()},
    )
    async with ProcessLoader(per_tenant=100) as loader:
        stub = loader.get("w", lambda: code).get_entrypoint()
        await asyncio.gather(*(stub.fetch() for _ in range(100)))


async def test_a_cancelled_session_leaves_no_process() -> None:
    class Signal(Capability):
        def __init__(self) -> None:
            self.here = asyncio.Event()

        async def arrive(self) -> None:
            self.here.set()

    arrived = Signal()
    source = """
import asyncio
async def fetch(request, env):
    await env.SIGNAL.arrive()
    await asyncio.sleep(1000)
"""
    code = WorkerCode("index.py", {"index.py": source}, env={"SIGNAL": arrived})
    async with ProcessLoader(ready=0) as loader:
        idle = len(descendants(os.getpid()))
        call: asyncio.Task[object] = asyncio.create_task(
            loader.get("w", lambda: code).get_entrypoint().call("fetch")
        )
        await arrived.here.wait()
        assert len(descendants(os.getpid())) == idle + 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: len(descendants(os.getpid())) == idle)  # gone at once, and reaped by its parent


async def test_a_new_zygote_is_started_where_one_has_ended() -> None:
    source = "def f(): return 1"
    async with ProcessLoader() as loader:
        for name in ("a", "b"):
            stub = loader.get(name, lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
            assert await stub.f() == 1
            family = descendants(os.getpid())
            family[0].kill()
            await until(lambda: all_over(family))  # noqa: B023 - awaited at once


async def test_isolates_come_with_frozen_garbage_and_what_tenants_use_is_loaded() -> None:
    source = """
import gc, sys
def look(): return [gc.get_freeze_count() > 10_000, "asyncio" in sys.modules, "dataclasses" in sys.modules]
"""
    async with ProcessLoader(ready=0) as loader:
        code = WorkerCode("index.py", {"index.py": source})
        assert await loader.load(code).get_entrypoint().look() == [True, True, True]


async def test_outside_of_its_context_a_loader_refuses() -> None:
    stub = ProcessLoader().get("w", lambda: WorkerCode("index.py", {"index.py": ""})).get_entrypoint()
    with pytest.raises(IsolateError, match="async with loader"):
        await stub.fetch()
