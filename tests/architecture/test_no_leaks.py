"""Nothing of the machine it was written on is in the repository: paths, addresses, keys."""

from __future__ import annotations

import re
from pathlib import Path

# Put together from pieces, so that this file does not find itself.
FORBIDDEN = {
    "a developer's path": rf"(?<![\w./])/{'work'}/(?:main|shared|\.library)|/{'root'}/\.pyenv|/home/[a-z]+/",
    "a private key": rf"-----BEGIN [A-Z ]*{'PRIVATE'} KEY-----",
    "a token of a forge": rf"\b(?:ghp|gho|ghs|github_pat){'_'}[A-Za-z0-9]{{30,}}",
    "an access key": r"\bAKIA[0-9A-Z]{16}\b",
    "a package mirror": r"(?:index-url|find-links)\s*=",
    "the plan instead of the documentation": rf"{'shared'}/design",
    "a merge conflict": r"^(?:<{7}|>{7}) ",
}
GENERATED = {".lock", ".png", ".svg", ".ico", ".tgz", ".gz"}


def test_no_file_shows_where_it_was_made(tracked: list[Path], root: Path) -> None:
    found = []
    for path in tracked:
        if path.suffix in GENERATED or path.stat().st_size > 2_000_000:
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        for what, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text, re.MULTILINE):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(root)}:{line}: {what}: {match[0]!r}")
    assert found == []


def test_scripts_can_be_executed(root: Path) -> None:
    names = [*(root / "scripts").iterdir(), root / ".ci" / "run"]
    shell = [path for path in names if path.is_file() and path.read_bytes().startswith(b"#!")]
    assert [path.name for path in shell if not path.stat().st_mode & 0o100] == []
