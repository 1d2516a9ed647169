"""The platform's end of the agents that warm containers have: it hands them commands, and hears how those ended.

An agent is the tenant's as soon as a command has run beside it. What it says is twelve bytes about the command that
it was given, and ends that command alone, which its container serves next to no other run: nothing else is believed.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio

from ci_platform.sandboxes import SANDBOX_UID, SandboxJob, doors
from ci_platform.sandboxes.container import walls
from ci_platform.sandboxes.container.agent import NOT_FOUND
from ci_platform.sandboxes.container.places import Place
from ci_platform.sandboxes.container.tails import KILLED

_DOOR = "agent"
_COMES_WITHIN = 20.0
"""Seconds for an agent to start in a container that has started: it takes some 30 ms where nobody hurries."""

_LOOK_EVERY = 0.05
_ANSWER = struct.Struct("<III")
_MOST_STATUS = 0xFFFF
_HEAD = struct.Struct("<II")
_PEER = struct.Struct("3i")
_NICE, _AT_REAL_TIME, _POLICY = 19, 40, 41
"""Where these are in /proc/<pid>/stat: proc(5) counts from 1."""

_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME": "sandbox"}
"""What the engine gives to each process that it starts, below what the image says."""


class NoAgentError(Exception):
    """No agent has started in this container; nothing has run in it."""


@dataclass(frozen=True, slots=True)
class End:
    """How a command ended. `lost`: its agent did before it could tell, and with it all of the container."""

    code: int
    ended: str = ""
    lost: bool = False


class Agent:
    """One agent, as `welcome` has met it. `env` is what its image sets for programs."""

    def __init__(self, channel: socket.socket, pid: int, env: Mapping[str, str]) -> None:
        self._channel, self._pid, self._env = channel, pid, dict(env)
        channel.settimeout(0)
        self._as_it_was = _traits(pid)

    async def run(self, number: int, job: SandboxJob) -> End:
        """Have a command run, and wait for its end. Cancelling leaves it running: the container has to go."""
        try:
            await self._send(_encoded(number, job, self._env))
            answer = await self._receive(_ANSWER.size)
        except OSError:
            answer = b""
        if len(answer) == _ANSWER.size:
            told, status, trouble = _ANSWER.unpack(answer)
            if told == number and status <= _MOST_STATUS and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
                return _end(status, trouble)
        return End(KILLED, lost=True)

    def is_well(self) -> bool:
        """Whether it waits for a command, and no command before has changed what the next one would inherit."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        return not poll.poll(0) and bool(self._as_it_was) and _traits(self._pid) == self._as_it_was

    def close(self) -> None:
        """Let go of it. A command that runs goes on."""
        self._channel.close()

    async def _send(self, message: bytes) -> None:
        left = memoryview(message)
        while left:
            try:
                left = left[self._channel.send(left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._channel)

    async def _receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            await anyio.wait_readable(self._channel)
            piece = self._channel.recv(size - len(received))
            if not piece:
                break
            received += piece
        return received


def expect(place: Place) -> socket.socket:
    """Return where the agent of a place will be heard, for `welcome`."""
    listener = doors.listen(place.output, _DOOR)
    os.chown(place.output / _DOOR, SANDBOX_UID, SANDBOX_UID)
    return listener


def welcome(listener: socket.socket, place: Place, pid: int, env: Mapping[str, str]) -> Agent:
    """Wait for the agent of a container whose first process is `pid`; after it, nobody is let in. Blocks.

    It is the first that comes, and nothing else runs there yet. Raises NoAgentError where that ends without it.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    try:
        for _ in range(int(_COMES_WITHIN / _LOOK_EVERY)):
            if poll.poll(_LOOK_EVERY * 1000):
                channel, _ = listener.accept()
                peer, _, _ = _PEER.unpack(
                    channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
                )
                return Agent(channel, peer, env)
            if not pid or not Path(f"/proc/{pid}").exists():
                break
        raise NoAgentError("the platform's agent does not start in it")
    finally:
        listener.close()
        (place.output / _DOOR).unlink(missing_ok=True)


def environment_of(image: Mapping[str, list[str] | None]) -> dict[str, str]:
    """Return what an image, as the engine describes its `Config`, has programs find in their environment."""
    pairs = (pair.partition("=") for pair in image.get("Env") or ())
    return _ENV | {name: value for name, _, value in pairs}


def _encoded(number: int, job: SandboxJob, env: Mapping[str, str]) -> bytes:
    pairs = (f"{name}={value}" for name, value in (dict(env) | walls.environment(job)).items())
    fields = [walls.place(job.cwd), str(len(job.argv)), *job.argv, *pairs]
    body = b"\0".join(os.fsencode(field) for field in fields)
    return _HEAD.pack(len(body), number) + body


def _end(status: int, trouble: int) -> End:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return End(128 + number, named(number))
    code = os.WEXITSTATUS(status)
    if trouble:
        return End(code, "not found" if code == NOT_FOUND else os.strerror(trouble & 0xFFF))
    return End(code)


def named(number: int) -> str:
    """Return what is said of a command that was killed by a signal."""
    names = {each.value: each.name for each in signal.Signals}
    return f"killed by signal {number} ({names.get(number, 'real time')})"


def _traits(pid: int) -> tuple[str, ...]:
    """Return what a process hands on to those that it starts, and that others of its user may change; () without it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # What comes after the name, which is the second field, begins with the third.
        of_stat = [stat[field - 3] for field in (_NICE, _AT_REAL_TIME, _POLICY)]
        texts = [Path(f"/proc/{pid}/{name}").read_text() for name in ("limits", "oom_score_adj")]
        return (*of_stat, *texts, repr(sorted(os.sched_getaffinity(pid))))
    except OSError:
        return ()
