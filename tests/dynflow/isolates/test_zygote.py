"""The zygote and the pool of isolates when something goes wrong: told to who waits, and good again afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dynflow.errors import IsolateCrashedError, IsolateError
from dynflow.isolates import ProcessLoader, WorkerCode, WorkerStub, zygotes
from dynflow.isolates.confinement import WALLS
from dynflow.isolates.pool import IsolatePool
from dynflow.isolates.zygotes import IsolateProcess

ROOT = Path(__file__).parents[3]
DEADLINE = 30

# Without no_new_privs, who has given up all capabilities may not load a filter.
_ZYGOTE = """
import fcntl, os, socket, sys
from dynflow.isolates import confinement, zygote

control = socket.socket(fileno=fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD, 10))
os.close(int(sys.argv[1]))
os.dup2(socket.socket(socket.AF_UNIX).detach(), 3)
own_wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=3)
walls = confinement.ChildWalls(frozenset({"identity", "seccomp"}), own_uids=False, own_pid_namespace=None)
zygote.Zygote(control, own_wire, walls).live(os.open("/proc", os.O_RDONLY))
"""


def family() -> list[psutil.Process]:
    """The outer process, the zygote, isolates: those that have not ended."""
    return [process for process in psutil.Process().children(recursive=True) if not _is_over(process)]


def _is_over(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def worker(loader: ProcessLoader) -> WorkerStub:
    return loader.load(WorkerCode("index.py", {"index.py": "def f(): return 1"}))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - the state of other processes
            await asyncio.sleep(0)


async def test_the_interrupt_of_a_terminal_is_the_hosts_alone() -> None:
    async with ProcessLoader(ready=1) as loader:
        await until(lambda: len(family()) == 3)
        before = family()
        for process in before:
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(DEADLINE):
            for _ in range(3):
                assert await worker(loader).get_entrypoint().f() == 1
        assert family()[:2] == before[:2]


def test_an_isolate_whose_walls_cannot_be_put_up_says_so_and_ends() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", _ZYGOTE, str(theirs.fileno())]
    wire, its_wire = socket.socketpair()
    with ours, wire, subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env={}) as process:
        theirs.close()
        ours.settimeout(DEADLINE)
        wire.settimeout(DEADLINE)
        assert b"ready" in ours.recv(1 << 16)
        socket.send_fds(ours, [b"fork"], [its_wire.fileno()])
        its_wire.close()
        with wire.makefile("rb") as told:
            text = told.read()
        assert b'"output"' in text
        assert b"PermissionError" in text
        ours.close()
        assert process.wait(DEADLINE) == 0


async def test_a_host_without_descriptors_fails_calls_and_goes_on_once_it_has_some() -> None:
    async with ProcessLoader(ready=0, warm=0) as loader:
        assert await worker(loader).get_entrypoint().f() == 1
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        for room in range(5):
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, before[1]))
            try:
                async with asyncio.timeout(DEADLINE):
                    for _ in range(20):  # more than forks at a time
                        try:
                            assert await worker(loader).get_entrypoint().f() == 1
                        except IsolateError as error:
                            assert "no room for another isolate" in str(error)  # noqa: PT017 - others may succeed
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
        async with asyncio.timeout(DEADLINE):
            assert await worker(loader).get_entrypoint().f() == 1


async def test_a_zygote_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ProcessLoader(ready=0, warm=0) as loader:
        outer, zygote = family()
        zygote.suspend()
        with monkeypatch.context() as patch:
            patch.setattr(zygotes, "_FORK_TIMEOUT", 0.2)
            with pytest.raises(IsolateCrashedError, match="does not answer"):
                await worker(loader).get_entrypoint().f()
        assert await worker(loader).get_entrypoint().f() == 1
        assert _is_over(outer)
        await until(lambda: _is_over(zygote))


async def test_after_the_death_of_a_zygote_isolates_are_kept_ready_again() -> None:
    async with ProcessLoader(ready=2, warm=0) as loader:
        await until(lambda: len(family()) == 4)
        old = family()
        old[0].kill()
        await until(lambda: all(map(_is_over, old)))
        for _ in range(2):
            with contextlib.suppress(
                IsolateError
            ):  # of one that was ready, and is not yet known to have ended
                await worker(loader).get_entrypoint().f()
        assert await worker(loader).get_entrypoint().f() == 1
        await until(lambda: len(family()) == 4)


@pytest.mark.parametrize("kept", ["ready", "warm"])
async def test_an_isolate_that_died_a_moment_ago_is_given_to_nobody(kept: str) -> None:
    code = WorkerCode("index.py", {"index.py": "def f(): return 1"})
    async with ProcessLoader(ready=int(kept == "ready"), warm=int(kept == "warm")) as loader:
        stub = loader.get("one", lambda: code)
        if kept == "warm":
            assert await stub.get_entrypoint().f() == 1
        await until(lambda: len(family()) == 3)
        await asyncio.sleep(0.1)  # connected, and kept
        isolate = family()[-1]
        isolate.kill()
        while not _is_over(isolate):  # without a turn of this loop, which would hear of it
            pass
        assert await stub.get_entrypoint().f() == 1


async def test_a_loader_that_is_cancelled_while_it_starts_leaves_nothing() -> None:
    for turns in (0, 1, 2, 5, 20, 60):
        starting = asyncio.create_task(ProcessLoader(ready=1).__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0.002)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loader = await starting
            await loader.__aexit__()
        await until(lambda: family() == [])


async def test_a_zygote_that_cannot_be_started_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil.Process().num_fds()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(IsolateError, match=r"could not be started.*/nowhere/python"):
        async with ProcessLoader():
            pass
    assert psutil.Process().num_fds() == before


class _Child:
    """What a pool's user may make of a child."""

    is_usable = is_alive = True

    def __init__(self, process: IsolateProcess) -> None:
        self.process = process

    def kill(self) -> None:
        self.process.drop()


async def test_an_isolate_that_comes_as_its_call_is_cancelled_is_stopped() -> None:
    made: list[_Child] = []
    taking: list[asyncio.Task[_Child]] = []

    async def connect(process: IsolateProcess) -> _Child:
        made.append(_Child(process))
        for task in taking:  # who waits for this is told of it after that
            asyncio.get_running_loop().call_soon(task.cancel)
        return made[-1]

    isolates = IsolatePool(tuple(WALLS), (), 1, 1 << 30, connect)
    await isolates.start()
    try:
        taking.append(asyncio.create_task(isolates.take()))
        await asyncio.wait(taking)
        assert taking[0].cancelled()
        async with asyncio.timeout(DEADLINE):
            await made[0].process.gone.wait()
    finally:
        await isolates.close()
