"""What a pipeline says of an artifact, checked: it comes out of an isolate, so annotations promise nothing. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ci_platform.errors import InvalidInputError
from dynflow.durations import parse_duration

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}", re.ASCII)

MOST_PATTERNS = 100
"""Of one upload, those that leave out among them: each name that is looked at is compared with them."""

_DEEPEST, _LONGEST = 40, 1000
"""Names of a pattern; characters of one, and of a path."""

_SHORTEST_RETENTION = timedelta(minutes=1)

Pattern = tuple[str, ...]
"""Names with signs, folder by folder; none at all stands for the whole workspace."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What is to be kept, under which name and for how long. `patterns` as they were given, for messages.

    `failed` names a step whose command failed: what that left is looked through, not the workspace as it stands.
    """

    name: str
    patterns: dict[str, Pattern]
    excluded: tuple[Pattern, ...]
    retention: timedelta
    replace: bool = False
    missing_ok: bool = False
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Retentions:
    """How long artifacts are kept where nothing is said, and how long at most."""

    default: timedelta = timedelta(days=30)
    longest: timedelta = timedelta(days=90)


def checked_upload(
    name: Any,
    paths: Any,
    *,
    exclude: Any,
    retention: Any,
    replace: Any,
    missing_ok: Any,
    failed: Any,
    retentions: Retentions,
) -> Upload:
    """Return what is asked for. Raises InvalidInputError that names the value."""
    patterns = {text: _pattern("paths", text) for text in _texts("paths", paths)}
    excluded = tuple(_pattern("exclude", text) for text in _texts("exclude", exclude))
    if not patterns:
        raise InvalidInputError('paths= names what is to be kept, such as ["dist/*.whl"]')
    if failed is not None and not (isinstance(failed, str) and failed):
        raise InvalidInputError(f"failed= is the name of a step whose command failed, not {failed!r:.100}")
    if () in excluded:
        raise InvalidInputError("exclude= would leave out the whole workspace")
    return Upload(
        checked_name(name),
        patterns,
        excluded,
        _retention(retention, retentions),
        replace=flag("replace", replace),
        missing_ok=flag("missing_ok", missing_ok),
        failed=failed,
    )


def checked_name(name: Any) -> str:
    """Return the name of an artifact. Raises InvalidInputError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(
            "an artifact's name has 1 to 128 of A-Z a-z 0-9 _ . + - and begins with a letter or digit, "
            f"not {name!r:.150}"
        )
    return name


def flag(name: str, value: Any) -> bool:
    """Return a value that is True or False. Raises InvalidInputError."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name}= is True or False, not {value!r:.20}")
    return value


def checked_folder(path: Any) -> tuple[str, ...]:
    """Return the names that lead to a folder of a workspace, none for its top. Raises InvalidInputError."""
    if (
        not isinstance(path, str)
        or len(path) > _LONGEST
        or not path.isprintable()
        or path.startswith(("/", "~"))
    ):
        raise InvalidInputError(f"path= is a folder of the workspace, such as 'dist', not {path!r:.100}")
    parts = tuple(part for part in path.split("/") if part not in {"", "."})
    if ".." in parts or len(parts) > _DEEPEST or any(len(part.encode()) > 255 for part in parts):
        raise InvalidInputError(f"path={path!r:.100} may leave the workspace, or is nested too deep")
    if any(part.lower() == ".git" for part in parts):
        raise InvalidInputError(
            f"path={path!r:.100} is a part of the workspace's .git, which is the platform's"
        )
    return parts


def _texts(name: str, values: Any) -> Sequence[str]:
    if isinstance(values, str):
        raise InvalidInputError(f"{name}= is a list, such as [{values!r:.100}], not {values!r:.100}")
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise InvalidInputError(f"{name}= is a list of text, not {values!r:.100}")
    if len(values) > MOST_PATTERNS:
        raise InvalidInputError(f"{name}= takes at most {MOST_PATTERNS} patterns, not {len(values)}")
    return values


def _pattern(name: str, text: str) -> Pattern:
    parts = tuple(part for part in text.split("/") if part not in {"", "."})
    if not text or text.startswith(("/", "~")) or ".." in parts or "\0" in text:
        raise InvalidInputError(
            f"{name}=: {text!r:.200} is no path in the workspace: it is relative, and stays in it"
        )
    if len(parts) > _DEEPEST or len(text) > _LONGEST:
        raise InvalidInputError(
            f"{name}=: {text!r:.100}… is longer than {_LONGEST} characters or {_DEEPEST} folders"
        )
    # Several `**` one after the other mean no more than one, and would be compared for each.
    return tuple(
        part for number, part in enumerate(parts) if part != "**" or parts[number - 1 : number] != ("**",)
    )


def _retention(value: Any, retentions: Retentions) -> timedelta:
    if value is None:
        return min(retentions.default, retentions.longest)
    try:
        retention = parse_duration(value)
    except ValueError as error:
        raise InvalidInputError(f"retention=: {error}") from None
    if not _SHORTEST_RETENTION <= retention <= retentions.longest:
        raise InvalidInputError(
            f"retention= is between one minute and {retentions.longest / timedelta(days=1):g} days "
            f"(setting artifact_retention_max), not {value!r:.50}"
        )
    return retention
