"""The isolate sandbox's suites once more, as a user who may do nothing, where the tests run as root."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ci_platform import layers

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65_534


def as_nobody(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as nobody: this one, or the system's of the same version where this one is out of reach."""
    version = "{}.{}".format(*sys.version_info)
    packages = sysconfig.get_path("purelib")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": f"{ROOT}:{packages}"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    for python in (sys.executable, f"/usr/bin/python{version}"):
        user: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "env": env, "cwd": ROOT}
        try:
            return subprocess.run([python, *arguments], check=False, capture_output=True, text=True, **user)
        except PermissionError:
            continue
        except FileNotFoundError:
            break
    pytest.skip(f"no Python {version} that the user nobody could run")


@pytest.fixture
def home() -> Iterator[Path]:
    # Not tmp_path: pytest keeps its parents to root.
    made = Path(tempfile.mkdtemp())
    os.chown(made, NOBODY, NOBODY)
    yield made
    layers.remove_tree(made)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the suites themselves run without privileges already")
@pytest.mark.parametrize(
    ("suite", "which"),
    [
        ("tests/contracts/test_sandboxes.py", "not container"),
        ("tests/ci_platform/test_sandbox_hostile.py", "not container"),
        ("tests/ci_platform/test_egress_clients.py", "not container"),
        ("tests/ci_platform/test_caches.py", "leaves or carried_on or outlives"),
    ],
)
def test_the_suite_passes_without_privileges(suite: str, which: str, home: Path) -> None:
    probe = as_nobody("-c", "import ci_platform, anyio, pytest, psutil", home=home)
    if probe.returncode:
        pytest.skip(f"the user nobody cannot import this project: {probe.stderr.strip().splitlines()[-1]}")
    options = ["-q", "-k", which, "-p", "no:cacheprovider", f"--basetemp={home}/tests"]
    done = as_nobody("-m", "pytest", suite, *options, home=home)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
