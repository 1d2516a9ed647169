"""Artifacts on disk: a folder each, in which files are called by their digests; equal ones of a repository are one.

Below the root: `<tenant>/<artifact>/contents` (the list) and `files/<digest>`; `<tenant>/.objects/<digest>` are hard
links of these, by which the next artifact finds them: one that has no other name is of no artifact any more. `.new/` is
what is being uploaded, `.trash/` what is being removed. An artifact appears by one rename and goes by one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ci_platform import layer_pool, layers, sealing
from ci_platform.artifacts import contents, copying
from ci_platform.artifacts.contents import Entry
from ci_platform.errors import LimitExceededError, UnavailableError
from ci_platform.layer_views import ViewEntry

_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_TEMPORARY = (".new", ".trash")
_BLOCK = 512
_MODE = 0o777


@dataclass(slots=True)
class Draft:
    """An artifact that is being made in `folder`; nobody sees it. `room` is how many bytes it may have."""

    tenant: str
    folder: Path
    room: int
    entries: list[Entry] = field(default_factory=list)
    size: int = 0
    digest: str = ""

    @property
    def taken(self) -> int:
        """Bytes on disk, also of what it shares with others."""
        found = [self.folder / "contents", *(self.folder / "files").iterdir()]
        return sum(path.stat().st_blocks for path in found) * _BLOCK


@dataclass(frozen=True, slots=True)
class Shelf:
    """All artifacts below `root`. Everything blocks. Safe from several threads; one process.

    With `durable` what is published is on disk before it can be seen.
    """

    root: Path
    durable: bool = True
    _removing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def prepare(self) -> None:
        """Make the folders that there have to be."""
        for name in _TEMPORARY:
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.chmod(0o700)

    def sweep(self, live: Collection[tuple[str, str]]) -> None:
        """Remove what a killed process left half done, and all but the `live` (tenant, artifact). Call at start."""
        self.prepare()
        left = [path for name in _TEMPORARY for path in (self.root / name).iterdir()]
        for path in left:
            layers.remove_tree(path)
        for tenant in self.root.glob("[!.]*"):
            for path in tenant.glob("[!.]*"):
                if (tenant.name, path.name) not in live:
                    self.remove(tenant.name, path.name)
            if left:  # something was going on: only then there may be files of nobody, and each is looked at
                for path in (tenant / ".objects").glob("*"):
                    _unlink_if_last(path, 1)
            with contextlib.suppress(OSError):  # others are in it
                (tenant / ".objects").rmdir()
                tenant.rmdir()

    # --- uploads ---

    def draft(self, tenant: str, room: int) -> Draft:
        """Begin an artifact."""
        folder = self.root / ".new" / secrets.token_hex(8)
        (folder / "files").mkdir(parents=True, mode=0o700)
        return Draft(tenant, folder, room)

    def fill(self, draft: Draft, found: Iterable[ViewEntry], alive: Callable[[], None]) -> None:
        """Copy what was found in layers into a draft. Raises LimitExceededError where it is too much."""
        for each in found:
            alive()
            entry = self._kept(draft, each, alive)
            draft.entries.append(entry)
            draft.size += entry.size
        with (draft.folder / "contents").open("xb") as file:
            draft.digest = contents.write(draft.entries, file)

    def _kept(self, draft: Draft, found: ViewEntry, alive: Callable[[], None]) -> Entry:
        if found.target is not None:
            return Entry(found.path, "symlink", 0o777, target=found.target)
        if found.kind == "folder":
            return Entry(found.path, "folder", 0o755)
        part = draft.folder / "part"
        with layers.open_file(found.layer, found.path) as file:
            status = os.fstat(file.fileno())
            if draft.size + status.st_size > draft.room:
                raise LimitExceededError(
                    f"{found.path!r:.200}: the artifacts of the run would have more than it may keep "
                    f"(setting max_artifacts): there is room for {draft.room - draft.size:,} bytes, "
                    f"and it has {status.st_size:,}"
                )
            writer = os.open(part, _FILE, 0o600)
            try:
                copied = copying.copy(file.fileno(), writer, alive)
            finally:
                os.close(writer)
        self._name(draft, part, copied.content)
        return Entry(found.path, "file", status.st_mode & _MODE, copied.size, copied.content, copied.crc)

    def _name(self, draft: Draft, part: Path, content: str) -> None:
        """Call a copy by its digest, or take the equal file that is there already."""
        target = draft.folder / "files" / content
        if not target.exists():
            try:
                os.link(self._objects(draft.tenant) / content, target)
            except (FileNotFoundError, OSError) as error:
                if error.errno not in {errno.ENOENT, errno.EMLINK}:
                    raise
                part.rename(target)
                return
        part.unlink()

    def publish(self, draft: Draft, artifact_id: str) -> None:
        """Let a draft be an artifact, by one rename."""
        target = self.root / draft.tenant / artifact_id
        objects = self._objects(draft.tenant)
        objects.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.durable:
            sealing.flush_tree(draft.folder, len(draft.entries) + 2)
        draft.folder.rename(target)
        if self.durable:
            layer_pool.flush(target.parent, self.root)
        for content in {entry.content for entry in contents.files_of(draft.entries)}:
            with contextlib.suppress(FileExistsError):
                os.link(target / "files" / content, objects / content)

    def discard(self, draft: Draft) -> None:
        """Remove a draft, unless it was published."""
        with self._removing:
            self._forget(draft.folder, draft.tenant)
            layers.remove_tree(draft.folder)

    # --- artifacts ---

    def remove(self, tenant: str, artifact_id: str) -> None:
        """Remove an artifact; nothing where there is none. One after the other: each counts who else has its files."""
        trash = self.root / ".trash" / secrets.token_hex(8)
        with self._removing, contextlib.suppress(FileNotFoundError):
            (self.root / tenant / artifact_id).rename(trash)
            self._forget(trash, tenant)
            layers.remove_tree(trash)

    def _forget(self, folder: Path, tenant: str) -> None:
        """Let the files of a folder be found no more that nobody else has. While it is there a kill leaves a trace."""
        for path in (folder / "files").glob("*"):
            _unlink_if_last(self._objects(tenant) / path.name, 2)

    def _objects(self, tenant: str) -> Path:
        return self.root / tenant / ".objects"

    def entries(self, tenant: str, artifact_id: str, digest: str) -> list[Entry]:
        """Return what is in an artifact. Raises UnavailableError where its files are gone or damaged."""
        try:
            with (self.root / tenant / artifact_id / "contents").open("rb") as file:
                return contents.read(file, digest)
        except FileNotFoundError:
            raise UnavailableError("the files of the artifact are not on the platform's disk") from None

    def open(self, tenant: str, artifact_id: str, entry: Entry) -> int:
        """Open a file of an artifact for reading; returns its descriptor."""
        path = self.root / tenant / artifact_id / "files" / entry.content
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnavailableError("a file of the artifact is not on the platform's disk") from None

    def pieces(self, tenant: str, artifact_id: str, entry: Entry) -> Iterator[bytes]:
        """Yield the bytes of a file, verified; see `copying.verified`."""
        descriptor = self.open(tenant, artifact_id, entry)
        try:
            yield from copying.verified(descriptor, entry.content, entry.size)
        finally:
            os.close(descriptor)


def _unlink_if_last(path: Path, links: int) -> None:
    """Remove a file that has so many names and no more."""
    with contextlib.suppress(FileNotFoundError):
        if path.lstat().st_nlink == links:
            path.unlink()
