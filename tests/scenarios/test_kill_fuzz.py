"""A few random kills with a fixed seed; scripts/fuzz_kills.py does many."""

from __future__ import annotations

from pathlib import Path

from tests.scenarios.github_server import serve_github
from tests.scenarios.kill_fuzz import Fuzz


def test_random_kills_lose_nothing_repeat_nothing_and_leave_nothing(tmp_path: Path) -> None:
    with serve_github() as github:
        fuzz = Fuzz(tmp_path, github, seed=20261123, repositories=2, pushes=3)
        try:
            fuzz.run(kills=4, longest=1.5)
        finally:
            fuzz.end()
