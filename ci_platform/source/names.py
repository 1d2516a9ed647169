"""What a repository can be named."""

from __future__ import annotations

import hashlib
import re

from ci_platform.errors import InvalidInputError

_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/[A-Za-z0-9_.-]{1,100}")


def check_repo(repo: str) -> str:
    """Return the name if it is `owner/name` and safe as a path; InvalidInputError otherwise."""
    if not _REPO.fullmatch(repo) or repo.endswith((".git", ".lock", "/.", "/..")):
        raise InvalidInputError(f"a repository is named like 'owner/name', got {repo[:100]!r}")
    return repo


def module_mirror(repo: str, url: str, *, trusted: bool) -> str:
    """Return the name of the mirror in which a repository's runs have what is at `url`, for no other repository.

    No registered repository has such a name. What trusted runs fetched is not what a fork's pull request gets.
    """
    return f"{module_mirrors(repo)[not trusted]}/{hashlib.sha256(url.encode()).hexdigest()[:32]}"


def module_mirrors(repo: str) -> tuple[str, str]:
    """Return the folders of a repository's mirrors of submodules: of trusted runs, and of others."""
    digest = hashlib.sha256(check_repo(repo).encode()).hexdigest()[:24]
    return f"_modules-{digest}", f"_modules-{digest}-forks"


def is_module_mirror(name: str) -> bool:
    """Whether this is the mirror of a submodule: fetched again by who needs it."""
    return name.startswith("_modules-")
