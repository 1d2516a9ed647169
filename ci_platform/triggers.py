"""From a change to the runs it asks for. Pure.

A push to a branch or tag asks for one run, and so does each new head of a pull request. GitHub tells of both
for one commit of a branch with a pull request: these are two runs, of two events, and they show as two
statuses (`dynflow/push`, `dynflow/pull_request`); requiring the second is what protects a merge.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from ci_platform.forges import Change

# The words of GitHub Actions, GitLab and others, anywhere in the head commit's message.
_SKIP = re.compile(r"\[(?:skip ci|ci skip|no ci|skip actions|actions skip|skip dynflow)\]", re.IGNORECASE)
_SKIP_TRAILER = re.compile(r"^skip-checks:\s*true\s*$", re.IGNORECASE | re.MULTILINE)
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# 128 bits: no two causes meet; and an id that is short enough for a URL and a folder's name.
_ID_LENGTH = 32


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One run that a change asks for. `run_id` follows from the cause: the same cause, the same run."""

    run_id: str
    change: Change


@dataclass(frozen=True, slots=True)
class Skipped:
    """The change asks for nothing; `reason` says why."""

    reason: str


def match(forge: str, change: Change, message: str = "") -> tuple[RunRequest, ...] | Skipped:
    """Return what `change` asks for. `message` is the head commit's, where it is known."""
    if change.deleted:
        return Skipped(f"{change.ref} was deleted")
    if not _SHA.fullmatch(change.sha):
        return Skipped(f"{change.sha[:64]!r} is not a commit's id")
    if change.event == "push" and not change.ref.startswith(("refs/heads/", "refs/tags/")):
        return Skipped(f"{change.ref[:200]} is neither a branch nor a tag")
    marker = skip_marker(message or change.title)
    if marker is not None and change.event != "manual":
        return Skipped(f"the commit's message says {marker}")
    return (RunRequest(run_id_of(forge, change), change),)


def run_id_of(forge: str, change: Change, nonce: str = "") -> str:
    """Return the id of the run that this cause has: 32 hexadecimal digits.

    One per repository, event, commit and ref; `nonce` tells manual runs apart.
    """
    # A unit separator cannot be in any of the parts: no two causes are spelled the same.
    cause = f"{forge}\x1f{change.repo}\x1f{change.event}\x1f{change.sha}\x1f{change.ref}\x1f{nonce}"
    return hashlib.sha256(cause.encode()).hexdigest()[:_ID_LENGTH]


def skip_marker(message: str) -> str | None:
    """Return the words by which a commit's message asks for no run, such as `[skip ci]`."""
    found = _SKIP.search(message) or _SKIP_TRAILER.search(message)
    return found[0].strip() if found else None
