"""Parts of a file that HTTP asks for (RFC 9110, section 14). Pure."""

from __future__ import annotations

import re
from typing import Final

_ONE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)

NOT_SATISFIABLE: Final = (0, 0)
"""There is nothing of what was asked for."""


def range_of(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the first byte and the one after the last, of a file of `size`; None where the whole file is to be sent.

    That is so of what is no range of bytes, or of several: RFC 9110 lets a server send all of it then.
    """
    found = _ONE.fullmatch((header or "").replace(" ", ""))
    if found is None or found[1] == found[2] == "":
        return None
    if not found[1]:  # the last so many bytes
        start, end = max(0, size - int(found[2])), size
        return (start, end) if start < end else NOT_SATISFIABLE
    start = int(found[1])
    end = size if not found[2] else min(int(found[2]) + 1, size)
    if found[2] and int(found[2]) < start:
        return None
    return (start, end) if start < size else NOT_SATISFIABLE
