"""Networks of runs: each is the run's alone, and leads neither to the host nor out."""

from __future__ import annotations

import contextlib
import hashlib

import docker
from docker.errors import APIError, NotFound

from ci_platform.sandboxes import cgroups
from ci_platform.sandboxes.container.engine import PLATFORM, RUN

NOWHERE = "192.0.2.1"
"""A name server that no network leads to (RFC 5737): the engine's own would ask the host's for outside names."""


def make_network(client: docker.DockerClient, run: str) -> str:
    """Make the private network of a run and return its name. Blocks.

    `internal`: no route out. `inhibit_ipv4`: the host has no address in it, so what listens on all of the host's
    addresses cannot be reached either.
    """
    name = f"dynflow-{hashlib.sha256(run.encode()).hexdigest()[:16]}-{cgroups.platform_name()}"
    client.api.create_network(
        name,
        driver="bridge",
        internal=True,
        check_duplicate=True,
        options={"com.docker.network.bridge.inhibit_ipv4": "true"},
        labels={RUN: run, PLATFORM: cgroups.platform_name()},
    )
    return name


def remove_network(client: docker.DockerClient, name: str) -> None:
    """Remove a network; nothing if it is gone. One that is still in use is left for the next sweep."""
    with contextlib.suppress(NotFound, APIError):
        client.api.remove_network(name)
