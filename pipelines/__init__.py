"""What a repository writes its pipeline with."""

from pipelines.commands import run_in_sandbox, summarise
from pipelines.contract import (
    Artifact,
    BuiltImage,
    CacheSpec,
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
    hash_files,
)

__all__ = [
    "Artifact",
    "BuiltImage",
    "CacheSpec",
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
    "hash_files",
    "run_in_sandbox",
    "summarise",
]
