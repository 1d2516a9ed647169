"""The platform's database for who only looks: a dry run changes nothing, not even a schema or a log."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio.to_thread

from ci_platform.errors import UnavailableError
from ci_platform.store import Store, file_of

_FILES = ("", "-journal", "-wal")
"""What belongs to a database of SQLite. Where its log is not merged yet, opening it would do that."""


@asynccontextmanager
async def looked_at(url: str) -> AsyncIterator[Store]:
    """Yield a database as it is; of SQLite's a copy, brought to this release's schema.

    Nobody may write meanwhile. Raises UnavailableError where another database has the schema of another release, or
    where there is no room for the copy.
    """
    file = file_of(url)
    with ExitStack() as copies:
        if file is not None:
            copy = Path(copies.enter_context(tempfile.TemporaryDirectory())) / "copy"
            await anyio.to_thread.run_sync(_copy, file, copy)
            url = f"sqlite:///{copy}"
        store = Store(url)
        try:
            await store.open(look_only=file is None)
            yield store
        finally:
            await store.close()


def _copy(database: Path, copy: Path) -> None:
    try:
        for more in _FILES:
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{database}{more}", f"{copy}{more}")
    except OSError as error:
        raise UnavailableError(
            f"the database cannot be copied to {copy.parent} to look at it: {error}"
        ) from None
