"""The door to pipelines' code: its isolates are confined, or the platform says what is missing and does not start."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio.to_thread

from ci_platform.errors import UnavailableError
from ci_platform.settings import Settings
from dynflow.errors import IsolateError
from dynflow.isolates import ProcessLoader, describe_walls
from dynflow.isolates.confinement import ESSENTIAL, WALLS

FLAG = "--unsafe-no-isolation"

_log = logging.getLogger(__name__)


@asynccontextmanager
async def opened(loader: ProcessLoader, settings: Settings) -> AsyncIterator[ProcessLoader]:
    """Keep `loader` open as long as the block runs.

    Raises UnavailableError, which names each essential wall that this machine lacks, unless the settings say to go
    on without; then a warning does.
    """
    try:
        await loader.__aenter__()
    except IsolateError as error:
        raise UnavailableError(await _refusal(error)) from error
    try:
        if settings.unsafe_no_isolation:
            _log.warning("%s", warning(missing_walls(loader.walls)))
        yield loader
    finally:
        await loader.__aexit__(None, None, None)


def missing_walls(standing: tuple[str, ...]) -> list[str]:
    """Return the essential walls that are not among `standing`."""
    return [name for name in WALLS if name in ESSENTIAL and name not in standing]


def warning(missing: list[str]) -> str:
    """Return what to say as long as the flag is given: what it costs here, or that it is not needed."""
    if not missing:
        return (
            f"{FLAG} is on, and not needed: all essential walls stand here. Take it away before they do not"
        )
    return (
        f"{FLAG} is on: pipelines' code runs WITHOUT the essential walls {', '.join(missing)}, and may read and change "
        "what this user can. Let only people in whom you trust with that"
    )


async def _refusal(error: IsolateError) -> str:
    try:
        found = await anyio.to_thread.run_sync(describe_walls)
    except (IsolateError, OSError, subprocess.SubprocessError):
        found = {}
    return (
        f"pipelines' code cannot be confined on this machine, so nothing was started. {_missing(found) or error} "
        f"What this machine has shows `dynflow doctor`. Where every pipeline is trusted with all that this user can "
        f"do, {FLAG} goes on without"
    )


def _missing(found: Mapping[str, str]) -> str:
    lacking = [
        f"{name} ({found[name].removeprefix('missing: ')})"
        for name in WALLS
        if name in ESSENTIAL and found.get(name, "up").startswith("missing")
    ]
    return f"Essential walls that are missing: {'; '.join(lacking)}." if lacking else ""
