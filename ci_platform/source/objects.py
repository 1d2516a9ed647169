"""What is read out of a git repository: refs, commits, folders, files. Blocking; everything in it is hostile."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import Any

import pygit2

from ci_platform import commit_trees
from ci_platform.cones import Cone
from ci_platform.errors import InvalidInputError, LimitExceededError, MissingObjectError, NotFoundError
from ci_platform.git_index import GITLINK
from pipelines.contract import Commit, CommitInfo, EntryKind, TreeEntry

LONGEST_REF = 1024
MOST_LOGGED = 10_000
"""Commits of a history that can be paged through: each page walks from its beginning."""

_SHA = re.compile(r"[0-9a-f]{40}")
_COMMIT_LIMIT = 1 << 20
_TREE_LIMIT = 16 << 20
_BLOB_LIMIT = 1 << 30
"""Bytes of one file: libgit2 has it in memory as a whole."""

_FOLDER_FILES = 1000
MOST_LISTED = 5000
"""Entries of a folder that are returned at once."""

_TITLE = 200
_KINDS: dict[int, EntryKind] = {0o040000: "folder", 0o120000: "symlink", 0o160000: "submodule"}


def is_sha(text: str) -> bool:
    """Whether this is a commit id in full."""
    return _SHA.fullmatch(text) is not None


def check_sha(sha: str) -> str:
    """Return the commit id if it is one in full; InvalidInputError otherwise."""
    if not is_sha(sha):
        raise InvalidInputError(f"a commit is named by 40 hexadecimal digits, got {sha[:60]!r}")
    return sha


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of a repository, by their ids as bytes."""

    repository: pygit2.Repository

    def size(self, oid: bytes) -> int | None:
        """Return an object's size; None where it is not here."""
        try:
            return int(self.repository.odb.read_header(pygit2.Oid(raw=oid))[1])
        except (KeyError, pygit2.GitError):
            return None

    def read(self, oid: bytes, *, limit: int = _BLOB_LIMIT, name: str = "a file") -> bytes:
        """Return an object's content; LimitExceededError above `limit` bytes.

        MissingObjectError where it is not here, or damaged.
        """
        key = pygit2.Oid(raw=oid)
        try:
            # The header first: a few bytes of pack can unfold to gigabytes.
            size = self.repository.odb.read_header(key)[1]
            if size > limit:
                raise LimitExceededError(f"{name} of the commit has {size} bytes, more than {limit}")
            content: bytes = self.repository.odb.read(key)[1]
        except (KeyError, pygit2.GitError) as error:
            raise MissingObjectError(f"the repository has no object {key}: {error}") from None
        return content


def isolate_libgit2() -> None:
    """Keep libgit2 from reading users' configuration and from minding whose repositories these are."""
    levels = pygit2.enums.ConfigLevel
    for level in (levels.SYSTEM, levels.XDG, levels.GLOBAL, levels.PROGRAMDATA):
        pygit2.settings.search_path[level] = ""
    pygit2.settings.owner_validation = False


# Refs


def is_ref(name: str) -> bool:
    """Whether a full ref can have this name."""
    return name.startswith("refs/") and bool(pygit2.reference_is_valid_name(name))


def refs(opened: pygit2.Repository) -> dict[str, str]:
    """Return branch and tag refs by full name, with the commits they lead to."""
    found = {}
    for reference in opened.references.iterator():
        name = reference.name
        # Git takes any bytes for a name. One that is no printable text starts nothing: no database would hold it.
        if name.startswith(("refs/heads/", "refs/tags/")) and name.isprintable() and len(name) <= LONGEST_REF:
            found[name] = _peeled(reference)
    return found


def own_refs(opened: pygit2.Repository) -> dict[bytes, str]:
    """Return every ref but the platform's own and symbolic ones, with the object that each names."""
    return {
        reference.raw_name: str(reference.target)
        for reference in opened.references.iterator()
        if isinstance(reference.target, pygit2.Oid)
        and reference.raw_name.startswith(b"refs/")
        and not reference.raw_name.startswith(b"refs/dynflow/")
    }


def named_refs(opened: pygit2.Repository) -> dict[bytes, str]:
    """Return every ref but symbolic ones, with the object that each names, where that is here."""
    return {
        reference.raw_name: str(reference.target)
        for reference in opened.references.iterator()
        if isinstance(reference.target, pygit2.Oid) and reference.target in opened
    }


