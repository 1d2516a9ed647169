"""Durable dynamic workflows. Public names, each imported when it is first used.

Type checkers read `__init__.pyi`.
"""

from __future__ import annotations

import importlib
from typing import Any

# Lazy, because the same package is loaded inside isolates, where only stdlib-based modules may be imported.
_HOME = {
    "WorkflowEntrypoint": "dynflow.workflow",
    "WorkerEntrypoint": "dynflow.workflow",
    "WorkflowStep": "dynflow.workflow",
    "WorkflowEvent": "dynflow.types",
    "Event": "dynflow.types",
    "StepContext": "dynflow.types",
    "RollbackContext": "dynflow.types",
    "InstanceStatus": "dynflow.types",
    "HistoryEvent": "dynflow.types",
    "DynamicWorkflowBinding": "dynflow.router",
    "create_dynamic_workflow_entrypoint": "dynflow.router",
    "dispatch_workflow": "dynflow.router",
    "wrap_workflow_binding": "dynflow.router",
    "LoadContext": "dynflow.router",
    "DynflowError": "dynflow.errors",
    "IllegalMoveError": "dynflow.errors",
    "InstanceExistsError": "dynflow.errors",
    "InstanceNotFoundError": "dynflow.errors",
    "InvalidArgumentError": "dynflow.errors",
    "InvalidInstanceIdError": "dynflow.errors",
    "MissingDispatcherMetadataError": "dynflow.errors",
    "NonRetryableDelayError": "dynflow.errors",
    "NonRetryableError": "dynflow.errors",
    "StepFailedError": "dynflow.errors",
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
