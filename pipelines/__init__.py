"""What a repository writes its pipeline with."""

from pipelines.commands import run_in_sandbox, summarise
from pipelines.contract import (
    BuiltImage,
    Command,
    CommandFailedError,
    CommandKilledError,
    CommandNotStartedError,
    CommandResult,
    Service,
    Workspace,
)

__all__ = [
    "BuiltImage",
    "Command",
    "CommandFailedError",
    "CommandKilledError",
    "CommandNotStartedError",
    "CommandResult",
    "Service",
    "Workspace",
    "run_in_sandbox",
    "summarise",
]
