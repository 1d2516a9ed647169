"""Whether tests can have containers here, and the image that they run in."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

IMAGE = "dynflow/base:latest"
_SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def require_image() -> None:
    """Skip the test, with the reason, where there is no engine or the image cannot be made."""
    problem = _problem(with_image=True)
    if problem:
        pytest.skip(problem)


def require_engine() -> None:
    """Skip the test, with the reason, where there is no engine."""
    problem = _problem(with_image=False)
    if problem:
        pytest.skip(problem)


@cache
def _problem(*, with_image: bool) -> str:
    for command in (["docker_engine"], ["build_images", "base"])[: 1 + with_image]:
        done = subprocess.run(
            [_SCRIPTS / command[0], *command[1:]], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"no containers here: {done.stderr.strip().splitlines()[-1]}"
    return ""
