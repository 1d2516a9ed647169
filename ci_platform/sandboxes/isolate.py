"""Commands as confined processes of this host, a few milliseconds each. The platform's side of `launcher`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import anyio

from ci_platform.egress import proxy_variables
from ci_platform.egress.policy import Policy
from ci_platform.egress.records import Records, WayOut
from ci_platform.errors import FailedError, UnavailableError
from ci_platform.sandboxes import (
    SANDBOX_UID,
    Output,
    Sandbox,
    SandboxJob,
    SandboxOutcome,
    Tree,
    berths,
    cgroups,
    messages,
    rootfs,
    seccomp,
)
from ci_platform.sandboxes.berths import Berth, Spool, StaleError
from ci_platform.sandboxes.settling import Settling

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
    runs the platform is one of them. `allow_network` lets jobs that ask for it out, through a gateway of their own
    that leads to public addresses and to the `inner_hosts` (`egress.policy.Rule`). `ready` sandboxes are kept
    prepared. `kept` is how long a command that has ended without a platform waits for one to hear of it. `python`
    boots the launcher.
    """

    outlives = True
    takes_lazy = True

    def __init__(
        self,
        *,
        toolchains: Sequence[Path] = (),
        allow_network: bool = False,
        inner_hosts: Sequence[str] = (),
        ready: int = 2,
        kept: timedelta = timedelta(hours=1),
        python: str = sys.executable,
    ) -> None:
        own = [] if sys.base_prefix == "/usr" else [sys.base_prefix]
        self._toolchains = [*own, *(str(path.resolve()) for path in toolchains)]
        self._allow_network, self._ready, self._python = allow_network, ready, python
        self._inner_hosts = tuple(inner_hosts)
        self._groups: cgroups.Parents | None = None
        self._launcher: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._berths: deque[Berth] = deque()
        self._leaving = False
        self._unsettled: dict[Path, Berth] = {}
        self._settling = Settling()
        self._kept = kept

    async def run(self, job: SandboxJob, output: Output) -> SandboxOutcome:
        """Run one command to its end."""
        self._check_network(job)
        await self._settling.wait(job)
        message = self._message(job)
        try:
            return await self._run(job, message, output)
        except StaleError:
            # Nothing has run yet, and a berth made now sees the tree.
            self._drop_berths()
        try:
            return await self._run(job, message, output)
        except StaleError as error:
            raise UnavailableError(f"isolate sandbox: {error}") from None

    async def sweep(self) -> int:
        """Remove the control groups of dead platforms (processes and mounts die with them), and get ready."""
        swept = cgroups.sweep()
        self._refill()
        return swept

    async def close(self) -> None:
        """End the launcher and the sandboxes that it keeps ready."""
        self._drop_berths()
        self._settling.close()
        for folder in list(self._unsettled):
            self.settled(folder)
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
            "network": "none, or through a gateway where a job asks for it"
            if self._allow_network
            else "none",
            "toolchains": ", ".join(self._toolchains) or "the host's /usr",
        }

    async def _run(self, job: SandboxJob, message: dict[str, Any], output: Output) -> SandboxOutcome:
        berth = await self._take()
        with contextlib.ExitStack() as stack:
            stack.callback(berth.close)
            way_out = self._way_out(job, berth, stack)
            # Without a name: it is gone with the last process that has it open.
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0, dir=job.survive))
            files = {"output": file.fileno()}
            if job.survive is not None:
                files["control"] = stack.enter_context(berths.listen(job.survive)).fileno()
            if job.tree.lazy is not None:
                files["lazy"] = await anyio.to_thread.run_sync(job.tree.lazy.mount)
                stack.callback(os.close, files["lazy"])
            berth.start(message, files, way_out)
            self._refill()
            spool = Spool(file.fileno(), output, None if way_out is None else way_out.records)
            outcome = await self._see_through(berth, spool, job)
            self._keep_until_settled(berth, job)
            return outcome

    async def resume(self, job: SandboxJob, output: Output) -> SandboxOutcome | None:
        """Go on with a command that an earlier process has started, from the first byte of its output on."""
        if job.survive is None:
            return None
        # Shielded: who is cancelled meanwhile would let go of a command that nobody finds again.
        with anyio.CancelScope(shield=True):
            found = await anyio.to_thread.run_sync(berths.find, job.survive)
        if found is None:
            return None
        berth, (file, *records) = found
        with contextlib.ExitStack() as stack:
            stack.callback(berth.close)
            for fd in (file, *records):
                stack.callback(os.close, fd)
            spool = Spool(file, output, Records(records[0], job.connected) if records else None)
            outcome = await self._see_through(berth, spool, job)
            self._keep_until_settled(berth, job)
            return outcome

    async def abandon(self, folder: Path) -> None:
        """Kill a command that an earlier process has started, and wait until nothing of it is left."""
        found = await anyio.to_thread.run_sync(berths.find, folder)
        if found is not None:
            berth, files = found
            await berth.kill(Spool(files[0], lambda _: None, None))
            berth.close()
            for fd in files:
                os.close(fd)

    def settled(self, folder: Path) -> None:
        """Let go of a command that has ended; until then a later process would find it."""
        if (berth := self._unsettled.pop(folder, None)) is not None:
            berth.heard()
            berth.close()

    def detach(self) -> None:
        """From now on leave commands that may survive to themselves, where others are cancelled."""
        self._leaving = True

    def _keep_until_settled(self, berth: Berth, job: SandboxJob) -> None:
        """Close all but the berth of a command that may survive: its supervisor waits until its end is settled."""
        self._settling.keep(job.tree, berth)
        if job.survive is not None:
            self._unsettled[job.survive] = berth.moved()

    async def _see_through(self, berth: Berth, spool: Spool, job: SandboxJob) -> SandboxOutcome:
        """Follow a command to its end. Cancelled, it is killed, or left alone where it may survive and we leave."""
        try:
            await spool.pass_on()  # of a command that was found again there may be much already
            verdict = await berth.follow(spool)
        except BaseException:
            if not (self._leaving and job.survive is not None):
                await berth.kill(spool)
                spool.pass_on_rest()
            raise
        spool.pass_on_rest()
        if "refused" in verdict:
            if job.survive is not None:
                berth.heard()
            raise FailedError(verdict["refused"])
        return SandboxOutcome(
            verdict["exited"],
            verdict.get("reason", "exited"),
            timedelta(seconds=verdict["seconds"]),
            verdict.get("used", 0),
            verdict.get("ended", ""),
        )

    def _check_network(self, job: SandboxJob) -> None:
        if job.network and not self._allow_network:
            raise FailedError(
                f"{job.argv[0]!r} asks for network={job.network!r}, which isolate sandboxes have not here"
            )
        try:
            Policy(job.network if isinstance(job.network, tuple) else None)
        except ValueError as error:
            raise FailedError(f"network: {error}") from None

    def _way_out(self, job: SandboxJob, berth: Berth, stack: contextlib.ExitStack) -> WayOut | None:
        """Have a gateway started for a job that may use a network."""
        if not job.network:
            return None
        rules = job.network if isinstance(job.network, tuple) else None
        way_out = stack.enter_context(WayOut(rules, self._inner_hosts, job.connected))
        order = {"gateway": way_out.order, "uid": SANDBOX_UID, "filter": seccomp.supported()}
        files = [berth.listener, way_out.gateways_end.fileno(), way_out.file]
        assert self._channel is not None  # noqa: S101 - the berth came through it
        try:
            messages.send(self._channel, order, files)
        except OSError as error:
            raise StaleError(f"its launcher ended before its gateway was there: {error}") from error
        return way_out

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
            **(proxy_variables() if job.network else {}),
            **job.env,
        }
        if any("\0" in text for text in (*job.argv, *env, *env.values())) or any("=" in key for key in env):
            raise FailedError("argv and env must not contain NUL characters, nor names of variables '='")
        return {
            "argv": list(job.argv),
            "env": env,
            "cwd": job.cwd,
            **_limits(job),
            "kept": self._kept.total_seconds(),
            "rlimits": self._rlimits(job),
            "tree": _tree(job.tree),
            "mounts": [
                {"place": each.place, "path": each.path, "tree": _tree(each.tree)} for each in job.mounts
            ],
        }

    def _rlimits(self, job: SandboxJob) -> dict[str, int]:
        """Return limits per process. Without control groups they stand in for the limits of the whole job.

        RLIMIT_DATA and not RLIMIT_AS: what Go, Java and V8 only reserve is no memory.
        """
        limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": max(job.limits.disk, job.limits.memory)}
        if self._groups is None:
            limits["RLIMIT_DATA"] = job.limits.memory
            if os.geteuid() != 0:
                limits["RLIMIT_NPROC"] = job.limits.processes
        return limits

    async def _take(self) -> Berth:
        """Return a prepared sandbox, a fresh one where those in stock died with their launcher."""
        while self._berths:
            if (berth := await _prepared(self._berths.popleft())) is not None:
                return berth
        if (berth := await _prepared(self._new_berth())) is not None:
            return berth
        raise UnavailableError("isolate sandbox: its launcher ended; see the platform's stderr")

    def _refill(self) -> None:
        while len(self._berths) < self._ready:
            self._berths.append(self._new_berth())

    def _drop_berths(self) -> None:
        while self._berths:
            self._berths.popleft().close()

    def _new_berth(self) -> Berth:
        config = {"uid": SANDBOX_UID, "toolchains": self._toolchains, "filter": seccomp.supported()}
        ours, theirs = socket.socketpair()
        ours.settimeout(_ANSWER_WITHIN)
        with theirs:
            try:
                self._order(config, theirs)
            except OSError:
                self._restart()
                self._order(config, theirs)
        return Berth(ours)

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


async def _prepared(berth: Berth) -> Berth | None:
    """Return a berth that is ready, None where it is gone. Whoever is cancelled here leaves none that nobody has."""
    try:
        if await berth.prepared():
            return berth
    except BaseException:
        berth.close()
        raise
    berth.close()
    return None


def _tree(tree: Tree) -> dict[str, Any]:
    """Return what a supervisor mounts. It may have been prepared before the tree's file system was mounted."""
    found = tree.upper.stat()
    return {
        "upper": str(tree.upper.resolve()),
        "work": str(tree.work.resolve()) if tree.lowers else "",
        "lowers": [str(lower.resolve()) for lower in tree.lowers],
        "identity": [found.st_dev, found.st_ino],
    }


def _limits(job: SandboxJob) -> dict[str, Any]:
    """Return what the supervisor holds a job to, in seconds and bytes."""
    limits = job.limits
    return {
        "memory": limits.memory,
        "processes": limits.processes,
        "timeout": limits.timeout.total_seconds(),
        "output": limits.output,
        "cpus": limits.cpus,
        "cpu": None if limits.cpu is None else limits.cpu.total_seconds(),
        "disk": limits.disk,
        "inodes": limits.files,
    }
