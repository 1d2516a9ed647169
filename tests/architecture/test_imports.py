"""Who may import whom, as a table. A new arrow fails here first; change the table and say why in an ADR."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dynflow", "pipelines", "ci_platform")

MAY_IMPORT = {
    "dynflow": ("dynflow",),
    "pipelines": (
        "pipelines",
        "dynflow.workflow",
        "dynflow.errors",
        "dynflow.types",
        "dynflow.durations",
        "dynflow.serialization",
    ),
    "ci_platform": ("ci_platform", "dynflow", "pipelines.contract"),
}
"""Of our own modules. A name covers the module and everything below it."""

DOORS = {
    "litestar": ("ci_platform.app", "ci_platform.api", "ci_platform.web"),
    "sqlmodel": ("ci_platform.model", "ci_platform.store"),
    "sqlalchemy": ("ci_platform.model", "ci_platform.store", "ci_platform.migrations"),
    "alembic": ("ci_platform.store", "ci_platform.migrations"),
    "cryptography": ("ci_platform.encryption",),
    "docker": ("ci_platform.sandboxes.container",),
    "pygit2": ("ci_platform.source", "ci_platform.forges.local"),
    "github": ("ci_platform.forges.github",),
    "sqlite3": ("dynflow.engines.embedded", "dynflow.facets"),
    "google": ("dynflow.engines.temporal",),  # protobuf: what Temporal's calls are made of
    "temporalio": ("dynflow.engines.temporal",),
    "boto3": ("ci_platform.blobs.s3",),
    "uvicorn": ("ci_platform.serving",),
    "click": ("ci_platform.cli", "ci_platform.options"),
    "rich": (
        "ci_platform.cli",
        "ci_platform.demo",
        "ci_platform.doctor",
        "ci_platform.here",
        "ci_platform.terminal",
    ),
    "httpx": ("ci_platform.client",),
    "jinja2": ("ci_platform.web",),
    "markupsafe": ("ci_platform.web",),
    "seccomp": ("dynflow.isolates.confinement",),
}
"""Which modules may import a library: one door each."""

ANYWHERE = {"anyio", "pydantic", "msgspec"}
"""Libraries that are part of the language here: no door."""

IMPLEMENTATIONS = (
    "dynflow.engines.embedded",
    "dynflow.engines.temporal",
    "dynflow.isolates.loader",
    "dynflow.isolates.trusted",
    "ci_platform.forges.github",
    "ci_platform.forges.local",
    "ci_platform.sandboxes.isolate",
    "ci_platform.sandboxes.container",
    "ci_platform.blobs.filesystem",
    "ci_platform.blobs.s3",
)
"""Chosen in one place: imported by the assembly, by their own package and by tests alone."""

CHOOSERS = (
    "ci_platform.assembly",
    "ci_platform.backup",
    "ci_platform.engines",
    "ci_platform.temporal_engine",
    "dynflow.testing",
)

STDLIB_ONLY = (
    "dynflow",
    "dynflow.durations",
    "dynflow.errors",
    "dynflow.failure",
    "dynflow.isolates.confinement",
    "dynflow.isolates.determinism",
    "dynflow.isolates.frames",
    "dynflow.isolates.guest",
    "dynflow.isolates.guest_http",
    "dynflow.isolates.guest_loop",
    "dynflow.isolates.guest_output",
    "dynflow.isolates.guest_steps",
    "dynflow.isolates.heap",
    "dynflow.isolates.modules",
    "dynflow.isolates.practice",
    "dynflow.isolates.proxies",
    "dynflow.isolates.remotes",
    "dynflow.isolates.seccomp",
    "dynflow.isolates.stubs",
    "dynflow.isolates.syscalls",
    "dynflow.isolates.wire",
    "dynflow.isolates.worker",
    "dynflow.isolates.zygote",
    "dynflow.outbound",
    "dynflow.serialization",
    "dynflow.types",
    "dynflow.workflow",
    "pipelines",
    "pipelines.commands",
    "pipelines.contract",
)
"""They are loaded inside isolates, where nothing else is."""

LAZY_NAMES = ("dynflow",)
"""A package whose names are resolved on first use shows them to type checkers in its `.pyi`."""


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_top: bool


def covers(allowed: tuple[str, ...], module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    own = [path for path in paths if "demo_repository" not in path.parts]
    return {module_name(path): ast.parse(path.read_text(), str(path)) for path in own}


def imports(name: str) -> Iterator[Import]:
    tree, known = modules()[name], modules()
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in top)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            source = node.module or ""
            for alias in node.names:
                # `from package import module` is an arrow to the module, not to its package.
                whole = f"{source}.{alias.name}"
                yield Import(whole if whole in known else source, node.lineno, id(node) in top)


def ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def every_import() -> Iterator[tuple[str, Import]]:
    for name in modules():
        for item in imports(name):
            yield name, item


def test_packages_know_only_what_lies_below_them() -> None:
    wrong = [
        f"{name}:{item.line} imports {item.module}"
        for name, item in every_import()
        if ours(item.module) and not covers(MAY_IMPORT[name.split(".")[0]], item.module)
    ]
    assert wrong == []


def test_each_library_comes_in_through_its_door() -> None:
    wrong = []
    for name, item in every_import():
        library = item.module.split(".")[0]
        if ours(library) or library in ANYWHERE:
            continue
        if library in DOORS:
            if not covers(DOORS[library], name):
                wrong.append(f"{name}:{item.line} imports {library}, which belongs to {DOORS[library]}")
        elif library not in sys.stdlib_module_names:
            wrong.append(f"{name}:{item.line} imports {library}, which has no door in DOORS")
    assert wrong == []


def test_only_the_assembly_chooses_implementations() -> None:
    wrong = [
        f"{name}:{item.line} imports {item.module}"
        for name, item in every_import()
        if covers(IMPLEMENTATIONS, item.module)
        and name not in CHOOSERS
        and name.rpartition(".")[0] != item.module.rpartition(".")[0]
        and not item.module.startswith(f"{name}.")  # a package of several modules is its own
    ]
    assert wrong == []


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_what_runs_inside_isolates_needs_only_the_standard_library(name: str) -> None:
    if name not in modules():
        pytest.fail(f"{name} is gone: update STDLIB_ONLY")
    wrong = [
        f"{name}:{item.line} imports {item.module}"
        for item in imports(name)
        if not (
            covers(STDLIB_ONLY[1:], item.module)
            if ours(item.module)
            else item.module.split(".")[0] in sys.stdlib_module_names
        )
    ]
    assert wrong == []


def test_nothing_is_pickled() -> None:
    """What isolates and files hold is hostile: reading it must not run it."""
    forbidden = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"}
    found = {
        (name, each.module) for name, each in every_import() if each.module.partition(".")[0] in forbidden
    }
    assert found == set()


def test_there_is_no_type_checking_loophole() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING")
        or (isinstance(node, ast.Attribute) and node.attr == "TYPE_CHECKING")
    ]
    assert wrong == []


def test_imports_stand_at_the_top_of_a_module() -> None:
    """An import inside of a function hides a cycle; the command line may be lazy, for its start-up time."""
    wrong = [
        f"{name}:{item.line} imports {item.module}"
        for name, item in every_import()
        if not item.at_top
        and ours(item.module)
        and name not in LAZY_NAMES
        and not covers(("ci_platform.cli",), name)
    ]
    assert wrong == []


def test_there_are_no_cycles() -> None:
    graph = {
        name: {item.module for item in imports(name) if item.at_top and item.module in modules()} - {name}
        for name in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_broad_handlers_stand_at_the_doors_or_are_justified_on_their_line() -> None:
    wrong = []
    for name, tree in modules().items():
        lines = Path(_file(name)).read_text().splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                continue  # it cleans up, or says more, and passes the error on
            caught = ast.unparse(node.type) if node.type is not None else "everything"
            if (
                caught in {"Exception", "BaseException", "everything"}
                and "noqa: BLE001 - " not in lines[node.lineno - 1]
            ):
                wrong.append(f"{name}:{node.lineno} catches {caught}")
    assert wrong == []


def _file(name: str) -> Path:
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
