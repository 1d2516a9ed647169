"""The resident program that starts commands for `isolate.IsolateSandbox`. Stdlib only, one thread, no secrets.

Booting Python for each command would cost 20-30 ms; forking this small process costs one or two. And most of
a sandbox does not depend on the command, so it is made ahead: a *berth*, one fork of the launcher, is

    supervisor (host's pid namespace) -> init (pid 1 of its own) -> command (no privileges, waits for exec)

in fresh mount, pid, network, ipc and uts namespaces with the root directory laid out. The job comes later,
over the berth's own channel and never through the launcher: the supervisor mounts the workspace, drops the
host's root directory and hands the job on to the command process.

The end: init ends with the command, and the kernel kills whatever else lives in the pid namespace before the
supervisor's wait returns. The platform shuts the channel down to kill, and its death does the same; a dying
launcher takes the supervisors along and they their inits.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from ci_platform.sandboxes import cgroups, linux, messages, rootfs, seccomp

_HOST, _ROOT = "/host", "/root"
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_OPEN_FILES = 65_536
_WATCH_EVERY = 200
"""Milliseconds between two looks at the memory of a job that no control group limits."""


def main(channel_fd: int) -> None:
    """Fork a berth for each message from the platform, until the platform is gone."""
    channel = socket.socket(fileno=channel_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o022)
    gc.collect()
    gc.freeze()
    parents = None
    while (received := messages.receive(channel)) is not None:
        config, files = received
        parents = _parents(config)
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run_to_exit(Berth(config, socket.socket(fileno=files[0])).serve)
        for file in files:
            os.close(file)
    # The platform is gone, so every supervisor is on its way out; leaving before them would kill them midway.
    with contextlib.suppress(ChildProcessError):
        os.wait()
    if parents is not None:
        parents.remove()


def _parents(config: dict[str, Any]) -> cgroups.Parents | None:
    found = config["groups"]
    return None if found is None else cgroups.Parents(found["version"], tuple(found["folders"]))


def _run_to_exit(work: Any) -> NoReturn:
    """End this fork with the result of `work`; never return into the code that forked it."""
    code = 70
    try:
        code = work() or 0
    except BaseException as error:  # noqa: BLE001 - a fork has nobody to raise to; the platform sees the channel end
        print(f"sandbox launcher: {error!r}", file=sys.stderr, flush=True)  # noqa: T201 - the platform's own stderr
    finally:
        os._exit(code)


class Berth:
    """One sandbox, from empty namespaces to the end of its command. Lives in the supervisor."""

    def __init__(self, config: dict[str, Any], channel: socket.socket) -> None:
        self.config, self.channel = config, channel
        self.uid: int = config["uid"]
        self.as_root = os.geteuid() == 0
        self.relay, self.command_end = socket.socketpair()
        self.init = 0
        self.group: cgroups.Group | None = None

    def serve(self) -> None:
        """Prepare, take one job, see it through, report."""
        linux.die_with_parent()
        os.setsid()
        # BrokenPipeError: nobody waits for the report any more.
        with contextlib.suppress(BrokenPipeError):
            try:
                self._serve()
            except _StaleError as error:
                self._kill()
                messages.send(self.channel, {"stale": str(error)})
            except OSError as error:
                self._kill()
                messages.send(self.channel, {"error": str(error)})
        self._kill()
        if self.group is not None:
            self.group.remove()

    def _serve(self) -> None:
        self._prepare()
        messages.send(self.channel, {"ready": self.init})
        received = messages.receive(self.channel)
        if received is None:
            return
        job, files = received
        self._furnish(job)
        messages.send(self.relay, job, files)
        for file in files:
            os.close(file)
        verdict = self._watch(job)
        # Nothing runs in there any more, so this waits for the overlay to be really gone.
        with contextlib.suppress(OSError):
            linux.unmount(rootfs.WORKSPACE)
        if self.group is not None:
            if verdict["exited"] and self.group.out_of_memory():
                verdict.setdefault("reason", "memory")
            self.group.remove()
        messages.send(self.channel, verdict)

    def _prepare(self) -> None:
        if (parents := _parents(self.config)) is not None:
            self.group = cgroups.Group(parents, str(os.getpid()))
        self._enter_namespaces()
        ready, go = os.pipe()
        done, finished = os.pipe()
        self.init = os.fork()
        if self.init == 0:
            self.relay.close()
            self.channel.close()
            os.close(go)
            os.close(done)
            _run_to_exit(lambda: self._be_init(ready, finished))
        os.close(ready)
        os.close(finished)
        self.command_end.close()
        if self.group is not None:
            # Moving takes up to 7 ms (it waits for an RCU grace period), which is why it is done ahead.
            self.group.add(self.init)
        os.write(go, b".")
        os.close(go)
        problem = os.read(done, 4096)
        os.close(done)
        if problem != b"ok":
            raise OSError(problem.decode(errors="replace") or "init ended early")
        rootfs.close(_ROOT)

    def _enter_namespaces(self) -> None:
        flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
        if not self.config["network"]:
            flags |= linux.CLONE_NEWNET
        if self.as_root:
            linux.unshare(flags)
        else:
            uid, gid = os.geteuid(), os.getegid()
            linux.unshare(flags | linux.CLONE_NEWUSER)
            linux.map_user(self.uid, self.uid, uid, gid)
            # The maps reset nothing, but a change of user namespace counts as one of credentials.
            linux.die_with_parent()
        linux.hide_memory()
        linux.set_hostname("sandbox")
        if not self.config["network"]:
            linux.loopback_up()
        self._leave_the_hosts_tree()

    def _leave_the_hosts_tree(self) -> None:
        """Make a memory file system the root, with the host's tree at _HOST and the sandbox's at _ROOT."""
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        stage = "/tmp"  # noqa: S108 - only a name to mount on, which exists everywhere
        linux.mount("tmpfs", stage, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=1m")
        for name in (_HOST, _ROOT):
            Path(stage + name).mkdir()
        linux.pivot_root(stage, stage + _HOST)
        os.chdir("/")
        linux.mount("tmpfs", _ROOT, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=4m")
        toolchains = self.config["toolchains"]
        rootfs.build(_HOST, _ROOT, toolchains, self.uid, network=self.config["network"])

    def _be_init(self, ready: int, finished: int) -> int:
        """Be pid 1: fork the command process, then collect the dead until it ends, and end as it did."""
        linux.die_with_parent()
        if not os.read(ready, 1):
            return 70
        try:
            rootfs.mount_proc(_ROOT)
            _stand_apart()
            command = os.fork()
            if command == 0:
                os.close(ready)
                os.close(finished)
                _run_to_exit(self._be_command)
            self.command_end.close()
            self._drop_privileges()
            linux.die_with_parent()
        except OSError as error:
            os.write(finished, str(error).encode())
            return 70
        os.write(finished, b"ok")
        os.close(finished)
        os.close(ready)
        while True:
            pid, status = os.wait()
            if pid == command:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _drop_privileges(self) -> None:
        linux.drop_bounding_capabilities()
        if self.as_root:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        linux.drop_capabilities()
        linux.hide_memory()

    def _be_command(self) -> int:
        """Give up everything, wait for the job, become it."""
        os.setsid()
        self._drop_privileges()
        if self.config["filter"]:
            linux.load_filter(seccomp.program())
        received = messages.receive(self.command_end)
        if received is None:
            return 70
        job, (output,) = received
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        try:
            _enter(job["cwd"])
            _set_limits(job)
        except OSError as error:
            messages.send(self.command_end, {"refused": str(error)})
            return 70
        return _become(job["argv"], {os.fsencode(k): os.fsencode(v) for k, v in job["env"].items()})

    def _furnish(self, job: dict[str, Any]) -> None:
        """Mount the workspace and leave the host's tree for good."""
        tree = job["tree"]
        upper = _HOST + tree["upper"]
        if _identity(upper) != tree["identity"]:
            raise _StaleError(f"{tree['upper']} is on a file system that was mounted later")
        target = _ROOT + rootfs.WORKSPACE
        if tree["lowers"]:
            lowers = [_HOST + lower for lower in tree["lowers"]]
            linux.mount_overlay(lowers, upper, _HOST + tree["work"], target, as_root=self.as_root)
        else:
            linux.bind(upper, target, linux.ATTR_NOSUID | linux.ATTR_NODEV, recursive=False)
        rootfs.limit_private_places(_ROOT, job["memory"])
        if self.group is not None:
            self.group.limit(job["memory"], job["processes"])
        os.chdir(_ROOT)
        linux.pivot_root(".", ".")
        linux.unmount(".", linux.MNT_DETACH)
        os.chdir("/")

    def _watch(self, job: dict[str, Any]) -> dict[str, Any]:
        """Wait until the command is over; kill it when the platform says so, is gone, or memory runs out."""
        poll = select.poll()
        poll.register(self.channel, select.POLLRDHUP)
        poll.register(self.relay, select.POLLIN)
        pidfd = os.pidfd_open(self.init)
        poll.register(pidfd, select.POLLIN)
        verdict: dict[str, Any] = {}
        while True:
            events = {fd for fd, _ in poll.poll(None if self.group is not None else _WATCH_EVERY)}
            if self.relay.fileno() in events:
                poll.unregister(self.relay)
                if (refusal := messages.receive(self.relay)) is not None:
                    verdict = refusal[0]
            if pidfd in events:
                _, status = os.waitpid(self.init, 0)
                self.init = 0
                code = os.waitstatus_to_exitcode(status)
                return {"exited": code if code >= 0 else 128 - code} | verdict
            if self.channel.fileno() in events:
                poll.unregister(self.channel)
                os.kill(self.init, signal.SIGKILL)
            elif self.group is None and not verdict and _memory_used() > job["memory"]:
                verdict = {"reason": "memory"}
                os.kill(self.init, signal.SIGKILL)

    def _kill(self) -> None:
        if self.init:
            os.kill(self.init, signal.SIGKILL)
            os.waitpid(self.init, 0)
            self.init = 0


