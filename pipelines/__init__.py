"""What a repository writes its pipeline with."""

from pipelines.commands import run_in_sandbox, summarise
from pipelines.contract import (
    BuiltImage,
    Command,
    CommandFailedError,
    CommandKilledError,
    CommandNotStartedError,
    CommandResult,
    Commit,
    CommitInfo,
    Service,
    TreeEntry,
    Workspace,
)

__all__ = [
    "BuiltImage",
    "Command",
    "CommandFailedError",
    "CommandKilledError",
    "CommandNotStartedError",
    "CommandResult",
    "Commit",
    "CommitInfo",
    "Service",
    "TreeEntry",
    "Workspace",
    "run_in_sandbox",
    "summarise",
]
