"""Backup and restore of the data folder's databases.

The engine's file is copied first, then the platform's: whatever is decided about a run is a row before it is an
instance, so a copy whose rows are a moment newer is what a crash in that moment leaves too, and the next start
makes both agree.
"""

from __future__ import annotations

from pathlib import Path

from ci_platform import data_lock
from ci_platform.errors import InvalidInputError
from ci_platform.settings import Settings
from dynflow.engines.embedded.backup import back_up, copy_database, restore

ENGINE, PLATFORM = "engine.db", "platform.db"


def back_up_folder(settings: Settings, target: Path) -> list[Path]:
    """Copy the databases into a new folder while the platform may run; return the copies.

    Raises InvalidInputError, StorageError; then what was begun is gone.
    """
    if not settings.engine_path.is_file():
        raise InvalidInputError(f"there is no {settings.engine_path}: --data names the folder of a platform")
    try:
        target.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise InvalidInputError(
            f"cannot make the folder {target}: {error.strerror}; name a new one"
        ) from None
    made: list[Path] = []
    try:
        back_up(settings.engine_path, target / ENGINE)
        made.append(target / ENGINE)
        if settings.database_url is None:
            copy_database(settings.data / PLATFORM, target / PLATFORM)
            made.append(target / PLATFORM)
    except BaseException:
        for path in made:
            path.unlink()
        target.rmdir()
        raise
    return made


def restore_folder(settings: Settings, backup: Path) -> list[Path]:
    """Put a backup's databases into a data folder that has none; return them.

    Raises ConflictError while a platform runs there, StorageError where a database is there or the backup is
    damaged; then nothing was restored.
    """
    wanted = [ENGINE] if settings.database_url is not None else [ENGINE, PLATFORM]
    for name in wanted:
        if not (backup / name).is_file():
            raise InvalidInputError(f"{backup} is not a backup: it has no {name}")
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with data_lock.held(settings.data):
        if PLATFORM in wanted:
            copy_database(backup / PLATFORM, settings.data / PLATFORM)
        try:
            restore(backup / ENGINE, settings.engine_path)
        except BaseException:
            if PLATFORM in wanted:
                (settings.data / PLATFORM).unlink()
            raise
    return [settings.data / name for name in wanted]


def back_up_engine(file: Path, target: Path) -> list[Path]:
    """Copy the file of an engine of the library alone; return the copy. Raises StorageError."""
    back_up(file, target)
    return [target]


def restore_engine(backup: Path, file: Path) -> list[Path]:
    """Copy a backup of an engine's file back; return it. Raises StorageError."""
    restore(backup, file)
    return [file]
