"""Keys of caches that follow from files: `{hash_files:requirements*.txt|setup.cfg}`, put in when a command begins.

The files are those of the workspace's layers, which nobody writes to any more; links are not followed. A digest is
over names and contents of all files that match, in the order of their names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path

from ci_platform import layer_views, layers
from ci_platform.caches.specs import DEEPEST, LONGEST_KEY
from ci_platform.errors import CacheInvalidError, LimitExceededError, NotFoundError
from ci_platform.layer_views import ViewEntry

MOST_PATTERNS, MOST_LOOKED_AT, MOST_FILES = 20, 100_000, 1000
"""Of one call; names of files and folders that are compared with one call's patterns; files that match them."""

LARGEST = 256 * 1024 * 1024
"""Bytes of all files that match."""

_CALL = re.compile(r"\{hash_files:([^{}]*)\}")
_PIECE = 1 << 20
_DIGITS = 32


class KeyMaker:
    """Puts digests in for files, each call once. `lowers`: the layers of the workspace, topmost first. Blocks."""

    def __init__(self, lowers: Sequence[Path]) -> None:
        self._lowers = lowers
        self._known: dict[str, str] = {}

    def __call__(self, template: str) -> str:
        """Return the key. Raises CacheInvalidError, LimitExceededError."""
        if re.search(r"[{}]", _CALL.sub("", template)):
            raise CacheInvalidError(
                f"cache: {template!r:.200} has braces that are not of hash_files(…), which a key may not have"
            )
        key = _CALL.sub(lambda call: self._digest(call[1]), template)
        if len(key) > LONGEST_KEY:
            raise CacheInvalidError(f"cache: the key {key!r:.100}… is longer than {LONGEST_KEY} characters")
        return key

    def _digest(self, patterns: str) -> str:
        if patterns not in self._known:
            self._known[patterns] = self._over(patterns.split("|"))
        return self._known[patterns]

    def _over(self, patterns: list[str]) -> str:
        if len(patterns) > MOST_PATTERNS:
            raise CacheInvalidError(f"hash_files takes at most {MOST_PATTERNS} patterns, not {len(patterns)}")
        search = _Search(self._lowers)
        found = {entry.path: entry for pattern in patterns for entry in search.files(_parts(pattern))}
        shown = ", ".join(map(repr, patterns))
        if not found:
            raise CacheInvalidError(f"hash_files({shown:.300}): no file of the workspace matches")
        if len(found) > MOST_FILES:
            raise LimitExceededError(f"hash_files({shown:.300}): more than {MOST_FILES:,} files match")
        if sum(entry.size for entry in found.values()) > LARGEST:
            raise LimitExceededError(
                f"hash_files({shown:.300}): the files that match have more than {LARGEST:,} bytes"
            )
        return _digest_of([found[path] for path in sorted(found)])


def _digest_of(entries: Sequence[ViewEntry]) -> str:
    whole = hashlib.sha256()
    for entry in entries:
        one = hashlib.sha256()
        with layers.open_file(entry.layer, entry.path) as file:
            while piece := file.read(_PIECE):
                one.update(piece)
        # Digests have one length: no two sets of files are spelled the same.
        whole.update(hashlib.sha256(entry.path.encode("utf-8", "surrogateescape")).digest() + one.digest())
    return whole.hexdigest()[:_DIGITS]


def _parts(pattern: str) -> list[str]:
    parts = [part for part in pattern.split("/") if part != "."]
    if pattern.startswith(("/", "~")) or not all(parts) or ".." in parts:
        raise CacheInvalidError(
            f"hash_files({pattern!r:.200}): a pattern is relative to the workspace, and stays in it"
        )
    if len(parts) > DEEPEST:  # each is a call within a call
        raise CacheInvalidError(f"hash_files({pattern!r:.200}): a pattern is at most {DEEPEST} folders deep")
    return parts


class _Search:
    """Looks for files by patterns, and looks at so many names and no more."""

    def __init__(self, lowers: Sequence[Path]) -> None:
        self._lowers = lowers
        self._left = MOST_LOOKED_AT
        self._listed: dict[str, list[ViewEntry]] = {}

    def files(self, parts: Sequence[str], folder: str = "") -> Iterator[ViewEntry]:
        """Yield regular files below `folder` that match."""
        head, *rest = parts
        if head == "**":
            # `**` stands for no folder, or for one and more; at the end for all files.
            yield from self.files(rest or ["*"], folder)
            for entry in self._list(folder):
                if entry.kind == "folder":
                    yield from self.files(parts, entry.path)
            return
        matches = re.compile(translate(head)).match
        for entry in self._list(folder):
            if not matches(entry.name):
                continue
            if rest and entry.kind == "folder":
                yield from self.files(rest, entry.path)
            elif not rest and entry.kind in {"file", "script"}:
                yield entry

    def _list(self, folder: str) -> list[ViewEntry]:
        if folder not in self._listed:
            try:
                found = layer_views.listing(self._lowers, folder, most=max(self._left, 1))
            except NotFoundError:
                found = []
            # Git's own files tell of no content, and change with every commit.
            self._listed[folder] = [entry for entry in found if folder or entry.name != ".git"]
        # Each time: patterns with many `**` look at the same folders again and again.
        self._left -= 1 + len(self._listed[folder])
        if self._left < 0:
            raise LimitExceededError(
                f"hash_files: more than {MOST_LOOKED_AT:,} names would have to be looked at"
            )
        return self._listed[folder]
