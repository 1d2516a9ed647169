"""What trusted code says in this process, told to its tails: stdout, stderr, logging and warnings ask who speaks.

While a TrustedLoader is open, the interpreter's places for these are taken by something that looks at the context it
is called in. Where that is a call of a worker, its voice gets it; everybody else gets what was there before.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any

from dynflow.isolates.guest_output import Lines
from dynflow.isolates.tails import size_of

current_voice: ContextVar[Voice | None] = ContextVar("current_voice", default=None)
"""Whose words are said here; None: the host's own."""

# Modules of a worker have names of their own in this process; in an isolate they do not.
_PREFIX = re.compile(r"worker_[0-9a-f]{16}\.")


class Voice:
    """What one call of a worker says. Without `tell` it goes where the host's own words go, and is counted.

    `count` is told the bytes first, and may raise.
    """

    def __init__(self, count: Callable[[int], None], tell: Callable[[int, str, str], None] | None) -> None:
        self._count, self._tell = count, tell
        self._lines = {
            "stdout": Lines(self, "stdout", logging.INFO),
            "stderr": Lines(self, "stderr", logging.WARNING),
        }

    @property
    def has_tails(self) -> bool:
        """Whether anybody hears it but the host."""
        return self._tell is not None

    def write(self, stream: str, text: str, under: Any) -> int:
        """Take what is written to a stream whose host's is `under`."""
        if self._tell is not None:
            return self._lines[stream].write(text)
        self._count(size_of(text))
        return int(under.write(text))

    def flush(self) -> None:
        """Say the lines that were begun."""
        for lines in self._lines.values():
            lines.flush()

    def send(self, text: str, level: int, source: str) -> None:
        """Tell the tails."""
        self._count(size_of(text) + size_of(source))
        self.told(level, source, text)

    def told(self, level: int, source: str, text: str) -> None:
        """Tell the tails what does not count."""
        if self._tell is not None:
            self._tell(level, source, text)

    def logged(self, record: logging.LogRecord) -> None:
        """Tell the tails a record."""
        if self._tell is not None:
            name = _PREFIX.sub("", record.name, count=1)
            try:
                text = logging.Formatter().format(record)
            except Exception as error:  # noqa: BLE001 - a tenant's own arguments may do anything
                text = f"(a record of {name} cannot be formatted: {type(error).__name__})"
            self.send(text + "\n", record.levelno, name)


class Voices:
    """Takes the interpreter's places as long as anybody wants that; see the module."""

    def __init__(self) -> None:
        self._wanted = 0
        self._stdout: _Stream | None = None
        self._stderr: _Stream | None = None
        self._record_before: Callable[..., logging.LogRecord] = logging.LogRecord
        self._warn_before: Callable[..., Any] = warnings.showwarning

    def want(self) -> None:
        """Say that there is a loader."""
        self._wanted += 1

    def listen(self) -> None:
        """Take what places somebody else has taken since."""
        if not isinstance(sys.stdout, _Stream):
            self._stdout = sys.stdout = _Stream("stdout", sys.stdout)
        if not isinstance(sys.stderr, _Stream):
            self._stderr = sys.stderr = _Stream("stderr", sys.stderr)
        if logging.getLogRecordFactory() != self._record:
            self._record_before = logging.getLogRecordFactory()
            logging.setLogRecordFactory(self._record)
        if warnings.showwarning != self._warn:
            self._warn_before = warnings.showwarning
            warnings.showwarning = self._warn

    def release(self) -> None:
        """Say that a loader is gone; with the last one the places are given back, where they are still ours."""
        self._wanted -= 1
        if self._wanted:
            return
        if self._stdout is not None and sys.stdout is self._stdout:
            sys.stdout = self._stdout.under
        if self._stderr is not None and sys.stderr is self._stderr:
            sys.stderr = self._stderr.under
        if logging.getLogRecordFactory() == self._record:
            logging.setLogRecordFactory(self._record_before)
        if warnings.showwarning == self._warn:
            warnings.showwarning = self._warn_before

    def _record(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._record_before(*args, **kwargs)
        voice = current_voice.get()
        if voice is not None:
            voice.logged(record)
        return record

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        voice = current_voice.get()
        if voice is None or not voice.has_tails:
            self._warn_before(message, category, filename, lineno, file, line)
        else:
            text = f"{filename}:{lineno}: {category.__name__}: {message}\n"
            voice.send(text, logging.WARNING, "warnings")


class _Stream:
    """stdout or stderr: the host's own, but where a voice speaks."""

    def __init__(self, name: str, under: Any) -> None:
        self._name, self.under = name, under

    def write(self, text: str) -> int:
        """Write `text` where it belongs."""
        voice = current_voice.get()
        return int(self.under.write(text) if voice is None else voice.write(self._name, text, self.under))

    def flush(self) -> None:
        """Write what waits."""
        voice = current_voice.get()
        if voice is not None:
            voice.flush()
        self.under.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)


def without_voice(context: Context) -> Context:
    """Return `context`, in which the host speaks from now on."""
    context.run(current_voice.set, None)
    return context


voices = Voices()
"""Of this process: it has one stdout."""
