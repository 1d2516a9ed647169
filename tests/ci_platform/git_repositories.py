"""Real repositories, real commands in real trees: what tests of source and workspaces share."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ci_platform import layer_copies, layers
from ci_platform.copy_on_write import MethodName
from ci_platform.sandboxes import SANDBOX_UID, Tree

Snapshot = dict[str, tuple[str, bytes]]
"""Path -> (kind with executable bit, content)."""

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}


@dataclass(frozen=True)
class Link:
    target: str


@dataclass(frozen=True)
class Script:
    content: bytes


Content = bytes | Link | Script | None


@dataclass(frozen=True)
class WorkingCopy:
    path: Path

    @property
    def url(self) -> str:
        return f"file://{self.path}"

    def git(self, *arguments: str, **extra: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.path,
            env={**ENVIRONMENT, **extra},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def commit(self, files: Mapping[str, Content], message: str = "a commit") -> str:
        for name, content in files.items():
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            if content is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                path.symlink_to(content.target)
            else:
                path.write_bytes(content.content if isinstance(content, Script) else content)
                path.chmod(0o755 if isinstance(content, Script) else 0o644)
        self.git("add", "--all", "--force")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        return self.git("rev-parse", "HEAD")

    def archive(self, sha: str) -> Snapshot:
        packed = subprocess.run(
            ["git", "archive", "--format=tar", sha],
            cwd=self.path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            found = {}
            for member in archive.getmembers():
                file = archive.extractfile(member) if member.isreg() else None
                found[member.name.rstrip("/")] = (
                    ("symlink", os.fsencode(member.linkname))
                    if member.issym()
                    else ("directory", b"")
                    if member.isdir()
                    else ("script" if member.mode & 0o100 else "file", file.read() if file else b"")
                )
            return found


def working_copy(path: Path) -> WorkingCopy:
    path.mkdir(parents=True)
    made = WorkingCopy(path)
    made.git("init", "--quiet", "--initial-branch=main")
    return made


def snapshot(root: Path) -> Snapshot:
    found: Snapshot = {}
    for entry in layers.walk(root):
        path = root / entry.path
        if stat.S_ISDIR(entry.stat.st_mode):
            found[entry.path] = ("directory", b"")
        elif entry.kind == "symlink":
            found[entry.path] = ("symlink", os.fsencode(path.readlink()))
        else:
            found[entry.path] = ("script" if entry.stat.st_mode & 0o100 else "file", path.read_bytes())
    return found


def merged(lowers: tuple[Path, ...], target: Path) -> Path:
    """What layers show, by our own copying."""
    target.mkdir()
    for layer in reversed(lowers):
        layer_copies.Apply()(layer, target)
    return target


def as_tenant(*command: str) -> list[str]:
    """The command as who tenants are: somebody else where the test is root."""
    if os.geteuid() != 0:
        return list(command)
    uid = str(SANDBOX_UID)
    return ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--", *command]


def run_in(tree: Tree, script: str, method: MethodName, place: Path) -> str:
    """Run a shell script in a tree as the sandbox does: mounted, as the sandboxes' uid."""
    if not tree.lowers:
        command = as_tenant("sh", "-ec", script)
        return subprocess.run(command, cwd=tree.upper, check=True, capture_output=True, text=True).stdout
    place.mkdir(exist_ok=True)
    place.chmod(0o755)
    lowers = ":".join(str(lower) for lower in tree.lowers)
    options = f"lowerdir={lowers},upperdir={tree.upper},workdir={tree.work},volatile"
    unshare = ["unshare", "--mount"]
    if method == "user-overlay":
        options, unshare = options + ",userxattr", ["unshare", "--user", "--map-root-user", "--mount"]
    mount = 'mount -t overlay overlay -o "$1" "$2" && cd "$2" && shift 2 && exec "$@"'
    command = [*unshare, "sh", "-ec", mount, "sh", options, str(place), *as_tenant("sh", "-ec", script)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
