"""Documentation that fails the build: docstrings, code blocks, commands, links."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ci_platform.cli import main as command_line

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def blocks(language: str) -> Iterator[tuple[str, str, str]]:
    """Yield where, extra words of the fence, and text of every code block in this language."""
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                yield f"{page.relative_to(ROOT)}:{line}", match[2].strip(), match[3]


def anchor(heading: str) -> str:
    """Return the anchor that a forge gives a heading."""
    words = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    broken = []
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists():
            broken.append(target)
        elif fragment and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
            if fragment not in map(anchor, headings):
                broken.append(target)
    assert broken == []


@pytest.mark.parametrize(("where", "extra", "code"), [pytest.param(*b, id=b[0]) for b in blocks("python")])
def test_python_in_the_documentation_runs(where: str, extra: str, code: str) -> None:
    """Blocks are executed; one whose fence says `python no-run` is only compiled."""
    compiled = compile(code, where, "exec")
    if "no-run" not in extra:
        exec(compiled, {"__name__": "documentation"})


@pytest.mark.parametrize(("where", "extra", "text"), [pytest.param(*b, id=b[0]) for b in blocks("console")])
def test_commands_in_the_documentation_exist(where: str, extra: str, text: str) -> None:
    for line in text.splitlines():
        if line.startswith("$ "):
            check_command(shlex.split(line[2:], comments=True))


def check_command(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0].startswith("scripts/"):
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    if words[0] not in {"scripts/run", "dynflow"}:
        return
    command: click.Command = command_line
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.commands.get(rest[0])
        assert found is not None, f"dynflow has no command {rest[0]!r}"
        command, rest = found, rest[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("-"):
            assert word.partition("=")[0] in options | {"--help", "--version"}, f"{words}: no option {word}"


def test_public_names_have_docstrings() -> None:
    """Modules, classes and functions; a method that fulfils a documented contract needs none of its own."""
    missing = []
    for package in ("dynflow", "pipelines", "ci_platform"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "demo_repository" in path.parts:
                continue
            tree = ast.parse(path.read_text())
            where = str(path.relative_to(ROOT))
            if tree.body and ast.get_docstring(tree) is None:
                missing.append(where)
            missing += [
                f"{where}:{node.lineno} {node.name}"
                for node in tree.body
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node) is None
            ]
    assert missing == []


def test_every_test_that_the_security_page_names_exists() -> None:
    existing = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in (file.name, *re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE))
    }
    named = re.findall(r"`(?:tests/[\w/]*/)?(test_\w+(?:\.py)?)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 100
    assert [name for name in named if name not in existing] == []


def test_every_command_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "command-line.md").read_text()
    assert [name for name in command_line.commands if f"`dynflow {name}" not in reference] == []


def test_every_path_of_the_api_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "http-api.md").read_text()
    paths = [
        re.sub(r":\w+}", "}", path)
        for file in (ROOT / "ci_platform" / "api").glob("*.py")
        for path in re.findall(r'@(?:get|post|delete)\(\s*"([^"]+)"', file.read_text())
    ]
    assert len(paths) > 10
    assert [path for path in paths if path not in reference] == []


def test_the_rules_for_workflows_are_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    rules = reference.split("### Rules for workflows\n")[1].split("\n## ")[0]
    for word in (
        "side effects",
        "clock",
        "random",
        "uuid",
        "deterministic",
        "idempotent",
        "Race inside of one step",
    ):
        assert word in rules


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs" / "adr").glob("[0-9]*.md")]
    assert [name for name in pages if name not in index] == []


def test_every_dependency_is_explained() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    declared = set(re.findall(r'^    "([A-Za-z0-9_-]+)(?:\[\w+\])?>=', project, re.MULTILINE))
    explained = (ROOT / "docs" / "dependencies.md").read_text().lower()
    assert {
        name for name in declared if name.lower() not in explained and not name.startswith("types-")
    } == set()
