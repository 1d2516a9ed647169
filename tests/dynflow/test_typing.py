"""Programs that use the library see its types: mypy --strict finds nothing to say about them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).with_name("typed_host.py.txt").read_text()
PROGRAMS = {
    f"{page.stem}_{number}": program
    for page in (ROOT / "README.md", ROOT / "docs" / "tutorial.md", ROOT / "docs" / "library.md")
    for number, program in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )
}
# What Any would hide: an assertion about a type holds for it too.
REVEALED = {
    "dynflow.isolates.ProcessLoader()": "dynflow.isolates.loader.ProcessLoader",
    "dynflow.isolates.TrustedLoader()": "dynflow.isolates.trusted.TrustedLoader",
    "dynflow.isolates.describe_walls": "def ",
    "dynflow.isolates.ProcessLoader().get": "def (worker_id: str",
    "dynflow.engines.embedded.EmbeddedEngine('x').binding('x')": "dynflow.binding.WorkflowBinding",
    "dynflow.testing.TestingEngine().clock": "dynflow.clock.ManualClock",
    "dynflow.WorkflowInstance.status": "dynflow.types.InstanceStatus",
    "dynflow.IsolateLimitError": "dynflow.errors.IsolateLimitError",
}


def check(folder: Path, *options: str) -> str:
    """Return what mypy says about the programs in a folder: of the package, as of any installed one, nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", *options, "."],
        cwd=folder, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    lines = (done.stdout + done.stderr).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(str(ROOT)))


@pytest.mark.slow
def test_a_typed_program_is_checked_strictly(tmp_path: Path) -> None:
    (tmp_path / "host.py").write_text(HOST)
    assert check(tmp_path) == ""


@pytest.mark.slow
def test_public_names_have_types_and_are_not_any(tmp_path: Path) -> None:
    imports = "import dynflow, dynflow.engines.embedded, dynflow.isolates, dynflow.testing\n"
    (tmp_path / "names.py").write_text(imports + "".join(f"reveal_type({name})\n" for name in REVEALED))
    revealed = re.findall(r'Revealed type is "(.*)"', check(tmp_path))
    assert len(revealed) == len(REVEALED)
    wrong = {
        name: found
        for (name, expected), found in zip(REVEALED.items(), revealed, strict=True)
        if expected not in found
    }
    assert wrong == {}


@pytest.mark.slow
def test_programs_of_the_documentation_use_what_there_is(tmp_path: Path) -> None:
    """They leave annotations out; what they call must be there all the same, with what they give it."""
    assert len(PROGRAMS) >= 11
    for name, program in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(program)
    untyped = (
        "--allow-untyped-defs",
        "--allow-untyped-calls",
        "--allow-untyped-decorators",
        "--check-untyped-defs",
        "--disable-error-code=union-attr",  # a program that knows what it did need not ask whether it is None
    )
    assert check(tmp_path, *untyped) == ""


def test_the_stub_of_isolates_is_what_their_contract_says() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "write_stubs.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stderr == ""
