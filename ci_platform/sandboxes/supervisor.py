"""The process that looks after one sandbox, from empty namespaces to the end of its command. Stdlib only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

from ci_platform.egress import ADDRESS, PORT
from ci_platform.sandboxes import cgroups, gauges, linux, messages, rootfs
from ci_platform.sandboxes.inside import HOST, LAZY, ROOT, Inside, run_to_exit
from ci_platform.sandboxes.watch import Watch


class _StaleError(Exception):
    """The host has mounted the job's tree after this sandbox was prepared."""


def _let_go_of_stderr() -> None:
    """Close the platform's stderr: who reads it to its end would wait for the command, too."""
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _identity(path: str) -> list[int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino]


def _attach(lazy: int) -> str:
    """Mount the lowest layer of a tree that is not on disk, beside the host's tree; returns where."""
    Path(LAZY).mkdir()
    linux.move_mount(lazy, LAZY)
    os.close(lazy)
    return LAZY


class Berth:
    """One sandbox, from empty namespaces to the end of its command. Lives in the supervisor."""

    def __init__(
        self, config: dict[str, Any], parents: cgroups.Parents | None, channel: socket.socket, here: int
    ) -> None:
        self.config, self.parents, self.channel, self.here = config, parents, channel, here
        self.uid: int = config["uid"]
        self.as_root = os.geteuid() == 0
        self.relay, self.command_end = socket.socketpair()
        self.init, self.told_by_init = 0, -1
        self.watch: Watch | None = None
        self.group: cgroups.Group | None = None

    def serve(self) -> None:
        """Prepare, take one job, see it through, report."""
        linux.die_with_parent()
        os.setsid()
        # OSError: nobody waits for the report any more.
        with contextlib.suppress(OSError):
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
        job, fds = received
        files = dict(zip(job["files"], fds, strict=True))
        if "control" in files:
            # From here on it does without the platform, and without the launcher.
            linux.live_on()
            os.close(self.here)
        changes = self._furnish(job, files)
        if "control" in files:
            _let_go_of_stderr()
        printed = self._hand_on(job)
        self.watch = Watch(
            job,
            files,
            self.channel,
            relay=self.relay,
            init=self.init,
            told_by_init=self.told_by_init,
            printed=printed,
            group=self.group,
            disk=gauges.Disk(changes, job["disk"], job["inodes"], fresh=bool(job["tree"]["lowers"])),
            settle=lambda: self._settle(changes),
        )
        self.init = 0
        self.watch.run()

    def _hand_on(self, job: dict[str, Any]) -> int:
        """Give the job to the process that becomes the command; returns where what it prints comes out."""
        printed, printing = os.pipe()
        if self.as_root:
            # So that the command may open /dev/stdout and /dev/stderr by name.
            os.fchown(printing, self.uid, self.uid)
        messages.send(self.relay, job, [printing])
        os.close(printing)
        return printed

    def _settle(self, changes: list[int]) -> None:
        """Let go of what the ended command held. Nothing runs in there, so the overlays are really gone afterwards."""
        for descriptor in changes:
            os.close(descriptor)
        # With what is mounted below it. Names of the tenant's are not followed: the two are the sandbox's own.
        for place in (rootfs.WORKSPACE, rootfs.HOME):
            with contextlib.suppress(OSError):
                linux.unmount(place, linux.MNT_DETACH)

    def _prepare(self) -> None:
        if self.parents is not None:
            self.group = cgroups.Group(self.parents, cgroups.platform_name())
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
            os.close(self.here)
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
        self.told_by_init = done
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

    def _furnish(self, job: dict[str, Any], files: dict[str, int]) -> list[int]:
        """Mount the workspace, and leave the host's tree for good; returns the folders that take changes, open."""
        lazy = _attach(files.pop("lazy")) if "lazy" in files else None
        changes = [self._show(job["tree"], ROOT + rootfs.WORKSPACE, lazy)]
        for mount in job["mounts"]:
            target = rootfs.mount_point(ROOT, mount["place"], mount["path"], self.uid)
            changes.append(self._show(mount["tree"], target))
        rootfs.limit_private_places(ROOT, job["memory"])
        if self.group is not None:
            self.group.limit(job["memory"], job["processes"], job["cpus"])
        os.chdir(ROOT)
        linux.pivot_root(".", ".")
        linux.unmount(".", linux.MNT_DETACH)
        os.chdir("/")
        return changes

    def _show(self, tree: dict[str, Any], target: str, lazy: str | None = None) -> int:
        """Mount a tree, `lazy` as its lowest layer; returns the folder of what will be changed in it, open."""
        upper = HOST + tree["upper"]
        if _identity(upper) != tree["identity"]:
            raise _StaleError(f"{tree['upper']} is on a file system that was mounted later")
        changes = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if tree["lowers"]:
            lowers = [HOST + lower for lower in tree["lowers"]]
            if lazy is not None:
                lowers[-1] = lazy
            linux.mount_overlay(lowers, upper, HOST + tree["work"], target, as_root=self.as_root)
        else:
            linux.bind(upper, target, linux.ATTR_NOSUID | linux.ATTR_NODEV, recursive=False)
        return changes

    def _kill(self) -> None:
        if self.watch is not None:
            self.watch.kill()
        if self.init:
            os.kill(self.init, signal.SIGKILL)
            os.waitpid(self.init, 0)
            self.init = 0
