"""Values that are too large to travel with an instance: kept aside, and referred to.

An encoded value is JSON text, which never begins with `@`; a reference does: `@<bytes>:<key>`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

_MARK = "@"
# Values of more bytes are kept aside; a shelf's parts have at most so many.
_INLINE = 32_000
_PART = 1_000_000


def size_of(value: str | None) -> int:
    """Return how many bytes an encoded value has, or what it refers to."""
    if value is None:
        return 0
    return int(value[1 : value.index(":")]) if value.startswith(_MARK) else len(value)


def is_reference(value: str | None) -> bool:
    """Whether this refers to a value that is kept aside."""
    return value is not None and value.startswith(_MARK)


def is_inline(value: bytes | None) -> bool:
    """Whether an encoded value travels as it is: `Aside.put` has nothing to await then."""
    return value is None or len(value) <= _INLINE


class Blobs(ABC):
    """Where large values are kept. Every worker and every caller of an engine must reach the same place.

    *Idempotency*: putting the same key again with the same data changes nothing. *Errors*: StorageError.
    When `put` returns, the data is durable.
    """

    @abstractmethod
    async def put(self, key: str, data: bytes) -> None:
        """Keep `data` under a key of `[A-Za-z0-9/_-]`, which names its content."""

    @abstractmethod
    async def get(self, key: str) -> bytes:
        """Return what is kept."""

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Forget a key; no error where there is none."""


class FolderBlobs(Blobs):
    """Blobs as files in a folder that all machines share, or on the one machine there is."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    async def put(self, key: str, data: bytes) -> None:
        """Write the file, and its folder's entry, to the disk."""
        await asyncio.to_thread(self._put, self._folder / key, data)

    async def get(self, key: str) -> bytes:
        """Read the file."""
        return await asyncio.to_thread((self._folder / key).read_bytes)

    async def delete(self, key: str) -> None:
        """Remove the file."""
        await asyncio.to_thread((self._folder / key).unlink, missing_ok=True)

    @staticmethod
    def _put(path: Path, data: bytes) -> None:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Aside:
    """Puts an instance's large values aside and brings them back."""

    def __init__(self, blobs: Blobs, prefix: str) -> None:
        self._blobs, self._prefix = blobs, prefix

    async def put(self, value: bytes | None) -> str | None:
        """Return the value as entries have it: itself, or a reference to it once it is kept."""
        if value is None:
            return None
        if is_inline(value):
            return value.decode()
        return await self.keep(value)

    async def keep(self, data: bytes) -> str:
        """Keep `data`, however small; returns the reference."""
        key = f"{self._prefix}/{hashlib.sha256(data).hexdigest()[:40]}"
        await self._blobs.put(key, data)
        return f"{_MARK}{len(data)}:{key}"

    async def shelve(self, text: str) -> list[str]:
        """Keep a long text; returns the references to its parts."""
        packed = zlib.compress(text.encode())
        return [await self.keep(packed[at : at + _PART]) for at in range(0, len(packed), _PART)]

    async def get(self, value: str | None) -> bytes | None:
        """Return a value that may be a reference."""
        if value is None:
            return None
        return await self._blobs.get(value.partition(":")[2]) if value.startswith(_MARK) else value.encode()

    async def delete(self, references: list[str]) -> None:
        """Forget what these refer to."""
        for reference in references:
            await self._blobs.delete(reference.partition(":")[2])
