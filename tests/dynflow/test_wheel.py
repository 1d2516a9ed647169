"""The library as a stranger gets it: a wheel in an empty environment, and the programs of docs/library.md."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(), re.MULTILINE | re.DOTALL
)


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_all_that_the_packages_have(wheel: Path) -> None:
    """SQL, types and whatever else is no module; and nothing beside the packages."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "dynflow", "pipelines", "ci_platform"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(tracked.stdout.split()) - held == set()
    assert {name.partition("/")[0] for name in held} == {"dynflow", "pipelines", "ci_platform"}


@pytest.mark.slow
def test_programs_of_the_library_run_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """`dynflow` needs the standard library alone: nothing else is installed here."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    options = ["--no-index", "--disable-pip-version-check", "--quiet"]  # what it needed could not be had
    run(python, "-m", "pip", "install", *options, wheel, cwd=tmp_path)
    assert len(PROGRAMS) == 3
    for number, program in enumerate(PROGRAMS):
        file = tmp_path / f"program_{number}.py"
        file.write_text(program)
        assert run(python, "-I", "-W", "error", file, cwd=tmp_path) == ""
    installed = run(python, "-c", "import dynflow, dynflow.isolates; print(dynflow.__file__)", cwd=tmp_path)
    assert installed.startswith(str(tmp_path))


@pytest.mark.slow
def test_the_program_says_what_is_missing_where_the_library_is_alone(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    folder = tmp_path / "venv" / "bin"
    run(folder / "python", "-m", "pip", "install", "--no-index", "--quiet", wheel, cwd=tmp_path)
    said = subprocess.run(
        [folder / "dynflow", "serve"], capture_output=True, text=True, timeout=60, check=False
    )
    assert said.returncode == 1
    assert said.stdout == ""
    assert said.stderr.startswith("dynflow: the platform is not installed: there is no ")
    assert "pip install 'dynflow[platform]==0.1.0'" in said.stderr


def test_a_tenants_workflow_takes_forty_lines() -> None:
    lines = [line for line in PROGRAMS[1].splitlines() if line.strip()]
    assert len(lines) <= 40
