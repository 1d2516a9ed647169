"""What this machine offers, found by trying, and what to do about what it does not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import anyio.to_thread
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ci_platform import copy_on_write, engines, isolation
from ci_platform.assembly import make_sandboxes
from ci_platform.errors import PlatformError
from ci_platform.garbage.stores import room_of
from ci_platform.settings import Settings, make_data_folder
from ci_platform.source import hydrating
from dynflow.errors import FacetUnavailableError, IsolateError, StorageError
from dynflow.facets import Facets
from dynflow.isolates import describe_walls
from dynflow.isolates.confinement import ESSENTIAL, WALLS

State = Literal["good", "fair", "bad", "note"]

_MARKS: dict[State, tuple[str, str]] = {
    "good": ("✓", "green"),
    "fair": ("!", "yellow"),
    "bad": ("✗", "red"),
    "note": ("·", "bright_black"),
}
# Mirrors, trees and layers of a few repositories; below it runs fail in ways that are no fun to explain.
_LITTLE_DISK = 5 * 1024**3
_OLD_GIT = (2, 31)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `state`: `good`, `fair` (works, could be better), `bad` (does not work), `note`."""

    area: str
    name: str
    value: str
    state: State = "note"
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


async def examine(settings: Settings) -> list[Finding]:
    """Try everything that a run needs. Leaves nothing behind but the data folder."""
    make_data_folder(settings)
    findings = [*_machine(), _git(), *_disk(settings)]
    findings += await _isolates(settings)
    findings += await _facets()
    findings += await anyio.to_thread.run_sync(_workspaces, settings)
    findings += await engine_findings(settings)
    for kind, sandbox in make_sandboxes(settings).items():
        described = await anyio.to_thread.run_sync(sandbox.describe)
        findings += _sandbox(kind, described)
    return findings


def _machine() -> Iterator[Finding]:
    user = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    yield Finding("machine", "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("machine", "user", user)
    yield Finding("machine", "Python", platform.python_version(), "good")


def _git() -> Finding:
    advice = "apt-get install git"
    try:
        text = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return Finding("machine", "git", "not found", "bad", advice)
    version = text.removeprefix("git version ")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    old = numbers < _OLD_GIT
    return Finding("machine", "git", version, "fair" if old else "good", "2.31 or newer" if old else "")


def _disk(settings: Settings) -> Iterator[Finding]:
    yield Finding("machine", "data folder", str(settings.data))
    free = shutil.disk_usage(settings.data).free
    state: State = "good" if free >= _LITTLE_DISK else "fair"
    advice = "" if state == "good" else "runs need room for mirrors, trees and layers"
    if shortage := room_of(settings).shortage():
        state, advice = "bad", f"new runs wait for {shortage}; dynflow gc says what can go"
    yield Finding("machine", "free disk", f"{free / 1024**3:.1f} GiB", state, advice)


async def _isolates(settings: Settings) -> list[Finding]:
    try:
        found = await anyio.to_thread.run_sync(describe_walls)
    except (IsolateError, OSError) as error:
        return [Finding("isolates", "walls", f"cannot be tried: {error}", "bad")]
    walls = [_wall(name, meaning, found[name]) for name, meaning in WALLS.items()]
    standing = tuple(name for name in WALLS if found[name].startswith("up"))
    missing = isolation.missing_walls(standing)
    if settings.unsafe_no_isolation:
        # What was asked for by name is no reason to fail, but to say so each time.
        walls = [replace(each, state="fair") if each.state == "bad" else each for each in walls]
        walls.append(Finding("isolates", isolation.FLAG, isolation.warning(missing), "fair"))
    elif missing:
        advice = f"where every pipeline is trusted with all that this user can do: {isolation.FLAG}"
        walls.append(Finding("isolates", "pipelines", "cannot run here", "bad", advice))
    return walls


async def _facets() -> list[Finding]:
    """Say which walls stand around processes that run SQL of tenants."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            async with Facets(folder) as facets:
                standing = await facets.walls()
        except (FacetUnavailableError, OSError) as error:
            return [Finding("facets", "SQL of tenants", f"cannot be run: {error}", "fair")]
    found = [
        Finding("facets", "limits", "memory, time and file size of SQL have an end", "good"),
        Finding("facets", "landlock", "SQL reaches its own folder and nothing else", "good"),
    ]
    advice = "should SQL get out of SQLite, it reads what this user can"
    missing = Finding("facets", "landlock", "missing on this kernel", "fair", advice)
    return [each if each.name in standing else missing for each in found]


def _wall(name: str, meaning: str, found: str) -> Finding:
    if found == "up":
        return Finding("isolates", name, meaning, "good")
    if found.startswith("up"):
        return Finding(
            "isolates", name, f"{meaning}; {found.removeprefix('up').strip(' ,(').rstrip(')')}", "good"
        )
    state: State = "bad" if name in ESSENTIAL else "fair"
    return Finding("isolates", name, found, state, meaning)


async def engine_findings(settings: Settings) -> list[Finding]:
    """Say what is found of the server that keeps runs, where one does."""
    if settings.engine == "embedded":
        return []
    try:
        found = await engines.temporal().examine_server(settings)
    except (PlatformError, StorageError) as error:
        return [Finding("engine", "temporal", str(error), "bad")]
    return [Finding("engine", each.name, each.value, each.state, each.advice) for each in found]


def _workspaces(settings: Settings) -> Sequence[Finding]:
    forced = None if settings.copy_on_write == "auto" else settings.copy_on_write
    try:
        method = copy_on_write.probe(settings.workspaces_path, forced)
    except PlatformError as error:
        return [Finding("workspaces", "copy-on-write", str(error), "bad")]
    state: State = "good" if method.mounts else "fair"
    advice = (
        "" if method.mounts else "an overlay filesystem makes commands start faster and keeps disk use low"
    )
    found = [Finding("workspaces", "copy-on-write", method.name, state, advice)]
    found.append(_lazy_trees(settings, method.name))
    return [*found, *(Finding("workspaces", f"not {name}", why) for name, why in method.refused.items())]


def _lazy_trees(settings: Settings, method: str) -> Finding:
    """Say whether the first command of a large commit need not wait until its files are written."""
    why = "lazy_trees=false" if not settings.lazy_trees else None
    why = why or ("needs overlay" if method != "overlay" else hydrating.unavailable())
    if why is None:
        return Finding("workspaces", "lazy trees", "large commits are used before they are on disk", "good")
    advice = "the first command of a large commit waits until all its files are written"
    return Finding("workspaces", "lazy trees", f"not here: {why}", "note", advice)


def _sandbox(kind: str, described: Mapping[str, str]) -> Iterator[Finding]:
    for name, value in described.items():
        lacking = any(sign in value for sign in ("NOT ", "none answers", "missing"))
        yield Finding(f"sandbox {kind}", name, value, "fair" if lacking else "good")


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print a table, and what to do."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    area = ""
    for finding in findings:
        mark, style = _MARKS[finding.state]
        text = Text(finding.value)
        if finding.advice:
            text.append(f"  ({finding.advice})", style="bright_black")
        table.add_row(finding.area if finding.area != area else "", Text(mark, style), finding.name, text)
        area = finding.area
    console.print(table)
    bad = [finding for finding in findings if finding.state == "bad"]
    if bad:
        console.print(f"{len(bad)} thing(s) that runs need are missing.", style="red")
    else:
        console.print("Everything that runs need is here.", style="green")
