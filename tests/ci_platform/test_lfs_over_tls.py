"""LFS from servers with certificates, through the gateway: looked at, and bound to their names."""

from __future__ import annotations

import hashlib
import io
import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import anyio.to_thread
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ci_platform.errors import FailedError, UnavailableError
from ci_platform.guarded import Guard
from ci_platform.lfs_client import LfsClient
from ci_platform.lfs_pointers import Pointer

CONTENT = b"kept" * 50_000
POINTER = Pointer(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    location = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        href = f"https://{self.headers['Host']}/kept"
        said = {"objects": [{"oid": POINTER.oid, "actions": {"download": {"href": href}}}]}
        self._answer(json.dumps(said).encode())

    def do_GET(self) -> None:
        if self.location:
            self.send_response(302)
            self.send_header("Location", self.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._answer(CONTENT)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Key and certificate of 127.0.0.1, signed by itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    signed = made.add_extension(names, critical=False).sign(key, hashes.SHA256())
    path = tmp_path / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def port(certificate: Path) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    # Who does not trust the certificate breaks off.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


async def fetched(port: int, host: str = "127.0.0.1") -> bytes:
    async with Guard([f"{host}:{port}"]).open(trusted=True) as way:
        client = LfsClient(
            f"https://{host}:{port}/x/info/lfs", ("ada", "token"), way.port, time.monotonic() + 30
        )

        def get() -> bytes:
            into = io.BytesIO()
            client.get(client.places([POINTER])[POINTER.oid], POINTER, into)
            return into.getvalue()

        return await anyio.to_thread.run_sync(get)


async def test_a_server_shows_a_certificate_of_its_name(
    port: int, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await fetched(port)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert await fetched(port) == CONTENT
    with pytest.raises(UnavailableError, match=r"CERTIFICATE_VERIFY_FAILED.*localhost"):
        await fetched(port, "localhost")


async def test_nothing_is_sent_on_from_https_to_http(
    port: int, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(Handler, "location", f"http://127.0.0.1:{port}/kept")
    with pytest.raises(FailedError, match="which is not https"):
        await fetched(port)
