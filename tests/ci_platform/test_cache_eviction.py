"""Which entries of caches go: the least recently used, down to a floor, none that is in use, forks' first."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from ci_platform.caches.entries import CacheEntry
from ci_platform.caches.eviction import MOST_ENTRIES, Budget, has_room, victims

THEN = datetime(2026, 1, 1, tzinfo=UTC)
BUDGET = Budget(total=100, repository=60, floor=20)


def entry(name: str, size: int, used: int, **how: bool) -> CacheEntry:
    """An entry of the repository that its name begins with, used so many minutes after the first."""
    return CacheEntry(
        name,
        name[0],
        name[0],
        "refs/heads/main",
        name,
        ("deps",),
        size,
        1,
        THEN,
        THEN + timedelta(minutes=used),
        **how,
    )


def gone(
    *entries: CacheEntry, budget: Budget = BUDGET, spared: str = "", outside_only: bool = False
) -> list[str]:
    return [each.id for each in victims(entries, budget, spared=spared, outside_only=outside_only)]


def test_within_the_budget_nothing_goes() -> None:
    assert gone(entry("a1", 30, 1), entry("a2", 30, 0), entry("b1", 40, 2)) == []


def test_the_least_recently_used_go_first_and_no_more_than_need_be() -> None:
    assert gone(entry("a1", 25, 3), entry("a2", 25, 1), entry("a3", 25, 2)) == ["a2"]
    crowd = [entry(f"a{n}", 0, n) for n in range(MOST_ENTRIES + 2)]
    assert gone(*reversed(crowd)) == ["a0", "a1"]


def test_a_repository_with_no_more_than_the_floor_loses_nothing_to_others() -> None:
    poor = [entry("a1", 10, 0), entry("a2", 10, 1)]
    rich = [entry(f"{name}{n}", 25, 10 + n) for name in "bc" for n in range(2)]
    assert gone(*poor, *rich) == ["b0"]
    assert gone(*poor, *rich, budget=replace(BUDGET, total=10)) == ["b0", "c0", "b1", "c1"]


def test_what_is_in_use_or_just_made_stays() -> None:
    used, new = entry("a1", 50, 0, pinned=True), entry("a2", 50, 1)
    assert gone(used, new, entry("a3", 5, 2), spared="a2") == ["a3"]


def test_a_fork_evicts_only_what_forks_have_saved() -> None:
    ours, theirs = entry("a1", 40, 0), entry("a2", 10, 5, outside=True)
    new = entry("a3", 30, 9, outside=True)
    assert gone(ours, theirs, new, spared="a3", outside_only=True) == ["a2"]
    assert not has_room([ours, new], BUDGET, "a")
    assert has_room([ours, replace(new, size=20)], BUDGET, "a")
    # And where a trusted run needs room, forks' go first, however new they are.
    assert gone(ours, theirs, entry("a4", 20, 1), spared="a4") == ["a2"]
