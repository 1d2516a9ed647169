"""Collect what the plan says, one item after the other, and say for each what became of it and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import anyio

from ci_platform.errors import PlatformError
from ci_platform.garbage import Collectable, Item
from ci_platform.garbage.planning import NOTHING, SHORT_OF_ROOM, Need, Stock, Verdict, plan
from dynflow.clock import Clock

_log = logging.getLogger(__name__)

Lack = Callable[[], Need]
"""Asks the disk what is missing."""

_TAKEN = "in use by now"


@dataclass(frozen=True, slots=True)
class Sum:
    """Some items together."""

    items: int = 0
    size: int = 0
    files: int = 0

    def plus(self, item: Item) -> Sum:
        """Return the sum with one item more."""
        return Sum(self.items + 1, self.size + item.size, self.files + item.files)


@dataclass(frozen=True, slots=True)
class Kind:
    """What became of all items of a kind. `kept` says by reason what stays, `trouble` why nothing was looked at."""

    kind: str
    budget: int
    collected: Sum = Sum()
    kept: dict[str, Sum] = field(default_factory=dict)
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Collected:
    """An item that is gone, or would go."""

    kind: str
    name: str
    repo: str | None
    size: int
    files: int
    used_at: datetime
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was collected, in this order, and in sums what there was. `dry_run`: nothing was."""

    dry_run: bool
    items: tuple[Collected, ...]
    kinds: tuple[Kind, ...]


class Collector:
    """Keeps stores within their budgets, and makes room.

    *Order of calls*: any. *Concurrency*: one collection at a time, the next one waits. *Idempotency*: both calls.
    *Cancellation*: between two items. *Errors*: none; what a store cannot do is in the report.
    """

    def __init__(self, stores: Sequence[Collectable], clock: Clock) -> None:
        self._stores, self._clock = {store.kind: store for store in stores}, clock
        self._turn = anyio.Lock()

    async def look(self, need: Need = NOTHING) -> Report:
        """Return what `collect` would do with this much missing; changes nothing."""
        stocks, trouble = await self._stocks()
        verdicts = plan(stocks, self._clock.now(), need)
        return _report(verdicts, stocks, trouble, dry_run=True)

    async def collect(self, lack: Lack = lambda: NOTHING) -> Report:
        """Collect what is above its budget and what `lack` asks for, which is asked again after each item."""
        async with self._turn:
            stocks, trouble = await self._stocks()
            gone = list[Verdict]()
            while True:
                verdicts = plan(stocks, self._clock.now(), lack())
                if not any(verdict.collected for verdict in verdicts):
                    return _report([*gone, *verdicts], stocks, trouble, dry_run=False)
                some, stocks = await self._carry_out(verdicts, stocks, lack)
                gone += some

    async def _stocks(self) -> tuple[list[Stock], dict[str, str]]:
        stocks, trouble = list[Stock](), dict[str, str]()
        for store in self._stores.values():
            items: Sequence[Item] = ()
            try:
                items = await store.items()
            except (PlatformError, OSError) as error:
                trouble[store.kind] = str(error)
                _log.info("%s cannot be looked at: %s", store.kind, error)
            stocks.append(Stock(store.kind, store.allowance, items))
        return stocks, trouble

    async def _carry_out(
        self, verdicts: Iterable[Verdict], stocks: Iterable[Stock], lack: Lack
    ) -> tuple[list[Verdict], list[Stock]]:
        """Collect until there is room, or until one cannot be: then what it stands on must stay, too.

        Returns what is gone, and what is left.
        """
        gone, pinned = list[Verdict](), dict[tuple[str, str], str]()
        for verdict in verdicts:
            if not verdict.collected or (gone and verdict.why == SHORT_OF_ROOM and lack() == NOTHING):
                break
            why_not = await self._delete(verdict)
            if why_not is not None:
                pinned[verdict.kind, verdict.item.name] = why_not
                break
            gone.append(verdict)
        missing = {(verdict.kind, verdict.item.name) for verdict in gone}
        return gone, [_left(stock, missing, pinned) for stock in stocks]

    async def _delete(self, verdict: Verdict) -> str | None:
        """Return why an item is still there, None where it is gone."""
        try:
            return None if await self._stores[verdict.kind].collect(verdict.item.name) else _TAKEN
        except (PlatformError, OSError) as error:
            _log.warning("%s %s cannot be deleted: %s", verdict.kind, verdict.item.name, error)
            return "it cannot be deleted"


def _left(stock: Stock, gone: set[tuple[str, str]], pinned: dict[tuple[str, str], str]) -> Stock:
    items = [item for item in stock.items if (stock.kind, item.name) not in gone]
    return replace(
        stock,
        items=[replace(item, pinned=pinned.get((stock.kind, item.name), item.pinned)) for item in items],
    )


def _report(
    verdicts: Iterable[Verdict], stocks: Iterable[Stock], trouble: dict[str, str], *, dry_run: bool
) -> Report:
    kinds = {
        stock.kind: Kind(stock.kind, stock.allowance.budget, trouble=trouble.get(stock.kind))
        for stock in stocks
    }
    items = list[Collected]()
    for verdict in verdicts:
        kind, item = kinds[verdict.kind], verdict.item
        if verdict.collected:
            kinds[verdict.kind] = replace(kind, collected=kind.collected.plus(item))
            items.append(
                Collected(
                    verdict.kind, item.name, item.repo, item.size, item.files, item.used_at, verdict.why
                )
            )
        else:
            kind.kept[verdict.why] = kind.kept.get(verdict.why, Sum()).plus(item)
    return Report(dry_run, tuple(items), tuple(kinds.values()))
