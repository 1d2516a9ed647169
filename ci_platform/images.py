"""Which exact image each name means in a run: found once, then the same for all of its steps and reruns."""

from __future__ import annotations

import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from ci_platform.errors import ImageNotFoundError, InvalidInputError
from ci_platform.model import RunImage
from ci_platform.named_locks import NamedLocks
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
        self._turns = NamedLocks()

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
        exact, is_new = await self._give(sandbox, row, say)
        if is_new:
            say(f"image {name} is {exact}, for the whole run")
        return exact

    async def hold(self, sandbox: Sandbox, run_id: str, exact: str, say: Say) -> None:
        """Keep an image that a run is given for as long as the run may name it.

        Held first and looked for then: after this it is here, and stays. Raises ImageNotFoundError where it is gone.
        """
        row = RunImage(run_id=run_id, asked=exact[:500], name=exact, exact=exact, pinned_at=self._clock.now())
        await self._give(sandbox, row, say)

    async def _give(self, sandbox: Sandbox, row: RunImage, say: Say) -> tuple[str, bool]:
        """Write down what a run is given, then look for it, and return it and whether that is new."""

        def first(tx: Transaction) -> tuple[str, bool]:
            if tx.add_once(row):
                return row.exact, True
            return tx.all(RunImage, *mine)[0].exact, False

        mine = (col(RunImage.run_id) == row.run_id, col(RunImage.asked) == row.asked)
        async with self.settled(row.exact):
            exact, is_new = await self._store.write(first)
            try:
                await sandbox.resolve(exact, say)
            except ImageNotFoundError:
                if is_new:
                    await self._store.write(lambda tx: tx.remove(RunImage, *mine))
                raise
        return exact, is_new

    @asynccontextmanager
    async def settled(self, exact: str) -> AsyncIterator[None]:
        """Keep an image from being given to a run, or from being collected, for the time of the block."""
        async with self._turns(exact):
            yield


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