def _peeled(reference: pygit2.Reference) -> str:
    """Return the commit behind a ref; of a tag of something else, what it names itself."""
    try:
        return str(reference.peel(pygit2.Commit).id)
    except (pygit2.GitError, ValueError):
        return str(reference.target)


def head(opened: pygit2.Repository) -> str:
    """Return the branch that HEAD names."""
    target = opened.lookup_reference("HEAD").target
    return str(target).removeprefix("refs/heads/")


def resolve(opened: pygit2.Repository, repo: str, ref: str) -> str:
    """Return the commit id of a branch, a tag, a full ref or a full id; NotFoundError if there is none."""
    if _SHA.fullmatch(ref):
        return str(commit(opened, repo, ref).id)
    for name in (ref, f"refs/heads/{ref}", f"refs/tags/{ref}"):
        if is_ref(name) and name in opened.references:
            try:
                return str(opened.references[name].peel(pygit2.Commit).id)
            except (pygit2.GitError, ValueError):
                raise NotFoundError(f"{ref[:100]!r} of {repo!r} leads to no commit that is here") from None
    raise NotFoundError(f"{repo!r} has no branch or tag {ref[:100]!r}")


# Commits


def commit(opened: pygit2.Repository, repo: str, sha: str) -> Any:
    """Return pygit2's commit; NotFoundError, or LimitExceededError for one too large to be read.

    MissingObjectError where it is damaged.
    """
    key = pygit2.Oid(hex=check_sha(sha))
    found: Any = None
    try:
        # The header first: a few bytes of pack can unfold to gigabytes of message.
        if (size := opened.odb.read_header(key)[1]) > _COMMIT_LIMIT:
            raise LimitExceededError(f"the commit {sha} itself has {size} bytes, more than {_COMMIT_LIMIT}")
        found = opened.get(key)
    except KeyError:
        pass
    except pygit2.GitError as error:
        raise MissingObjectError(f"the commit {sha} of {repo!r} is damaged: {error}") from None
    if not isinstance(found, pygit2.Commit):
        raise NotFoundError(f"{repo!r} has no commit {sha} here{_end_of_history(opened)}")
    return found


def _end_of_history(opened: pygit2.Repository) -> str:
    """Say so where history ends before its beginning."""
    return ": its history is kept down to a depth" if Path(opened.path, "shallow").exists() else ""


def info(found: Any) -> CommitInfo:
    """Return what people see of pygit2's commit."""
    title = _text(found.raw_message).strip().partition("\n")[0][:_TITLE]
    return CommitInfo(str(found.id), title, _text(found.author.raw_name), _moment(found.commit_time))


def whole(found: Any) -> Commit:
    """Return all of pygit2's commit."""
    author, committer = found.author, found.committer
    return Commit(
        sha=str(found.id),
        tree=str(found.tree_id),
        parents=tuple(str(parent) for parent in found.parent_ids),
        author=_text(author.raw_name),
        author_email=_text(author.raw_email),
        authored_at=_moment(author.time),
        committer=_text(committer.raw_name),
        committer_email=_text(committer.raw_email),
        committed_at=_moment(committer.time),
        message=_text(found.raw_message),
    )


def log(opened: pygit2.Repository, repo: str, start: str, *, limit: int, skip: int) -> list[CommitInfo]:
    """Return commits that `start` leads to, the newest first, itself included."""
    if not 1 <= limit <= 1000 or not 0 <= skip <= MOST_LOGGED:
        raise InvalidInputError(f"a log has 1 to 1,000 commits a page, after at most {MOST_LOGGED:,} skipped")
    return [info(found) for found in islice(_history(opened, repo, start), skip, skip + limit)]


def _history(opened: pygit2.Repository, repo: str, start: str) -> Iterator[Any]:
    """Walk by ourselves, each commit's size looked at before it is read: libgit2's walk reads any."""
    first, numbers = commit(opened, repo, start), count()
    seen, waiting = {first.id}, [(-first.commit_time, next(numbers), first)]
    while waiting:
        found = heapq.heappop(waiting)[2]
        yield found
        for parent in found.parent_ids:
            # In a shallow repository history ends before its beginning.
            if parent not in seen and parent in opened:
                seen.add(parent)
                older = commit(opened, repo, str(parent))
                heapq.heappush(waiting, (-older.commit_time, next(numbers), older))


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")