class _StaleError(Exception):
    """The host has mounted the job's tree after this sandbox was prepared."""


def _identity(path: str) -> list[int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino]


def _stand_apart() -> None:
    """Read nothing, and print nowhere until told where."""
    null = os.open(f"{_ROOT}/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def _enter(cwd: str) -> None:
    if Path(_HOST).exists():
        raise OSError("the host's tree is still there")
    place = os.path.realpath(f"{rootfs.WORKSPACE}/{cwd}")
    if place != rootfs.WORKSPACE and not place.startswith(rootfs.WORKSPACE + "/"):
        raise OSError(f"cwd {cwd!r} leaves the workspace")
    try:
        os.chdir(place)
    except OSError as error:
        raise OSError(f"cwd {cwd!r}: {error.strerror}") from None


def _set_limits(job: dict[str, Any]) -> None:
    for kind, value in job["rlimits"].items():
        number = getattr(resource, kind)
        _, hard = resource.getrlimit(number)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (limit, limit))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, hard), hard))


def _become(argv: list[str], env: dict[bytes, bytes]) -> int:
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(argv[0], argv, env)  # noqa: S606 - no shell is the point
    except FileNotFoundError:
        os.write(2, f"{argv[0]}: not found\n".encode(errors="replace"))
        return _NOT_FOUND
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode(errors="replace"))
        return _NOT_EXECUTABLE


def _memory_used() -> int:
    """Return the bytes that all processes of this sandbox hold, its private files included."""
    private = os.statvfs(rootfs.SCRATCH)
    used = (private.f_blocks - private.f_bfree) * private.f_frsize
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used += _proportional_size(process)
    return used


def _proportional_size(process: Path) -> int:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
