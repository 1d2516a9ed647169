"""Copies of all databases below a folder of facets, while they are used, and back.

Each copy is one moment of its database; two databases are copied one after the other. What a tenant stored is opened
in a confined process here, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynflow.errors import FacetUnavailableError
from dynflow.facets import FacetLimits
from dynflow.facets.process import WorkerProcess

# As `Facets` names them: whatever else lies there is not a tenant's.
_FILE = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}/[a-z0-9][a-z0-9_-]{0,62}\.db")


@dataclass(frozen=True, slots=True)
class FacetCopies:
    """What was copied, and what could not be: `left_out` says of each file why."""

    made: list[Path]
    left_out: dict[Path, str]


async def copy_facets(source: Path, target: Path) -> FacetCopies:
    """Copy the databases below `source`, which may be in use, to the new folder `target`. It is backup and restore.

    A damaged one is left out, and so is one that is deleted meanwhile, which is not told. Raises FacetUnavailableError
    where `target` is not new, or a disk does not do its part; then what was begun is left in `target`.
    """
    _make(target)
    files = list(_files(source))
    largest = max((source / file).stat().st_size for file in files) if files else 0
    limits = {**FacetLimits().plain(), "size": max(largest * 2, FacetLimits().size)}
    worker = await WorkerProcess.start(source, limits, also=target)
    copies = FacetCopies([], {})
    try:
        for file in files:
            await _copy(worker, source, target, file, copies)
    finally:
        await worker.end()
    return copies


def _make(target: Path) -> None:
    try:
        target.mkdir(mode=0o700, parents=True)
    except OSError as error:
        why = f"cannot make the folder {target}: {error.strerror}; name a new one"
        raise FacetUnavailableError(why) from None


async def _copy(worker: WorkerProcess, source: Path, target: Path, file: str, copies: FacetCopies) -> None:
    request = {"do": "copy", "name": "", "path": str(source / file), "target": str(target / file)}
    answer = await worker.ask(request)
    if "ok" in answer:
        if answer["ok"]:
            copies.made.append(target / file)
        return
    kind, *details = answer["error"]
    if kind != "damaged":
        raise FacetUnavailableError(f"{source / file} could not be copied: {' '.join(map(str, details))}")
    copies.left_out[source / file] = f"is damaged: {details[0]}"


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("??/*/*.db")):
        file = path.relative_to(folder).as_posix()
        if _FILE.fullmatch(file) and path.is_file() and not path.is_symlink():
            yield file
