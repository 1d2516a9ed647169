"""Look at a port that could not be used as a Temporal server's, and say what is there instead."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

_LOOK_SECONDS = 1.5
# How each connection of HTTP/2 begins, and with that each of gRPC: a fixed text, then a frame of (no) settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_TLS_ALERT = b"\x15\x03"
_SETTINGS_FRAME = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """What is wrong with a port. `is_passing`: it may be right later, with nothing changed."""

    problem: str
    is_passing: bool = False


def look(host: str, port: int, tls: ssl.SSLContext | None, server_name: str | None) -> Seen | None:
    """Return what is wrong with a port; None where nothing is seen to be. Blocks, for seconds at the most."""
    try:
        with socket.create_connection((host, port), timeout=_LOOK_SECONDS) as plain:
            if tls is None:
                return _look_plain(plain)
            with tls.wrap_socket(plain, server_hostname=server_name or host) as encrypted:
                return _look_encrypted(encrypted)
    except TimeoutError:
        return Seen("nothing answers there; a firewall may be between, or it is overloaded", is_passing=True)
    except socket.gaierror as error:
        return Seen(
            f"the name {host!r} has no address ({error.strerror}): look at the address", is_passing=True
        )
    except ConnectionRefusedError:
        return Seen("nobody listens there: start it, or look at the address", is_passing=True)
    except ssl.SSLError as error:
        return _tls_problem(error)
    except OSError as error:
        return Seen(
            f"{error.strerror or error}: look at the address and at the network between", is_passing=True
        )


def _look_plain(connection: socket.socket) -> Seen | None:
    try:
        connection.sendall(_PREFACE)
        answer = connection.recv(9)
    except ConnectionError:
        answer = b""
    if answer.startswith(_TLS_ALERT):
        return Seen("it wants TLS, and TLS is off here: turn it on")
    if not answer:
        return Seen(
            "it ends the connection without a word: it may want TLS, which is off here", is_passing=True
        )
    return _what_answers(answer)


def _look_encrypted(connection: ssl.SSLSocket) -> Seen | None:
    try:
        connection.sendall(_PREFACE)
        # With TLS 1.3 what a server says of the client's certificate comes after the handshake.
        answer = connection.recv(9)
    except ConnectionError:
        answer = b""
    if not answer:
        return Seen("it ends the connection after the handshake: it may want another client certificate")
    return _what_answers(answer)


def _what_answers(answer: bytes) -> Seen | None:
    if answer.startswith(b"HTTP/"):
        return Seen("a web server answers there and not Temporal's frontend, whose port is 7233 by default")
    if len(answer) > 3 and answer[3] == _SETTINGS_FRAME:
        return None
    return Seen("what answers there does not speak gRPC: look at the address")


def _tls_problem(error: ssl.SSLError) -> Seen:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Seen(
            f"its certificate is not to be trusted: {error.verify_message}. Give the authority that signed it, and the "
            "name in it where that is not the host's"
        )
    reason = (error.reason or "").replace("_", " ").lower()
    if "certificate required" in reason or "handshake failure" in reason:
        return Seen("it wants a client certificate: give one with its key")
    if "certificate" in reason or "unknown ca" in reason:
        return Seen(f"it does not take the client certificate: {reason}")
    if reason in {"wrong version number", "record layer failure"}:
        return Seen("it does not speak TLS, and TLS is on here: turn it off, or look at the address")
    return Seen(f"TLS fails: {reason or error}")
