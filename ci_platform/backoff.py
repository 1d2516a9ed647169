"""How long to wait before something that failed is tried again."""

from __future__ import annotations

from datetime import timedelta

_FIRST = 1.0
# Half an hour: an outage's end is noticed within it, and a day's tries stay below a hundred.
_LONGEST = 1800.0


def backoff(attempts: int, retry_after: float | None = None) -> timedelta:
    """Return the wait after `attempts` failures: 1 s doubling up to half an hour, or what the other side said."""
    doubling = min(_FIRST * 2 ** min(attempts - 1, 20), _LONGEST)
    # A reset time that is a week away is a mistake or an attack; reports are tried for a day.
    return timedelta(seconds=max(doubling, min(retry_after or 0.0, 86_400.0)))
