"""`env.IMAGES`: images that runs make. Each method authorises for *this* run, then delegates."""

from __future__ import annotations

import re
from typing import Any

from ci_platform.cancellation import with_shields
from ci_platform.capabilities import RunIdentity, calling, workspace_of
from ci_platform.errors import ForbiddenError, InvalidInputError
from ci_platform.image_making import ImageMaking, Maker
from ci_platform.settings import Settings
from dynflow.isolates import Capability
from pipelines.contract import BuiltImage, Command

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*")
_MOST_TAGS = 10
_LONGEST_KEY = 200


class ImagesCapability(Capability):
    """`env.IMAGES`: builds and snapshots. The engine's socket stays with the platform."""

    def __init__(self, making: ImageMaking | None, settings: Settings) -> None:
        self._making, self._settings = making, settings

    async def build(
        self,
        workspace: Any,
        dockerfile: Any = "Dockerfile",
        tags: Any = (),
        *,
        push: Any = False,
        network: Any = False,
    ) -> BuiltImage:
        """Build the image of a Dockerfile in `workspace`, with the workspace as its files.

        With `push` it goes to the platform's registry (setting `push_images`) as `<push_images>/<repository>:<tag>`
        for each tag.
        """
        making, maker, identity = self._authorised("IMAGES.build", network)
        if not isinstance(dockerfile, str) or not 0 < len(dockerfile) < 1000 or "\0" in dockerfile:
            raise InvalidInputError(f"dockerfile is a path in the workspace, not {dockerfile!r:.100}")
        if push and identity.is_what_if:
            raise ForbiddenError("push=True: a what-if run publishes nothing")
        references = self._references(identity.repo, tags) if push else []
        command = Command(
            workspace_of(workspace, identity), ("docker", "build"), "container", network=network
        )
        return await with_shields(lambda: making.build(maker, command, dockerfile, references))

    async def snapshot(
        self,
        workspace: Any,
        argv: Any,
        *,
        key: Any,
        image: Any = None,
        env: Any = None,
        network: Any = False,
    ) -> str:
        """Run an install as root of a container, and return its file system as an image for `image=` of commands.

        Done once for each `key` of the repository: with a key that is there, nothing runs.
        """
        making, maker, identity = self._authorised("IMAGES.snapshot", network)
        texts = (*argv, key) if isinstance(argv, (list, tuple)) and argv else (None,)
        env = {} if env is None else env
        if not isinstance(env, dict) or not all(
            isinstance(each, str) and "\0" not in each for each in (*texts, *env, *env.values(), image or "")
        ):
            raise InvalidInputError(
                "argv, key, env and image of a snapshot are text, argv a list that is not empty"
            )
        if not 0 < len(key) <= _LONGEST_KEY:
            raise InvalidInputError(
                f"the key of a snapshot has 1 to {_LONGEST_KEY} characters, not {key!r:.100}"
            )
        command = Command(
            workspace_of(workspace, identity), tuple(argv), "container", image, dict(env), network=network
        )
        return await with_shields(lambda: making.snapshot(maker, command, key))

    def _authorised(self, what: str, network: Any) -> tuple[ImageMaking, Maker, RunIdentity]:
        identity, author = calling(what)
        if self._making is None:
            raise ForbiddenError(
                f"{what}: containers are switched off on this platform (setting allow_containers)"
            )
        if not identity.trusted:
            raise ForbiddenError(f"{what} is not for pull requests from forks")
        if network not in (True, False) or (network and not self._settings.allow_network):
            raise ForbiddenError(f"network={network!r:.100} is not allowed here (setting allow_network)")
        return self._making, Maker(identity.run_id, identity.repo, author), identity

    def _references(self, repo: str, tags: Any) -> list[str]:
        if not self._settings.push_images:
            raise ForbiddenError("push=True: this platform has no registry to push to (setting push_images)")
        if not isinstance(tags, (list, tuple)) or not 0 < len(tags) <= _MOST_TAGS:
            raise InvalidInputError(f"push=True needs 1 to {_MOST_TAGS} tags, not {tags!r:.100}")
        if not all(isinstance(tag, str) and _TAG.fullmatch(tag) for tag in tags):
            raise InvalidInputError(f"tags are letters, digits, dots and dashes, not {tags!r:.200}")
        if not _REPOSITORY.fullmatch(repo.lower()):
            raise InvalidInputError(f"no registry takes images of a repository that is called {repo!r:.100}")
        return [f"{self._settings.push_images}/{repo.lower()}:{tag}" for tag in tags]
