"""Sparse workspaces: folders of a commit that are wanted on disk, as git's cone mode means them.

A cone holds its folders with all that is in them, and of each folder above one, and of the root, the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ci_platform.errors import InvalidInputError

_MOST_FOLDERS = 1000
_LONGEST = 4096
_MEANS_MORE = frozenset("*?[]\\!#\n\r\0")
"""Characters that git's list of patterns would take for more than themselves."""


@dataclass(frozen=True, slots=True)
class Cone:
    """Folders, sorted, none below another. None at all: the files of the root alone."""

    folders: tuple[str, ...]

    @classmethod
    def of(cls, paths: Any) -> Cone:
        """Return the cone of some folders' paths; InvalidInputError for what is no such list."""
        if not isinstance(paths, Sequence) or isinstance(paths, str | bytes) or len(paths) > _MOST_FOLDERS:
            raise InvalidInputError(
                f"sparse is a list of up to {_MOST_FOLDERS:,} folders such as ['src', 'docs/api'], not {paths!r:.100}"
            )
        found = sorted({_checked(path) for path in paths})
        return cls(tuple(path for path in found if not any(path.startswith(up + "/") for up in found)))

    @property
    def name(self) -> str:
        """A name for it that a file can have."""
        return hashlib.sha256("\n".join(self.folders).encode()).hexdigest()[:16]

    def holds(self, folder: bytes) -> bool:
        """Whether anything below a folder of the commit, by its path, is on disk."""
        path = folder + b"/"
        wanted = [name.encode() + b"/" for name in self.folders]
        return any(path.startswith(name) or name.startswith(path) for name in wanted)

    def patterns(self) -> str:
        """Return git's `info/sparse-checkout`."""
        above = {parent for name in self.folders for parent in _parents(name)}
        lines = ["/*", "!/*/"]
        for name in sorted(above | set(self.folders)):
            lines += [f"/{name}/"] if name in self.folders else [f"/{name}/", f"!/{name}/*/"]
        return "\n".join(lines) + "\n"


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _checked(path: Any) -> str:
    name = path.strip("/") if isinstance(path, str) else ""
    parts = name.split("/")
    if (
        not name
        or len(name) > _LONGEST
        or _MEANS_MORE & set(name)
        or not name.isprintable()
        or any(part in {"", ".", ".."} or part.lower() == ".git" for part in parts)
    ):
        raise InvalidInputError(f"sparse names folders inside of the repository, not {path!r:.100}")
    return name
