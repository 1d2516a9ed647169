"""Which files of a workspace's layers an upload names. They are a tenant's: no link is followed. Blocks.

Every folder is looked at once, whatever the patterns: what is left of each goes along from folder to folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from pathlib import Path

from ci_platform import layer_views
from ci_platform.artifacts.asking import Pattern, Upload
from ci_platform.errors import InvalidInputError, LimitExceededError
from ci_platform.layer_views import ViewEntry

MOST_COMPARED = 5_000_000
"""Names times patterns of one upload: seconds, whatever a workspace is made of."""

MOST_IN_A_FOLDER = 250_000
"""Names: they are in memory together."""

LONGEST_PATH = 1000
"""Characters: beyond it, tools that unpack give up."""

_Places = frozenset[tuple[Pattern, int]]


@dataclass(slots=True)
class Picking:
    """One look through the layers `lowers`, topmost first, for at most `most` entries.

    `alive` is called often, and raises where nobody waits for the answer any more. `used` are patterns that matched.

    Raises InvalidInputError for what cannot be in an artifact, LimitExceededError where there is too much.
    """

    lowers: Sequence[Path]
    upload: Upload
    most: int
    alive: Callable[[], None] = lambda: None
    used: set[Pattern] = field(default_factory=set)
    _compared: int = 0
    _found: int = 0

    def entries(self) -> list[ViewEntry]:
        """Return files, links and empty folders, sorted by path."""
        whole = () in self.upload.patterns.values()
        if whole:
            self.used.add(())
        wanted = _opened((pattern, 0) for pattern in self.upload.patterns.values())
        excluded = _opened((pattern, 0) for pattern in self.upload.excluded)
        return sorted(self._below("", wanted, excluded, whole=whole), key=lambda entry: entry.path)

    def unused(self) -> list[str]:
        """Return the patterns that matched nothing, as they were given."""
        return [text for text, pattern in self.upload.patterns.items() if pattern not in self.used]

    def _below(self, folder: str, wanted: _Places, excluded: _Places, *, whole: bool) -> Iterator[ViewEntry]:
        is_empty = True
        for entry in self._list(folder, len(wanted) + len(excluded)):
            name = entry.name
            if (
                name.lower() == ".git"
            ):  # git's own, of the workspace and of submodules, wherever it is unpacked
                continue
            is_empty = False
            left_out, deeper_out = _matched(excluded, name)
            if left_out:
                continue
            matches, deeper = _matched(wanted, name)
            taken = whole or bool(matches)
            if entry.kind != "folder":
                if taken:
                    self.used |= matches
                    yield self._taken(entry)
            elif taken or deeper:
                self.used |= matches
                yield from self._below(entry.path, deeper, deeper_out, whole=taken)
        if whole and is_empty and folder:
            yield self._taken(ViewEntry(folder, "folder", 0, 0.0, None, self.lowers[0]))

    def _list(self, folder: str, patterns: int) -> list[ViewEntry]:
        self.alive()
        found = layer_views.listing(self.lowers, folder, most=MOST_IN_A_FOLDER)
        self._compared += 1 + len(found) * max(patterns, 1)
        if self._compared > MOST_COMPARED:
            raise LimitExceededError(
                f"the artifact {self.upload.name!r}: too many names would have to be compared with its patterns; "
                "name the folders that have what is to be kept"
            )
        return found

    def _taken(self, entry: ViewEntry) -> ViewEntry:
        self._found += 1
        if self._found > self.most:
            raise LimitExceededError(
                f"the artifact {self.upload.name!r} has more than {self.most:,} files (setting max_artifact_files); "
                "pack them into one, or keep fewer"
            )
        check_path(entry.path)
        if entry.target is not None:
            check_link(entry.path, entry.target)
        return entry


def check_path(path: str) -> None:
    """Raise InvalidInputError for a name that is another one, or none, where it is unpacked."""
    if not _is_plain(path):
        raise InvalidInputError(
            f"{path!r:.200} cannot be in an artifact: names are printable UTF-8 without backslashes, "
            f"and paths at most {LONGEST_PATH:,} characters; exclude= leaves it out"
        )


def check_link(path: str, target: str) -> None:
    """Raise InvalidInputError for a link that leads out of the workspace, or may: `..` comes first, or not at all.

    Its folders are folders, so that these lead to folders of the artifact; what comes after can be links that were
    looked at in the same way.
    """
    parts = [part for part in target.split("/") if part not in {"", "."}]
    up = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    if target.startswith("/") or ".." in parts[up:] or up > path.count("/") or not _is_plain(target):
        raise InvalidInputError(
            f"{path!r:.200} is a link to {target!r:.200}, which leads out of the workspace, or may; "
            "links of an artifact stay in it; exclude= leaves it out"
        )


def _is_plain(text: str) -> bool:
    if not text.isprintable() or "\\" in text or len(text) > LONGEST_PATH:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no text
        return False
    return True


def _opened(places: Iterable[tuple[Pattern, int]]) -> _Places:
    """Return places of patterns, with those after a `**`, which stands for no folder too."""
    found = set[tuple[Pattern, int]]()
    for pattern, first in places:
        for at in range(first, len(pattern)):
            found.add((pattern, at))
            if pattern[at] != "**":
                break
    return frozenset(found)


def _matched(places: _Places, name: str) -> tuple[set[Pattern], _Places]:
    """Return the patterns that a name ends, and the places to go on from in it where it is a folder."""
    ended, further = set[Pattern](), list[tuple[Pattern, int]]()
    for pattern, at in places:
        is_last = at + 1 == len(pattern)
        if pattern[at] == "**":
            further.append((pattern, at))
            if is_last:  # all that is below
                ended.add(pattern)
        elif _fits(pattern[at])(name):
            if is_last:
                ended.add(pattern)
            else:
                further.append((pattern, at + 1))
    return ended, _opened(further)


@lru_cache(maxsize=1024)
def _fits(part: str) -> Callable[[str], object]:
    return re.compile(translate(part)).match
