"""Contract of sandboxes: where tenant commands run.

`isolate.IsolateSandbox` is a confined process on this host, `container.ContainerSandbox` a Docker container.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from ci_platform.egress import Connection
from ci_platform.errors import ImageNotFoundError
from pipelines.contract import Service

MEBIBYTE = 1024 * 1024

SANDBOX_UID = 64_801
"""User and group of commands, in every sandbox. Where the platform runs as root, trees belong to this user of
the host; elsewhere they belong to the platform's own user, who has this number inside. The number is one that
Debian leaves unassigned (policy 9.2.2: 60000-64999 are for packages on demand, 64801 is not taken)."""


class Lazy(Protocol):
    """The lowest layer of a tree whose files are not on disk yet."""

    def mount(self) -> int:
        """Return a mount of it as an open file, to be attached once. Blocks a moment; UnavailableError."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The files of one command, made by `workspaces.prepare`.

    With `lowers` (topmost first, at least one) they are an overlay that the sandbox mounts: `upper` takes the
    changes, `work` is overlayfs's own. Without lowers `upper` is a plain directory with everything in it.
    With `lazy` the last of `lowers` is an empty folder, and what `lazy` mounts belongs in its place.
    """

    upper: Path
    work: Path
    lowers: tuple[Path, ...] = ()
    lazy: Lazy | None = None


@dataclass(frozen=True, slots=True)
class Mount:
    """Files of their own in a job's sandbox, at `path` below its workspace or its home folder.

    What a command changes in there goes into this tree and not into the job's. In the workspace, `path` is there
    already, and nothing on the way to it is a link.
    """

    place: Literal["workspace", "home"]
    path: str
    tree: Tree


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one command may use."""

    timeout: timedelta = timedelta(minutes=60)
    memory: int = 2048 * MEBIBYTE
    processes: int = 512
    cpus: float | None = None
    """Processors' worth of time, such as 1.5; None: as much as there is."""
    output: int = 64 * MEBIBYTE
    """Bytes printed; a command that prints more is killed."""
    cpu: timedelta | None = None
    """Time of processors that all its processes take together; None: as much as they like until `timeout`."""
    disk: int = 20 * 1024 * MEBIBYTE
    """Bytes on disk of what it changes in its tree. /tmp and HOME are memory."""
    files: int = 1_000_000
    """Files and folders that it changes in its tree."""


Say = Callable[[str], None]
"""Called on the event loop with a line of the sandbox's own, for the job's log."""

Connected = Callable[[Connection], None]
"""Called on the event loop with each connection that a command has made or was refused, when it is over."""


def say_nothing(line: str) -> None:
    """Take a line and drop it."""


def _ignore(_: Connection) -> None:
    return


@dataclass(frozen=True, slots=True)
class SandboxJob:
    """One command. `id` is unique while it runs; `cwd` is relative to the tree, which is mounted at /workspace.

    `services` run beside it, and their images are exact names, too. `scope` is the run that it is part of: jobs
    of one scope may share what a sandbox keeps between two of them.
    `survive` is a folder in which a later process of the platform finds a command that goes on without this one.
    `network`: none, an open one, or rules of the hosts that may be reached (`egress.policy.Rule`).
    """

    id: str
    argv: tuple[str, ...]
    tree: Tree
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "."
    image: str | None = None
    network: bool | tuple[str, ...] = False
    limits: SandboxLimits = SandboxLimits()
    scope: str = ""
    services: tuple[Service, ...] = ()
    mounts: tuple[Mount, ...] = ()
    say: Say = say_nothing
    survive: Path | None = None
    connected: Connected = field(default=_ignore, compare=False, repr=False)


StopReason = Literal["exited", "timeout", "memory", "output", "processes", "cpu", "disk", "files", "depth"]
"""`depth`: folders below each other, of which nobody needs as many as a limit on files allows."""


@dataclass(frozen=True, slots=True)
class SandboxOutcome:
    """How the command ended. `exit_code` is 128 + n for signal n. `reason` says who ended it.

    `used` is what it had used of the limit that ended it, 0 where nobody counted. `ended` says how it ended by itself,
    where that was neither well nor with an exit code of its own: "killed by signal 11 (SIGSEGV)", "not found".
    """

    exit_code: int
    reason: StopReason
    duration: timedelta
    used: int = 0
    ended: str = ""


