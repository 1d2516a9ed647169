"""What a command prints, on its way into the log: redacted, counted, and its end remembered."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import anyio

from ci_platform.connections import ConnectionLog
from ci_platform.egress import Connection
from ci_platform.errors import PlatformError
from ci_platform.logs import LogWriter
from ci_platform.redaction import Redactor, redact_text
from ci_platform.survival import Progress

KEPT_OUTPUT = 8 * 1024
"""Bytes of output that a CommandResult carries: it is stored with the step, so it has to stay small."""

_SHOWN_CONNECTIONS = 500
"""Of one command, in its log: a package manager makes some hundreds."""


def seconds(duration: timedelta) -> str:
    """Return a duration as people read it."""
    return f"{duration.total_seconds():.3g} s"


class Printer:
    """Redacts what a command prints, logs it and remembers its end.

    With a `progress` it writes down how far it is, and `logged` bytes are in the log already. `left`: the command goes
    on without us, so what is not in the log yet is left to who goes on with it.
    """

    def __init__(self, log: LogWriter, secrets: Collection[str], connections: ConnectionLog) -> None:
        self._log, self._secrets, self._connections = log, secrets, connections
        self._redactor = Redactor(secrets)
        self._end = bytearray()
        self._progress: Progress | None = None
        self._clean = self._logged = 0
        self._connected = self._told = 0
        self.left = False

    def keep(self, progress: Progress, logged: int = 0) -> None:
        """Write down how far it is from now on."""
        self._progress, self._logged, self._told = progress, logged, progress.connections

    def output(self, piece: bytes) -> None:
        """Take a piece of output."""
        self._pass_on(self._redactor.feed(piece))

    def finish(self) -> None:
        """Pass on what redaction held back."""
        if not self.left:
            self._pass_on(self._redactor.flush())

    def _pass_on(self, clean: bytes) -> None:
        if not clean:
            return
        self._end += clean[-KEPT_OUTPUT:]
        del self._end[:-KEPT_OUTPUT]
        new = clean[max(0, self._logged - self._clean) :]
        self._clean += len(clean)
        if not new:
            return
        if self._progress is not None and (end := new.rfind(b"\n")) >= 0:
            # A line that is not over is not in the log for sure: it would be told again.
            self._progress.will_write(self._log.size, self._clean - len(new) + end + 1)
        self._log.write(new)

    def tail(self) -> str:
        """Return the end of the output, at most KEPT_OUTPUT bytes of UTF-8."""
        text = self._end.decode("utf-8", "replace").lstrip("\ufffd").replace("\0", "\ufffd")
        return text.encode()[-KEPT_OUTPUT:].decode("utf-8", "ignore")

    def say(self, kind: Literal["command", "result", "notice"], text: str) -> None:
        """Log a line of the platform's own."""
        self._log.note(kind, redact_text(text, self._secrets))

    def notice(self, text: str) -> None:
        """Log a line of the platform's own that is no part of the result."""
        self.say("notice", text)

    def connected(self, connection: Connection) -> None:
        """Record a connection that the command made or was refused, and show the first ones in its log."""
        self._connected += 1
        if self._connected <= self._told:
            return
        self._connections.append(connection)
        if self._connected <= _SHOWN_CONNECTIONS:
            self.say("notice", str(connection))
        elif self._connected == _SHOWN_CONNECTIONS + 1:
            self.say("notice", "network: more connections are in the step's list of them")
        if self._progress is not None:
            self._progress.told(self._log.size)

    @contextmanager
    def report_failure(self) -> Iterator[None]:
        """Log why a command ends without a result; close the log in any case."""
        started = time.monotonic()
        try:
            yield
        except PlatformError as error:
            self.say("notice", str(error))
            raise
        except anyio.get_cancelled_exc_class():
            if self.left:
                raise
            self.say("notice", f"stopped after {seconds(timedelta(seconds=time.monotonic() - started))}")
            raise
        finally:
            if self._progress is not None:
                self._progress.close()
            if self.left:
                self._log.leave()
            else:
                self._log.finish()
