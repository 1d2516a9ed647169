"""Ports that are no plain Temporal server: TLS in front of one, one that refuses, a web server."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Handle = Callable[[socket.socket], None]
_PREFACE_LENGTH = 24
_SETTINGS, _ACK, _HEADERS, _END = 4, 1, 1, 0x5
_REQUEST_END = 0x1


@contextmanager
def listening(handle: Handle, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run a server on loopback, a thread for each connection; its address."""
    opened: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def handled(connection: socket.socket, spare: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            handle(connection if tls is None else tls.wrap_socket(connection, server_side=True))
        with contextlib.suppress(OSError):
            spare.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                opened.append(connection.dup())
                threads.append(threading.Thread(target=handled, args=(connection, opened[-1])))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for connection in opened:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            for thread in threads:
                thread.join()


def passing_on(address: str) -> Handle:
    """What passes everything on to another server."""
    host, _, port = address.rpartition(":")

    def handle(theirs: socket.socket) -> None:
        with socket.create_connection((host, int(port))) as ours, theirs:
            other = {theirs: ours, ours: theirs}
            while True:
                has_more = isinstance(theirs, ssl.SSLSocket) and theirs.pending() > 0
                for ready in [theirs] if has_more else select.select([theirs, ours], [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    other[ready].sendall(data)

    return handle


def refusing(status: int, message: str) -> Handle:
    """A gRPC server that answers each call with this status."""

    def handle(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            stream.read(_PREFACE_LENGTH)
            connection.sendall(_frame(_SETTINGS, 0, 0, b""))
            while head := stream.read(9):
                kind, flags, number = head[3], head[4], int.from_bytes(head[5:], "big")
                stream.read(int.from_bytes(head[:3], "big"))
                if kind == _SETTINGS and not flags & _ACK:
                    connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
                elif number and flags & _REQUEST_END:
                    # 0x88 is `:status 200` in the table that HTTP/2 begins with.
                    fields = {
                        "content-type": "application/grpc",
                        "grpc-status": str(status),
                        "grpc-message": message,
                    }
                    block = b"\x88" + b"".join(_field(*item) for item in fields.items())
                    connection.sendall(_frame(_HEADERS, _END, number, block))

    return handle


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def _field(name: str, value: str) -> bytes:
    """Return a header field that is in no table and not compressed."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def web(connection: socket.socket) -> None:
    """A web server that knows no HTTP/2."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Length: 0\r\n\r\n")


@dataclass(frozen=True)
class Authority:
    """A certificate authority of a test: its own certificate's file, and what it signs in `folder`."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def of(cls, folder: Path) -> Authority:
        """Make one that is called as its folder is."""
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(folder.name, key.public_key(), folder.name, key, is_authority=True)
        (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        return cls(folder, key, made)

    @property
    def file(self) -> Path:
        """The authority's own certificate."""
        return self.folder / "ca.pem"

    def sign(self, name: str) -> tuple[Path, Path]:
        """Make a certificate for a name and 127.0.0.1; returns its file and that of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(name, key.public_key(), self.folder.name, self.key)
        certificate, secret = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, secret

    def server_context(self, *, asks_clients: bool = False) -> ssl.SSLContext:
        """Return what a server speaks TLS with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.sign("server"))
        context.set_alpn_protocols(["h2"])
        if asks_clients:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.file)
        return context


def _certificate(
    name: str,
    public: ec.EllipticCurvePublicKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool = False,
) -> x509.Certificate:
    now = datetime.now(UTC)
    names = [x509.DNSName(name), x509.IPAddress(ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(signer, hashes.SHA256())
    )
