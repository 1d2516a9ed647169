"""What a repository can be named."""

from __future__ import annotations

import re

from ci_platform.errors import InvalidInputError

_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/[A-Za-z0-9_.-]{1,100}")


def check_repo(repo: str) -> str:
    """Return the name if it is `owner/name` and safe as a path; InvalidInputError otherwise."""
    if not _REPO.fullmatch(repo) or repo.endswith((".git", ".lock", "/.", "/..")):
        raise InvalidInputError(f"a repository is named like 'owner/name', got {repo[:100]!r}")
    return repo
