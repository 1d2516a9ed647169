"""Every error that dynflow raises on purpose.

Misuse is never retried. Workflow errors are delivered into tenant code and can be caught there.
Isolate errors tell the tenant's failure (load, limit) from ours (crash, no room).
"""

from __future__ import annotations


class DynflowError(Exception):
    """Base of all errors of the library. `code` is stable and meant for programs."""

    code = "dynflow_error"


# --- misuse of the instance API ------------------------------------------------------------------


class InvalidInstanceIdError(DynflowError, ValueError):
    """An instance id is not 1-100 of `[A-Za-z0-9_-]`, or starts with a hyphen."""

    code = "invalid_instance_id"


class InstanceNotFoundError(DynflowError, LookupError):
    """No instance has this id (in this tenant's reach)."""

    code = "instance_not_found"


class InstanceExistsError(DynflowError):
    """An instance with this id exists already."""

    code = "instance_exists"


class IllegalMoveError(DynflowError):
    """The instance's status does not allow the call."""

    code = "illegal_move"


class InvalidArgumentError(DynflowError, ValueError):
    """An argument has the wrong type or a value out of its range; the message names both."""

    code = "invalid_argument"


class UnserializableError(DynflowError, TypeError):
    """A value is not plain data; the message names the path inside it."""

    code = "unserializable"


class MissingDispatcherMetadataError(DynflowError):
    """A dynamic workflow was started without the envelope that the wrapped binding adds."""

    code = "missing_dispatcher_metadata"


class EngineClosedError(DynflowError):
    """The engine is not running: use it inside `async with engine`."""

    code = "engine_closed"


class StorageError(DynflowError):
    """The engine's file is damaged, newer than this release, held by another process, or out of room."""

    code = "storage"


class EngineUnreachableError(StorageError):
    """The server that keeps the engine's instances does not answer. It may later: what was asked can be asked again."""

    code = "engine_unreachable"


class EngineRefusedError(StorageError):
    """The server that keeps the engine's instances does not take this client: TLS, namespace or permission.

    Waiting does not help: the message says what to change.
    """

    code = "engine_refused"


# --- delivered into workflows --------------------------------------------------------------------


class WorkflowError(DynflowError):
    """Base of the errors that a workflow can meet."""

    code = "workflow_error"


class NonRetryableError(WorkflowError):
    """Raise it in a step to fail the step at once: `NonRetryableError(message, name=None)`.

    `name`, where given, is the error name that status and logs show.
    """

    code = "non_retryable"

    def __init__(self, message: str = "", name: str | None = None) -> None:
        super().__init__(message, name)
        self.message, self.name = message, name

    def __str__(self) -> str:
        return str(self.message)


class WorkflowTimeoutError(WorkflowError, TimeoutError):
    """An attempt ran longer than its timeout, or an awaited event did not come in time."""

    code = "workflow_timeout"


class WorkflowInternalError(WorkflowError):
    """A result is too large to be stored, or storage failed."""

    code = "workflow_internal"


class ValueTooLargeError(WorkflowInternalError, ValueError):
    """Params, an event or another value is larger than its limit; the message names size and limit."""

    code = "value_too_large"


class WorkflowFatalError(WorkflowError):
    """A step's name, config or callback is invalid, or a limit of the instance is reached."""

    code = "workflow_fatal"


class NonRetryableDelayError(WorkflowError):
    """A delay function raised, ran over its 5 seconds, or returned no duration."""

    code = "non_retryable_delay"


class StepFailedError(WorkflowError):
    """A step failed for good and the class of its last error is not importable here.

    Attributes: `step` (its name), `attempts` (how many were made), `cause` (`"Name: message"`).
    """

    code = "step_failed"

    def __init__(self, step: str, attempts: int, cause: str) -> None:
        super().__init__(step, attempts, cause)
        self.step, self.attempts, self.cause = step, attempts, cause

    def __str__(self) -> str:
        return f"step {self.step!r} failed after {self.attempts} attempt(s): {self.cause}"


