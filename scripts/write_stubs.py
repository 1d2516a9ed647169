"""Write `dynflow/isolates/__init__.pyi`: the contract as it stands, and the names that are imported on first use.

Type checkers cannot follow a module's `__getattr__`. Run it when the contract of isolates has changed; a test
(tests/dynflow/test_typing.py) calls it with `--check`, and fails where that was forgotten.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from mypy.stubgen import main as stubgen

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "dynflow" / "isolates" / "__init__.pyi"
sys.path.insert(0, str(ROOT))

import dynflow.isolates  # noqa: E402 - found by the line above


def stub() -> str:
    """Return what the stub should say."""
    lazy: dict[str, str] = vars(dynflow.isolates)["_HOME"]
    with tempfile.TemporaryDirectory() as folder:
        stubgen(["--quiet", "--output", folder, str(STUB.with_suffix(".py"))])
        made = Path(folder) / "dynflow" / "isolates" / "__init__.pyi"
        names = [f"from {module} import {name} as {name}\n" for name, module in sorted(lazy.items())]
        made.write_text("".join(names) + made.read_text())
        for command in (["check", "--fix", "--exit-zero"], ["format"]):
            _ruff(*command, "--quiet", "--config", str(ROOT / "pyproject.toml"), str(made))
        return made.read_text()


def _ruff(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    if "--check" not in sys.argv:
        STUB.write_text(stub())
    elif STUB.read_text() != stub():
        sys.exit(f"{STUB.relative_to(ROOT)} is not what the contract says: run scripts/write_stubs.py")
