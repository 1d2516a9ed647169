"""The entries of caches on disk: sealed folders that are found by a key and never change.

Below the root: `<tenant>/<entry>/entry.json`, and `files/<n>/` for the nth of its paths; `.open/` what commands work
on, `.trash/` what is being removed. An entry appears by one rename and goes by one: a kill leaves all of it or nothing.
When it was last used is the modification time of its `entry.json`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ci_platform import layer_pool, layers

_REMEMBERED = 1000
"""Entries that were evicted lately, of which a miss says so."""

_DIGITS = 32


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One entry. `size` is bytes of files on disk, `files` counts folders too. `pinned`: a command uses it now.

    `scope` is what wrote it: a branch or tag as `refs/…`, or a pull request. `outside`: that of a fork.
    """

    id: str
    repo: str
    tenant: str
    scope: str
    key: str
    paths: tuple[str, ...]
    size: int
    files: int
    created_at: datetime
    used_at: datetime
    outside: bool = False
    pinned: bool = False


def entry_id(tenant: str, scope: str, key: str, paths: Sequence[str]) -> str:
    """Return what identifies an entry: the same key of other paths is another one."""
    known = json.dumps([tenant, scope, key, list(paths)])
    return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


@dataclass(slots=True)
class Entries:
    """All entries below a root. `load`, `find`, `publish`, `scratch` block; the others are the event loop's alone."""

    root: Path
    durable: bool = True
    _known: dict[str, CacheEntry] = field(default_factory=dict)
    _of_tenants: dict[str, dict[str, CacheEntry]] = field(default_factory=dict)
    _pins: Counter[str] = field(default_factory=Counter)
    _evicted: OrderedDict[str, datetime] = field(default_factory=OrderedDict)

    def load(self, spared: Collection[Path] = ()) -> None:
        """Read what is there, and remove what a killed process left half done, but what is `spared` of it."""
        for name in (".open", ".trash"):
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in (self.root / name).iterdir():
                if path not in spared:
                    layers.remove_tree(path)
        for path in self.find():
            self._remove(path)

    def find(self) -> list[Path]:
        """Read what is there; returns what nobody can say what it is."""
        self._known.clear()
        self._of_tenants.clear()
        unknown = list[Path]()
        for path in self.root.glob("[!.]*/*"):
            try:
                found = _read(path)
            except (OSError, ValueError, KeyError, TypeError):
                unknown.append(path)
            else:
                self._hold(found)
        return unknown

    def _hold(self, entry: CacheEntry) -> None:
        self._known[entry.id] = self._of_tenants.setdefault(entry.tenant, {})[entry.id] = entry

    def folder(self, entry: CacheEntry) -> Path:
        """Return where an entry is."""
        return self.root / entry.tenant / entry.id

    def all(self) -> list[CacheEntry]:
        """Return every entry."""
        return [
            replace(each, pinned=True) if each.id in self._pins else each for each in self._known.values()
        ]

    def get(self, identity: str) -> CacheEntry | None:
        """Return the entry of this id."""
        return self._known.get(identity)

    def of(self, tenant: str, scope: str, paths: Sequence[str]) -> Iterator[CacheEntry]:
        """Yield a scope's entries of these paths, the newest first."""
        found = [
            each
            for each in self._of_tenants.get(tenant, {}).values()
            if (each.scope, each.paths) == (scope, tuple(paths))
        ]
        yield from sorted(found, key=lambda each: each.created_at, reverse=True)

    def has_other_paths(self, tenant: str, scopes: Collection[str], key: str) -> bool:
        """Whether a key is there that holds other paths."""
        known = self._of_tenants.get(tenant, {}).values()
        return any(each.key == key and each.scope in scopes for each in known)

    def evicted_at(self, identity: str) -> datetime | None:
        """Return when an entry was evicted, if that was lately."""
        return self._evicted.get(identity)

    def pin(self, identity: str) -> None:
        """Keep an entry until as many calls of `unpin`."""
        self._pins[identity] += 1

    def unpin(self, identity: str) -> None:
        """Take a `pin` back."""
        self._pins[identity] -= 1
        if not self._pins[identity]:
            del self._pins[identity]

    def touch(self, entry: CacheEntry, now: datetime) -> None:
        """Write down that an entry is used."""
        self._hold(replace(entry, used_at=now))
        # On a disk that cannot be written to, it is known in this process.
        with contextlib.suppress(OSError):
            os.utime(self.folder(entry) / "entry.json", (now.timestamp(), now.timestamp()))

    def publish(self, scratch: Path, entry: CacheEntry) -> bool:
        """Make a scratch folder with `files` an entry, by one rename; False where it is there already. Blocks."""
        record = {
            "repo": entry.repo, "scope": entry.scope, "key": entry.key, "paths": entry.paths, "size": entry.size,
            "files": entry.files, "created_at": entry.created_at.isoformat(), "outside": entry.outside,
        }  # fmt: skip
        layer_pool.write(scratch / "entry.json", record, durable=self.durable)
        target = self.folder(entry)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        if self.durable:
            layer_pool.flush(scratch / "files", scratch)
        try:
            scratch.rename(target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            return False
        if self.durable:
            layer_pool.flush(target.parent, self.root)
        return True

    def add(self, entry: CacheEntry) -> None:
        """Let a published entry be found."""
        self.touch(entry, entry.used_at)

    def discard(self, identity: str, now: datetime | None = None) -> Path | None:
        """Take an entry out of sight; returns what is left to remove, None where it is pinned or not there.

        `now`: it is evicted, which a later miss can say.
        """
        entry = self._known.get(identity)
        if entry is None or identity in self._pins:
            return None
        trash = self._out_of_sight(self.folder(entry))
        del self._known[identity], self._of_tenants[entry.tenant][identity]
        if now is not None:
            self._evicted[identity] = now
            while len(self._evicted) > _REMEMBERED:
                self._evicted.popitem(last=False)
        return trash

    def _out_of_sight(self, path: Path) -> Path:
        trash = self.root / ".trash" / secrets.token_hex(8)
        path.rename(trash)
        return trash

    def _remove(self, path: Path) -> None:
        layers.remove_tree(self._out_of_sight(path))

    def scratch(self) -> Path:
        """Make a folder for one command to work on."""
        path = self.root / ".open" / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        return path


def _read(path: Path) -> CacheEntry:
    file = path / "entry.json"
    record: dict[str, Any] = json.loads(file.read_bytes())
    return CacheEntry(
        id=path.name,
        repo=record["repo"],
        tenant=path.parent.name,
        scope=record["scope"],
        key=record["key"],
        paths=tuple(record["paths"]),
        size=int(record["size"]),
        files=int(record["files"]),
        created_at=datetime.fromisoformat(record["created_at"]),
        used_at=datetime.fromtimestamp(file.stat().st_mtime, UTC),
        outside=bool(record["outside"]),
    )
