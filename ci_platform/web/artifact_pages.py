"""The page of an artifact: what is in its folders, each file to be downloaded."""

from __future__ import annotations

from litestar import Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery

from ci_platform.artifacts import Artifacts
from ci_platform.artifacts.contents import MOST_LISTED, listing
from ci_platform.runs import Runs
from ci_platform.web.render import AnyRequest, Pages, query


@get("/runs/{run_id:str}/artifacts/{name:str}", opt={"scope": "read"})
async def artifact_page(
    *,
    request: AnyRequest,
    run_id: FromPath[str],
    name: FromPath[str],
    pages: NamedDependency[Pages],
    runs: NamedDependency[Runs],
    artifacts: NamedDependency[Artifacts],
    path: FromQuery[str] = "",
) -> Response[str]:
    """Show a folder of an artifact."""
    run, folder = await runs.summary(run_id), path.strip("/")
    async with artifacts.opened(run_id, name) as opened:
        files, row = listing(opened.entries, folder), opened.row
    here, download = (
        f"/runs/{run_id}/artifacts/{row.name}",
        f"/api/v1/runs/{run_id}/artifacts/{row.name}/download",
    )
    lines = []
    for each in files:
        at = f"{folder}/{each.name}" if folder else each.name
        leads = {"folder": query(here, {"path": at}), "symlink": None}.get(
            each.kind, query(download, {"path": at})
        )
        lines.append((each, leads))
    parts = folder.split("/") if folder else []
    above = [
        (part, query(here, {"path": "/".join(parts[: number + 1])})) for number, part in enumerate(parts)
    ]
    return pages.render(
        request,
        "artifact.html",
        section="runs",
        run=run,
        artifact=row,
        lines=lines,
        is_cut=len(files) >= MOST_LISTED,
        above=[(row.name, here), *above],
        downloads=[(form, query(download, {"format": form})) for form in ("zip", "tar")],
    )
