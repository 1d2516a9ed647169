"""Contract of forges: where repositories live and results are shown. `github` and `local` implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

StatusState = Literal["pending", "success", "failure", "error"]


@dataclass(frozen=True, slots=True)
class Change:
    """What a delivery says happened, in the platform's own words.

    `sha` is the commit to build, `ref` the full ref (`refs/heads/main`), `branch` its short name (a pull
    request's is its head branch), `base_branch` where a pull request wants to go, `pr` its number. `trusted`
    is false for what comes from a fork. `action` is GitHub's for pull requests, `"push"` for pushes.
    """

    event: Literal["push", "pull_request", "manual"]
    action: str
    repo: str
    sha: str
    ref: str
    branch: str
    base_branch: str | None = None
    before: str | None = None
    pr: int | None = None
    actor: str = ""
    title: str = ""
    trusted: bool = True
    deleted: bool = False
    clone_url: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A verified delivery. `change` is None where it starts nothing; `ignored` then says why."""

    forge: str
    delivery_id: str
    event: str
    repo: str | None
    change: Change | None = None
    ignored: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CommitStatus:
    """A status to show on a commit; `description` is cut to 140 characters by the forge."""

    repo: str
    sha: str
    context: str
    state: StatusState
    description: str
    target_url: str


@dataclass(frozen=True, slots=True)
class Comment:
    """The one comment that a pull request has under `marker`; made once, then updated in place."""

    repo: str
    pr: int
    marker: str
    body: str


class Forge(ABC):
    """One forge.

    *Order of calls*: any. *Concurrency*: safe; each forge limits itself. *Idempotency*: `set_status` and
    `put_comment` may be repeated; the result is the same. *Cancellation*: a call may still take effect.
    *Errors*: UnauthorizedError from `receive`; UnavailableError (with `retry_after` seconds where the forge
    says) for what may work later, FailedError for what never will.
    """

    name: str

    @abstractmethod
    def receive(self, headers: Mapping[str, str], body: bytes) -> Delivery:
        """Verify the signature over the raw body, then parse. Header names are lower case.

        Raises UnauthorizedError, or InvalidInputError for a body that is not what its headers say.
        """

    @abstractmethod
    async def set_status(self, status: CommitStatus) -> None:
        """Show a status on a commit."""

    @abstractmethod
    async def put_comment(self, comment: Comment) -> None:
        """Create the pull request's comment under the marker, or update it."""

    @abstractmethod
    def clone_url(self, repo: str) -> str:
        """Return what git fetches `repo` from, without credentials."""

    @abstractmethod
    def credentials(self, repo: str) -> tuple[str, str] | None:
        """Return user and token for fetching `repo`, None where it needs none. Never for a URL or a log."""
