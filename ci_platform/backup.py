"""Backup and restore of the data folder's databases.

The engine's file is copied first, then the platform's: whatever is decided about a run is a row before it is an
instance, so a copy whose rows are a moment newer is what a crash in that moment leaves too, and the next start
makes both agree. Tenants' databases come last: a step whose SQL is newer than its instance is one that was cut off,
and such a step is done again.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from ci_platform import data_lock
from ci_platform.errors import InvalidInputError
from ci_platform.settings import Settings
from dynflow.engines.embedded.backup import back_up, copy_database, restore
from dynflow.errors import FacetUnavailableError, StorageError
from dynflow.facets.backup import copy_facets

ENGINE, PLATFORM, FACETS = "engine.db", "platform.db", "facets"


@dataclass(frozen=True, slots=True)
class Copies:
    """What was copied, and the tenants' databases that could not be, each with the reason.

    `elsewhere` says what is not in the data folder, and has to be copied with the means of where it is.
    """

    made: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)


def back_up_folder(settings: Settings, target: Path) -> Copies:
    """Copy the databases into a new folder while the platform may run.

    A tenant's database that is damaged is left out. Raises InvalidInputError, StorageError; then there is no copy.
    """
    names = _databases(settings)
    first = settings.data / names[0] if names else settings.data
    if not first.exists():
        raise InvalidInputError(f"there is no {first}: --data names the folder of a platform")
    try:
        target.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise InvalidInputError(
            f"cannot make the folder {target}: {error.strerror}; name a new one"
        ) from None
    copies = Copies(elsewhere=_elsewhere(settings))
    made = copies.made
    try:
        for name in names:
            copy = back_up if name == ENGINE else copy_database
            copy(settings.data / name, target / name)
            made.append(target / name)
        if settings.facets_path.is_dir():
            found = copy_all_facets(settings.facets_path, target / FACETS)
            made += found.made
            copies.left_out.update(found.left_out)
    except BaseException:
        shutil.rmtree(target)
        raise
    return copies


def restore_folder(settings: Settings, backup: Path) -> Copies:
    """Put a backup's databases into a data folder that has none.

    Raises ConflictError while a platform runs there, StorageError where a database is there or the backup is
    damaged; then nothing was restored.
    """
    wanted = _databases(settings)
    for name in wanted:
        if not (backup / name).is_file():
            raise InvalidInputError(f"{backup} is not a backup: it has no {name}")
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = [settings.data / name for name in wanted]
    with data_lock.held(settings.data), contextlib.ExitStack() as undo:
        if (backup / FACETS).is_dir():
            found = restore_facets(backup / FACETS, settings.facets_path)
            undo.callback(shutil.rmtree, settings.facets_path)
            made += found.made
        if PLATFORM in wanted:
            copy_database(backup / PLATFORM, settings.data / PLATFORM)
            undo.callback((settings.data / PLATFORM).unlink)
        if ENGINE in wanted:
            restore(backup / ENGINE, settings.engine_path)
        undo.pop_all()
    return Copies(made, elsewhere=_elsewhere(settings))


def _databases(settings: Settings) -> list[str]:
    """Return the files of the data folder that a platform with these settings has, in the order of a backup."""
    engine = [ENGINE] if settings.engine == "embedded" else []
    return engine + ([PLATFORM] if settings.database_url is None else [])


def _elsewhere(settings: Settings) -> list[str]:
    found = []
    if settings.engine == "temporal":
        found.append(
            f"runs are in the namespace {settings.temporal_namespace!r} of the Temporal server at "
            f"{settings.temporal_address}, and backed up with its database"
        )
    if settings.database_url is not None:
        found.append("the platform's tables are in the database that database_url names, and backed up there")
    return found


def back_up_engine(file: Path, target: Path) -> Copies:
    """Copy the file of an engine of the library alone. Raises StorageError."""
    back_up(file, target)
    return Copies([target])


def restore_engine(backup: Path, file: Path) -> Copies:
    """Copy a backup of an engine's file back. Raises StorageError."""
    restore(backup, file)
    return Copies([file])


def restore_facets(backup: Path, folder: Path) -> Copies:
    """Copy a backup of tenants' databases to a new folder. Raises StorageError, also where one of them is damaged."""
    copies = copy_all_facets(backup, folder)
    for file, why in copies.left_out.items():
        shutil.rmtree(folder)
        raise StorageError(f"{file} {why}")
    return copies


def copy_all_facets(source: Path, target: Path) -> Copies:
    """Copy the tenants' databases of a folder, in use or not, to a new one. Raises StorageError; then it is gone."""
    is_new = not target.exists()
    try:
        found = anyio.run(copy_facets, source, target)
    except BaseException as error:
        if is_new:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, FacetUnavailableError):
            raise StorageError(str(error)) from None
        raise
    return Copies(found.made, found.left_out)
