"""A server in GitHub's place on loopback: it keeps statuses and comments, and records each call."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of the API."""

    method: str
    path: str
    body: Any
    authorization: str | None


@dataclass
class GitHubServer:
    """What the platform told it. `url` is the API's base URL; `down` makes it answer 502."""

    url: str = ""
    down: bool = False
    calls: list[Call] = field(default_factory=list)
    comments: dict[int, dict[str, Any]] = field(default_factory=dict)
    issues: dict[int, tuple[str, str]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def statuses(self, sha: str, context: str | None = None) -> list[dict[str, Any]]:
        """Return the bodies of the statuses set on a commit, in order."""
        found = [
            call.body
            for call in self.calls
            if call.method == "POST" and call.path.endswith(f"/statuses/{sha}")
        ]
        return [body for body in found if context is None or body["context"] == context]

    def wait_for(self, condition: Any, timeout: float = 30.0) -> None:
        """Wait until `condition()` holds, looking after each call."""
        with self.changed:
            assert self.changed.wait_for(condition, timeout), self.calls

    def answer(self, call: Call) -> tuple[int, Any]:
        """Do what GitHub does with the few calls that a reporter makes."""
        if self.down:
            return 502, {"message": "Bad Gateway"}
        status = re.fullmatch(r"/repos/([^/]+/[^/]+)/statuses/([0-9a-f]+)", call.path)
        if status and call.method == "POST":
            return 201, {"id": len(self.calls), "url": f"{self.url}{call.path}", **call.body}
        listing = re.fullmatch(r"/repos/([^/]+/[^/]+)/issues/(\d+)/comments", call.path.partition("?")[0])
        if listing and call.method == "POST":
            number = 1000 + len(self.comments)
            self.comments[number] = self._comment(listing[1], number, call.body["body"])
            self.issues[number] = (listing[1], listing[2])
            return 201, self.comments[number]
        if listing and call.method == "GET":
            wanted = (listing[1], listing[2])
            return 200, [made for number, made in self.comments.items() if self.issues[number] == wanted]
        one = re.fullmatch(r"/repos/([^/]+/[^/]+)/issues/comments/(\d+)", call.path)
        if one and int(one[2]) in self.comments:
            if call.method == "PATCH":
                self.comments[int(one[2])]["body"] = call.body["body"]
            return 200, self.comments[int(one[2])]
        return 404, {"message": "Not Found"}

    def _comment(self, repo: str, number: int, body: str) -> dict[str, Any]:
        return {"id": number, "url": f"{self.url}/repos/{repo}/issues/comments/{number}", "body": body}


@contextmanager
def serve_github() -> Iterator[GitHubServer]:
    """Run the server in a thread."""
    github = GitHubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a caller that was killed
                super().handle()

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            if len(raw) < length:
                return  # the caller was killed
            body = json.loads(raw) if raw else None
            call = Call(self.command, self.path, body, self.headers.get("Authorization"))
            with github.changed:
                status, answer = github.answer(call)
                github.calls.append(call)
                github.changed.notify_all()
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _handle  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    github.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield github
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
