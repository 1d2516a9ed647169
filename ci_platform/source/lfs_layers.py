"""A layer on top of a commit's tree: files that LFS keeps, in the place of their pointers. Blocking."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pygit2

from ci_platform import commit_trees, lfs_pointers, workspace_git
from ci_platform.cones import Cone
from ci_platform.errors import LimitExceededError, MissingObjectError
from ci_platform.git_index import Changes, WrittenIndex
from ci_platform.lfs_pointers import Pointed, Pointer
from ci_platform.source import objects
from ci_platform.source.objects import Objects
from ci_platform.tree_store import StoredTree, TreeStore
from ci_platform.trees import Owner

MOST = 20_000
"""Files of one commit that LFS keeps."""


def pointed(opened: pygit2.Repository, repo: str, sha: str, cone: Cone | None) -> list[Pointed]:
    """Return the files of a commit that LFS keeps, those of a cone's folders alone."""
    found, read = list[Pointed](), Objects(opened)
    folders = [(b"", objects.commit(opened, repo, sha).tree_id.raw)]
    while folders:
        above, tree = folders.pop()
        for item in commit_trees.items(read.read(tree)):
            path = above + item.name
            if item.is_tree:
                if cone is None or cone.holds(path):
                    folders.append((path + b"/", item.oid))
            elif item.is_file and (pointer := _pointer(read, item.oid)) is not None:
                found.append(Pointed(path, item.oid, bool(item.mode & 0o100), pointer))
                if len(found) > MOST:
                    raise LimitExceededError(f"LFS keeps more than {MOST:,} files of the commit")
    return found


def _pointer(read: Objects, oid: bytes) -> Pointer | None:
    size = read.size(oid)
    if size is None:
        raise MissingObjectError(f"the repository has no object {oid.hex()}")
    return lfs_pointers.parse(read.read(oid)) if 0 < size <= lfs_pointers.LARGEST else None


@dataclass(slots=True)
class LfsTrees:
    """Layers of files that LFS keeps, with an index that knows them: git compares none with its pointer."""

    store: TreeStore
    owner: Owner

    def find(self, repo: str, below: Sequence[StoredTree], told: str) -> Path | None:
        """Return the layer for a tree and for what it is `told` to be, where it is here."""
        found = self.store.find(repo, _key(below, told))
        return None if found is None else found.path

    def build(
        self,
        repo: str,
        below: Sequence[StoredTree],
        told: str,
        files: Sequence[Pointed],
        config: str,
        path_of: Callable[[Pointer], Path],
    ) -> Path:
        """Make the layer, with git's configuration `config`. `path_of` says where a file is."""

        def fill(scratch: Path) -> int:
            tree = scratch / "tree"
            workspace_git.give(tree, self.owner, 0o755)
            return self._fill(tree, below, config, files, path_of) if files else 0

        return self.store.build(repo, _key(below, told), fill, base=below[0].key).path

    def _fill(
        self,
        tree: Path,
        below: Sequence[StoredTree],
        config: str,
        files: Sequence[Pointed],
        path_of: Callable[[Pointer], Path],
    ) -> int:
        changes = Changes()
        for each in files:
            path = tree / os.fsdecode(each.path)
            self._make_folders(tree, path.parent)
            self._place(path_of(each.pointer), path, executable=each.executable)
            mode = 0o100755 if each.executable else 0o100644
            changes.add(each.path, mode, each.blob, path.stat())
        base = below[-1].folder
        if len(below) > 1:
            earlier = json.loads((below[0].folder / "changes.json").read_bytes())
            changes = changes.after(Changes.from_json(**earlier))
        git = tree / ".git"
        git.mkdir()
        index = WrittenIndex((base / "index").read_bytes(), (base / "offsets").read_bytes()).changed(changes)
        size = index.write(git / "index")
        (git / "config").write_text(config, encoding="utf-8")
        workspace_git.hand_over(git, self.owner)
        return size + sum(each.pointer.size for each in files)

    def _make_folders(self, tree: Path, folder: Path) -> None:
        missing = list[Path]()
        while folder != tree and not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for each in reversed(missing):
            each.mkdir()
            workspace_git.give(each, self.owner, 0o755)

    def _place(self, source: Path, path: Path, *, executable: bool) -> None:
        """Link a file, whose inode others share: one that is to be executed is a copy of its own."""
        if executable:
            shutil.copy2(source, path)
            workspace_git.give(path, self.owner, 0o755)
        else:
            workspace_git.link(source, path)
            if path.stat().st_nlink == 1:  # it had to be copied
                shutil.copystat(source, path)
                workspace_git.give(path, self.owner, 0o644)


def _key(below: Sequence[StoredTree], told: str) -> str:
    """Return a key that ends as that of the tree does: whoever stands on the commit keeps both."""
    digest = hashlib.sha256(f"{below[0].key} {told}".encode()).hexdigest()[:40]
    return f"lfs-{digest}-{below[0].key.rpartition('-')[2]}"
