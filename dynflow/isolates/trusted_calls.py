"""The limits of one call of trusted code that can be held in this process, and what the call says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import types
import weakref
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any

from dynflow.errors import IsolateLimitError
from dynflow.failure import Failure
from dynflow.isolates.host_stubs import own_kind
from dynflow.isolates.limits import IsolateLimits
from dynflow.isolates.remotes import Kind
from dynflow.isolates.stubs import Kept, copied
from dynflow.isolates.tails import Tails
from dynflow.isolates.voices import Voice, current_voice, voices
from dynflow.isolates.watchdog import Watchdog
from dynflow.workflow import WorkerEntrypoint

# CPU time is that of the whole process.
_NO_CPU_LIMIT = 1 << 60


class TrustedCall:
    """One call of a worker in this process: its account, and its voice. Made on the host's loop."""

    def __init__(self, limits: IsolateLimits, worker_id: str, files: Collection[str], tails: Tails) -> None:
        self._files = files
        self._limits = replace(limits, cpu_ms=_NO_CPU_LIMIT, isolate_cpu_ms=_NO_CPU_LIMIT)
        self.failed: IsolateLimitError | None = None
        self._task: weakref.ref[asyncio.Task[Any]] | None = None
        self._watchdog = Watchdog(lambda: None, self.fail)
        self._watchdog.load(self._limits)
        self._unanswered = 0

        def tell(level: int, source: str, text: str) -> None:
            tails.tell(worker_id, "in-process", level, source, text)

        self.voice = Voice(self._printed, tell if tails else None)

    def begin(self) -> None:
        """Say that the current task performs the call: it is cancelled over a limit."""
        task = asyncio.current_task()
        self._task = None if task is None else weakref.ref(task)
        current_voice.set(self.voice)
        voices.listen()
        self._watchdog.begin(self._limits)

    def end(self, error: BaseException | None = None) -> None:
        """Say that it is over; what ended it is told. Raises IsolateLimitError where it was over a limit."""
        with contextlib.suppress(IsolateLimitError):
            self.voice.flush()
        self._watchdog.close()
        task = asyncio.current_task()
        if self.failed is None:
            if isinstance(error, Exception):
                failure = Failure.of(error.with_traceback(_own_part(error.__traceback__, self._files)))
                self.voice.told(logging.ERROR, "uncaught", failure.traceback or str(failure))
        elif task is None or not task.cancelling() or (task is self._current() and not task.uncancel()):
            raise self.failed from None

    def fail(self, error: IsolateLimitError) -> None:
        """Cancel the call, which is over a limit."""
        if self.failed is None:
            self.failed = error
            task = self._current()
            if task is not None:
                task.cancel()

    def given(self, value: Any, *, to_worker: bool) -> Any:
        """Return `value` as it arrives on the other side. Raises ValueTooLargeError, UnserializableError."""
        voice = None if to_worker else self.voice

        def own(given: Any) -> tuple[Kind, Any] | None:
            if isinstance(given, WorkerEntrypoint):
                return "object", Spoken(Kept("object", given), voice)
            found = own_kind(given)
            return None if found is None else (found[0], Spoken(found[1], voice))

        return copied(value, own, self._limits.message)

    def asks(self) -> None:
        """Count a call of a binding; `answered` comes after it. Raises IsolateLimitError."""
        self._watchdog.asked()
        self._unanswered += 1
        most = self._limits.outstanding
        if self._unanswered > most:
            error = IsolateLimitError("outstanding", most, f"more than {most:,} calls wait for an answer")
            self.fail(error)
            raise error

    def answered(self) -> None:
        """Say that a call of a binding is over."""
        self._unanswered -= 1

    def _current(self) -> asyncio.Task[Any] | None:
        return self._task() if self._task is not None else None

    def _printed(self, size: int) -> None:
        try:
            self._watchdog.printed(size)
        except IsolateLimitError as error:
            self.fail(error)  # what is raised in `print` the code could catch
            raise


class Spoken:
    """What performs calls of something that was given away, in the voice of whoever gave it."""

    def __init__(self, kept: Any, voice: Voice | None) -> None:
        self._kept, self._voice = kept, voice

    def find(self, method: str) -> Callable[..., Awaitable[Any]]:
        """Return what performs `method`."""
        function = self._kept.find(method)

        async def spoken(*args: Any, **kwargs: Any) -> Any:
            token = current_voice.set(self._voice)
            try:
                result = function(*args, **kwargs)
                return await result if isinstance(result, Awaitable) else result
            finally:
                current_voice.reset(token)

        return spoken


def _own_part(trace: types.TracebackType | None, files: Collection[str]) -> types.TracebackType | None:
    whole = trace
    while trace is not None and trace.tb_frame.f_code.co_filename not in files:
        trace = trace.tb_next
    return trace or whole
