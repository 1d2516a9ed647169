"""Commands as confined processes of this host, a few milliseconds each. The platform's side of `launcher`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import anyio

from ci_platform.errors import FailedError, UnavailableError
from ci_platform.sandboxes import (
    SANDBOX_UID,
    Output,
    Sandbox,
    SandboxJob,
    SandboxLimits,
    SandboxOutcome,
    StopReason,
    cgroups,
    messages,
    rootfs,
    seccomp,
)

_PIECE = 32 * 1024
"""Bytes read at a time: what is done with them keeps the event loop busy, 10 ms if they are empty lines."""

_ANSWER_WITHIN = 30.0
"""Seconds for the launcher to take a message: it is idle or forks, so only a stopped machine needs longer."""

_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from ci_platform.sandboxes.launcher import main; main(int(sys.argv[2]))"
)
_PACKAGE_HOME = str(Path(__file__).resolve().parents[2])


class IsolateSandbox(Sandbox):
    """Runs commands in namespaces of their own, over an overlay of the job's tree, without privileges.

    `toolchains` are folders shown read-only at their own paths, their `bin` first on PATH; the Python that
    runs the platform is one of them. `allow_network` lets jobs that ask for it use the host's network, which
    includes the host's own loopback. `ready` sandboxes are kept prepared. `python` boots the launcher.
    """

    def __init__(
        self,
        *,
        toolchains: Sequence[Path] = (),
        allow_network: bool = False,
        ready: int = 2,
        python: str = sys.executable,
    ) -> None:
        own = [] if sys.base_prefix == "/usr" else [sys.base_prefix]
        self._toolchains = [*own, *(str(path.resolve()) for path in toolchains)]
        self._allow_network, self._ready, self._python = allow_network, ready, python
        self._groups: cgroups.Parents | None = None
        self._launcher: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._berths: deque[_Berth] = deque()

    async def run(self, job: SandboxJob, output: Output) -> SandboxOutcome:
        """Run one command to its end."""
        if job.network and not self._allow_network:
            raise FailedError(f"{job.argv[0]!r} asks for network=True, which isolate sandboxes have not here")
        message = self._message(job)
        try:
            return await self._run(job, message, output)
        except _StaleError:
            # Nothing has run yet, and a berth made now sees the tree.
            self._drop_berths()
        try:
            return await self._run(job, message, output)
        except _StaleError as error:
            raise UnavailableError(f"isolate sandbox: {error}") from None

    async def sweep(self) -> int:
        """Remove the control groups of dead platforms (processes and mounts die with them), and get ready."""
        swept = cgroups.sweep()
        self._refill()
        return swept

    async def close(self) -> None:
        """End the launcher and the sandboxes that it keeps ready."""
        self._drop_berths()
        if self._channel is not None:
            self._channel.close()
        if self._launcher is not None:
            launcher, self._launcher = self._launcher, None
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(launcher.wait)
        self._channel = None
        if self._groups is not None:
            self._groups.remove()
            self._groups = None

    def describe(self) -> Mapping[str, str]:
        """Return which walls and limits are in use and what would add those that are missing."""
        as_root = os.geteuid() == 0
        groups = self._groups or cgroups.find()
        if groups is not None and self._groups is None:
            groups.remove()
        version = f"control groups v{groups.version}" if groups else ""
        hint = "a group with memory and pids delegated to this user (systemd: Delegate=yes) makes them exact"
        return {
            "namespaces": "mount, pid, net, ipc, uts" + ("" if as_root else ", user"),
            "user": f"uid {SANDBOX_UID}"
            + (" of the host" if as_root else f" inside, {os.geteuid()} outside"),
            "system calls": "seccomp"
            if seccomp.supported()
            else f"NOT filtered: no list for {os.uname().machine}",
            "memory": version or f"sampled five times a second, and RLIMIT_DATA per process; {hint}",
            "processes": version
            or ("NOT limited" if as_root else "RLIMIT_NPROC in the user namespace") * (not groups),
            "network": "none, or the host's where a job asks for it" if self._allow_network else "none",
            "toolchains": ", ".join(self._toolchains) or "the host's /usr",
        }

    async def _run(self, job: SandboxJob, message: dict[str, Any], output: Output) -> SandboxOutcome:
        berth = await self._take(network=job.network)
        try:
            started = time.monotonic()
            stream = _Stream(berth.start(message), job.limits.output, output)
            self._refill()
            try:
                reason = await _follow(berth, stream, job.limits)
            finally:
                berth.kill()
                verdict = await berth.end()
                stream.finish()
        finally:
            berth.close()
        if "refused" in verdict:
            raise FailedError(verdict["refused"])
        duration = timedelta(seconds=time.monotonic() - started)
        return SandboxOutcome(verdict["exited"], verdict.get("reason", reason), duration)

    def _message(self, job: SandboxJob) -> dict[str, Any]:
        if PurePosixPath(job.cwd).is_absolute() or ".." in PurePosixPath(job.cwd).parts:
            raise FailedError(f"cwd {job.cwd!r} leaves the workspace")
        env = {
            "PATH": rootfs.path_variable(self._toolchains),
            "HOME": rootfs.HOME,
            "USER": rootfs.USER_NAME,
            "LANG": "C.UTF-8",
            "CI": "true",
            "DYNFLOW": "true",
            **job.env,
        }
        if any("\0" in text for text in (*job.argv, *env, *env.values())) or any("=" in key for key in env):
            raise FailedError("argv and env must not contain NUL characters, nor names of variables '='")
        tree = job.tree
        found = tree.upper.stat()
        return {
            "argv": list(job.argv),
            "env": env,
            "cwd": job.cwd,
            "memory": job.limits.memory,
            "processes": job.limits.processes,
            "rlimits": self._rlimits(job),
            "tree": {
                "upper": str(tree.upper.resolve()),
                "work": str(tree.work.resolve()) if tree.lowers else "",
                "lowers": [str(lower.resolve()) for lower in tree.lowers],
                "identity": [found.st_dev, found.st_ino],
            },
        }

    def _rlimits(self, job: SandboxJob) -> dict[str, int]:
        """Return limits per process. Without control groups they stand in for the limits of the whole job.

        RLIMIT_DATA and not RLIMIT_AS: what Go, Java and V8 only reserve is no memory.
        """
        limits = {"RLIMIT_CORE": 0}
        if self._groups is None:
            limits["RLIMIT_DATA"] = job.limits.memory
            if os.geteuid() != 0:
                limits["RLIMIT_NPROC"] = job.limits.processes
        return limits

    async def _take(self, *, network: bool) -> _Berth:
        """Return a prepared sandbox, a fresh one where those in stock died with their launcher."""
        while self._berths and not network:
            berth = self._berths.popleft()
            if await berth.prepared():
                return berth
            berth.close()
        berth = self._new_berth(network=network)
        try:
            if await berth.prepared():
                return berth
        except BaseException:
            berth.close()
            raise
        berth.close()
        raise UnavailableError("isolate sandbox: its launcher ended; see the platform's stderr")

    def _refill(self) -> None:
        while len(self._berths) < self._ready:
            self._berths.append(self._new_berth(network=False))

    def _drop_berths(self) -> None:
        while self._berths:
            self._berths.popleft().close()

    def _new_berth(self, *, network: bool) -> _Berth:
        config = {
            "uid": SANDBOX_UID,
            "toolchains": self._toolchains,
            "network": network,
            "filter": seccomp.supported(),
        }
        ours, theirs = socket.socketpair()
        ours.settimeout(_ANSWER_WITHIN)
        with theirs:
            try:
                self._order(config, theirs)
            except OSError:
                self._restart()
                self._order(config, theirs)
        return _Berth(ours)

    def _order(self, config: dict[str, Any], theirs: socket.socket) -> None:
        if self._channel is None:
            self._start()
        assert self._channel is not None  # noqa: S101 - _start has just set it
        groups = self._groups and {"version": self._groups.version, "folders": self._groups.folders}
        messages.send(self._channel, config | {"groups": groups}, [theirs.fileno()])

    def _start(self) -> None:
        self._groups = cgroups.find()
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(_ANSWER_WITHIN)
        with theirs:
            # -I and -S: nothing of the environment, of site-packages or of the current folder gets in.
            command = [self._python, "-I", "-S", "-c", _CODE, _PACKAGE_HOME, str(theirs.fileno())]
            self._launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=[theirs.fileno()],
            )

    def _restart(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._launcher is not None:
            self._launcher.wait()
        self._drop_berths()
        self._start()


class _StaleError(Exception):
    """The berth is older than a mount that the job's tree is on, or died with its launcher."""


