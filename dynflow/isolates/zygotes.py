"""The host's hold on a zygote and the isolates that it forks."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dynflow.errors import IsolateCrashedError, IsolateError
from dynflow.isolates.cgroup import IsolateGroup, machine_memory

# Options come through the socket: what is in a process's arguments stays in the memory of all of its forks.
_START = (
    "import json, os, sys; options = json.loads(os.read(int(sys.argv[1]), 1 << 20)); sys.path += options['path']\n"
    "from dynflow.isolates import zygote; zygote.main(int(sys.argv[1]), options)\n"
)
# Seconds for a zygote to come up: 0.2 on an idle machine; a loaded CI host may take long.
_START_TIMEOUT = 60
_FORK_TIMEOUT = 60  # likewise for an isolate, which takes it milliseconds
# Requests that wait in the control socket; it holds some hundred.
_FORKS_AT_ONCE = 16
# Times that the removal of a control group is tried, a hundredth of a second apart.
_REMOVALS = 200
# Isolates of one zygote at a time: each is one task.
_TASKS = 8_192


def describe_walls() -> dict[str, str]:
    """Return for each wall of isolates whether it can be put up here, and what it lacks; takes about 0.1 seconds."""
    program = (
        "import json, sys; sys.path += json.loads(sys.argv[1]); "
        "from dynflow.isolates import confinement; print(json.dumps(confinement.probe()))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", program, json.dumps(_import_path(["dynflow"]))],
        env={},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=_START_TIMEOUT,
    )
    if done.returncode != 0:
        raise IsolateError(f"walls could not be tried: {done.stderr.decode(errors='replace')[-500:]}")
    found: dict[str, str] = json.loads(done.stdout)
    group = IsolateGroup.create(machine_memory(), _TASKS)
    found["cgroup"] = (
        "up" if group else "missing: no control group with memory in it may be made by this user here"
    )
    if group is not None:
        group.close()
    return found


def _pid_of(pidfd: int) -> int:
    with open(f"/proc/self/fdinfo/{pidfd}") as file:  # noqa: PTH123 - one line of a small file
        return next(int(line[4:]) for line in file if line.startswith("Pid:"))


class IsolateProcess:
    """One forked child: the socket to it, and a hold on its life."""

    def __init__(self, sock: socket.socket, pidfd: int) -> None:
        self._socket, self._pidfd = sock, pidfd
        self._is_taken = False
        self._pid: int | None = None
        self.status: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._ended)

    def take_socket(self) -> socket.socket:
        """Return the socket to it, which is the taker's to close."""
        self._is_taken = True
        return self._socket

    def drop(self) -> None:
        """Kill it, and close the socket where nobody has taken it."""
        self.kill()
        if not self._is_taken:
            self._socket.close()

    def kill(self) -> None:
        """Kill it, and all that it may have started: it is pid 1 of its namespace."""
        if not self.gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def is_alive(self) -> bool:
        """Whether it runs, by asking the kernel: its end may not have been read yet."""
        if self.gone.is_set():
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def cpu_clock(self) -> int | None:
        """Return the clock of its CPU time, for `time.clock_gettime`; None where it has ended."""
        pid = self._find_pid()
        # The kernel's CPUCLOCK_SCHED of a process (include/linux/posix-timers.h): asks nobody, costs a microsecond.
        return (~pid << 3) | 2 if pid else None

    def resident(self) -> int:
        """Return the bytes of memory that it holds, without what it shares with files; 0 where it has ended."""
        try:
            pages = Path(f"/proc/{self._find_pid()}/statm").read_text().split()
        except OSError:
            return 0
        return (int(pages[1]) - int(pages[2])) * resource.getpagesize()

    def _find_pid(self) -> int | None:
        if self._pid is None and not self.gone.is_set():
            with contextlib.suppress(OSError):
                self._pid = _pid_of(self._pidfd)
        return None if self.gone.is_set() else self._pid

    def ended_with(self, status: int | None) -> None:
        """Say how it ended: an exit code, minus the signal, or None where nobody knows."""
        if not self.status.done():
            self.status.set_result(status)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.gone.set()


