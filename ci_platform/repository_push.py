"""Put a folder's files into a platform's git server by a real `git push`, without touching the folder."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci_platform.errors import FailedError, InvalidInputError

_TIMEOUT = 600.0
_AUTHOR = {
    "GIT_AUTHOR_NAME": "dynflow",
    "GIT_AUTHOR_EMAIL": "dynflow@localhost",
    "GIT_COMMITTER_NAME": "dynflow",
    "GIT_COMMITTER_EMAIL": "dynflow@localhost",
}


@dataclass(frozen=True, slots=True)
class Destination:
    """A branch of a repository on a platform's git server, and who pushes."""

    url: str
    repo: str
    branch: str
    token: str


def push_folder(folder: Path, destination: Destination, message: str) -> str:
    """Commit what is in `folder` (but for what its `.gitignore` says) and push it. Return the commit's id.

    The commit is made in a repository of its own: index, objects and refs of `folder` stay as they are.
    Raises FailedError with git's own words.
    """
    with tempfile.TemporaryDirectory(prefix="dynflow-push-") as scratch:
        environment = {"GIT_DIR": f"{scratch}/repository", "GIT_WORK_TREE": str(folder), **_AUTHOR}
        git(["init", "--quiet", "--initial-branch", destination.branch], folder, environment)
        git(["add", "--all"], folder, environment)
        git(["commit", "--quiet", "--allow-empty", "--no-verify", "--message", message], folder, environment)
        target = f"{destination.url}/git/{destination.repo}.git"
        push = ["push", "--quiet", "--force", target, f"HEAD:refs/heads/{destination.branch}"]
        git(push, folder, {**environment, **_credentials(destination)})
        return git(["rev-parse", "HEAD"], folder, environment)


def current_branch(folder: Path) -> str:
    """Return the branch that is checked out in `folder`, `main` where there is none."""
    try:
        return git(["symbolic-ref", "--quiet", "--short", "HEAD"], folder, {})
    except FailedError:
        return "main"


def repository_name(folder: Path) -> str:
    """Return a name for the repository in `folder`, below the owner `local`."""
    return "local/" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.name).strip("-.")[:80] or "repository")


def git(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Run git and return what it printed. Raises FailedError, or InvalidInputError where there is no git."""
    # Nothing of the caller's git environment (a hook's GIT_DIR, say) gets in.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    own = {**inherited, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **environment}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=own,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise InvalidInputError("dynflow needs git: on Debian and Ubuntu, `apt-get install git`") from None
    if done.returncode != 0:
        raise FailedError(f"git {arguments[0]} failed: {done.stderr.strip()[-2000:] or done.returncode}")
    return done.stdout.strip()


def _credentials(destination: Destination) -> dict[str, str]:
    # Through the environment: an argument would show in the list of processes, a URL in git's messages.
    return {
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": "http.extraHeader",
        "GIT_CONFIG_VALUE_0": f"Authorization: Bearer {destination.token}",
        "GIT_CONFIG_KEY_1": "http.postBuffer",
        "GIT_CONFIG_VALUE_1": str(64 * 1024 * 1024),
    }