Output = Callable[[bytes], None]
"""Called on the event loop with each piece of stdout and stderr, as it comes."""


class Sandbox(ABC):
    """Runs commands.

    *Order of calls*: `run` any number of times, concurrently; `sweep` once at start, before the first `run`.
    *Concurrency*: one event loop. *Idempotency*: none; a caller that repeats gives a fresh tree.
    *Cancellation*: cancelling `run` kills the whole process tree and waits for it before CancelledError leaves.
    *Errors*: UnavailableError where the sandbox itself cannot run; a command that fails is an outcome, not an
    error. When `run` returns or raises, no process of the job is left, and no mount that anything can be changed by,
    nor anything else but what is kept ready for the next job of its scope, until `release`.
    """

    outlives: ClassVar[bool] = False
    """Whether jobs with `survive` go on without this process."""

    takes_lazy: ClassVar[bool] = False
    """Whether trees of jobs may be `lazy`."""

    @abstractmethod
    async def run(self, job: SandboxJob, output: Output) -> SandboxOutcome:
        """Run one command to its end."""

    @abstractmethod
    async def sweep(self) -> int:
        """Kill and remove what an earlier process of this platform left behind; returns how many."""

    async def resume(self, job: SandboxJob, output: Output) -> SandboxOutcome | None:
        """Go on with the command that an earlier process of the platform has left in `job.survive`.

        `output` gets all that it has printed, from the first byte on. None: nothing is there (any more).
        """
        del job, output
        return None

    async def abandon(self, folder: Path) -> None:
        """Kill the command that an earlier process has left in `folder`; nothing where there is none."""
        del folder

    def settled(self, folder: Path) -> None:
        """Hear that the end of a job with `survive=folder` is taken care of; until then it would be found again."""
        del folder

    def detach(self) -> None:  # noqa: B027 - where nothing outlives the process there is nothing to leave
        """Hear that this process ends: from now on, cancelling a job with `survive` leaves its command running."""

    async def release(self, scope: str) -> None:
        """Let go of what is kept for the jobs of a scope and not in use now: it has ended, or waits."""
        del scope

    async def close(self) -> None:  # noqa: B027 - most sandboxes keep nothing between two jobs
        """Let go of what is kept ready for the next `run`; a later `run` makes it anew."""

    async def resolve(self, image: str | None, say: Say) -> tuple[str, str]:
        """Return the name of an image as it was asked for (None: this sandbox's own) and its exact name.

        Fetches it if need be. Raises ImageNotFoundError, with the name.
        """
        del say
        raise ImageNotFoundError(f"this sandbox has no images, and none that is called {image!r}")

    @abstractmethod
    def describe(self) -> Mapping[str, str]:
        """Return which walls and methods are in use, for `dynflow doctor`."""


@dataclass(frozen=True, slots=True)
class MadeImage:
    """An image that a run has made. `size` is the bytes that no other image shares."""

    exact: str
    size: int
    made_at: datetime


class ImageMaker(Sandbox):
    """A sandbox that makes images, too. Errors: FailedError is the tenant's, UnavailableError ours."""

    @abstractmethod
    async def install(self, image: str, job: SandboxJob, output: Output) -> tuple[SandboxOutcome, str | None]:
        """Run a command as root of a container of its own; its file system is an image if it exits with 0."""

    @abstractmethod
    async def build(
        self, job: SandboxJob, dockerfile: str, check: Callable[[str], Awaitable[str]], output: Output
    ) -> str:
        """Build an image of the job's tree by a Dockerfile in it, whose text `check` makes harmless."""

    @abstractmethod
    async def refuse_triggers(self, image: str) -> None:
        """Raise FailedError for an image that would have the engine do things of its own in a build."""

    @abstractmethod
    async def push(self, image: str, references: list[str], output: Output) -> list[str]:
        """Push an image under some references; returns each with its digest."""

    @abstractmethod
    async def made(self) -> list[MadeImage]:
        """Return the images that runs have made and that are here."""

    @abstractmethod
    async def remove_made(self, exact: str) -> bool:
        """Remove an image that a run has made; False while something uses it."""
