"""A registry of container images on this machine's loopback: what Docker's pull and push ask of one, in memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_BLOB = re.compile(r"/v2/(.+)/blobs/(sha256:[0-9a-f]{64})")
_UPLOAD = re.compile(r"/v2/(.+)/blobs/uploads/([0-9a-f]*)(?:\?(?:.*&)?digest=(.+))?")
_MANIFEST = re.compile(r"/v2/(.+)/manifests/(.+)")


@dataclass
class Registry:
    """What has been pushed. `tags` leads from name:tag to a digest; `broken` makes every request fail."""

    host: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    pulled: list[str] = field(default_factory=list)
    broken: bool = False


@contextmanager
def serve_registry() -> Iterator[Registry]:
    """Serve a registry; Docker speaks plain HTTP to 127.0.0.0/8 by itself."""
    registry = Registry()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"registry": registry}))
    registry.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    registry: Registry
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass

    def do_GET(self) -> None:
        self._find()

    def do_HEAD(self) -> None:
        self._find()

    def _find(self) -> None:
        registry = self.registry
        if registry.broken:
            self._error(500, "INTERNAL_ERROR")
        elif self.path == "/v2/":
            self._answer(200, b"{}")
        elif match := _BLOB.fullmatch(self.path):
            self._answer(200, registry.blobs[match[2]], **{"Docker-Content-Digest": match[2]}) if (
                match[2] in registry.blobs
            ) else self._error(404, "BLOB_UNKNOWN")
        elif match := _MANIFEST.fullmatch(self.path):
            digest = registry.tags.get(f"{match[1]}:{match[2]}", match[2])
            if digest not in registry.manifests:
                self._error(404, "MANIFEST_UNKNOWN")
                return
            if self.command == "GET":
                registry.pulled.append(f"{match[1]}@{digest}")
            kind, body = registry.manifests[digest]
            self._answer(200, body, **{"Content-Type": kind, "Docker-Content-Digest": digest})
        else:
            self._error(404, "NAME_UNKNOWN")

    def do_POST(self) -> None:
        self._body()
        upload = uuid.uuid4().hex
        self.registry.uploads[upload] = bytearray()
        self._answer(202, b"", Location=f"{self.path}{upload}", Range="0-0")

    def do_PATCH(self) -> None:
        match = _UPLOAD.fullmatch(self.path)
        assert match is not None
        upload = self.registry.uploads[match[2]]
        upload += self._body()
        self._answer(202, b"", Location=self.path, Range=f"0-{len(upload) - 1}")

    def do_PUT(self) -> None:
        body = self._body()
        if match := _MANIFEST.fullmatch(self.path):
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            self.registry.manifests[digest] = (self.headers["Content-Type"], body)
            self.registry.tags[f"{match[1]}:{match[2]}"] = digest
            self._answer(201, b"", **{"Docker-Content-Digest": digest})
            return
        match = _UPLOAD.fullmatch(self.path)
        assert match is not None
        blob = bytes(self.registry.uploads.pop(match[2]) + body)
        digest = match[3].replace("%3A", ":")
        assert digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
        self.registry.blobs[digest] = blob
        self._answer(201, b"", **{"Docker-Content-Digest": digest})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _error(self, status: int, code: str) -> None:
        body = json.dumps({"errors": [{"code": code, "message": code.replace("_", " ").lower()}]}).encode()
        self._answer(status, body, **{"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
