"""The trees that commands are using, and what a later process has to know of one that outlives ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ci_platform import copy_on_write
from ci_platform.sandboxes import Tree
from ci_platform.stacks import LayerAuthor


@dataclass(frozen=True, slots=True)
class OpenTree:
    """A tree that a command is using. `seen` is the order of the newest layer below it."""

    workspace_id: str
    folder: Path
    author: LayerAuthor
    seen: int
    on: tuple[int, ...]
    lowers: tuple[Path, ...]
    stamps: copy_on_write.Stamps | None = None

    @property
    def tree(self) -> Tree:
        """What sandboxes get of it, where layers are mounted."""
        return Tree(self.folder / "tree", self.folder / "work", self.lowers)

    def is_of(self, workspace: Path) -> bool:
        """Whether it is a tree of the workspace in this folder, or stands on a layer of its."""
        return self.workspace_id == workspace.name or any(workspace in lower.parents for lower in self.lowers)

    def as_plain(self) -> dict[str, Any]:
        """Return it as JSON takes it; without stamps, which only copies have."""
        plain = asdict(self) | {"folder": str(self.folder), "lowers": [str(lower) for lower in self.lowers]}
        del plain["stamps"]
        return plain

    @staticmethod
    def from_plain(told: Mapping[str, Any]) -> OpenTree:
        """Return what `as_plain` was of."""
        return OpenTree(
            told["workspace_id"],
            Path(told["folder"]),
            LayerAuthor(**told["author"]),
            told["seen"],
            tuple(told["on"]),
            tuple(Path(lower) for lower in told["lowers"]),
        )
