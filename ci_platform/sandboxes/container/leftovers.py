"""What platforms that are dead have left in the engine: swept, but for what belongs to a command that goes on."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import docker

from ci_platform.sandboxes import cgroups
from ci_platform.sandboxes.container.engine import PLATFORM, RUN, remove
from ci_platform.sandboxes.container.networks import remove_network


def sweep_engine(client: docker.DockerClient, spared: Collection[str]) -> int:
    """Remove containers and networks of dead platforms, but of the runs in `spared`; returns how many."""
    return _remove(client, {"label": PLATFORM}, spared)


def remove_left(client: docker.DockerClient, run: str) -> int:
    """Remove what dead platforms have left for one run; returns how many."""
    return _remove(client, {"label": f"{RUN}={run}"}, ())


def scopes_of(client: docker.DockerClient, containers: Collection[str]) -> set[str]:
    """Return the runs that these containers are part of."""
    return {
        each["Labels"].get(RUN, "")
        for each in client.api.containers(all=True, filters={"label": PLATFORM})
        if each["Id"] in containers
    }


def _remove(client: docker.DockerClient, filters: dict[str, str], spared: Collection[str]) -> int:
    removed = 0
    for container in _dead(client.api.containers(all=True, filters=filters), spared):
        remove(client, container)
        removed += 1
    for network in _dead(client.api.networks(filters=filters), spared):
        remove_network(client, network)
        removed += 1
    return removed


def _dead(listed: list[dict[str, object]], spared: Collection[str]) -> Iterator[str]:
    for each in listed:
        labels: dict[str, str] = each["Labels"]  # type: ignore[assignment]
        # An image may have our labels too, without a value.
        name = labels.get(PLATFORM, "")
        if name and not cgroups.is_alive(name) and labels.get(RUN, "") not in {*spared} - {""}:
            yield str(each["Id"])
