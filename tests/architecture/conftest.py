"""What the architecture tests share: the tracked files of this repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every tracked text file; in a source archive without git, every file outside of hidden folders."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    except (subprocess.CalledProcessError, FileNotFoundError):
        paths = [
            path
            for path in ROOT.rglob("*")
            if path.is_file() and ".venv" not in path.parts and ".git" not in path.parts
        ]
    return [path for path in paths if path.is_file()]
