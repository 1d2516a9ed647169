"""The platform as a process of its own: started, watched, killed, started again."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ci_platform.client import read_address

SECRET = "It's a Secret to Everybody"
ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """One data folder and the process that serves it, if one does."""

    data: Path
    settings: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable,)
    user: int | None = None
    process: subprocess.Popen[bytes] | None = None
    pids: list[int] = field(default_factory=list)
    """Of all processes that have served it."""

    def start(self) -> None:
        """Start the process and wait until it says that it is ready."""
        self.spawn()
        self.wait_until(self.is_ready, "the server to be ready")

    def spawn(self) -> None:
        """Start the process."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("DYNFLOW_")}
        environ |= {
            "DYNFLOW_GITHUB_WEBHOOK_SECRET": SECRET,
            "DYNFLOW_GITHUB_TOKEN": "a-token",
            "DYNFLOW_COMMAND_KEPT": "20 seconds",  # what the last server of a test leaves is gone soon
        } | self.settings
        log = (self.data.parent / "server.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [*self.command, "-m", "ci_platform", "serve", "--data", str(self.data), "--port", "0"],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
            )
        self.pids.append(self.process.pid)

    def is_ready(self) -> bool:
        """Whether the process answers; fails where it has ended."""
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        address = read_address(self.data)
        if address is None or address.pid != self.process.pid:
            return False
        try:
            return httpx.get(f"{address.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def log(self) -> str:
        """Return what the process printed, for messages."""
        return (self.data.parent / "server.log").read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """SIGKILL: no handler, no goodbye."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Stop as an operator does."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.kill()
                raise

    @property
    def url(self) -> str:
        """Where the server listens now."""
        address = read_address(self.data)
        assert address is not None, self.log()
        return address.url

    @property
    def headers(self) -> dict[str, str]:
        """The local administrator's authorisation."""
        return {"Authorization": f"Bearer {(self.data / 'token').read_text().strip()}"}

    def api(self, method: str, path: str, **options: Any) -> Any:
        """Call the API; fail on an error."""
        response = httpx.request(
            method, f"{self.url}/api/v1{path}", headers=self.headers, timeout=30, **options
        )
        assert response.is_success, (response.status_code, response.text)
        return response.json() if response.content else None

    def register(self, repo: str, bare: Path) -> None:
        """Register a GitHub repository whose clone URL is a bare repository here."""
        self.api("POST", "/repos", json={"name": repo, "forge": "github", "clone_url": bare.as_uri()})

    def deliver(
        self, event: str, payload: Any, *, delivery: str | None = None, secret: str = SECRET
    ) -> httpx.Response:
        """Send a webhook as GitHub does."""
        body = json.dumps(payload).encode()
        signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        headers = {
            "Content-Type": "application/json",
            "X-GitHub-Event": event,
            "X-GitHub-Delivery": delivery or str(uuid.uuid4()),
            "X-Hub-Signature-256": f"sha256={signature}",
            "User-Agent": "GitHub-Hookshot/0000000",
        }
        return httpx.post(f"{self.url}/webhooks/github", content=body, headers=headers, timeout=30)

    def wait_for_run(
        self, condition: Callable[[dict[str, Any]], bool], what: str, *, repo: str | None = None
    ) -> dict[str, Any]:
        """Wait until the newest run fulfils `condition`; return it in full."""
        found: dict[str, Any] = {}

        def look() -> bool:
            runs = self.api("GET", "/runs", params={"repo": repo} if repo else {})["items"]
            if not runs:
                return False
            found.clear()
            found.update(self.api("GET", f"/runs/{runs[0]['id']}"))
            if condition(found):
                return True
            assert not concluded(found), (
                f"waited for {what}, but the run ended\n{json.dumps(found, indent=1)[-3000:]}"
            )
            return False

        self.wait_until(look, what, lambda: json.dumps(found, indent=1)[-3000:])
        return found

    def wait_until(
        self, condition: Callable[[], bool], what: str, detail: Callable[[], str] = str, timeout: float = 60
    ) -> None:
        """Wait for a condition that only another process can make true; fail with what is known."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}\n{detail()}\n{self.log()}"
            time.sleep(0.02)  # between two looks at another process


@contextmanager
def running_server(data: Path, environ: dict[str, str] | None = None, /, **settings: str) -> Iterator[Server]:
    """Start a server; stop it at the end."""
    named = {f"DYNFLOW_{name.upper()}": value for name, value in settings.items()}
    server = Server(data, {**(environ or {}), **named})
    server.start()
    try:
        yield server
    finally:
        server.stop()


def concluded(run: dict[str, Any]) -> bool:
    """Whether the run has ended."""
    return run["conclusion"] is not None


def at_gate(run: dict[str, Any]) -> bool:
    """Whether a gate of the run is open."""
    return run["status"] == "waiting" and any(gate["state"] == "open" for gate in run["gates"])


def step_named(run: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a step of the run."""
    found: dict[str, Any] = next(step for step in run["steps"] if step["name"] == name)
    return found
