"""Plain values that cross between a pipeline and the platform. Stdlib only: they exist on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from dynflow.serialization import register

SandboxKind = Literal["isolate", "container"]
EntryKind = Literal["file", "script", "symlink", "folder", "submodule"]


@register
@dataclass(frozen=True, slots=True)
class Workspace:
    """A copy-on-write working tree of `repo` at `sha`. Commands see each other's results through it."""

    id: str
    repo: str
    sha: str


@register
@dataclass(frozen=True, slots=True)
class Service:
    """A server in a container of its own, beside the commands of a run that name it: a database, a queue.

    Commands reach it as `name`:`port`; the name is the image's unless one is given (`postgres:16`: postgres).
    `ready`: None when something listens on the port; a path such as "/health" when that answers with 2xx or 3xx
    over HTTP; a command when it exits with 0 inside. `command` takes the place of the image's own arguments.
    Equal services of one run are one container, which lives while the run works.
    """

    image: str
    port: int
    ready: str | tuple[str, ...] | None = None
    env: dict[str, str] = field(default_factory=dict)
    name: str = ""
    command: tuple[str, ...] = ()
    timeout: timedelta = timedelta(minutes=1)

    @property
    def host(self) -> str:
        """The name that commands reach it by."""
        return self.name or self.image.rpartition("/")[2].partition("@")[0].partition(":")[0]


@register
@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Files that commands find again in later runs, below `paths`: folders in the workspace, or in `~`, the home.

    They come from the entry with this `key`, else from the newest one whose key begins with one of `restore_keys`, the
    first of these that is found. An entry is made when a command has succeeded and its key was not there, and never
    changes. See `hash_files` for keys that follow from files.
    """

    key: str
    paths: Sequence[str]
    restore_keys: Sequence[str] = ()


def hash_files(*patterns: str) -> str:
    """Return a part of a key that stands for the contents of the workspace's files that match `patterns`.

    The platform puts 32 hexadecimal digits in its place when a command begins. `*`, `?` and `[…]` match within a name,
    `**` any number of folders: `hash_files("requirements*.txt", "**/package-lock.json")`.
    """
    for pattern in patterns:
        if not pattern or any(sign in pattern for sign in "{}|"):
            raise ValueError(f"a pattern is text without braces and bars, not {pattern!r}")
    if not patterns:
        raise ValueError('hash_files takes patterns, such as hash_files("requirements*.txt")')
    return f"{{hash_files:{'|'.join(patterns)}}}"


@register
@dataclass(frozen=True, slots=True)
class Command:
    """One command to run in a sandbox over a workspace.

    `timeout` None means the step's own. `network` asks for one, True for all of the internet or a tuple of hosts
    for these alone; the platform decides. `cwd` is relative to the workspace. `image` names a container image and
    is for `sandbox="container"`, as are
    `services`, which are ready when the command starts. `cache` says what it finds again of earlier runs.
    """

    workspace: Workspace
    argv: tuple[str, ...]
    sandbox: SandboxKind = "isolate"
    image: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "."
    timeout: timedelta | None = None
    network: bool | tuple[str, ...] = False
    services: tuple[Service, ...] = ()
    cache: tuple[CacheSpec, ...] = ()


@register
@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that `env.IMAGES.build` has made. `image` is its exact name, for `image=` of later commands.

    `pushed` are the references under which it is in the registry, each with its digest.
    """

    image: str
    pushed: tuple[str, ...] = ()


@register
@dataclass(frozen=True, slots=True)
class CommitInfo:
    """What people see of a commit. `title` is its first line, at most 200 characters."""

    sha: str
    title: str
    author: str
    committed_at: datetime


@register
@dataclass(frozen=True, slots=True)
class Commit:
    """A whole commit. What is not UTF-8 in it is replaced."""

    sha: str
    tree: str
    parents: tuple[str, ...]
    author: str
    author_email: str
    authored_at: datetime
    committer: str
    committer_email: str
    committed_at: datetime
    message: str


@register
@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One name in a folder of a commit. `size` in bytes, of files that are here; bytes of a name are replaced."""

    name: str
    kind: EntryKind
    id: str
    size: int | None


@register
@dataclass(frozen=True, slots=True)
class Artifact:
    """Files that a run has kept under a name, see `env.ARTIFACTS.upload`. `run` is the id of that run.

    `files` are how many there are, `size` their bytes together. `digest` is over their names, modes and contents:
    artifacts of the same files have the same.
    """

    name: str
    run: str
    digest: str
    files: int
    size: int
    created_at: datetime
    expires_at: datetime


@register
@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. `output` is the end of stdout and stderr together, at most 8 KiB, redacted.

    `exit_code` is 128 + n where signal n ended it. `ended` says so, "killed by signal 11 (SIGSEGV)", or why it did not
    begin, "not found"; it is empty where the command ended with an exit code of its own.
    """

    argv: tuple[str, ...]
    exit_code: int
    output: str
    duration: timedelta
    ended: str = ""

    @property
    def ok(self) -> bool:
        """Whether the command exited with 0."""
        return self.exit_code == 0


class CommandFailedError(Exception):
    """A command exited non-zero: `argv`, `exit_code`, and `output`, the end of what it printed.

    A failing command fails again most of the time, so its step is retried only where the step's own config
    names `retries`.
    """

    retry = "when_configured"

    def __init__(self, argv: tuple[str, ...], exit_code: int, output: str, ended: str = "") -> None:
        super().__init__(argv, exit_code, output, ended)
        self.argv, self.exit_code, self.output, self.ended = argv, exit_code, output, ended

    def __str__(self) -> str:
        tail = "\n".join(self.output.rstrip().splitlines()[-20:])
        return f"{self._what()}" + (f"\n{tail}" if tail else "")

    def _what(self) -> str:
        return f"{' '.join(self.argv)!r} exited with {self.exit_code}"


class CommandKilledError(CommandFailedError):
    """A signal ended the command itself: a crash, or somebody's `kill`. `ended` names it."""

    def _what(self) -> str:
        return f"{' '.join(self.argv)!r} was {self.ended}"


class CommandNotStartedError(CommandFailedError):
    """There is no such program, or it cannot be executed. `ended` says why."""

    def _what(self) -> str:
        return f"{self.argv[0]!r} could not be started: {self.ended}"


def failure_of(result: CommandResult) -> CommandFailedError:
    """Return the error that says how `result` failed."""
    kind = CommandFailedError
    if result.ended:
        kind = CommandKilledError if result.ended.startswith("killed") else CommandNotStartedError
    return kind(result.argv, result.exit_code, result.output, result.ended)
