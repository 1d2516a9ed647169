"""Run benchmark parts and put their tables into docs/performance.md, one section per part.

A part may have options: "scale --most 1000000". Those of PLOTTED leave their figures in docs/figures too, which are
drawn there.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "figures"
ENGINES = ROOT / "docs" / "engines.md"
PLOTTED = frozenset({"scale", "peers"})


def machine() -> str:
    """Return one line about the machine that is measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, measured {datetime.now(UTC):%Y-%m-%d}"
    )


def measure(part: str, options: list[str]) -> str:
    """Run one part and return the Markdown it printed."""
    script = ROOT / "scripts" / f"bench_{part}.py"
    if not script.is_file():
        sys.exit(f"there is no benchmark {part!r}: {script.relative_to(ROOT)} is missing")
    print(f"bench: {part} …", file=sys.stderr)
    if part in PLOTTED:
        FIGURES.mkdir(exist_ok=True)
        options = [*options, "--json", str(FIGURES / f"{part}.json")]
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"benchmark {part!r} failed with exit code {done.returncode}")
    if part in PLOTTED:
        subprocess.run([sys.executable, ROOT / "scripts" / "plot_engine.py"], cwd=ROOT, check=True)
    return done.stdout.strip()


def put(page: str, part: str, text: str) -> str:
    """Replace the section of `part`, or add it at the end."""
    start, end = f"<!-- bench:{part} -->", f"<!-- /bench:{part} -->"
    section = f"{start}\n{text}\n\n*{machine()}*\n{end}"
    if start in page:
        return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: section, page, flags=re.DOTALL)
    return f"{page.rstrip()}\n\n{section}\n"


def grouped(arguments: list[str]) -> list[str]:
    """Return parts with their options: those in quotes with the part, and those that stand behind it."""
    parts: list[str] = []
    for each in arguments:
        if parts and (each.startswith("--") or parts[-1].split()[-1].startswith("--")):
            parts[-1] += f" {each}"
        else:
            parts.append(each)
    return parts


def main(parts: list[str]) -> None:
    """Measure each part in turn; one that fails leaves the page's other sections as they were."""
    for given in grouped(parts):
        part, *options = given.split()
        if part == "engine" and options[:2] == ["--engine", "temporal"]:
            part, options = "temporal", options[2:]
        text = measure(part, options)
        page = ENGINES if part == "temporal" and ENGINES.is_file() else PAGE
        page.write_text(put(page.read_text(), part, text))
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
