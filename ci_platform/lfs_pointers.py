"""Pointers: the small files that git has in the place of those that LFS keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass

LARGEST = 1023
"""Bytes of a pointer; the format says fewer than 1,024."""

_FIRST = b"version https://git-lfs.github.com/spec/v1\n"
_OID = re.compile(rb"^oid sha256:([0-9a-f]{64})$", re.MULTILINE)
_SIZE = re.compile(rb"^size (0|[1-9][0-9]{0,17})$", re.MULTILINE)
_LINE = re.compile(rb"[a-z0-9.-]+ [^\n]*")


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a pointer names: `oid` is the SHA-256 of the file in hexadecimal, `size` its bytes."""

    oid: str
    size: int


@dataclass(frozen=True, slots=True)
class Pointed:
    """A file of a commit that LFS keeps. `blob` is the id of its pointer in git, as bytes."""

    path: bytes
    blob: bytes
    executable: bool
    pointer: Pointer


def parse(content: bytes) -> Pointer | None:
    """Return what a file points at; None where it is no pointer but a file like others."""
    if len(content) > LARGEST or not content.startswith(_FIRST):
        return None
    lines = content[len(_FIRST) :].removesuffix(b"\n").split(b"\n")
    oid, size = _OID.findall(content), _SIZE.findall(content)
    if len(oid) != 1 or len(size) != 1 or not all(_LINE.fullmatch(line) for line in lines):
        return None
    return Pointer(oid[0].decode(), int(size[0]))
