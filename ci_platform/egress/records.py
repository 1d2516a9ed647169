"""The platform's side of a gateway: what it is ordered to do, and what it has told. Stdlib only."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Self

from ci_platform.egress import Connection, GatewayLimits

_LONGEST_READ = 1024 * 1024


class Records:
    """The file that a gateway tells connections in."""

    def __init__(self, file: int, tell: Callable[[Connection], None]) -> None:
        self._file, self._tell, self._offset, self._rest = file, tell, 0, b""

    def tell_new(self) -> None:
        """Tell the connections that are over since the last time."""
        while piece := os.pread(self._file, _LONGEST_READ, self._offset):
            self._offset += len(piece)
            *lines, self._rest = (self._rest + piece).split(b"\n")
            for line in lines:
                self._tell(Connection.from_line(line))


class WayOut:
    """What a command with a network has for it: the gateway's lifeline, and the file that it tells connections in.

    `rules` None opens every public host; `inner` are the operator's own exceptions.
    """

    def __init__(
        self,
        rules: Sequence[str] | None,
        inner: Sequence[str],
        tell: Callable[[Connection], None],
        limits: GatewayLimits = GatewayLimits(),  # noqa: B008 - frozen
    ) -> None:
        self.order: dict[str, Any] = {"hosts": rules, "inner": list(inner), "limits": asdict(limits)}
        self.lifeline, self.gateways_end = socket.socketpair()
        # Without a name: it is gone with the last process that has it open.
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self.file = self._file.fileno()
        self.records = Records(self.file, tell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.handed_over()
        self._file.close()

    def handed_over(self) -> None:
        """Let go of both ends of the lifeline: supervisor and gateway have them."""
        self.lifeline.close()
        self.gateways_end.close()
