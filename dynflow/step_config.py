"""The config of a step: checked, merged over the defaults, and pinned as plain data when the step starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

from dynflow.durations import parse_duration
from dynflow.errors import WorkflowFatalError

Backoff = Literal["constant", "linear", "exponential"]
DelayFunction = Callable[..., Any]

_BACKOFFS: tuple[Backoff, ...] = ("constant", "linear", "exponential")
_KEYS = frozenset({"retries", "timeout", "sensitive"})
_RETRY_KEYS = frozenset({"limit", "delay", "backoff"})
# What the journal keeps in the place of a delay function, which lives in the workflow's code.
_FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class StepConfig:
    """A merged config. `delay` is None where a delay function decides.

    `retries_named` says whether the step's own config names retries: some errors are retried only then.
    """

    limit: int = 5
    delay: timedelta | None = timedelta(seconds=10)
    backoff: Backoff = "exponential"
    timeout: timedelta = timedelta(minutes=10)
    sensitive: bool = False
    retries_named: bool = False

    def retry_delay(self, attempts: int) -> timedelta:
        """Return the wait after attempt number `attempts`: d, d·n or d·2^(n-1), at most what a timedelta holds."""
        delay = self.delay or timedelta(0)
        factor = {"constant": 1, "linear": attempts, "exponential": 1 << min(attempts - 1, 60)}[self.backoff]
        try:
            return delay * factor
        except OverflowError:
            return timedelta.max

    def as_plain(self) -> dict[str, Any]:
        """Return it as `ctx.config` shows it, a new dict at each call."""
        return {
            "retries": {
                "limit": self.limit,
                "delay": _FUNCTION if self.delay is None else self.delay,
                "backoff": self.backoff,
            },
            "timeout": self.timeout,
            "sensitive": "output" if self.sensitive else None,
        }

    def as_stored(self) -> dict[str, Any]:
        """Return it as journals keep it: plain data."""
        return {**self.as_plain(), "retries_named": self.retries_named}

    @staticmethod
    def from_stored(plain: Mapping[str, Any]) -> StepConfig:
        """Return what `as_stored` was made from."""
        retries = plain["retries"]
        return StepConfig(
            limit=retries["limit"],
            delay=None if retries["delay"] == _FUNCTION else retries["delay"],
            backoff=retries["backoff"],
            timeout=plain["timeout"],
            sensitive=plain["sensitive"] == "output",
            retries_named=plain["retries_named"],
        )


def merge_config(
    given: Any, *, defaults: StepConfig, max_retries: int, step: str
) -> tuple[StepConfig, DelayFunction | None]:
    """Return the config that `given` asks for, and its delay function if it has one.

    Raises WorkflowFatalError naming the step and what is wrong.
    """
    if given is None:
        return defaults, None
    if not isinstance(given, Mapping):
        raise WorkflowFatalError(f"step {step!r}: config must be a dict, not {given!r:.100}")
    if unknown := [key for key in given if key not in _KEYS]:
        raise WorkflowFatalError(
            f"step {step!r}: unknown config {unknown[0]!r:.100}; known are {sorted(_KEYS)}"
        )
    config, function = defaults, None
    if "retries" in given:
        config, function = _with_retries(given["retries"], config, max_retries, step)
    if "timeout" in given:
        config = replace(config, timeout=_timeout(given["timeout"], step))
    if given.get("sensitive") not in (None, "output"):
        raise WorkflowFatalError(
            f'step {step!r}: sensitive={given["sensitive"]!r:.100}; only "output" is known'
        )
    if "sensitive" in given:
        config = replace(config, sensitive=given["sensitive"] == "output")
    return config, function


def _with_retries(
    retries: Any, config: StepConfig, max_retries: int, step: str
) -> tuple[StepConfig, DelayFunction | None]:
    if not isinstance(retries, Mapping) or not {"limit", "delay"} <= set(retries):
        raise WorkflowFatalError(f"step {step!r}: retries must have limit and delay, not {retries!r:.100}")
    if unknown := [key for key in retries if key not in _RETRY_KEYS]:
        raise WorkflowFatalError(
            f"step {step!r}: unknown key {unknown[0]!r:.100} in retries; known are {sorted(_RETRY_KEYS)}"
        )
    limit, delay, backoff = retries["limit"], retries["delay"], retries.get("backoff", config.backoff)
    if type(limit) is not int or not 0 <= limit <= max_retries:
        raise WorkflowFatalError(
            f"step {step!r}: retries.limit must be an int from 0 to {max_retries}, not {limit!r:.100}"
        )
    if backoff not in _BACKOFFS:
        raise WorkflowFatalError(
            f"step {step!r}: retries.backoff must be one of {_BACKOFFS}, not {backoff!r:.100}"
        )
    function = delay if callable(delay) else None
    try:
        fixed = None if function is not None else parse_duration(delay)
    except ValueError as error:
        raise WorkflowFatalError(f"step {step!r}: retries.delay: {error}") from None
    return replace(config, limit=limit, delay=fixed, backoff=backoff, retries_named=True), function


def _timeout(value: Any, step: str) -> timedelta:
    try:
        timeout = parse_duration(value)
    except ValueError as error:
        raise WorkflowFatalError(f"step {step!r}: timeout: {error}") from None
    if not timeout:
        raise WorkflowFatalError(f"step {step!r}: timeout must be more than zero, not {value!r}")
    return timeout