def _moment(seconds: int) -> datetime:
    """Return a time; for one that no calendar has, whatever a commit says, the beginning of time."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(0, UTC)


# Files


def read_file(opened: pygit2.Repository, repo: str, sha: str, path: str, limit: int) -> bytes | None:
    """Return a regular file of a commit, None where there is none."""
    objects = Objects(opened)
    found = commit_trees.find(objects, commit(opened, repo, sha).tree_id.raw, path)
    return objects.read(found.oid, limit=limit, name=path) if found and found.is_file else None


def blobs_at(opened: pygit2.Repository, repo: str, sha: str, path: str, suffix: str = "") -> list[bytes]:
    """Return the ids of what `read_file` or `read_folder` reads."""
    objects = Objects(opened)
    found = commit_trees.find(objects, commit(opened, repo, sha).tree_id.raw, path)
    if found is None or not found.is_tree:
        return [found.oid] if found and found.is_file else []
    return [item.oid for _, item in commit_trees.files(objects, found.oid, suffix=suffix)]


def blobs_of(opened: pygit2.Repository, repo: str, sha: str, cone: Cone | None) -> Iterator[bytes]:
    """Yield the ids of a commit's files and links, those of a cone's folders alone."""
    objects = Objects(opened)
    folders = [(b"", commit(opened, repo, sha).tree_id.raw)]
    while folders:
        above, tree = folders.pop()
        for item in commit_trees.items(objects.read(tree)):
            path = above + item.name
            if not item.is_tree and item.mode != GITLINK:
                yield item.oid
            elif item.is_tree and (cone is None or cone.holds(path)):
                folders.append((path + b"/", item.oid))


def missing(opened: pygit2.Repository, oids: Iterable[bytes]) -> list[str]:
    """Return those of some objects that are not here, each once."""
    objects = Objects(opened)
    return [oid.hex() for oid in dict.fromkeys(oids) if objects.size(oid) is None]


def read_folder(
    opened: pygit2.Repository, repo: str, sha: str, path: str, *, suffix: str, limit: int
) -> dict[str, bytes]:
    """Return the regular files below a folder by their path in it."""
    objects, found = Objects(opened), dict[str, bytes]()
    folder = commit_trees.find(objects, commit(opened, repo, sha).tree_id.raw, path)
    if folder is None or not folder.is_tree:
        return found
    for name, item in commit_trees.files(objects, folder.oid, suffix=suffix):
        found[name] = objects.read(item.oid, limit=limit, name=f"{path}/{name}")
        limit -= len(found[name])
        if len(found) > _FOLDER_FILES:
            raise LimitExceededError(f"{path} of the commit has more than {_FOLDER_FILES} files")
    return found


def links(opened: pygit2.Repository, repo: str, sha: str, paths: Iterable[str]) -> dict[str, str]:
    """Return which of some paths are submodules, with the commits that they are at."""
    objects, tree = Objects(opened), commit(opened, repo, sha).tree_id.raw
    found = {path: commit_trees.find(objects, tree, path) for path in paths}
    return {path: item.oid.hex() for path, item in found.items() if item and item.mode == GITLINK}


def read_tree(
    opened: pygit2.Repository, repo: str, sha: str, path: str, *, limit: int = MOST_LISTED, skip: int = 0
) -> list[TreeEntry]:
    """Return what a folder of a commit holds, in git's order. The empty path is the commit's own folder."""
    if not 1 <= limit <= MOST_LISTED or skip < 0:
        raise InvalidInputError(f"a folder is listed in pages of 1 to {MOST_LISTED:,} entries, not {limit}")
    objects, tree = Objects(opened), commit(opened, repo, sha).tree_id.raw
    if path:
        found = commit_trees.find(objects, tree, path)
        if found is None or not found.is_tree:
            raise NotFoundError(f"{repo!r} has no folder {path[:200]!r} at {sha}")
        tree = found.oid
    content = objects.read(tree, limit=_TREE_LIMIT, name=path or "the folder")
    return [_entry(objects, item) for item in islice(commit_trees.items(content), skip, skip + limit)]


def _entry(objects: Objects, item: commit_trees.Item) -> TreeEntry:
    kind = _KINDS.get(item.mode, "script" if item.mode & 0o100 else "file")
    size = objects.size(item.oid) if kind in {"file", "script", "symlink"} else None
    return TreeEntry(_text(item.name), kind, item.oid.hex(), size)
