"""An exception as plain data, and back: how errors reach the journal and cross out of isolates.

Stdlib only: isolates use it too.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import traceback
from dataclasses import dataclass
from typing import Any, Literal

from dynflow.errors import (
    EngineClosedError,
    LeaseLostError,
    NonRetryableError,
    StepFailedError,
    StorageError,
    UnserializableError,
    WorkflowFatalError,
    WorkflowInternalError,
)
from dynflow.serialization import encode, register

# What a failure may take in the journal: long messages keep their start, tracebacks their end.
_MAX_TEXT = 16_000
# What engines say to each other and what generators end with. A step that failed with one of these, by accident
# or to deceive, must not say it again where it means something.
_NEVER_OF_A_STEP = (LeaseLostError, StorageError, EngineClosedError, StopIteration, StopAsyncIteration)

Retry = Literal["yes", "no", "when_configured"]


@register
@dataclass(frozen=True, slots=True)
class Failure:
    """What is kept of an exception.

    `name` is shown to people, `type` is `module:qualname`, `args` are the exception's where they are plain
    data (else None). `retry` says whether another attempt may help: an exception class can carry
    `retry = "when_configured"` to be retried only where the step's own config names retries.
    """

    name: str
    message: str
    type: str
    args: tuple[Any, ...] | None = None
    traceback: str = ""
    retry: Retry = "yes"

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"

    @staticmethod
    def of(error: BaseException) -> Failure:
        """Return what is kept of `error`."""
        cls = type(error)
        name = cls.__name__
        if isinstance(error, NonRetryableError) and isinstance(error.name, str):
            name = error.name
        return Failure(
            name=storable(name),
            message=storable(_text(error)[:_MAX_TEXT]),
            type=storable(f"{cls.__module__}:{cls.__qualname__}"),
            args=_plain_args(error),
            traceback=storable("".join(traceback.format_exception(error))[-_MAX_TEXT:]),
            retry=_retry(error),
        )

    def rebuild(self, *, only_loaded: bool = False) -> BaseException | None:
        """Return the exception again: the same class with the same args, or None where that cannot be.

        `only_loaded` looks at imported modules alone, so that data cannot cause an import.
        """
        cls = self._find_class(only_loaded=only_loaded)
        if cls is None or self.args is None:
            return None
        try:
            return cls(*self.args)
        except Exception:  # noqa: BLE001 - a tenant's constructor may raise anything; None means "not rebuilt"
            return None

    def as_step_error(self, step: str, attempts: int) -> BaseException:
        """Return what `await step.do` raises after the last attempt failed with this."""
        error = self.rebuild(only_loaded=True)
        if error is None or isinstance(error, _NEVER_OF_A_STEP):
            return StepFailedError(step, attempts, str(self))
        error.add_note(f"step {step!r} failed after {attempts} attempt(s)")
        return error

    def _find_class(self, *, only_loaded: bool) -> builtins.type[Exception] | None:
        module_name, _, qualname = self.type.partition(":")
        try:
            found: Any = sys.modules[module_name] if only_loaded else importlib.import_module(module_name)
            for part in qualname.split("."):
                found = vars(found)[part]  # not getattr: some modules import what they are asked for
        except (KeyError, ImportError, TypeError, ValueError):
            return None
        return found if isinstance(found, builtins.type) and issubclass(found, Exception) else None


def storable(text: str) -> str:
    """Return `text` without what databases and encoders refuse: NUL and lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as inner:  # noqa: BLE001 - a tenant's __str__ may raise anything
        return f"(its __str__ raised {type(inner).__name__})"


def _plain_args(error: BaseException) -> tuple[Any, ...] | None:
    try:
        args = tuple(error.args)
        return args if len(encode(args)) <= _MAX_TEXT else None
    except (UnserializableError, TypeError, ValueError, RecursionError):
        return None


def _retry(error: BaseException) -> Retry:
    if isinstance(error, (NonRetryableError, WorkflowFatalError, WorkflowInternalError, UnserializableError)):
        return "no"
    return "when_configured" if getattr(error, "retry", None) == "when_configured" else "yes"


class RemoteError(Exception):
    """An exception that was raised on the other side of the wire, as its failure.

    `step` and `attempts` are set where it is the final error of a step.
    """

    def __init__(self, failure: Failure, step: str | None = None, attempts: int | None = None) -> None:
        super().__init__(failure)
        self.failure, self.step, self.attempts = failure, step, attempts

    def __str__(self) -> str:
        return str(self.failure)
