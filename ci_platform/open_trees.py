"""The trees that commands are using, and what a later process has to know of one that outlives ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ci_platform import copy_on_write
from ci_platform.hydration import mounts
from ci_platform.hydration.mounts import LazyLower
from ci_platform.sandboxes import Tree
from ci_platform.stacks import LayerAuthor

LOOKER = LayerAuthor("", 0, 0)
"""Who has a tree open to look at it: no step."""


@contextlib.contextmanager
def letting_go_of(hold: LazyLower | None) -> Iterator[None]:
    """Let go of a lazy tree if the block fails."""
    try:
        yield
    except BaseException:
        if hold is not None:
            hold.close()
        raise


@dataclass(frozen=True, slots=True)
class OpenTree:
    """A tree that a command is using. `seen` is the order of the newest layer below it.

    `hold` is what the last of `lowers` is mounted from, where that is not on disk.
    """

    workspace_id: str
    folder: Path
    author: LayerAuthor
    seen: int
    on: tuple[int, ...]
    lowers: tuple[Path, ...]
    stamps: copy_on_write.Stamps | None = None
    hold: LazyLower | None = None

    @property
    def tree(self) -> Tree:
        """What sandboxes get of it, where layers are mounted."""
        return Tree(self.folder / "tree", self.folder / "work", self.lowers, self.hold)

    @property
    def is_here(self) -> bool:
        """Whether all its folders are."""
        return all(path.is_dir() for path in (self.tree.upper, *self.lowers))

    def is_of(self, workspace: Path) -> bool:
        """Whether it is a tree of the workspace in this folder, or stands on files in it."""
        return self.workspace_id == workspace.name or any(workspace in lower.parents for lower in self.lowers)

    @property
    def is_view(self) -> bool:
        """Whether somebody only looks at it."""
        return self.author == LOOKER

    def as_plain(self) -> dict[str, Any]:
        """Return it as JSON takes it; without stamps, which only copies have."""
        plain = asdict(replace(self, stamps=None, hold=None))
        plain |= {"folder": str(self.folder), "lowers": [str(lower) for lower in self.lowers]}
        del plain["stamps"]
        return plain | {"hold": None if self.hold is None else str(self.hold.folder)}

    @staticmethod
    def from_plain(told: Mapping[str, Any]) -> OpenTree | None:
        """Return what `as_plain` was of; None where it was lazy and is lost."""
        hold = None if told.get("hold") is None else mounts.find(Path(told["hold"]))
        if hold is None and told.get("hold") is not None:
            return None
        return OpenTree(
            told["workspace_id"],
            Path(told["folder"]),
            LayerAuthor(**told["author"]),
            told["seen"],
            tuple(told["on"]),
            tuple(Path(lower) for lower in told["lowers"]),
            hold=hold,
        )
