"""The process that looks after one sandbox, from empty namespaces to the end of its command. Stdlib only."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from pathlib import Path
from typing import Any

from ci_platform.egress import ADDRESS, PORT
from ci_platform.sandboxes import cgroups, linux, messages, rootfs
from ci_platform.sandboxes.inside import HOST, ROOT, Inside, run_to_exit

_WATCH_EVERY = 200
"""Milliseconds between two looks at the memory of a job that no control group limits."""

_GATEWAY_ENDS_WITHIN = 5.0
"""Seconds that a gateway is waited for when its command is over, so that its last records are there."""


class _StaleError(Exception):
    """The host has mounted the job's tree after this sandbox was prepared."""


def _identity(path: str) -> list[int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino]


class Berth:
    """One sandbox, from empty namespaces to the end of its command. Lives in the supervisor."""

    def __init__(
        self, config: dict[str, Any], parents: cgroups.Parents | None, channel: socket.socket
    ) -> None:
        self.config, self.parents, self.channel = config, parents, channel
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
        self._hand_over_the_way_out()
        received = messages.receive(self.channel)
        if received is None:
            return
        job, (output, *lifeline) = received
        self._furnish(job)
        messages.send(self.relay, job, [output])
        os.close(output)
        verdict = self._watch(job)
        for fd in lifeline:
            _end_gateway(socket.socket(fileno=fd))
        # Nothing runs in there any more, so this waits for the overlay to be really gone.
        with contextlib.suppress(OSError):
            linux.unmount(rootfs.WORKSPACE)
        if self.group is not None:
            if verdict["exited"] and self.group.out_of_memory():
                verdict.setdefault("reason", "memory")
            self.group.remove()
        messages.send(self.channel, verdict)

    def _prepare(self) -> None:
        if self.parents is not None:
            self.group = cgroups.Group(self.parents, str(os.getpid()))
        self._enter_namespaces()
        ready, go = os.pipe()
        done, finished = os.pipe()
        self.init = os.fork()
        if self.init == 0:
            self.relay.close()
            self.channel.close()
            os.close(go)
            os.close(done)
            inside = Inside(self.uid, self.as_root, self.config["filter"], self.command_end)
            run_to_exit(lambda: inside.be_init(ready, finished))
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
        rootfs.close(ROOT)

    def _enter_namespaces(self) -> None:
        flags = (
            linux.CLONE_NEWNS
            | linux.CLONE_NEWPID
            | linux.CLONE_NEWNET
            | linux.CLONE_NEWIPC
            | linux.CLONE_NEWUTS
        )
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
        linux.loopback_up()
        self._leave_the_hosts_tree()

    def _leave_the_hosts_tree(self) -> None:
        """Make a memory file system the root, with the host's tree at HOST and the sandbox's at ROOT."""
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        stage = "/tmp"  # noqa: S108 - only a name to mount on, which exists everywhere
        linux.mount("tmpfs", stage, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=1m")
        for name in (HOST, ROOT):
            Path(stage + name).mkdir()
        linux.pivot_root(stage, stage + HOST)
        os.chdir("/")
        linux.mount("tmpfs", ROOT, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=4m")
        toolchains = self.config["toolchains"]
        rootfs.build(HOST, ROOT, toolchains, self.uid)

    def _hand_over_the_way_out(self) -> None:
        """Say that all is ready, with the socket on which a gateway will take the command's connections.

        Init does not hold it, and the platform closes it for a command that has no network.
        """
        with socket.create_server((ADDRESS, PORT), backlog=128) as listener:
            messages.send(self.channel, {"ready": self.init}, [listener.fileno()])

    def _furnish(self, job: dict[str, Any]) -> None:
        """Mount the workspace and leave the host's tree for good."""
        tree = job["tree"]
        upper = HOST + tree["upper"]
        if _identity(upper) != tree["identity"]:
            raise _StaleError(f"{tree['upper']} is on a file system that was mounted later")
        target = ROOT + rootfs.WORKSPACE
        if tree["lowers"]:
            lowers = [HOST + lower for lower in tree["lowers"]]
            linux.mount_overlay(lowers, upper, HOST + tree["work"], target, as_root=self.as_root)
        else:
            linux.bind(upper, target, linux.ATTR_NOSUID | linux.ATTR_NODEV, recursive=False)
        rootfs.limit_private_places(ROOT, job["memory"])
        if self.group is not None:
            self.group.limit(job["memory"], job["processes"])
        os.chdir(ROOT)
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


def _end_gateway(lifeline: socket.socket) -> None:
    """Have the command's gateway end, and wait until it has written what it knows."""
    with lifeline:
        lifeline.settimeout(_GATEWAY_ENDS_WITHIN)
        with contextlib.suppress(OSError):
            lifeline.shutdown(socket.SHUT_WR)
            while lifeline.recv(4096):
                pass


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