class InstanceFailedError(WorkflowError):
    """`instance.result()` of an instance that ended `errored`; `name` and `message` are its error's."""

    code = "instance_failed"

    def __init__(self, name: str, message: str) -> None:
        super().__init__(name, message)
        self.name, self.message = name, message

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


class InstanceTerminatedError(WorkflowError):
    """`instance.result()` of an instance that was terminated."""

    code = "instance_terminated"


class ReplayError(WorkflowError):
    """Workflow code and journal disagree: the message names the step, what was expected, what was found."""

    code = "replay"


# --- isolates ------------------------------------------------------------------------------------


class IsolateError(DynflowError):
    """Base of what can go wrong with an isolate."""

    code = "isolate"


class WorkerLoadError(IsolateError):
    """The tenant's code could not be loaded: syntax error, missing class, exception at import.

    Attributes: `file` and `line` (None where unknown). The tenant's matter.
    """

    code = "worker_load"

    def __init__(self, message: str, file: str | None = None, line: int | None = None) -> None:
        super().__init__(message, file, line)
        self.message, self.file, self.line = message, file, line

    def __str__(self) -> str:
        where = (
            f"{self.file}:{self.line}: "
            if self.file and self.line
            else (f"{self.file}: " if self.file else "")
        )
        return f"{where}{self.message}"


class IsolateLimitError(IsolateError):
    """The isolate ran into a limit and was stopped. The tenant's matter.

    `limit` is the name of the limit in `IsolateLimits`, `value` what was allowed.
    """

    code = "isolate_limit"

    def __init__(self, limit: str, value: object = None, message: str | None = None) -> None:
        super().__init__(limit, value, message)
        self.limit, self.value, self.message = limit, value, message

    def __str__(self) -> str:
        return self.message or f"the isolate was stopped at its limit {self.limit!r}: {self.value}"


class IsolateCrashedError(IsolateError):
    """The isolate's process ended without having been asked to."""

    code = "isolate_crashed"


class OutboundRefusedError(DynflowError):
    """The platform does not let this request out; raised by `global_outbound` and delivered into tenant code."""

    code = "outbound_refused"


# --- facets --------------------------------------------------------------------------------------


class FacetError(DynflowError):
    """Base of what can go wrong with a tenant's database."""

    code = "facet"


class FacetRefusedError(FacetError):
    """SQL that is not run in facets, whatever it is good for elsewhere; the message says what. The tenant's matter."""

    code = "facet_refused"


class FacetLimitError(FacetError):
    """A call ran into a limit and has changed nothing. The tenant's matter.

    (With `time`, a call that was just being committed may have happened.)

    `limit` is the name of the limit in `FacetLimits`, `value` what was allowed.
    """

    code = "facet_limit"

    def __init__(self, limit: str, value: object = None) -> None:
        super().__init__(limit, value)
        self.limit, self.value = limit, value

    def __str__(self) -> str:
        return f"the call was stopped at the limit {self.limit!r} of its database: {self.value}"


class FacetSqlError(FacetError):
    """SQLite does not run the statement: a syntax error, a constraint. The tenant's matter.

    `message` is SQLite's, `name` its name of the error, such as `SQLITE_CONSTRAINT_UNIQUE`.
    """

    code = "facet_sql"

    def __init__(self, message: str, name: str = "SQLITE_ERROR") -> None:
        super().__init__(message, name)
        self.message, self.name = message, name

    def __str__(self) -> str:
        return f"{self.message} ({self.name})"


class FacetUnavailableError(FacetError):
    """The database is damaged, or its host cannot reach it. The platform's matter."""

    code = "facet_unavailable"


# --- between segment and engine ------------------------------------------------------------------


class LeaseLostError(DynflowError):
    """This segment no longer owns its instance: it was terminated, restarted or taken over."""

    code = "lease_lost"
