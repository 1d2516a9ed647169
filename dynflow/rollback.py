"""The saga's way back: handlers of started steps, one after another, the last started first. Knows no engine."""

from __future__ import annotations

from dynflow.engines import Journal, StepKey
from dynflow.errors import EngineClosedError, LeaseLostError, StorageError
from dynflow.failure import Failure
from dynflow.step import perform_rollback
from dynflow.step_host import StepHost
from dynflow.types import ErrorInfo, RollbackStatus
from dynflow.workflow import StepCall


class Handlers:
    """The step calls of this segment that brought a handler; a replay brings those of earlier segments again."""

    def __init__(self) -> None:
        self._calls: dict[StepKey, StepCall] = {}

    def note(self, call: StepCall) -> None:
        """Remember the call if it has a handler."""
        if call.rollback is not None and isinstance(call.name, str):
            self._calls[(call.kind, call.stored_name, call.count)] = call

    def chain(self, journal: Journal) -> list[StepCall]:
        """Return the calls whose steps have started, the last started first."""
        started = [
            (record.seq, call)
            for key, call in self._calls.items()
            if (record := journal.steps.get(key)) is not None and record.attempt
        ]
        return [call for _, call in sorted(started, key=lambda pair: pair[0], reverse=True)]


async def roll_back(chain: list[StepCall], reason: str, host: StepHost) -> RollbackStatus:
    """Run the handlers; the first that fails for good ends the chain. Errors of journal and lease pass through."""
    for call in chain:
        try:
            await perform_rollback(call, reason, host)
        except (LeaseLostError, StorageError, EngineClosedError):
            raise
        except Exception as error:  # noqa: BLE001 - the handler's final error, of whatever class the tenant raised
            failure = getattr(error, "failure", None) or Failure.of(error)
            return RollbackStatus("failed", ErrorInfo(failure.name, failure.message))
    return RollbackStatus("complete")
