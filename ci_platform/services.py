"""What runs beside the server for as long as it does, and what it looks for once."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import anyio

from ci_platform.errors import UnavailableError
from ci_platform.sandboxes import Sandbox

_log = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0


async def kept_up(serve: Callable[[], Awaitable[None]]) -> None:
    """Run a service for ever. Without its database (a full disk) it begins again, with what is stored."""
    while True:
        try:
            await serve()
        except* UnavailableError as group:
            _log.warning("work stops for a moment: %s", group.exceptions[0])
        await anyio.sleep(_PAUSE_SECONDS)


async def swept(sandbox: Sandbox) -> None:
    """Look for what dead platforms have left to a sandbox."""
    # Beside the service: what is swept belongs to platforms that are dead, and Docker may be slow or absent.
    try:
        await sandbox.sweep()
    except UnavailableError as error:
        _log.warning("leftovers of an earlier process could not be looked for: %s", error)
