"""What can be made or fetched again, or is only kept for a while: the contract of the stores that hold it.

A store lists its items, each with what it takes, when it was used last and why it must stay, and deletes one of them at
a time. `planning` decides which, `collector` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that a store holds. `name` is its own among the store's; `size` in bytes, `files` counts inodes.

    `pinned` says in a few words why it must stay, None where nothing keeps it: the same words for the same reason,
    since they are summed up by them. `expires_at` is when its time is over, whatever room there is. `stands_on` names
    another item of the store without which this one is of no use.
    """

    name: str
    repo: str | None
    size: int
    used_at: datetime
    files: int = 1
    pinned: str | None = None
    expires_at: datetime | None = None
    stands_on: str | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much a store may hold: `budget` in bytes. And its floor: what is never taken, however little room there is.

    What was used in the time `recent` stays, and so do the `newest` ones of each repository that were used in the time
    `newest_for`, and the newest of each that are no more than `of_repository` bytes together.
    """

    budget: int
    recent: timedelta = timedelta(hours=1)
    newest: int = 0
    newest_for: timedelta = timedelta()
    of_repository: int = 0


class Collectable(Protocol):
    """A store whose items can be collected.

    *Order of calls*: `items`, then `collect` for any of them, those first that stand on others. *Concurrency*: the
    store may be used by everybody meanwhile. *Idempotency*: both; what is gone is collected. *Cancellation*: a
    deletion that has begun goes on in its thread, and a kill in the middle is cleaned up at the next start.
    *Errors*: OSError, UnavailableError; then the item is there, or its leftovers are.
    """

    @property
    def kind(self) -> str:
        """What the items are, in the plural: `trees`."""

    @property
    def allowance(self) -> Allowance:
        """How much of them there may be."""

    async def items(self) -> Sequence[Item]:
        """Return what is there, without changing the time of its last use."""

    async def collect(self, name: str) -> bool:
        """Delete an item: out of sight by one step that nothing tears. False where it is in use by now."""
