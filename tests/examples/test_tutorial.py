"""The tutorial's programs print what the tutorial says they print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
PROGRAM = re.compile(
    r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL
)
PROGRAMS = PROGRAM.findall(TUTORIAL.read_text())


@pytest.mark.parametrize(("program", "output"), [pytest.param(*rest, id=title) for title, *rest in PROGRAMS])
def test_a_program_of_the_tutorial_prints_what_stands_below_it(
    program: str, output: str, tmp_path: Path
) -> None:
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", file],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout == output


def test_every_program_is_found() -> None:
    assert len(PROGRAMS) == TUTORIAL.read_text().count("```python") >= 7
