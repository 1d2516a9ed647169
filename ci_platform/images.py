"""Which exact image each name means in a run: found once, then the same for all of its steps and reruns."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ci_platform.errors import InvalidInputError
from ci_platform.model import RunImage
from ci_platform.sandboxes import Sandbox, Say
from ci_platform.store import Store, Transaction, col
from dynflow.clock import Clock
from pipelines.contract import Command

_BESIDE = Path(__file__).resolve().parents[1] / "sandbox_images" / "images.toml"


class PinnedImages:
    """The images of runs.

    *Order of calls*: any. *Concurrency*: safe; who pins first decides. *Idempotency*: a name stays what it was.
    *Cancellation*: nothing is stored. *Errors*: ImageNotFoundError, UnavailableError.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def pin_all(self, sandbox: Sandbox, run_id: str, command: Command, say: Say) -> Command:
        """Return the command with exact images, its own and those of its services, if it is for containers."""
        if command.sandbox != "container":
            return command
        image = await self.pin(sandbox, run_id, command.image, say)
        services = [
            replace(each, name=each.host, image=await self.pin(sandbox, run_id, each.image, say))
            for each in command.services
        ]
        return replace(command, image=image, services=tuple(services))

    async def pin(self, sandbox: Sandbox, run_id: str, image: str | None, say: Say) -> str:
        """Return the exact image that `image` (None: the sandbox's own) means in this run."""
        key = (image or "")[:500]  # a longer one is refused when it is looked up
        pinned = await self._store.read(lambda tx: tx.get(RunImage, (run_id, key)))
        if pinned is not None:
            return pinned.exact
        name, exact = await sandbox.resolve(image, say)
        row = RunImage(run_id=run_id, asked=key, name=name, exact=exact, pinned_at=self._clock.now())

        def first(tx: Transaction) -> tuple[str, bool]:
            if tx.add_once(row):
                return exact, True
            return tx.all(RunImage, col(RunImage.run_id) == run_id, col(RunImage.asked) == key)[
                0
            ].exact, False

        exact, is_new = await self._store.write(first)
        if is_new:
            say(f"image {name} is {exact}, for the whole run")
        return exact

    async def hold(self, run_id: str, exact: str) -> None:
        """Keep an image that a run was given for as long as the run may name it."""
        row = RunImage(run_id=run_id, asked=exact[:500], name=exact, exact=exact, pinned_at=self._clock.now())
        await self._store.write(lambda tx: tx.add_once(row))


def read_names(path: Path | None) -> dict[str, str]:
    """Return the images of an `images.toml` (None: the one beside this code) by name. Raises InvalidInputError.

    An entry with a `reference` stands for that; the others are made by scripts/build_images as dynflow/<name>.
    """
    if path is None:
        path = _BESIDE
        if not path.is_file():
            return {}
    try:
        entries: Mapping[str, Mapping[str, object]] = tomllib.loads(path.read_text())
        return {
            name: str(entry.get("reference", f"dynflow/{name}:latest")) for name, entry in entries.items()
        }
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError) as error:
        raise InvalidInputError(f"cannot read the images in {path}: {error}") from error
