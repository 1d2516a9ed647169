"""Which items go: those whose time is over, those above a budget, those for which there is no room. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from ci_platform.garbage import Allowance, Item

WITHIN_BUDGET = "within the budget"
SHORT_OF_ROOM = "the disk is short of room"


@dataclass(frozen=True, slots=True)
class Stock:
    """What one store holds."""

    kind: str
    allowance: Allowance
    items: Sequence[Item]

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)


@dataclass(frozen=True, slots=True)
class Need:
    """What is missing on the disk: bytes, and inodes."""

    size: int = 0
    files: int = 0

    def after(self, item: Item) -> Need:
        """Return what is missing still once the item is gone."""
        return Need(max(0, self.size - item.size), max(0, self.files - item.files))


NOTHING = Need()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of an item, and why."""

    kind: str
    item: Item
    collected: bool
    why: str


def plan(stocks: Iterable[Stock], now: datetime, need: Need = NOTHING) -> list[Verdict]:
    """Decide about every item. Those that go come first, in the order in which they are to go.

    Nothing that stays stands on something that goes. Of what the floor does not hold, the longest unused goes first:
    in each stock down to its budget, then of all of them until `need` is met.
    """
    going = list[Verdict]()
    free = list[tuple[str, _Standing]]()
    kept = list[Verdict]()
    for stock in stocks:
        held, candidates = _floor(stock, now)
        kept += [Verdict(stock.kind, item, collected=False, why=why) for item, why in held]
        over, within = _over_budget(stock, candidates, now)
        going += over
        free += [(stock.kind, standing) for standing in within]
    for verdict in going:
        need = need.after(verdict.item)
    free.sort(key=lambda each: each[1].order)
    for kind, standing in free:
        wanted = need != NOTHING
        why = SHORT_OF_ROOM if wanted else WITHIN_BUDGET
        (going if wanted else kept).append(Verdict(kind, standing.item, collected=wanted, why=why))
        need = need.after(standing.item)
    return [*going, *kept]


@dataclass(frozen=True, slots=True)
class _Standing:
    """An item, when it or something on it was used last, and how many items it stands on."""

    item: Item
    used_at: datetime
    depth: int

    @property
    def order(self) -> tuple[datetime, int, str]:
        """What goes first is smallest: what stands on others goes before them."""
        return self.used_at, -self.depth, self.item.name


def _standings(items: Sequence[Item]) -> list[_Standing]:
    by_name = {item.name: item for item in items}
    used_at = {item.name: item.used_at for item in items}
    depth = dict.fromkeys(by_name, 0)
    for item in items:
        for level, below in enumerate(_below(item, by_name), start=1):
            used_at[below.name] = max(used_at[below.name], item.used_at)
            depth[item.name] = level
    return [_Standing(item, used_at[item.name], depth[item.name]) for item in items]


def _below(item: Item, by_name: dict[str, Item]) -> Iterable[Item]:
    seen = {item.name}
    while item.stands_on is not None and item.stands_on not in seen and item.stands_on in by_name:
        item = by_name[item.stands_on]
        seen.add(item.name)
        yield item


def _floor(stock: Stock, now: datetime) -> tuple[list[tuple[Item, str]], list[_Standing]]:
    """Return what stays and why, and what may go, the first to go first."""
    standings = _standings(stock.items)
    by_name = {item.name: item for item in stock.items}
    why = dict[str, str]()
    newest, sizes = Counter[str | None](), Counter[str | None]()
    for standing in sorted(standings, key=lambda each: each.order, reverse=True):
        item = standing.item
        reason = item.pinned or _recency(item, stock.allowance, now, newest[item.repo], sizes[item.repo])
        if reason is None:
            continue
        newest[item.repo] += 1
        sizes[item.repo] += item.size
        why.setdefault(item.name, reason)
        for below in _below(item, by_name):
            why.setdefault(below.name, "something that stays stands on it")
    held = [(item, why[item.name]) for item in stock.items if item.name in why]
    free = [standing for standing in standings if standing.item.name not in why]
    return held, sorted(free, key=lambda each: each.order)


def _recency(item: Item, allowance: Allowance, now: datetime, newer: int, size: int) -> str | None:
    """Return why an item stays though nobody needs it; `newer` and `size` are of those of its repository that do."""
    if item.expires_at is not None and item.expires_at <= now:
        return None
    if item.used_at > now - allowance.recent:
        return "used a short while ago"
    if newer < allowance.newest and item.used_at > now - allowance.newest_for:
        return "the newest of its repository"
    if 0 < size + item.size <= allowance.of_repository:
        return "within what its repository may have in any case"
    return None


def _over_budget(
    stock: Stock, candidates: Sequence[_Standing], now: datetime
) -> tuple[list[Verdict], list[_Standing]]:
    """Return what goes for its time or the budget, in order, and what of the candidates is left."""
    users = defaultdict[str, int](int)
    for item in stock.items:
        if item.stands_on is not None:
            users[item.stands_on] += 1
    total, gone = stock.size, dict[str, Verdict]()

    def take(standing: _Standing, why: str) -> None:
        nonlocal total
        item = standing.item
        gone[item.name] = Verdict(stock.kind, item, collected=True, why=why)
        total -= item.size
        if item.stands_on is not None:
            users[item.stands_on] -= 1

    for standing in candidates:
        expires_at = standing.item.expires_at
        if expires_at is not None and expires_at <= now and not users[standing.item.name]:
            take(standing, "its time is over")
    why = f"all {stock.kind} may take {in_bytes(stock.allowance.budget)} and take {in_bytes(total)}"
    for standing in candidates:
        if total <= stock.allowance.budget:
            break
        if standing.item.name not in gone:
            take(standing, why)
    return list(gone.values()), [each for each in candidates if each.item.name not in gone]


def in_bytes(size: int) -> str:
    """Return a size as people read it."""
    value, units = float(size), iter(("bytes", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
