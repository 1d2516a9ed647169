"""Keep secrets out of what commands print: every form of a secret becomes `***`, across any cut into pieces.

Redaction happens at the producer, before a byte reaches a log. A command that wants to leak can encode a secret
in ways nobody lists; this guards against accidents, the network policy against intent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

MASK = b"***"

SHORTEST = 4
"""Shorter values are not masked: hiding every `e` makes a log unreadable and tells the secret by its holes."""

_SHORTEST_BASE64 = 6
"""Characters of an encoded form that are worth hiding: fewer occur in any text by chance."""

Interval = tuple[int, int]


def warnings(secrets: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each (name, value) that is too short to be masked."""
    return [
        f"secret {name!r} has fewer than {SHORTEST} characters and is not masked in logs"
        for name, value in secrets
        if len(value.strip()) < SHORTEST
    ]


def forms(secret: str) -> frozenset[bytes]:
    """Return every form of one secret that is masked.

    Its lines and, if it is JSON, the texts inside; the whole and these texts also as JSON, URLs and base64
    write them. A base64 form is masked at any position of a longer text, wrapped or not.
    """
    stripped = secret.strip()
    whole = {text.strip() for text in (stripped, *_leaves_of(stripped)) if len(text.strip()) >= SHORTEST}
    lines = {line.strip() for text in whole for line in text.splitlines() if len(line.strip()) >= SHORTEST}
    return frozenset([form for text in whole for form in _encodings(text)] + [_bytes(line) for line in lines])


class Redactor:
    """Masks secrets in a stream of bytes. Feed pieces in order, then `flush`.

    What may be the beginning of a secret is held back until the next piece decides.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._needles = sorted({form for secret in secrets for form in forms(secret)}, key=len, reverse=True)
        self._held = b""
        self._masked = 0
        """How many bytes of `_held` belong to a secret that is masked in the output already."""

    def feed(self, piece: bytes) -> bytes:
        """Return what is certain by now, masked."""
        if not self._needles:
            return piece
        data = self._held + piece
        found = self._find(data)
        keep = self._undecided(data)
        done = self._mask(data, found, keep)
        ends = [self._masked, *(end for start, end in found if start < keep)]
        self._masked = max(0, max(ends) - keep)
        self._held = data[keep:]
        return done

    def flush(self) -> bytes:
        """Return what was held back: the stream is at its end."""
        done = self._mask(self._held, self._find(self._held), len(self._held))
        self._held, self._masked = b"", 0
        return done

    def _find(self, data: bytes) -> list[Interval]:
        """Return where secrets are, overlaps included, in order of their beginning."""
        found = []
        for needle in self._needles:
            at = data.find(needle)
            while at >= 0:
                found.append((at, at + len(needle)))
                at = data.find(needle, at + 1)
        return sorted(found)

    def _undecided(self, data: bytes) -> int:
        """Return where the longest tail begins that a secret could begin with."""
        keep = len(data)
        for needle in self._needles:
            first = max(0, len(data) - len(needle) + 1)
            at = data.find(needle[:SHORTEST], first)
            while 0 <= at < keep and not needle.startswith(data[at:]):
                at = data.find(needle[:SHORTEST], at + 1)
            last = range(max(first, len(data) - SHORTEST + 1), len(data))
            keep = min(
                [keep, *([at] if at >= 0 else []), *(at for at in last if needle.startswith(data[at:]))]
            )
        return keep

    def _mask(self, data: bytes, found: list[Interval], end: int) -> bytes:
        """Return `data[:end]` with each run of overlapping secrets replaced once."""
        pieces: list[bytes] = []
        at = self._masked
        for start, stop in found:
            if start >= end:
                break
            if start >= at:
                pieces += [data[at:start], MASK]
            at = max(at, stop)
        return b"".join([*pieces, data[at:end]])


def redact_text(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with secrets masked, for messages that are at hand as a whole."""
    redactor = Redactor(secrets)
    raw = _bytes(text)
    return (redactor.feed(raw) + redactor.flush()).decode("utf-8", "replace")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _leaves_of(secret: str) -> list[str]:
    try:
        return list(_leaves(json.loads(secret)))
    except (ValueError, RecursionError):
        # Not JSON, as most secrets.
        return []


def _leaves(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for inner in value.values():
                yield from _leaves(inner)
        case list():
            for inner in value:
                yield from _leaves(inner)
        case str():
            yield value
        case int() | float() if not isinstance(value, bool):
            yield str(value)


def _encodings(text: str) -> Iterator[bytes]:
    raw = _bytes(text)
    yield raw
    yield raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    yield from (_bytes(json.dumps(text, ensure_ascii=ascii_only)[1:-1]) for ascii_only in (True, False))
    yield from (form.encode() for form in (quote(raw), quote(raw, safe=""), quote_plus(raw)))
    yield from _base64_forms(raw)


def _base64_forms(raw: bytes) -> Iterator[bytes]:
    """Yield the characters that `raw` alone decides, for each of the three positions in a longer text."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw)
        core = encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        lines = [core, *_wrapped(core)] if before == 0 else [core]
        for line in lines:
            if len(line) >= _SHORTEST_BASE64:
                yield line
                yield line.translate(bytes.maketrans(b"+/", b"-_"))


def _wrapped(encoded: bytes) -> Iterator[bytes]:
    """Yield the lines that `base64` (76 characters) and PEM (64) make of a long text."""
    for width in (64, 76):
        if len(encoded) > width:
            yield from (encoded[at : at + width] for at in range(0, len(encoded), width))
