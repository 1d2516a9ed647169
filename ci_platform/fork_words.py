"""What a run was forked from and which runs were forked from it, in words: for terminals and pages. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def forks_in_words(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a run (as the API shows it) was forked from and with what, and what was forked from it."""
    forked = run.get("forked")
    if forked is not None:
        source = forked["run"] if forked["number"] is None else f"{run['repo']}#{forked['number']}"
        place = "from the start" if forked["step"] is None else f"before step {forked['step']}"
        yield f"what-if: forked from {source} {place}"
        yield from differences(forked)
    for fork in run.get("forks", ()):
        yield f"forked: {run['repo']}#{fork['number']} ({fork['conclusion'] or 'not ended'})"


def differences(forked: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a forked run has that the other one had not, and what its code left out."""
    if forked["code"]:
        yield f"code of {forked['code'][:10]}"
    for name, value in forked["inputs"].items():
        yield f"input {name} = {json.dumps(value, ensure_ascii=False)[:100]}"
    files = forked["patched_files"]
    if files:
        yield f"patched {', '.join(files[:3])}" + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    if forked["reached"] is False:
        yield f"its code did not call step {forked['step']}"
    for step in forked["unused_steps"] or ():
        yield f"its code did not call {step}, of which the result was kept"
