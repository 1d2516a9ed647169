"""The trees that commands are using, as plain values: what a later process needs to know of one that outlives ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ci_platform.stacks import LayerAuthor


def to_plain(opened: Any) -> dict[str, Any]:
    """Return the fields of an open tree as JSON takes them; without stamps, which only copies have."""
    plain = asdict(opened) | {"folder": str(opened.folder), "lowers": [str(lower) for lower in opened.lowers]}
    del plain["stamps"]
    return plain


def from_plain(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields again."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    paths = {"folder": Path(told["folder"]), "lowers": tuple(Path(lower) for lower in told["lowers"])}
    return fields | paths | {"author": LayerAuthor(**told["author"]), "stamps": None}
