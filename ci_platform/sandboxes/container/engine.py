"""The Docker engine, asked from the event loop: each call in a thread, its errors as ours."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
import docker
from docker.errors import APIError, DockerException, NotFound

from ci_platform.errors import UnavailableError

T = TypeVar("T")

JOB, RUN, SERVICE, PLATFORM = "dynflow.job", "dynflow.run", "dynflow.service", "dynflow.platform"
"""Labels of what we make: for which job, which run, as which service, by which process (`cgroups.platform_name`)."""

_SOCKET = "unix:///var/run/docker.sock"
_CALLS = 16
"""Calls to the engine at a time: it serialises most of its work anyway."""


class Engine:
    """One engine, connected to at the first call. `url` None: as the docker command finds it.

    Errors: UnavailableError where it does not do its part; `docker.errors.NotFound` (of which ImageNotFound is
    one) is left to the caller, who knows what was asked for.
    """

    def __init__(self, url: str | None = None) -> None:
        self._url = url
        self._calls = anyio.CapacityLimiter(_CALLS)
        self._opened: docker.DockerClient | None = None

    def connect(self) -> docker.DockerClient:
        """Connect anew. Blocks; raises DockerException with the address where nothing answers."""
        url = self._url or os.environ.get("DOCKER_HOST", _SOCKET)
        if url.startswith("unix://"):
            # The library leaks a socket for each failed try, and its message does not name the place.
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(url.removeprefix("unix://"))
                except OSError as error:
                    raise DockerException(f"no engine at {url}: {error.strerror}") from None
        return docker.DockerClient(self._url) if self._url else docker.from_env()

    def opened(self) -> docker.DockerClient:
        """Return the connection that an earlier call has made."""
        if self._opened is None:
            raise UnavailableError("container sandbox: the connection to Docker is closed")
        return self._opened

    async def call(self, function: Callable[[docker.DockerClient], T], *, abandon: bool = False) -> T:
        """Make a blocking call in a thread: to its end once it has begun, or with `abandon` not."""
        if self._opened is None:
            self._opened = await self.in_thread(self.connect, abandon=True)
        client = self._opened
        return await self.in_thread(lambda: function(client), abandon=abandon)

    async def shielded(self, function: Callable[[docker.DockerClient], T]) -> T:
        """Make a call that is not to be cancelled while it waits for its turn either."""
        with anyio.CancelScope(shield=True):
            return await self.call(function)
        raise AssertionError("a shielded scope swallows nothing")

    async def finish(self, function: Callable[[], T]) -> T:
        """Run something that blocks and has to be done, whoever is cancelled."""
        with anyio.CancelScope(shield=True):
            return await self.in_thread(function)
        raise AssertionError("a shielded scope swallows nothing")

    async def close(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            await self.finish(opened.close)

    async def in_thread(self, function: Callable[[], T], *, abandon: bool = False) -> T:
        """Run something that blocks; with `abandon` its thread is left behind when the caller is cancelled."""
        # OSError covers what the HTTP library below docker raises.
        try:
            return await anyio.to_thread.run_sync(function, abandon_on_cancel=abandon, limiter=self._calls)
        except NotFound:
            raise
        except (DockerException, OSError) as error:
            raise UnavailableError(f"container sandbox: Docker does not do its part: {error}") from error


def kill(client: docker.DockerClient, container: str) -> None:
    """Kill a container; nothing if it does not run (any more)."""
    with contextlib.suppress(APIError):
        client.api.kill(container)


def remove(client: docker.DockerClient, container: str) -> None:
    """Remove a container, alive or not, with its volumes; nothing if it is gone."""
    with contextlib.suppress(NotFound):
        client.api.remove_container(container, force=True, v=True)
