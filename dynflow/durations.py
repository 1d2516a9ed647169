"""Durations as people write them: `"24 hours"`, seconds, or a timedelta."""

from __future__ import annotations

import math
import re
from datetime import timedelta

_SECONDS = {
    "millisecond": 0.001,
    "second": 1.0,
    "minute": 60.0,
    "hour": 3600.0,
    "day": 86400.0,
    "week": 7 * 86400.0,
    "month": 30 * 86400.0,
    "year": 365.25 * 86400.0,
}
_FORM = re.compile(r"(\d+(?:\.\d+)?) (" + "|".join(_SECONDS) + r")s?", re.ASCII)
_ACCEPTED = 'a timedelta, a number of seconds, or "<number> <unit>" with the unit one of ' + ", ".join(
    _SECONDS
)


def parse_duration(value: object) -> timedelta:
    """Return `value` as a timedelta.

    Raises ValueError, naming the accepted forms, for anything else, for negatives, nan and infinities,
    and for what does not fit a timedelta.
    """
    seconds: float | None = None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value) if not isinstance(value, int) or abs(value) < 10**15 else None
    elif isinstance(value, str) and (found := _FORM.fullmatch(value)):
        seconds = float(found[1]) * _SECONDS[found[2]]
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        shown = repr(value)
        raise ValueError(f"{shown[:100]} is not a duration: give {_ACCEPTED}")
    try:
        return value if isinstance(value, timedelta) else timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError(f"{value!r} is longer than a duration can be: give {_ACCEPTED}") from None
