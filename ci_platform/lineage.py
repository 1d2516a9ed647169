"""Names of workspaces: of which run and step they are, and what they are called in a run that was forked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def workspace_id_of(run_id: str, step: str, count: int) -> str:
    """Return the id of what a step (the `count`th of its name) forks: readable, and one for each step of a run."""
    slug = _UNSAFE.sub("-", step)[:40]
    if slug != step:
        # The dot is in no name that stays as it is, so that none can be chosen to meet this one.
        slug += f".{hashlib.sha256(step.encode()).hexdigest()[:16]}"
    return f"{run_id}.{slug}-{count}"


def in_run(workspace_id: str, run_id: str, ancestors: Collection[str]) -> str | None:
    """Return what a workspace is called in a run; None where it is not the run's.

    Results of steps that were taken over name the workspaces of `ancestors`: there are copies of the same name here.
    """
    owner, dot, rest = workspace_id.partition(".")
    if dot and (owner == run_id or owner in ancestors):
        return f"{run_id}.{rest}"
    return None