class Zygote:
    """One zygote process, seen from the host."""

    def __init__(self, walls: Collection[str], preload: Collection[str], memory: int) -> None:
        self._walls, self._preload, self._memory = walls, preload, memory
        self._group: IsolateGroup | None = None
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._turn = asyncio.Semaphore(_FORKS_AT_ONCE)
        self._asked: deque[tuple[socket.socket, asyncio.Future[IsolateProcess]]] = deque()
        self._children: dict[int, IsolateProcess] = {}
        self.ended = False

    async def start(self) -> list[str]:
        """Start it; return the names of the walls. Raises IsolateError where they cannot be put up."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._group = IsolateGroup.create(self._memory, _TASKS) if "cgroup" in self._walls else None
        options = {
            "groups": [str(folder) for folder in self._group.folders] if self._group is not None else [],
            "path": _import_path(("dynflow", *self._preload)),
            "preload": list(self._preload),
            "walls": sorted(self._walls),
        }
        ours.send(json.dumps(options).encode())
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a spawn takes a millisecond, and happens once
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START, str(theirs.fileno())],
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        except OSError as error:
            ours.close()
            self._ready.cancel()
            await self.close()
            raise IsolateError(f"the zygote could not be started: {error}") from None
        finally:
            theirs.close()
        ours.settimeout(0)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._read)
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                return await self._ready
        except TimeoutError:
            await self.close()
            raise IsolateError(f"the zygote did not come up within {_START_TIMEOUT} seconds") from None

    async def fork(self, *, ahead: bool = False) -> IsolateProcess:
        """Return a new child, which has copied its memory where it is made `ahead` of its use.

        Raises IsolateCrashedError where the zygote is gone.
        """
        # Given back by the answer, which comes even if nobody waits for it any more.
        await self._turn.acquire()
        if self.ended or self._control is None:
            self._turn.release()
            raise IsolateCrashedError("the zygote has ended")
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._turn.release()
            raise IsolateError(f"no room for another isolate: {error}") from None
        ours.settimeout(0)
        answer: asyncio.Future[IsolateProcess] = asyncio.get_running_loop().create_future()
        self._asked.append((ours, answer))
        with theirs:
            try:
                socket.send_fds(self._control, [b"fork ahead" if ahead else b"fork"], [theirs.fileno()])
            except OSError:
                self._end()
        try:
            async with asyncio.timeout(_FORK_TIMEOUT):
                return await answer
        except TimeoutError:
            self._end()  # and another one is started
            raise IsolateCrashedError("the zygote does not answer") from None
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().drop()  # it came just now
            raise

    async def close(self) -> None:
        """End it and all of its children; returns when the kernel has done so."""
        self._end()
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.get_running_loop().run_in_executor(None, _wait, process)
        for child in self._children.values():
            child.drop()
            await child.gone.wait()
        self._children.clear()
        for _ in range(_REMOVALS):
            if self._group is None or self._group.close():
                break
            await asyncio.sleep(0.01)  # the kernel is still taking apart what nobody here waits for

    def _read(self) -> None:
        if self._control is None:
            return
        try:
            message, fds, _, _ = socket.recv_fds(self._control, 65536, 1)
        except BlockingIOError:
            return
        except OSError:
            message, fds = b"", []
        if not message:
            self._end()
            return
        self._act(json.loads(message), fds)

    def _act(self, message: dict[str, Any], fds: list[int]) -> None:
        if "forked" in message and fds:
            sock, answer = self._asked.popleft()
            self._turn.release()
            child = IsolateProcess(sock, fds[0])
            self._children[message["forked"]] = child
            if answer.done():  # nobody waits any more
                child.drop()
            else:
                answer.set_result(child)
        elif "exited" in message:
            child_or_none = self._children.pop(message["exited"], None)
            if child_or_none is not None:
                child_or_none.ended_with(message["status"])
                child_or_none.drop()
        elif "failed" in message or "forked" in message:
            sock, answer = self._asked.popleft()
            self._turn.release()
            sock.close()  # where it is there, but this process had no descriptor left for it, it ends with that
            if not answer.done():
                why = message.get("failed", "the host has no descriptor left")
                answer.set_exception(IsolateError(f"no room for another isolate: {why}"))
        elif "refused" in message:
            if not self._ready.done():
                self._ready.set_exception(IsolateError(message["refused"]))
        elif not self._ready.done():
            self._ready.set_result(message["walls"])

    def _end(self) -> None:
        self.ended = True
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        error = IsolateCrashedError("the zygote has ended")
        if not self._ready.done():
            self._ready.set_exception(IsolateError("the zygote ended while it was starting"))
        for sock, answer in self._asked:
            self._turn.release()
            sock.close()
            if not answer.done():
                answer.set_exception(error)
        self._asked.clear()
        for child in self._children.values():
            child.ended_with(None)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()  # its child, the zygote, dies with it
        process.wait()


def _import_path(packages: Collection[str]) -> list[str]:
    """Return the folders in which the packages are."""
    found: dict[str, None] = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            found[str(Path(location).resolve().parent)] = None
    return list(found)
