"""One platform per data folder: what a second one would sweep at its start is the first one's work."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ci_platform.errors import ConflictError, InvalidInputError

LOCK_FILE = "lock"

# A platform that was killed a moment ago lets go when the kernel has ended it.
_TRIES, _PAUSE_SECONDS = 20, 0.05


@contextmanager
def held(folder: Path, *, look_only: bool = False) -> Generator[None]:
    """Hold the folder as long as the block runs; the kernel lets go if the process dies. Blocks for a second.

    Raises ConflictError while another process has it, InvalidInputError where nothing can be written there. With
    `look_only` nothing is: where there is no lock, no platform has ever been in the folder.
    """
    path = folder / LOCK_FILE
    if look_only and folder.is_dir() and not path.exists():
        yield
        return
    try:
        flags = os.O_RDONLY if look_only else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInputError(f"cannot write to the data folder {folder}: {error.strerror}") from None
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
        else:
            return
    raise ConflictError(
        f"the data folder {folder} is in use by another dynflow process: "
        "stop that one, or choose another folder with --data"
    )
