"""What the planner promises, for any stocks: the floor, the budgets, the order, and nothing that hangs in the air."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from ci_platform.garbage import Allowance, Item
from ci_platform.garbage.planning import NOTHING, Need, Stock, Verdict, plan

NOW = datetime(2026, 11, 23, 18, tzinfo=UTC)
HOUR = timedelta(hours=1)


@st.composite
def stocks(draw: st.DrawFn, kind: str = "trees") -> Stock:
    items = list[Item]()
    for number in range(draw(st.integers(0, 8))):
        below = draw(st.sampled_from([None, *(item.name for item in items)]))
        repo = next((item.repo for item in items if item.name == below), draw(st.sampled_from("ab")))
        items.append(
            Item(
                f"{kind}-{number}",
                repo,
                draw(st.integers(0, 100)),
                NOW - draw(st.integers(0, 60)) * timedelta(minutes=10),
                draw(st.integers(1, 5)),
                draw(st.sampled_from([None, None, None, "a run needs it"])),
                draw(st.sampled_from([None, None, NOW - HOUR, NOW + HOUR])),
                below,
            )
        )
    allowance = Allowance(
        draw(st.integers(0, 300)),
        HOUR * draw(st.integers(0, 3)),
        draw(st.integers(0, 2)),
        5 * HOUR,
        draw(st.sampled_from([0, 50, 150])),
    )
    return Stock(kind, allowance, draw(st.permutations(items)))


few = settings(max_examples=50)
needs = st.builds(Need, st.integers(0, 300), st.integers(0, 10))
several = st.tuples(stocks("trees"), stocks("logs"))


def last_use(item: Item, stock: Stock) -> datetime:
    """Of it and all that stands on it."""
    users = [each for each in stock.items if each.stands_on == item.name]
    return max([item.used_at, *(last_use(each, stock) for each in users)])


def of(verdicts: list[Verdict], stock: Stock, *, collected: bool) -> list[Verdict]:
    return [each for each in verdicts if each.kind == stock.kind and each.collected is collected]


@few
@given(several, needs)
def test_each_item_is_decided_about_once_and_what_goes_comes_first(
    both: tuple[Stock, Stock], need: Need
) -> None:
    verdicts = plan(both, NOW, need)
    assert sorted(each.item.name for each in verdicts) == sorted(
        item.name for stock in both for item in stock.items
    )
    assert [each.collected for each in verdicts] == sorted(
        (each.collected for each in verdicts), reverse=True
    )
    assert all(each.why for each in verdicts)


@few
@given(several, needs)
def test_the_floor_stays_however_little_room_there_is(both: tuple[Stock, Stock], need: Need) -> None:
    verdicts = plan(both, NOW, need)
    for stock in both:
        for verdict in of(verdicts, stock, collected=True):
            item = verdict.item
            expired = item.expires_at is not None and item.expires_at <= NOW
            assert item.pinned is None
            assert expired or item.used_at <= NOW - stock.allowance.recent
        kept = {each.item.name for each in of(verdicts, stock, collected=False)}
        for repo in "ab":
            mine = [item for item in stock.items if item.repo == repo and item.expires_at is None]
            mine = [item for item in mine if item.used_at > NOW - stock.allowance.newest_for]
            at_least = min(stock.allowance.newest, len(mine))
            assert sum(item.repo == repo and item.name in kept for item in stock.items) >= at_least
            left = sum(item.size for item in stock.items if item.repo == repo and item.name in kept)
            for each in of(verdicts, stock, collected=True):
                if each.item.repo == repo and each.item.expires_at is None and each.item.size:
                    assert left + each.item.size > stock.allowance.of_repository


@few
@given(several, needs)
def test_nothing_that_stays_stands_on_something_that_goes_at_any_moment(
    both: tuple[Stock, Stock], need: Need
) -> None:
    verdicts = plan(both, NOW, need)
    gone = set[str]()
    for verdict in verdicts:
        if verdict.collected:
            gone.add(verdict.item.name)
            stock = next(each for each in both if each.kind == verdict.kind)
            assert all(item.name in gone for item in stock.items if item.stands_on == verdict.item.name)


@few
@given(stocks())
def test_a_stock_fits_its_budget_or_its_floor_does_not(stock: Stock) -> None:
    verdicts = plan([stock], NOW)
    kept = of(verdicts, stock, collected=False)
    free = [each for each in kept if each.why == "within the budget"]
    assert sum(each.item.size for each in kept) <= stock.allowance.budget or not free


@few
@given(stocks())
def test_the_longest_unused_goes_first_and_no_more_than_must(stock: Stock) -> None:
    stock = replace(stock, items=[replace(item, expires_at=None) for item in stock.items])
    verdicts = plan([stock], NOW)
    gone, kept = of(verdicts, stock, collected=True), of(verdicts, stock, collected=False)
    free = [each for each in kept if each.why == "within the budget"]
    for verdict in gone:
        assert all(last_use(verdict.item, stock) <= last_use(each.item, stock) for each in free)
    if gone:  # one less would not have been enough
        left = sum(each.item.size for each in kept)
        assert left + gone[-1].item.size > stock.allowance.budget


@few
@given(several, needs)
def test_room_is_made_by_the_longest_unused_of_all_until_there_is_enough(
    both: tuple[Stock, Stock], need: Need
) -> None:
    verdicts = plan(both, NOW, need)
    gone = [each.item for each in verdicts if each.collected]
    for verdict in verdicts:
        if verdict.collected and verdict.why == "the disk is short of room":
            before = gone[: gone.index(verdict.item)]
            assert (
                sum(item.size for item in before) < need.size
                or sum(item.files for item in before) < need.files
            )
    if any(each.why == "within the budget" for each in verdicts):
        assert sum(item.size for item in gone) >= need.size
        assert sum(item.files for item in gone) >= need.files


def test_what_is_over_goes_though_there_is_room_and_though_it_was_used() -> None:
    item = Item("old", "a", 1, NOW, expires_at=NOW)
    (verdict,) = plan([Stock("logs", Allowance(100, HOUR, 1, HOUR), [item])], NOW)
    assert (verdict.collected, verdict.why) == (True, "its time is over")


def test_no_stock_is_no_work() -> None:
    assert plan([], NOW, Need(10, 10)) == []
    assert Need() == NOTHING
