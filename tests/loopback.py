"""An HTTP server on loopback that answers what a test says, and records what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    body: Any
    headers: Mapping[str, str]


@dataclass
class Answer:
    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


Behaviour = Callable[[Call], Answer]


@dataclass
class Loopback:
    """`behaviour` makes the answers, outside of the lock; `scripted` ones go first, in order."""

    behaviour: Behaviour
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    scripted: list[Answer] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self) -> list[str]:
        return [f"{call.method} {call.path}" for call in self.calls]

    def handle(self, call: Call) -> Answer:
        with self.lock:
            self.calls.append(call)
            if self.scripted:
                return self.scripted.pop(0)
        return self.behaviour(call)


@contextmanager
def loopback(behaviour: Behaviour) -> Iterator[Loopback]:
    server = Loopback(behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = server.handle(Call(self.command, self.path, json.loads(raw) if raw else None, headers))
            content = json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = _handle  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
