"""Images of containers: looked up, fetched with progress, and named exactly."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import anyio.from_thread
import docker
from docker.errors import APIError, ImageNotFound, NotFound

from ci_platform.errors import ImageNotFoundError, UnavailableError
from ci_platform.named_locks import NamedLocks
from ci_platform.sandboxes import MEBIBYTE, Say
from ci_platform.sandboxes.container.engine import Engine

OURS = "dynflow/"
"""Images of this platform's own making. No registry is asked for them: there, the name may be anybody's."""

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_REFERENCE = re.compile(
    rf"(?:(?:{_WORD}(?:\.{_WORD})+(?::[0-9]+)?|{_WORD}:[0-9]+|localhost)/)?[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
    r"(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
    r"|sha256:[0-9a-f]{64}"
)
"""What a name may look like (docs.docker.com/reference/cli/docker/image/tag). Checked here, because the name becomes
a part of the path of a request to the engine."""
_LONGEST = 500

_EVERY = 2.0
"""Seconds between two lines of progress: a log shows that something goes on and is not filled by it."""

_NOT_THERE = (
    "not found",
    "manifest unknown",
    "name unknown",
    "denied",
    "unauthorized",
    "does not exist",
    "no matching manifest",
)
"""What registries say, in the middle of a pull, where there is no such image (for us)."""


class Images:
    """The images of one engine. `pull` allows fetching those that are not there, told `every` so many seconds."""

    def __init__(self, engine: Engine, *, pull: bool, every: float = _EVERY) -> None:
        self._engine, self._pull, self._every = engine, pull, every
        self._pulling = NamedLocks()
        self._seen: set[str] = set()

    def forget(self, exact: str) -> None:
        """Take note that an image that was here is not any more."""
        self._seen.discard(exact)

    async def resolve(self, name: str, say: Say) -> str:
        """Return the exact name of an image: `name@sha256:…` of a registry's, `sha256:…` of one made here.

        Fetches it if need be; `say` gets the progress. Raises ImageNotFoundError, UnavailableError.
        """
        if len(name) > _LONGEST or not _REFERENCE.fullmatch(name):
            raise ImageNotFoundError(f"{name!r:.200} cannot be the name of an image")
        if name in self._seen:
            return name
        async with self._pulling(name):  # who comes second finds it
            found = await self._engine.call(lambda client: _look_up(client, name))
            if found is not None:
                self._seen.add(found)
                return found
            if not self._pull or name.startswith(OURS):
                raise ImageNotFoundError(missing(name))
            return await self._fetch(name, say)

    async def _fetch(self, name: str, say: Say) -> str:
        progress = _Progress(name, say, self._every)
        say(f"pulling {name}")
        try:
            await self._engine.call(lambda client: _pull(client, name, progress), abandon=True)
        finally:
            progress.over = True
        exact = await self._engine.call(lambda client: _look_up(client, name))
        if exact is None:
            raise UnavailableError(f"the image {name!r} was removed as soon as it was pulled")
        say(f"pulled {name} in {progress.seconds():.1f} s")
        return exact


def missing(name: str) -> str:
    """Return what to say of an image that is not here, and how to get it."""
    how = f"scripts/build_images {name} makes it" if name.startswith(OURS) else f"docker pull {name}"
    return f"the image {name!r} is not on this machine ({how})"


class _Progress:
    """Tells how a pull goes, now and then. Used in the thread that pulls, but for `over`."""

    def __init__(self, name: str, say: Say, every: float) -> None:
        self._name, self._say, self._every = name, say, every
        self._started = self._told = time.monotonic()
        self._layers: dict[str, tuple[int, int]] = {}
        self.over = False

    def seconds(self) -> float:
        """Return how long it takes so far."""
        return time.monotonic() - self._started

    def take(self, message: Mapping[str, Any]) -> None:
        """Take one message of the engine's, and say something if it is time to."""
        layer, detail = message.get("id"), message.get("progressDetail") or {}
        if layer and message.get("status") == "Downloading" and "total" in detail:
            self._layers[layer] = (int(detail.get("current", 0)), int(detail["total"]))
        elif layer in self._layers and message.get("status") == "Download complete":
            self._layers[layer] = (self._layers[layer][1],) * 2
        if time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            anyio.from_thread.run_sync(self._say, f"pulling {self._name}: {self._sum()}")

    def _sum(self) -> str:
        done = sum(have for have, _ in self._layers.values()) / MEBIBYTE
        total = sum(size for _, size in self._layers.values()) / MEBIBYTE
        return f"{done:.1f} of {total:.1f} MiB, {len(self._layers)} layers"


def _look_up(client: docker.DockerClient, name: str) -> str | None:
    """Return the exact name of an image that is here, None if it is not."""
    try:
        found = client.api.inspect_image(name)  # type: ignore[no-untyped-call]
    except ImageNotFound:
        return None
    repository = _repository(name)
    digests: list[str] = found.get("RepoDigests") or []
    return next((each for each in digests if _repository(each) == repository), str(found["Id"]))


def _repository(name: str) -> str:
    """Return the name without tag and digest, as the engine shortens it."""
    path = name.partition("@")[0]
    head, colon, tag = path.rpartition(":")
    if colon and "/" not in tag:
        path = head
    return path.removeprefix("index.docker.io/").removeprefix("docker.io/").removeprefix("library/")


def _pull(client: docker.DockerClient, name: str, progress: _Progress) -> None:
    tag = None if "@" in name or ":" in name.rpartition("/")[2] else "latest"
    refused = None
    try:
        for message in client.api.pull(name, tag=tag, stream=True, decode=True):
            if progress.over:
                return  # nobody waits any more, and the engine stops when nobody reads
            refused = message.get("error", refused)
            progress.take(message)
    except NotFound as error:
        raise ImageNotFoundError(_nowhere(name, str(error.explanation))) from None
    except APIError as error:
        raise _refusal(name, str(error.explanation)) from None
    if refused is not None:  # not before the end of what is sent: that is what closes the connection
        raise _refusal(name, str(refused))


def _refusal(name: str, reason: str) -> ImageNotFoundError | UnavailableError:
    if any(sign in reason.lower() for sign in _NOT_THERE):
        return ImageNotFoundError(_nowhere(name, reason))
    return UnavailableError(f"the image {name!r} cannot be pulled now: {reason:.500}")


def _nowhere(name: str, reason: str) -> str:
    return f"there is no image {name!r}, here or in its registry: {reason:.500}"
