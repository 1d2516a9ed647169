"""What the tests of the examples share: an example as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# An example that takes longer than this hangs.
DEADLINE = 60.0


def run(name: str, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example to its end, stdout and stderr together in `stdout`."""
    return subprocess.run(
        _command(name, arguments),
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@contextmanager
def started(name: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Start an example; it is killed where it still runs at the end."""
    process = subprocess.Popen(
        _command(name, arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what the process prints, up to the line with `text`; fail where it ends before."""
    printed = ""
    assert process.stdout is not None
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"it never printed {text!r}, but:\n{printed}")


def _command(name: str, arguments: tuple[str | Path, ...]) -> list[str | Path]:
    return [sys.executable, EXAMPLES / name / "main.py", *arguments]
