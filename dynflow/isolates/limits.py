"""What isolates and single calls of them may use. Over a limit the isolate is stopped with IsolateLimitError."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any

from dynflow.serialization import MEBIBYTE


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one call may use, where its caller allows less than the worker's own limits; None: as those say."""

    cpu_ms: int | None = None
    wall: timedelta | None = None
    subrequests: int | None = None
    output: int | None = None


@dataclass(frozen=True, slots=True)
class IsolateLimits:
    """What one isolate may use, and each call of it (a call, or a workflow's run until it waits)."""

    memory: int = 256 * MEBIBYTE
    """Bytes of address space that the tenant's code may add."""
    busy: timedelta = timedelta(seconds=30)
    """How long code may compute without coming back to its event loop."""
    output: int = 4 * MEBIBYTE
    """Bytes printed and logged in one call."""
    message: int = 8 * MEBIBYTE
    """Bytes of one message to the host."""
    outstanding: int = 20_000
    """Calls to the host that are not answered yet."""
    cpu_ms: int = 300_000
    """Milliseconds of CPU in one call."""
    isolate_cpu_ms: int = 600_000
    """Milliseconds of CPU in the life of the isolate; more than 600,000 are never given."""
    wall: timedelta | None = None
    """How long one call may take, waiting included."""
    subrequests: int | None = None
    """Calls of bindings in one call."""
    output_rate: int = 4 * MEBIBYTE
    """Bytes printed and logged in one second."""

    def lowered(self, call: CallLimits | None) -> IsolateLimits:
        """Return these limits where `call` does not ask for lower ones."""
        if call is None:
            return self
        lower: dict[str, Any] = {}
        for each in fields(call):
            asked, own = getattr(call, each.name), getattr(self, each.name)
            if asked is not None and (own is None or asked < own):
                lower[each.name] = asked
        return replace(self, **lower) if lower else self
