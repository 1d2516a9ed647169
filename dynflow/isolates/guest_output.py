"""What a tenant prints, logs and warns of, as frames to the host. Stdlib only."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import Any, Protocol

from dynflow.isolates.wire import Peer

# Longer text goes in pieces that fit a frame.
_PIECE = 64 * 1024


class Teller(Protocol):
    """Takes what was said."""

    def send(self, text: str, level: int, source: str) -> None:
        """Tell it on."""


class Output:
    """The guest's way of saying something; it replaces stdout, stderr, and what logging and warnings write to."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._out, self._err = Lines(self, "stdout", logging.INFO), Lines(self, "stderr", logging.WARNING)

    def install(self) -> None:
        """Take the interpreter's places."""
        sys.stdout, sys.stderr = self._out, self._err
        # The handler of last resort: whoever sets up logging for themselves gets what they ask for, on stderr.
        logging.lastResort = _Handler(self)
        logging.root.setLevel(logging.INFO)
        warnings.showwarning = self._warn

    def send(self, text: str, level: int, source: str) -> None:
        """Tell the host, at once."""
        for start in range(0, len(text), _PIECE):
            self._peer.send("output", text[start : start + _PIECE], level, source)

    def advise(self, text: str) -> None:
        """Tell the tenant something of our own."""
        self.send(text, logging.WARNING, "dynflow")

    def flush(self) -> None:
        """Send the lines that were begun."""
        self._out.flush()
        self._err.flush()

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        del file, line
        self.send(f"{filename}:{lineno}: {category.__name__}: {message}\n", logging.WARNING, "warnings")


class _Handler(logging.Handler):
    """Records become frames with their level and the logger's name."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; what cannot be formatted is said instead."""
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001 - a tenant's own arguments may do anything
            text = f"(a record of {record.name} cannot be formatted: {type(error).__name__})"
        self._output.send(text + "\n", record.levelno, record.name)


class Lines(io.TextIOBase):
    """stdout or stderr of the tenant: whole lines are sent."""

    def __init__(self, output: Teller, source: str, level: int) -> None:
        super().__init__()
        self._output, self._source, self._level = output, source, level
        self._begun = ""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Take `text`; send the lines that are complete."""
        self._begun += text
        if "\n" in text:
            lines, _, self._begun = self._begun.rpartition("\n")
            self._output.send(lines + "\n", self._level, self._source)
        if len(self._begun) > _PIECE:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Send what there is."""
        text, self._begun = self._begun, ""
        if text:
            self._output.send(text, self._level, self._source)
