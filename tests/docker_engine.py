"""Whether tests can have containers here, and the image that they run in."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from ci_platform.sandboxes import Tree

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


async def killed_platform(code: str, scope: str, tree: Tree, says: str, within: float) -> int:
    """Run `code` as a platform over `tree`, kill it once it says so, and return what its pid was.

    Its arguments are the image, the scope, and the three folders of the tree.
    """
    folders = [str(tree.upper), str(tree.work), str(tree.lowers[0])]
    platform = subprocess.Popen(  # noqa: ASYNC220 - it is killed, not waited for
        [sys.executable, "-c", code, IMAGE, scope, *folders],
        stdout=subprocess.PIPE,
        cwd=_SCRIPTS.parent,
    )
    assert platform.stdout is not None
    with platform.stdout, anyio.fail_after(within):
        assert await anyio.to_thread.run_sync(platform.stdout.readline) == f"{says}\n".encode()
    platform.kill()
    platform.wait()
    return platform.pid
