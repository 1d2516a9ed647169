"""A forge over HTTP on loopback: git's own server, repositories that anybody or only who has the token may read."""

from __future__ import annotations

import base64
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.ci_platform.git_repositories import ENVIRONMENT, WorkingCopy, working_copy

TOKEN = "token-of-the-forge"
Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class ForgeServer:
    """`private` repositories want the token; `more` answers before git does; `asked` is what came in."""

    root: Path
    url: str = ""
    private: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    more: Callable[[Asked], Answer | None] = lambda _asked: None

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def repository(self, name: str) -> WorkingCopy:
        """A repository whose commits are served at once."""
        made = working_copy(self.root / f"{name}.git")
        for key in ("uploadpack.allowAnySHA1InWant", "uploadpack.allowFilter"):
            made.git("config", key, "true")
        return made

    def address(self, name: str) -> str:
        return f"{self.url}/{name}.git"

    def who(self, asked: Asked) -> str:
        scheme, _, value = asked.headers.get("authorization", "").partition(" ")
        return base64.b64decode(value).decode() if scheme == "Basic" else ""

    def answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        if (answer := self.more(asked)) is not None:
            return answer
        name = asked.path.partition(".git")[0].lstrip("/")
        if name in self.private and not self.who(asked).endswith(f":{TOKEN}"):
            return 401, {"WWW-Authenticate": 'Basic realm="forge"'}, b""
        return self._git(asked)

    def _git(self, asked: Asked) -> Answer:
        parts = urlsplit(asked.path)
        env = ENVIRONMENT | {
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": parts.path.replace(".git/", ".git/.git/", 1),
            "QUERY_STRING": parts.query,
            "REQUEST_METHOD": asked.method,
            "CONTENT_TYPE": asked.headers.get("content-type", ""),
            "CONTENT_LENGTH": str(len(asked.body)),
            "HTTP_CONTENT_ENCODING": asked.headers.get("content-encoding", ""),
            "GIT_PROTOCOL": asked.headers.get("git-protocol", ""),
            "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*",
        }  # fmt: skip
        done = subprocess.run(
            ["git", "http-backend"], input=asked.body, env=env, capture_output=True, check=False
        )
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines() if ": " in line)
        return int(headers.pop("Status", "200").split()[0]), headers, body


@contextmanager
def forge_server(root: Path) -> Iterator[ForgeServer]:
    served = ForgeServer(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            if headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
            else:
                body = self.rfile.read(int(headers.get("content-length", 0)))
            status, more, content = served.answer(Asked(self.command, self.path, headers, body))
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name, value)
            if "Content-Length" not in more:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _handle  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
