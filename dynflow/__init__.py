"""Durable dynamic workflows. Public names, each imported when it is first used.

Type checkers read `__init__.pyi`.
"""

from __future__ import annotations

import importlib
from typing import Any

# Lazy, because the same package is loaded inside isolates, where only stdlib-based modules may be imported.
_HOME = {
    "ExecutionContext": "dynflow.workflow",
    "WorkerEntrypoint": "dynflow.workflow",
    "WorkflowEntrypoint": "dynflow.workflow",
    "WorkflowStep": "dynflow.workflow",
    "AttemptInfo": "dynflow.types",
    "ErrorInfo": "dynflow.types",
    "Event": "dynflow.types",
    "HISTORY_TYPES": "dynflow.types",
    "HistoryEvent": "dynflow.types",
    "InstanceStatus": "dynflow.types",
    "RollbackContext": "dynflow.types",
    "RollbackStatus": "dynflow.types",
    "Schedule": "dynflow.types",
    "StepContext": "dynflow.types",
    "StepInfo": "dynflow.types",
    "StepStatus": "dynflow.types",
    "WorkflowEvent": "dynflow.types",
    "WorkflowBinding": "dynflow.binding",
    "WorkflowInstance": "dynflow.binding",
    "InstanceRef": "dynflow.engines",
    "Limits": "dynflow.engines",
    "DynamicWorkflowBinding": "dynflow.router",
    "LoadContext": "dynflow.router",
    "create_dynamic_workflow_entrypoint": "dynflow.router",
    "dispatch_workflow": "dynflow.router",
    "wrap_workflow_binding": "dynflow.router",
    "DynflowError": "dynflow.errors",
    "EngineClosedError": "dynflow.errors",
    "IllegalMoveError": "dynflow.errors",
    "InstanceExistsError": "dynflow.errors",
    "InstanceFailedError": "dynflow.errors",
    "InstanceNotFoundError": "dynflow.errors",
    "InstanceTerminatedError": "dynflow.errors",
    "InvalidArgumentError": "dynflow.errors",
    "InvalidInstanceIdError": "dynflow.errors",
    "IsolateCrashedError": "dynflow.errors",
    "IsolateError": "dynflow.errors",
    "IsolateLimitError": "dynflow.errors",
    "MissingDispatcherMetadataError": "dynflow.errors",
    "NonRetryableDelayError": "dynflow.errors",
    "NonRetryableError": "dynflow.errors",
    "StepFailedError": "dynflow.errors",
    "StorageError": "dynflow.errors",
    "UnserializableError": "dynflow.errors",
    "ValueTooLargeError": "dynflow.errors",
    "WorkerLoadError": "dynflow.errors",
    "WorkflowError": "dynflow.errors",
    "WorkflowFatalError": "dynflow.errors",
    "WorkflowInternalError": "dynflow.errors",
    "WorkflowTimeoutError": "dynflow.errors",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
