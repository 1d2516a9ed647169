"""The `.git` of a workspace: usable at once, without a copy of history, and nothing of the platform's in it.

Packs and single objects are hard links to those of the repository: git never writes to one again, and commands
see them through a layer that is read-only. Where the platform is root they are root's, and nobody else's to change.
There is no remote in its configuration. The platform itself never runs git in a workspace.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ci_platform import git_commands
from ci_platform.cones import Cone
from ci_platform.errors import MissingObjectError, UnavailableError
from ci_platform.trees import Owner

_CONFIG = """\
[core]
\trepositoryformatversion = 0
\tfilemode = true
\tbare = false
\tlogallrefupdates = true
[gc]
\tauto = 0
[maintenance]
\tauto = false
[advice]
\tdetachedHead = false
[user]
\tname = dynflow
\temail = dynflow@localhost
"""
"""Collecting garbage would copy the history into the command's layer. A commit needs some author."""

_SPARSE = "[core]\n\tsparseCheckout = true\n\tsparseCheckoutCone = true\n"
_COPIED = "[core]\n\tcheckStat = minimal\n\ttrustctime = false\n\tuntrackedCache = false\n"
"""Where commands get copies of files, numbers of inodes and times of change are not those of the index."""

LINKED = "[core]\n\ttrustctime = false\n\tuntrackedCache = false\n"
"""For files that have other links: each link more is a change of their inode, and none of theirs. Without times of
change, who sets a folder's time of modification back would hide from git what is new in it."""

_CANNOT_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EACCES}
_PACK_PARTS = {".pack", ".idx", ".rev", ".bitmap", ".promisor"}
_PACK_WITHIN = 600.0
"""Seconds to pack one commit."""


@dataclass(frozen=True, slots=True)
class GitFolder:
    """Which `.git` is wanted: of a commit and its cone; with all of the repository, or with `alone` this commit.

    `copied` says that commands get copies of the tree. `index` tells indexes of one commit apart, where there are
    several.
    """

    sha: str
    cone: Cone | None = None
    alone: bool = False
    copied: bool = False
    index: str = ""

    def key(self, repository: Path) -> str:
        """Return its name in a store of trees. It changes with the repository's refs and packs."""
        view = f".{self.cone.name}" if self.cone is not None else ""
        kind = ("alone" if self.alone else "git") + ("-copy" if self.copied else "") + self.index
        state = "" if self.alone else f"-{state_of(repository)}"
        return f"{kind}{view}-{self.sha}{state}"

    def write(self, tree: Path, repository: Path, index: Path, refs: Mapping[bytes, str], head: str) -> None:
        """Write it below `tree`. `refs` by their names in the repository; `index` is linked."""
        git = tree / ".git"
        for name in ("objects/info", "objects/pack", "refs/heads", "refs/tags", "info"):
            (git / name).mkdir(parents=True)
        texts = {"HEAD": f"{self.sha}\n", "config": self.config(), "info/exclude": ""}
        if self.cone is not None:
            texts["info/sparse-checkout"] = self.cone.patterns()
        if self.alone:
            texts["shallow"] = f"{self.sha}\n"
        else:
            (git / "packed-refs").write_bytes(_packed(refs))
            if b"refs/heads/" + head.encode() in refs:
                (git / "refs/remotes/origin").mkdir(parents=True)
                texts["refs/remotes/origin/HEAD"] = f"ref: refs/remotes/origin/{head}\n"
            with suppress(FileNotFoundError):
                shutil.copyfile(repository / "shallow", git / "shallow")
        for name, text in texts.items():
            (git / name).write_text(text, encoding="utf-8")
        link(index, git / "index")

    def config(self) -> str:
        """Return its configuration."""
        return _CONFIG + (_SPARSE if self.cone is not None else "") + (_COPIED if self.copied else "")


def state_of(repository: Path) -> str:
    """Return what changes whenever refs or packs do: directories' times, as refs are replaced by renames."""
    found = [_times(repository / name) for name in ("packed-refs", "shallow", "HEAD", "objects/pack")]
    folders = [repository / "refs"]
    while folders:
        folder = folders.pop()
        found.append(_times(folder))
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            folders += sorted(Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _times(path: Path) -> tuple[str, int, int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return path.name, 0, 0, 0
    return path.name, found.st_ino, found.st_mtime_ns, found.st_size


def _packed(refs: Mapping[bytes, str]) -> bytes:
    """Return git's `packed-refs`: branches as those of a remote called origin, tags as they are."""
    shown = dict[bytes, str]()
    for name, oid in refs.items():
        for prefix in (b"refs/dynflow/heads/", b"refs/heads/"):
            if name.startswith(prefix):
                shown[b"refs/remotes/origin/" + name.removeprefix(prefix)] = oid
        if name.startswith(b"refs/tags/"):
            shown[name] = oid
    shown.pop(b"refs/remotes/origin/HEAD", None)
    lines = [oid.encode() + b" " + name + b"\n" for name, oid in sorted(shown.items())]
    return b"# pack-refs with: sorted \n" + b"".join(lines)


def link_objects(repository: Path, tree: Path) -> None:
    """Give the `.git` below `tree` all objects of a repository."""
    source, target = repository / "objects", tree / ".git" / "objects"
    for path in (source / "pack").iterdir():
        if path.name.startswith("pack-") and path.suffix in _PACK_PARTS:
            link(path, target / "pack" / path.name)
            if path.suffix == ".pack":
                # A command's own collecting of garbage leaves it where it is.
                (target / "pack" / path.with_suffix(".keep").name).touch()
    for folder in source.glob("[0-9a-f][0-9a-f]"):
        (target / folder.name).mkdir()
        for path in folder.iterdir():
            if not path.name.startswith("tmp_"):
                link(path, target / folder.name / path.name)


def pack_objects(repository: Path, tree: Path, oids: Iterable[bytes]) -> None:
    """Give the `.git` below `tree` some objects of a repository and no others."""
    command = ["git", "--git-dir", str(repository), "pack-objects", "--quiet", "--window=0"]
    command.append(str(tree / ".git" / "objects" / "pack" / "pack"))
    names = "".join(f"{oid.hex()}\n" for oid in oids).encode()
    try:
        done = subprocess.run(
            command,
            input=names,
            env=git_commands.environment(),
            cwd="/",
            capture_output=True,
            timeout=_PACK_WITHIN,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the commit cannot be packed: {error}") from error
    if done.returncode:
        raise MissingObjectError(
            f"the commit cannot be packed: {done.stderr.decode(errors='replace')[-300:].strip()}"
        )


def hand_over(tree: Path, owner: Owner) -> None:
    """Give the `.git` below `tree` to the tenants, without what it shares with the repository."""
    for folder, _, files in os.walk(tree, followlinks=False):
        give(folder, owner, 0o755)
        for name in files:
            path = f"{folder}/{name}"
            if os.lstat(path).st_nlink == 1:
                give(path, owner, 0o644)
            elif os.geteuid() == 0 and not os.lstat(path).st_mode & 0o004:
                # Made under a strict umask; the folders above it keep everybody else away.
                os.chmod(path, 0o444)  # noqa: PTH101


def give(path: str | Path, owner: Owner, mode: int) -> None:
    """Make a path the tenants' where the platform may."""
    if os.geteuid() == 0:
        os.chown(path, owner.uid, owner.gid)
    os.chmod(path, mode)  # noqa: PTH101


def link(source: Path, target: Path) -> None:
    """Link a file, or copy it where that cannot be."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, target)
