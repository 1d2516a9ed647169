"""Snapshots: a workspace as it stood after each layer, and what failed commands left, to look at and to fork."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ci_platform.commit_reports import Conflict
from ci_platform.layer_pool import Part
from ci_platform.stacks import Layer, Stack

_MOST_CONFLICTS = 100
"""Of one layer that are written down; whether there were more is too."""


@dataclass(frozen=True, slots=True)
class Overruled:
    """A path that a layer left different from a parallel step's, which it overruled."""

    path: str
    step: str
    count: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of a workspace. `name` is how to ask for it: `0` is the fork, then layers, then `failed-…`.

    `step`, `count` and `attempt` say whose changes came last; `paths` and `size` (bytes of files) how much they
    are. `conflicts` are at most 100 of `conflict_count`.
    """

    workspace: str
    name: str
    outcome: Literal["forked", "committed", "failed"]
    step: str | None = None
    count: int = 1
    attempt: int = 1
    paths: int | None = None
    size: int | None = None
    at: datetime | None = None
    conflict_count: int = 0
    conflicts: tuple[Overruled, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """A snapshot's layers, topmost first: those of the workspace's `own`, and all down to the commit's tree."""

    own: tuple[Part, ...]
    lowers: tuple[Path, ...]


def layer_facts(
    paths: int, size: int, on: Collection[int], conflicts: Sequence[Conflict] = ()
) -> dict[str, Any]:
    """Return what a layer's file says beside its author. `on` are the orders of the layers that it saw."""
    some = [[each.path, each.other.step, each.other.count] for each in conflicts[:_MOST_CONFLICTS]]
    facts = {"paths": paths, "size": size, "on": list(on)}
    return facts | {"conflict_count": len(conflicts), "conflicts": some}


def snapshots_of(stack: Stack) -> list[Snapshot]:
    """Return a workspace's snapshots, oldest first, those of failed commands at the end."""
    stack.describe()
    layers = [_snapshot(stack, str(layer.order), "committed", layer) for layer in stack.layers()]
    failed = [_snapshot(stack, f"failed-{layer.place.name}", "failed", layer) for layer in stack.kept()]
    return [Snapshot(stack.folder.name, "0", "forked"), *layers, *failed]


def _snapshot(stack: Stack, name: str, outcome: Literal["committed", "failed"], layer: Layer) -> Snapshot:
    record: Mapping[str, Any] = layer.record
    modified = layer.modified_at
    return Snapshot(
        stack.folder.name,
        name,
        outcome,
        layer.author.step,
        layer.author.count,
        layer.author.attempt,
        record.get("paths"),
        record.get("size"),
        datetime.fromtimestamp(modified, UTC),
        record.get("conflict_count", 0),
        tuple(Overruled(*each) for each in record.get("conflicts", ())),
    )
