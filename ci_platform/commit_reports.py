"""What a command changed, and where it overruled a parallel one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ci_platform import layer_conflicts
from ci_platform.stacks import Layer, LayerAuthor


@dataclass(frozen=True, slots=True)
class Conflict:
    """A path that a command left different from another one (`other`) which started from the same files."""

    path: str
    other: LayerAuthor


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a command changed: number of paths, bytes, and where it overruled a parallel command.

    The later commit wins; the log should say so. `order` is None where nothing changed and no layer was made.
    """

    order: int | None
    paths: int = 0
    size: int = 0
    conflicts: tuple[Conflict, ...] = ()


def conflicts_with(upper: Path, siblings: Sequence[Layer]) -> tuple[Conflict, ...]:
    """Return where a layer and parallel ones that were committed before it differ."""
    if not siblings:
        return ()
    mine = layer_conflicts.scan(upper)
    return tuple(
        Conflict(path, sibling.author)
        for sibling in siblings
        for tree in sibling.trees
        for path in layer_conflicts.find(upper, mine, tree, layer_conflicts.scan(tree))
    )


def describe(report: CommitReport) -> str:
    """Return a line for the log that says where a command overruled parallel ones; empty where it did not."""
    if not report.conflicts:
        return ""
    # A tenant chooses the names of files: a line end in one must not begin a line of the platform's.
    paths = sorted({conflict.path for conflict in report.conflicts})
    shown = ", ".join(path if path.isprintable() else ascii(path) for path in paths[:10])
    others = ", ".join(sorted({conflict.other.step for conflict in report.conflicts}))
    more = len(paths) - 10
    return f"changed differently by {others}; this command's version stays: {shown}" + (
        f" and {more} more" if more > 0 else ""
    )
