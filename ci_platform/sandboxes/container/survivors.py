"""Commands in containers that go on while the platform is away: what is written down to find them again.

In the folder that the platform keeps for a command stands which execution in which container it is; in the
container's place, a mark with that folder's name says that the sweep has to spare it.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import docker
from docker.errors import NotFound

from ci_platform.sandboxes import StopReason
from ci_platform.sandboxes.container import places
from ci_platform.sandboxes.container.places import Place
from ci_platform.sandboxes.container.tails import KILLED

_RECORD = "container.json"

_BEGINS_WITHIN = 5.0
"""Seconds from writing down a command to its beginning: it takes milliseconds, unless the platform was killed."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A command: the `number`th in its container, and the execution's id, "" where an agent runs it.

    `began` is in seconds since 1970.

    `code` is None as long as it runs; then `reason` and `seconds` say how it ended.
    """

    container: str
    pid: int
    place: str
    number: int
    execution: str
    began: float
    code: int | None = None
    reason: StopReason = "exited"
    seconds: float = 0.0


def write(folder: Path, survivor: Survivor) -> None:
    """Write down a command, or how it has ended."""
    (Path(survivor.place) / f"{survivor.number}.mark").write_text(str(folder))
    new = folder / f"{_RECORD}.new"
    new.write_text(json.dumps(asdict(survivor)))
    new.replace(folder / _RECORD)


def read(folder: Path) -> Survivor | None:
    """Return the command of a folder, None where there is none or its container's place is gone."""
    try:
        survivor = Survivor(**json.loads((folder / _RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return survivor if Place(Path(survivor.place)).output.is_dir() else None


def forget(folder: Path, survivor: Survivor) -> None:
    """Forget a command: from now on it is not found, and nothing of it is spared."""
    with contextlib.suppress(OSError):
        (folder / _RECORD).unlink()
    with contextlib.suppress(OSError):
        (Path(survivor.place) / f"{survivor.number}.mark").unlink()


def of_place(place: Path) -> list[Survivor]:
    """Return the commands of a place that may still be asked for."""
    found = []
    for mark in place.glob("*.mark"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found.append(read(Path(mark.read_text())))
    return [each for each in found if each is not None and Path(each.place) == place]


def ended(client: docker.DockerClient, survivor: Survivor) -> Survivor | None:
    """Look whether a command has ended: returns it with its exit code if so, as it is if not.

    None where it has never begun, or nothing is known of it any more. Blocks for a few milliseconds.
    """
    if not survivor.execution:
        return _ended_by_agent(survivor)
    try:
        state = client.api.exec_inspect(survivor.execution)
    except NotFound:
        # The engine forgets an execution some minutes after its end.
        code = Place(Path(survivor.place)).written_end(survivor.number)
        return None if code is None else replace(survivor, code=code)
    if state["Running"]:
        return survivor
    return None if state["ExitCode"] is None else replace(survivor, code=int(state["ExitCode"]))


def _ended_by_agent(survivor: Survivor) -> Survivor | None:
    place = Place(Path(survivor.place))
    runs = places.processes(survivor.container, survivor.pid) > 0  # asked first: what it writes last counts
    begun, code = place.written(survivor.number)
    if code is not None:
        return replace(survivor, code=code)
    if not runs:
        return replace(survivor, code=KILLED)
    return survivor if begun or time.time() < survivor.began + _BEGINS_WITHIN else None