class _Berth:
    """The platform's end of one prepared sandbox."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._prepared = False
        self._killed = False

    async def prepared(self) -> bool:
        """Wait until it is ready for a job. False: it is gone. UnavailableError: the host does not let us."""
        if not self._prepared:
            answer = await self._answer()
            if answer is not None and "error" in answer:
                raise UnavailableError(f"isolate sandbox: cannot prepare one: {answer['error']}")
            self._prepared = answer is not None
        return self._prepared

    def start(self, message: dict[str, Any]) -> int:
        """Send the job; returns the reading end of what its command prints, which does not block."""
        reading, writing = os.pipe()
        try:
            if os.geteuid() == 0:
                # So that the command may open /dev/stdout and /dev/stderr by name.
                os.fchown(writing, SANDBOX_UID, SANDBOX_UID)
            messages.send(self._channel, message, [writing])
        except OSError as error:
            os.close(reading)
            raise _StaleError(f"it ended before its job came: {error}") from error
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        return reading

    def kill(self) -> None:
        """Have the supervisor kill what still runs; its answer comes as usual."""
        # OSError: it has ended by itself.
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    async def ended(self) -> None:
        """Wait until the supervisor has something to say."""
        await anyio.wait_readable(self._channel)

    async def end(self) -> dict[str, Any]:
        """Wait until nothing is left and return how it ended. Not cancellable."""
        with anyio.CancelScope(shield=True):
            answer = await self._answer()
        if answer is None:
            raise UnavailableError("isolate sandbox: its supervisor ended unexpectedly")
        if "stale" in answer:
            raise _StaleError(answer["stale"])
        if "error" in answer:
            raise UnavailableError(f"isolate sandbox: {answer['error']}")
        return answer

    def close(self) -> None:
        self._channel.close()

    async def _answer(self) -> dict[str, Any] | None:
        await anyio.wait_readable(self._channel)
        received = messages.receive(self._channel)
        return received and received[0]


class _Stream:
    """What a command prints, passed on up to a limit."""

    def __init__(self, fd: int, limit: int, output: Output) -> None:
        self._fd, self._left, self._output = fd, limit, output

    async def drain(self) -> bool:
        """Pass on what comes until the last writer is gone; False where that is more than the limit."""
        while self._left >= 0:
            await anyio.wait_readable(self._fd)
            if self._pass_on():
                return True
        return False

    def finish(self) -> None:
        """Pass on what the ended command left in the pipe, and close it."""
        while self._left >= 0 and not self._pass_on():
            pass
        os.close(self._fd)

    def _pass_on(self) -> bool:
        """Pass on one piece; returns whether the stream is at its end."""
        try:
            piece = os.read(self._fd, _PIECE)
        except BlockingIOError:
            return False
        if piece and self._left > 0:
            self._output(piece[: self._left])
        # Below zero: there was more than the limit.
        self._left -= len(piece)
        return not piece


async def _follow(berth: _Berth, stream: _Stream, limits: SandboxLimits) -> StopReason:
    with anyio.move_on_after(limits.timeout.total_seconds()):
        if not await stream.drain():
            return "output"
        # A command may close its output and go on.
        await berth.ended()
        return "exited"
    return "timeout"
