"""A layer on top of a commit's tree: submodules with a `.git` of their own each. Blocking."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pygit2

from ci_platform import commit_trees, layers, submodules, workspace_git
from ci_platform.git_index import Recorder
from ci_platform.source import objects
from ci_platform.source.checkouts import BEFORE
from ci_platform.source.objects import Objects
from ci_platform.submodules import Module
from ci_platform.tree_store import TreeStore
from ci_platform.trees import Owner, TreeLimits, TreeWriter
from ci_platform.workspace_git import GitFolder

With = Callable[[str, Callable[[pygit2.Repository], int]], int]
"""Opens a repository by its name for the time of a call, and returns what that returns."""


@dataclass(slots=True)
class ModuleTrees:
    """The trees of a workspace's submodules: files, `.git/modules/…` and what git's configuration says of them.

    The layer depends on the submodules alone, so that workspaces of other commits share it.
    """

    store: TreeStore
    owner: Owner
    limits: TreeLimits
    opened: With

    def layer(
        self, repo: str, modules: Sequence[Module], folder: GitFolder, config: str, key: str | None = None
    ) -> Path:
        """Return the layer; `config` is what the workspace's own configuration says without them.

        Who has had it before names it by its `key`, by which it is kept from being collected.
        """
        if key is None:
            told = json.dumps([[module.as_json() for module in modules], config, folder.copied])
            key = f"modules-{hashlib.sha256(told.encode()).hexdigest()[:40]}"
        found = self.store.find(repo, key)
        return (
            found or self.store.build(repo, key, lambda scratch: self._fill(scratch, modules, folder, config))
        ).path

    def _fill(self, scratch: Path, modules: Sequence[Module], folder: GitFolder, config: str) -> int:
        tree, left = scratch / "tree", self.limits
        size = 0
        for module in modules:
            used = _Module(
                self, scratch, module, replace(folder, sha=module.sha, cone=None, alone=True), left
            )
            written = self.opened(module.store, used.write)
            size += written
            left = TreeLimits(left.files - used.files, left.size - written)
        _configure(tree / ".git", modules, "", config)
        for module in modules:
            git = tree / ".git" / module.folder
            _configure(git, modules, module.path, (git / "config").read_text(encoding="utf-8"))
        workspace_git.give(tree, self.owner, 0o755)
        workspace_git.hand_over(tree / ".git", self.owner)
        return size + sum(path.stat().st_size for path in (tree / ".git").rglob("*") if path.is_file())


def _configure(git: Path, modules: Sequence[Module], above: str, config: str) -> None:
    sections = [submodules.section(each.name, each.url) for each in modules if each.above == above]
    (git / "config").write_text(config + "".join(sections), encoding="utf-8")


@dataclass(slots=True)
class _Module:
    """One submodule that is being written."""

    trees: ModuleTrees
    scratch: Path
    module: Module
    folder: GitFolder
    limits: TreeLimits
    files: int = 0

    def write(self, opened: pygit2.Repository) -> int:
        """Write its files and its `.git`; return the bytes of the files."""
        found = objects.commit(opened, self.module.store, self.module.sha)
        tree = self.scratch / "tree"
        place, git = tree / self.module.path, tree / ".git" / self.module.folder
        self._make_folders(tree, place)
        recorder, modified_at = Recorder(found.tree_id.raw), time.time_ns() - BEFORE
        with TreeWriter(place, self.trees.owner, self.limits, recorder, modified_at=modified_at) as writer:
            commit_trees.write_tree(Objects(opened), found.tree_id.raw, writer)
        self.files = writer.files
        self._write_git(opened, recorder, git)
        with (git / "config").open("a", encoding="utf-8") as config:
            config.write(f"[core]\n\tworktree = {_quoted(os.path.relpath(place, git))}\n")
        link = place / ".git"
        link.write_text(f"gitdir: {os.path.relpath(git, place)}\n", encoding="utf-8")
        workspace_git.give(link, self.trees.owner, 0o644)
        return writer.size

    def _make_folders(self, tree: Path, place: Path) -> None:
        folder = tree
        for name in place.relative_to(tree).parts:
            folder /= name
            if not folder.is_dir():
                folder.mkdir()
                workspace_git.give(folder, self.trees.owner, 0o755)

    def _write_git(self, opened: pygit2.Repository, recorder: Recorder, git: Path) -> None:
        made, index = self.scratch / "made", self.scratch / "index"
        made.mkdir()
        recorder.finish()[0].write(index)
        repository = Path(opened.path)
        self.folder.write(made, repository, index, {}, "main")
        index.unlink()
        workspace_git.pack_objects(repository, made, self._parts(opened))
        git.parent.mkdir(parents=True, exist_ok=True)
        (made / ".git").rename(git)
        layers.remove_tree(made)

    def _parts(self, opened: pygit2.Repository) -> list[bytes]:
        found = objects.commit(opened, self.module.store, self.module.sha)
        inside = commit_trees.parts(Objects(opened), found.tree_id.raw, self.limits.files)
        return [found.id.raw, *inside]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
