"""The library's reference says what the code says: names, parameters, defaults, limits, errors, statuses."""

from __future__ import annotations

import importlib
import inspect
import re
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

import dynflow
from dynflow import errors
from dynflow.binding import WorkflowBinding, WorkflowInstance
from dynflow.engines import Limits
from dynflow.errors import DynflowError, IllegalMoveError
from dynflow.instance import Move, may
from dynflow.isolates import IsolateLimits
from dynflow.isolates.confinement import WALLS
from dynflow.step_config import StepConfig
from dynflow.types import HISTORY_TYPES, Status

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
SIGNATURES = [
    line
    for block in re.findall(r"^```signature\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
WORDS = {
    "IsolateLimits": IsolateLimits,
    "UTC": UTC,
    "WALLS": WALLS,
    "datetime": datetime,
    "timedelta": timedelta,
}
"""What defaults are written with."""
PUBLIC: list[str] = vars(dynflow)["__all__"]


@cache
def resolve(path: str) -> Any:
    """Return what a dotted name names: modules first, then attributes."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:number]))
    return found


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Return name, kind and default of each parameter but `self`."""
    found = inspect.signature(function).parameters.values()
    return [
        (each.name, each.kind, {} if repr(each.default) == "<factory>" else each.default)
        for each in found
        if each.name != "self"
    ]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    section = REFERENCE.split(f"# {heading}\n", 1)[1]
    table = re.search(r"^\|.*?\n\n", section, re.MULTILINE | re.DOTALL)
    assert table is not None
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:] if line
    ]


@pytest.mark.parametrize("line", SIGNATURES)
def test_signatures_are_those_of_the_code(line: str) -> None:
    found = re.fullmatch(r"(async )?([\w.]+)\((.*)\)", line)
    assert found is not None
    is_async, path, documented = found.groups()
    target = resolve(path)
    namespace: dict[str, Any] = {}
    exec(f"def written({documented}): ...", dict(WORDS), namespace)
    assert parameters(namespace["written"]) == parameters(target)
    assert bool(is_async) == inspect.iscoroutinefunction(target)


def test_names_with_their_module_exist() -> None:
    for name in re.findall(r"`(dynflow(?:\.\w+)+)`", REFERENCE):
        resolve(name)


def test_every_public_name_is_there() -> None:
    assert [name for name in PUBLIC if name not in REFERENCE] == []


@pytest.mark.parametrize("cls", [WorkflowBinding, WorkflowInstance, dynflow.WorkflowStep])
def test_every_public_method_is_there(cls: type) -> None:
    internal = {"for_metadata"}
    methods = {name for name, value in vars(cls).items() if inspect.isfunction(value) and name[0] != "_"}
    assert {name for name in methods - internal if f"{cls.__name__}.{name}(" not in REFERENCE} == set()


def test_the_config_has_these_defaults() -> None:
    plain = StepConfig().as_plain()
    flat = {f"retries.{key}": value for key, value in plain.pop("retries").items()} | plain
    written = {key.strip("`"): eval(default.strip("`"), dict(WORDS)) for key, default, _ in rows("Config")}
    assert written == flat


def test_every_limit_is_explained() -> None:
    explained = [name.strip("`") for name, _, _ in rows("Limits")]
    assert explained == [*Limits.__dataclass_fields__, *IsolateLimits.__dataclass_fields__]


def test_every_error_is_there_with_its_code() -> None:
    known = {
        (name if name in PUBLIC else f"dynflow.errors.{name}"): cls.code
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, DynflowError)
    }
    assert {name.strip("`"): code.strip("`") for name, code, _ in rows("Errors")} == known


def test_every_parameter_of_the_engine_is_explained() -> None:
    engine = resolve("dynflow.engines.embedded.EmbeddedEngine")
    assert {name.strip("`") for name, _ in rows("Engine")} == {name for name, _, _ in parameters(engine)}


def edges() -> set[tuple[str, str]]:
    """The edges of the state diagram."""
    return set(re.findall(r"^    (\S+) --> (\S+)$", REFERENCE, re.MULTILINE))


def test_every_edge_of_the_diagram_is_explained() -> None:
    explained = [tuple(part.strip("` ") for part in edge.split("→")) for edge, _ in rows("Statuses")]
    assert len(explained) == len(set(explained))
    assert set(explained) == edges()
    assert {status for edge in edges() for status in edge} - {"[*]"} == set(get_args(Status))


def test_the_diagram_allows_what_the_engine_allows() -> None:
    def allowed(move: Move, status: Status) -> bool:
        try:
            return may(move, status, "x")
        except IllegalMoveError:
            return False

    targets: dict[Move, set[str]] = {
        "pause": {"paused", "waiting_for_pause"},
        "resume": {"queued", "running"},
        "terminate": {"terminated"},
    }
    explained = {tuple(part.strip("` ") for part in edge.split("→")): text for edge, text in rows("Statuses")}
    for move, reached in targets.items():
        drawn = {
            source
            for (source, target), text in explained.items()
            if target in reached and f"`{move}`" in text
        }
        assert drawn == {status for status in get_args(Status) if allowed(move, status)}, move


def test_every_history_event_is_there() -> None:
    source = "".join(path.read_text() for path in (ROOT / "dynflow" / "engines" / "embedded").glob("*.py"))
    told = set(re.findall(r"[\"'+]((?:workflow|step|attempt|sleep|wait)\.[a-z_]+)(?=[\"'+])", source))
    assert len(told) > 10
    written = set(re.findall(r"`((?:workflow|step|attempt|rollback|sleep|wait)\.\w+)`", REFERENCE))
    assert told - written == set()


def test_the_history_events_that_are_documented_are_those_that_can_be_asked_for() -> None:
    section = REFERENCE.split("### History events\n", 1)[1].split("\n## ", 1)[0]
    table = "".join(line for line in section.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`((?:workflow|step|attempt|rollback|sleep|wait)\.\w+)`", table)) == HISTORY_TYPES
