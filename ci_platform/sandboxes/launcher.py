"""The resident program that starts commands for `isolate.IsolateSandbox`. Stdlib only, one thread, no secrets.

Booting Python for each command would cost 20-30 ms; forking this small process costs one or two. And most of
a sandbox does not depend on the command, so it is made ahead: a *berth*, one fork of the launcher, is

    supervisor (host's pid namespace) -> init (pid 1 of its own) -> command (no privileges, waits for exec)

in fresh mount, pid, network, ipc and uts namespaces with the root directory laid out. The job comes later,
over the berth's own channel and never through the launcher: the supervisor mounts the workspace, drops the
host's root directory and hands the job on to the command process.

A command that may use a network gets a gateway, another fork of the launcher, which stays on the host's network.

The end: init ends with the command, and the kernel kills whatever else lives in the pid namespace before the
supervisor's wait returns. The platform shuts the channel down to kill, and its death does the same; a dying
launcher takes the supervisors along and they their inits.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from typing import Any

from ci_platform.egress import gateway
from ci_platform.sandboxes import cgroups, linux, messages, seccomp
from ci_platform.sandboxes.inside import drop_privileges, run_to_exit
from ci_platform.sandboxes.supervisor import Berth


def main(channel_fd: int) -> None:
    """Fork a berth for each message from the platform, until the platform is gone."""
    channel = socket.socket(fileno=channel_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o022)
    gc.collect()
    gc.freeze()
    # Every child that does not survive the platform holds one end: when all are gone, the other end says so.
    gone, here = os.pipe()
    parents = None
    while (received := messages.receive(channel)) is not None:
        order, files = received
        if "gateway" not in order:
            parents = _parents(order)
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(gone)
            run_to_exit(lambda order=order, files=files: _serve(order, files, here))  # type: ignore[misc]
        for file in files:
            os.close(file)
    # The platform is gone, so every supervisor is on its way out that has no command which may survive it; leaving
    # before them would kill them midway.
    os.close(here)
    os.read(gone, 1)
    if parents is not None:
        parents.remove()


def _serve(order: dict[str, Any], files: list[int], here: int) -> None:
    if "gateway" in order:
        os.close(here)
        _be_gateway(order, files)
    else:
        Berth(order, _parents(order), socket.socket(fileno=files[0]), here).serve()


def _be_gateway(order: dict[str, Any], files: list[int]) -> None:
    """Let one command out to the network: as nobody in particular, and with what a command may not do either."""
    os.setsid()
    served = gateway.from_order(order["gateway"], *files)
    drop_privileges(order["uid"], as_root=os.geteuid() == 0)
    if order["filter"]:
        linux.load_filter(seccomp.program())
    served.serve()


def _parents(config: dict[str, Any]) -> cgroups.Parents | None:
    found = config["groups"]
    return None if found is None else cgroups.Parents(found["version"], tuple(found["folders"]))
