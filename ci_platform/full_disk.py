"""A disk that is full is our trouble, not the tenant's, and it passes: said so wherever we write files."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from ci_platform.errors import UnavailableError

T = TypeVar("T")

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What Linux says where there is no room: on the disk, or for this user."""


def told(function: Callable[[], T]) -> Callable[[], T]:
    """Return a function that does the same, and raises UnavailableError where it found no room."""

    def telling() -> T:
        try:
            return function()
        except OSError as error:
            if error.errno not in FULL:
                raise
            place = f" ({error.filename})" if error.filename else ""
            raise UnavailableError(f"the platform's disk is full{place}: {error.strerror}") from error

    return telling
