"""Patches as text: what `git diff` and `diff -u` write, read into changes of files. Pure; trusts nothing in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ci_platform import layers
from ci_platform.errors import PatchError

MOST_BYTES = 1 << 20
MOST_FILES = 1_000
_LONGEST_NAME = 255

_HUNK = re.compile(rb"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@")
_ESCAPES = {
    b"a": b"\a", b"b": b"\b", b"t": b"\t", b"n": b"\n", b"v": b"\v", b"f": b"\f", b"r": b"\r",
    b'"': b'"', b"\\": b"\\",
}  # fmt: skip
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2}|.)", re.DOTALL)
_MODES = {0o100644: "file", 0o100755: "script", 0o120000: "symlink"}


@dataclass(frozen=True, slots=True)
class Hunk:
    """Lines, each with its end, that take the place of others. `line` is where, from 1; `number` which of its file."""

    number: int
    line: int
    before: tuple[bytes, ...]
    after: tuple[bytes, ...]


@dataclass(slots=True)
class FilePatch:
    """The change of one file. `old` None: it is new; `new` None: it is deleted.

    `kind` is what it is to become, None: what it was. `keeps` says that the old one stays: a copy.
    """

    old: str | None = None
    new: str | None = None
    kind: str | None = None
    keeps: bool = False
    hunks: list[Hunk] = field(default_factory=list)

    @property
    def shown(self) -> str:
        """The name by which messages call it."""
        return self.new or self.old or "?"


def parse(text: bytes) -> list[FilePatch]:
    """Return the changes of a patch in their order. Raises PatchError, which names file and hunk."""
    if len(text) > MOST_BYTES:
        raise PatchError(f"a patch has at most {MOST_BYTES:,} bytes, this one has {len(text):,}")
    if b"\0" in text:
        raise PatchError("a patch is text: this one has a byte that is zero")
    reader = _Reader(text)
    found: list[FilePatch] = []
    while (line := reader.peek()) is not None:
        if line.startswith(b"diff --git "):
            found.append(_git_file(reader))
        elif line.startswith(b"--- ") and (reader.peek(1) or b"").startswith(b"+++ "):
            file = FilePatch()
            _names(reader, file)
            found.append(_with_hunks(reader, file))
        elif line.startswith(b"@@ -"):
            raise PatchError(f"line {reader.at + 1} of the patch is a hunk without a file above it")
        else:
            reader.next()  # a commit's message, `Index:`, whatever people write before
        if len(found) > MOST_FILES:
            raise PatchError(f"a patch changes at most {MOST_FILES:,} files")
    if not found:
        raise PatchError("this is no patch: it has neither 'diff --git' nor '---' and '+++' lines")
    return found


class _Reader:
    """The lines of a patch, one after the other, with their ends."""

    def __init__(self, text: bytes) -> None:
        # Only \n ends a line: a carriage return is part of it, and so is what else splitlines() goes by.
        *whole, last = text.split(b"\n")
        self._lines = [line + b"\n" for line in whole] + ([last] if last else [])
        self.at = 0

    def peek(self, ahead: int = 0) -> bytes | None:
        """Return a line without going on."""
        at = self.at + ahead
        return self._lines[at] if at < len(self._lines) else None

    def next(self) -> bytes | None:
        """Return the next line; None at the end."""
        line = self.peek()
        self.at += 1
        return line


def _git_file(reader: _Reader) -> FilePatch:
    header = (reader.next() or b"").rstrip(b"\r\n").removeprefix(b"diff --git ")
    file, is_new, is_deleted = FilePatch(), False, False
    while (line := reader.peek()) is not None:
        words = line.rstrip(b"\r\n")
        if words.startswith(b"--- "):
            _names(reader, file)
            return _with_hunks(reader, file)
        if words.startswith((b"GIT binary patch", b"Binary files ")):
            names = header.decode(errors="replace")
            raise PatchError(f"{names[:300]!r}: this is a binary file, and patches are of text alone")
        if words.startswith((b"new file mode ", b"new mode ")):
            is_new = is_new or words.startswith(b"new file")
            file.kind = _kind(words)
        elif words.startswith((b"deleted file mode ", b"old mode ")):
            is_deleted = is_deleted or words.startswith(b"deleted")
            _kind(words)
        elif words.startswith((b"rename from ", b"copy from ")):
            file.old, file.keeps = _path(words.split(b" ", 2)[2]), words.startswith(b"copy")
        elif words.startswith((b"rename to ", b"copy to ")):
            file.new = _path(words.split(b" ", 2)[2])
        elif not words.startswith((b"index ", b"similarity ", b"dissimilarity ")):
            break
        reader.next()
    if file.old is None and file.new is None:  # a change of the mode, or of an empty file
        both = _same_name(header)
        file.old, file.new = None if is_new else both, None if is_deleted else both
    return file


def _names(reader: _Reader, file: FilePatch) -> None:
    """Read the lines that name the file before and after."""
    old, new = ((reader.next() or b"")[4:].rstrip(b"\r\n") for _ in range(2))
    old, new = (name if name.startswith(b'"') else name.partition(b"\t")[0] for name in (old, new))
    named = [_unquoted(name) for name in (old, new)]
    marks = (b"a/", b"b/")
    if all(name == b"/dev/null" or name.startswith(mark) for name, mark in zip(named, marks, strict=True)):
        named = [name if name == b"/dev/null" else name[2:] for name in named]
    file.old, file.new = (None if name == b"/dev/null" else checked(name) for name in named)
    if file.old is None and file.new is None:
        raise PatchError(f"line {reader.at} of the patch names no file")


def _same_name(header: bytes) -> str:
    """Return the name of `a/name b/name`, which is twice the same."""
    if header.startswith(b'"'):
        found = _QUOTED.match(header)
        return _path(found[0] if found else header, prefix=b"a/")
    half = (len(header) - 1) // 2
    first, second = header[:half], header[half + 1 :]
    if first.partition(b"/")[2] != second.partition(b"/")[2]:
        raise PatchError(f"{header.decode(errors='replace')[:300]!r} does not say which file it is about")
    return _path(first, prefix=b"a/")


def _path(name: bytes, prefix: bytes = b"") -> str:
    return checked(_unquoted(name).removeprefix(prefix))


def _unquoted(name: bytes) -> bytes:
    found = _QUOTED.fullmatch(name)
    if found is None:
        return name

    def character(match: re.Match[bytes]) -> bytes:
        octal = match[1]
        return bytes([int(octal, 8)]) if len(octal) == 3 else _ESCAPES.get(octal, octal)

    return _ESCAPE.sub(character, found[1])


def checked(name: bytes) -> str:
    """Return a path that stays in the workspace and out of its `.git`. Raises PatchError."""
    shown, parts = name.decode(errors="replace")[:300], name.split(b"/")
    if name.startswith(b"/") or b".." in parts:
        raise PatchError(f"{shown!r} leaves the workspace")
    if any(part.lower() == b".git" for part in parts):
        raise PatchError(f"{shown!r} is in .git, which no patch may change")
    if any(part in {b"", b"."} or b"\0" in part or len(part) > _LONGEST_NAME for part in parts):
        raise PatchError(f"{shown!r} is no path that a file can have")
    if len(parts) > layers.MAX_DEPTH:
        raise PatchError(f"{shown!r} is nested deeper than {layers.MAX_DEPTH}")
    return name.decode(errors="surrogateescape")


def _kind(words: bytes) -> str:
    mode = words.rpartition(b" ")[2]
    kind = _MODES.get(int(mode, 8)) if re.fullmatch(rb"[0-7]{6}", mode) else None
    if kind is None:
        shown = mode.decode(errors="replace")[:20]
        raise PatchError(f"mode {shown!r}: a patch may have files, scripts and symbolic links")
    return kind


def _with_hunks(reader: _Reader, file: FilePatch) -> FilePatch:
    while (reader.peek() or b"").startswith(b"@@ -"):
        file.hunks.append(_hunk(reader, file, len(file.hunks) + 1))
    if not file.hunks:
        raise PatchError(f"{file.shown!r} has no hunks: the patch is cut off at line {reader.at}")
    return file


def _hunk(reader: _Reader, file: FilePatch, number: int) -> Hunk:
    begin = reader.at + 1
    head = _HUNK.match(reader.next() or b"")
    if head is None:
        raise PatchError(f"{file.shown!r}, hunk {number}: line {begin} of the patch is no hunk's head")
    line, old, _, new = (int(each) if each is not None else 1 for each in head.groups())
    before, after = list[bytes](), list[bytes]()
    for mark, content in _body(reader, old, new):
        if mark in b" -":
            before.append(content)
        if mark in b" +":
            after.append(content)
    if (len(before), len(after)) != (old, new):
        raise PatchError(f"{file.shown!r}, hunk {number}: it is cut off at line {reader.at} of the patch")
    return Hunk(number, line, tuple(before), tuple(after))


def _body(reader: _Reader, old: int, new: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield mark and content of a hunk's lines, as many as its head says."""
    while old > 0 or new > 0 or (reader.peek() or b"").startswith(b"\\"):
        line = reader.peek()
        if line is None or line[:1] not in b" +-\\\r\n":
            return
        reader.next()
        if line.startswith(b"\\"):
            continue  # of the line before, which looked ahead
        mark, content = (b" ", line) if line[:1] in b"\r\n" else (line[:1], line[1:])
        old, new = old - (mark in b" -"), new - (mark in b" +")
        if (reader.peek() or b"").startswith(b"\\"):
            content = content.removesuffix(b"\n")
        yield mark, content
