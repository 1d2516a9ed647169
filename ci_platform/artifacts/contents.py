"""What is in an artifact: its list of files, in a form that is the same for the same files. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal

from ci_platform.errors import NotFoundError, UnavailableError

MOST_LISTED = 10_000
"""Entries of one folder that are listed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of an artifact, relative and plain.

    `content` is the SHA-256 of a file, in hexadecimal; `target` is where a link leads. `mode` has the nine bits of
    permissions; `crc` is what zip asks for. Folders are there where they are empty.
    """

    path: str
    kind: Literal["file", "symlink", "folder"]
    mode: int = 0o644
    size: int = 0
    content: str = ""
    crc: int = 0
    target: str = ""

    def as_line(self) -> bytes:
        """Return the entry as a line of JSON."""
        facts = [self.path, self.kind, self.mode, self.size, self.content, self.crc, self.target]
        return json.dumps(facts, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def write(entries: Iterable[Entry], output: IO[bytes]) -> str:
    """Write the list of an artifact's entries, which are sorted; returns the artifact's digest."""
    digest = hashlib.sha256()
    for entry in entries:
        line = entry.as_line()
        digest.update(line)
        output.write(line)
    return f"sha256:{digest.hexdigest()}"


def read(lines: IO[bytes], digest: str) -> list[Entry]:
    """Return the entries of a list. Raises UnavailableError where it is not what it was."""
    text = lines.read()
    if f"sha256:{hashlib.sha256(text).hexdigest()}" != digest:
        raise UnavailableError("the list of the artifact's files is damaged on the platform's disk")
    return [Entry(*json.loads(line)) for line in text.splitlines()]


@dataclass(frozen=True, slots=True)
class Listed:
    """One name in a folder of an artifact. `size` in bytes of a file, `digest` its own; `target` of a link."""

    name: str
    kind: Literal["file", "script", "symlink", "folder"]
    size: int = 0
    digest: str | None = None
    target: str | None = None


def listing(entries: Sequence[Entry], folder: str) -> list[Listed]:
    """Return what a folder of an artifact holds, up to 10,000 names; NotFoundError where there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    found = dict[str, Listed]()
    is_there = not folder
    for entry in entries:
        if entry.path == folder and entry.kind == "folder":
            is_there = True
        if not entry.path.startswith(prefix) or len(found) >= MOST_LISTED:
            continue
        name, slash, _ = entry.path.removeprefix(prefix).partition("/")
        found.setdefault(name, Listed(name, "folder") if slash else _listed(name, entry))
        is_there = True
    if not is_there:
        raise NotFoundError(f"there is no folder {folder[:200]!r} in this artifact")
    return sorted(found.values(), key=lambda each: each.name)


def _listed(name: str, entry: Entry) -> Listed:
    if entry.kind == "file":
        is_script = bool(entry.mode & 0o100)
        return Listed(name, "script" if is_script else "file", entry.size, f"sha256:{entry.content}")
    return Listed(name, entry.kind, target=entry.target or None)


def file_at(entries: Iterable[Entry], path: str) -> Entry:
    """Return the file at a path. Raises NotFoundError, also for links: they lead somewhere else."""
    for entry in entries:
        if entry.path == path and entry.kind == "file":
            return entry
    raise NotFoundError(f"there is no file {path[:200]!r} in this artifact")


def files_of(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the files."""
    return (entry for entry in entries if entry.kind == "file")
