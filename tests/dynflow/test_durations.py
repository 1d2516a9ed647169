"""Durations as people write them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from dynflow.durations import parse_duration


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (timedelta(hours=1), 3600), (5, 5), (0, 0), (0.25, 0.25),
        ("1 second", 1), ("2 seconds", 2), ("1.5 minutes", 90),
        ("250 milliseconds", 0.25), ("24 hours", 86_400), ("1 day", 86_400), ("2 weeks", 1_209_600),
        ("1 month", 30 * 86_400), ("1 year", 365.25 * 86_400), ("0 hours", 0),
    ],
)  # fmt: skip
def test_accepted_forms(given: Any, seconds: float) -> None:
    assert parse_duration(given) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "given",
    [
        "1 h", "1h", "5", "", " 1 hour", "1 hour ", "1  hour", "one hour",
        "-1 hours", "1e3 seconds", "1 Hour", "\u0661 hour",
        -1, -0.5, True, None, [], float("nan"), float("inf"), 10**16,
        1e300, timedelta(seconds=-1), "9" * 400 + " years",
        b"1 hour",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_the_accepted_forms(given: Any) -> None:
    with pytest.raises(ValueError, match=r"is .* duration.*<number> <unit>.*millisecond.*year"):
        parse_duration(given)
