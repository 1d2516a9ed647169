"""What the workspaces of runs that have not ended are made of, and will be made of again when these go on."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio.to_thread

from ci_platform.garbage.workspaces import OpenRuns, origin_of, stacks
from ci_platform.source import Source
from ci_platform.workspaces import Workspaces


@dataclass(frozen=True, slots=True)
class Wanted:
    """What has to stay, found in the records of workspaces: nothing of it is looked at.

    `commits` are (repository, id), `layers` (repository, key) of trees, `mirrors` those of submodules by their names;
    `lfs` the commits with files that LFS keeps.
    """

    commits: set[tuple[str, str]] = field(default_factory=set)
    layers: set[tuple[str, str]] = field(default_factory=set)
    mirrors: set[str] = field(default_factory=set)
    lfs: set[tuple[str, str]] = field(default_factory=set)


async def wanted_by(workspaces: Workspaces, still_open: OpenRuns) -> Wanted:
    """Return what the workspaces of runs stand on that have not ended, also of those that wait for days."""
    run_ids = set(await still_open())

    def look() -> Wanted:
        found = Wanted()
        for stack in stacks(workspaces.root):
            if stack.folder.name.partition(".")[0] in run_ids and (origin := origin_of(stack)) is not None:
                found.commits.add((origin.repo, origin.sha))
                found.mirrors.update(module.store for module in origin.modules)
                if origin.layer is not None:
                    found.layers.add((origin.repo, origin.layer))
                if origin.lfs:
                    found.lfs.add((origin.repo, origin.sha))
        return found

    return await anyio.to_thread.run_sync(look)


async def without_lfs_layer(source: Source, wanted: Wanted) -> set[str]:
    """Return the repositories of which LFS's files are in no tree any more though a run will want them again.

    After the machine has been started again no tree counts, so that nothing links to the files.
    """
    if not wanted.lfs:
        return set()
    here = {(repo, tree.key.rpartition("-")[2]) for repo, tree in await source.trees() if tree.is_of_lfs}
    ids = await source.tree_ids(wanted.lfs)
    return {repo for repo, _ in wanted.lfs if any(name == repo for name, _ in ids - here)}
