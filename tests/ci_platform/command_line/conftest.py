"""A server as a process of its own, and the command line as a user calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from ci_platform.client import Address, Client, read_address

ROOT = Path(__file__).parents[3]
DEADLINE = 60


@dataclass
class CommandLine:
    """Calls `dynflow` with an environment in which nothing but the tests' own server can be found."""

    environ: Mapping[str, str]
    cwd: Path

    def __call__(self, *arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ci_platform", *arguments],
            env={**self.environ, **environ},
            cwd=self.cwd,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ci_platform", *arguments],
            env={**self.environ, **environ},
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DYNFLOW_", "XDG_"))}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", "COLUMNS": "200"}


@pytest.fixture
def dynflow(tmp_path: Path) -> CommandLine:
    """The command line of somebody who has no server."""
    return CommandLine(environment(tmp_path), tmp_path)


@dataclass
class Served:
    """A server process and its user."""

    dynflow: CommandLine
    client: Client
    process: subprocess.Popen[str]
    data: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    data = home / ".local" / "share" / "dynflow"
    line = CommandLine(environment(home), home)
    with line.start("serve", "--port", "0", "--no-allow-containers") as process:
        try:
            address = wait_for_address(data, process)
            with Client(address.url, (data / "token").read_text().strip()) as client:
                yield Served(line, client, process, data)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def wait_for_address(data: Path, process: subprocess.Popen[str]) -> Address:
    deadline = time.monotonic() + DEADLINE
    while (address := read_address(data)) is None or address.pid != process.pid:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
    return address
