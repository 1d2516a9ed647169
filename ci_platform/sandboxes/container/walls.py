"""What every container of commands is made of: its walls, limits, user and environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import docker
from docker.types import LogConfig

from ci_platform.errors import FailedError
from ci_platform.sandboxes import SANDBOX_UID, Mount, SandboxJob, cgroups
from ci_platform.sandboxes.container.engine import JOB, PLATFORM, RUN
from ci_platform.sandboxes.container.networks import NOWHERE

WORKSPACE, HOME = "/workspace", "/home/ci"
PRIVATE = ("/tmp", "/var/tmp", HOME)  # noqa: S108 - the container's own
"""Folders that a command may write to beside the workspace: in memory, and empty when it begins."""


_TO_INSTALL = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID")
"""What package managers need to put files of other owners in place."""


def create(
    client: docker.DockerClient,
    image: str,
    job: SandboxJob,
    *,
    binds: list[str],
    networks: Sequence[str],
    program: Mapping[str, Any],
    keepers: int = 0,
    installs: bool = False,
) -> str:
    """Make a container with every wall, and return its id. Blocks.

    `networks`: those it is on, none at all if there are none. `program` says what it runs, and where;
    `keepers` of its processes do not count. With `installs` it is root's, whose files may be changed.
    """
    limits = job.limits
    private = f"size={limits.memory},mode=1777,nosuid,nodev,exec"
    host = client.api.create_host_config(
        binds=binds,
        cap_drop=["ALL"],
        cap_add=list(_TO_INSTALL) if installs else None,
        # Collects orphans, lets signals end the command, and exits with 127 where there is no such program.
        init=True,
        ipc_mode="private",
        log_config=LogConfig(type=LogConfig.types.NONE),
        mem_limit=limits.memory,
        memswap_limit=limits.memory,
        nano_cpus=None if limits.cpus is None else int(limits.cpus * 1e9),
        network_mode=networks[0] if networks else "none",
        # A private network's names are the engine's to know; it must not ask outside for others.
        dns=None if job.network else [NOWHERE],
        # docker-init is one more.
        pids_limit=limits.processes + 1 + keepers,
        read_only=not installs,
        security_opt=["no-new-privileges"],
        shm_size=limits.memory,
        tmpfs=dict.fromkeys([*PRIVATE, *_ways_home(job)], private),
    )
    labels = {JOB: job.id, RUN: job.scope, PLATFORM: cgroups.platform_name()}
    made: dict[str, str] = client.api.create_container(
        image,
        host_config=host,
        labels=labels,
        user="0:0" if installs else user(),
        hostname="sandbox",
        healthcheck={"test": ["NONE"]},  # an image's own would run beside the command
        **program,
    )
    for network in networks[1:]:
        client.api.connect_container_to_network(made["Id"], network)
    return made["Id"]


def environment(job: SandboxJob) -> dict[str, str]:
    """Return the environment of a command; what its image sets comes below it."""
    return {"HOME": HOME, "USER": "ci", "LANG": "C.UTF-8", "CI": "true", "DYNFLOW": "true"} | dict(job.env)


def mount_point(mount: Mount) -> str:
    """Return where a job's mount is, inside."""
    return str(PurePosixPath(WORKSPACE if mount.place == "workspace" else HOME, mount.path))


def _ways_home(job: SandboxJob) -> list[str]:
    """Return the folders between the home folder and what is mounted in it; the engine would make them as root's."""
    targets = [PurePosixPath(mount_point(mount)) for mount in job.mounts if mount.place == "home"]
    ways = {str(parent) for target in targets for parent in target.parents if parent.is_relative_to(HOME)}
    return sorted(ways - {HOME})


def place(cwd: str) -> str:
    """Return where a command starts, inside."""
    return str(PurePosixPath(WORKSPACE, cwd))


def user() -> str:
    """Return who commands are, as the engine takes it: files they make belong to the tree's owner."""
    if os.geteuid() == 0:
        return f"{SANDBOX_UID}:{SANDBOX_UID}"
    return f"{os.geteuid()}:{os.getegid()}"


def check_cwd(folder: Path, cwd: str) -> None:
    """Refuse a `cwd` that leaves the workspace at `folder` or is not there."""
    if PurePosixPath(cwd).is_absolute() or ".." in PurePosixPath(cwd).parts:
        raise FailedError(f"cwd {cwd!r} leaves the workspace")
    place = (folder / cwd).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise FailedError(f"cwd {cwd!r} leaves the workspace")
    if not place.is_dir():
        # The engine would make it, as root.
        raise FailedError(f"cwd {cwd!r}: no such directory")
