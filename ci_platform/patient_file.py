"""A file that is appended to, also while its disk is full: then what is written waits in memory."""

from __future__ import annotations

from pathlib import Path

from ci_platform.full_disk import FULL

MOST_WAITING = 1024 * 1024
"""Bytes of one file that wait; beyond that they are dropped, and counted."""


class PatientFile:
    """Appends whole pieces in their order. `lost` counts the bytes that were dropped, `waiting` those not written.

    Errors: OSError, but not for want of room. A piece of which only a part has found room goes on where it stopped.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self.lost = 0

    @property
    def waiting(self) -> int:
        """Bytes that are not in the file yet."""
        return len(self._waiting)

    def write(self, data: bytes) -> bool:
        """Append a piece; False where it is dropped, since too much waits already."""
        if not self._waiting:
            written = self._put(data)
            if written < len(data):
                self._waiting += data[written:]
            return True
        self.flush()
        if len(self._waiting) + len(data) > MOST_WAITING:
            self.lost += len(data)
            return False
        self._waiting += data
        self.flush()
        return True

    def flush(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        if self._waiting:
            del self._waiting[: self._put(self._waiting)]
        return not self._waiting

    def _put(self, data: bytes | bytearray) -> int:
        """Write as much as there is room for; return how much that was."""
        done = 0
        view = memoryview(data)
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            if error.errno not in FULL:
                raise
        finally:
            view.release()
        return done

    def close(self) -> None:
        """Close the file; what waits still is lost."""
        self.flush()
        self._file.close()
