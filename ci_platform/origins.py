"""What a workspace was forked from, as its file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ci_platform.cones import Cone
from ci_platform.submodules import Module


@dataclass(frozen=True, slots=True)
class Origin:
    """What a workspace was forked from. `git` names the `.git` that it got.

    `snapshot` is another workspace and a snapshot of it, where it began as that. With `submodules` these are in it,
    `modules` says which, `layer` names what has their files; with `lfs` files that LFS keeps.
    """

    repo: str
    sha: str
    cone: Cone | None = None
    alone: bool = False
    git: str | None = None
    snapshot: str | None = None
    submodules: bool = False
    lfs: bool = False
    modules: tuple[Module, ...] = ()
    layer: str | None = None

    def asked(self) -> Origin:
        """Return what was asked for, without what was found."""
        return replace(self, git=None, modules=(), layer=None)

    def __str__(self) -> str:
        more = [name for name in ("submodules", "lfs") if getattr(self, name)]
        sparse = f", sparse={list(self.cone.folders)}" if self.cone is not None else ""
        snapshot = f", snapshot {self.snapshot}" if self.snapshot else ""
        return f"{self.repo} at {self.sha}{sparse}{snapshot}" + "".join(f", {name}" for name in more)

    def as_json(self) -> dict[str, Any]:
        """Return what a workspace's file says."""
        sparse = None if self.cone is None else list(self.cone.folders)
        fields = {"repo": self.repo, "sha": self.sha, "sparse": sparse, "alone": self.alone}
        fields |= {"git": self.git, "snapshot": self.snapshot, "submodules": self.submodules, "lfs": self.lfs}
        return fields | {"modules": [module.as_json() for module in self.modules], "layer": self.layer}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Origin:
        """Read what `as_json` returned, in this release or one before."""
        sparse = record.get("sparse")
        cone = None if sparse is None else Cone(tuple(sparse))
        alone, git, snapshot = bool(record.get("alone")), record.get("git"), record.get("snapshot")
        return cls(
            record["repo"],
            record["sha"],
            cone,
            alone,
            git,
            snapshot,
            submodules=bool(record.get("submodules")),
            lfs=bool(record.get("lfs")),
            modules=tuple(Module.from_json(each) for each in record.get("modules", ())),
            layer=record.get("layer"),
        )
