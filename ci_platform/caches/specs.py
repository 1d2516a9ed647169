"""What a pipeline says of a cache, checked: it comes out of an isolate, so annotations promise nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ci_platform.errors import CacheInvalidError

MOST_CACHES, MOST_PATHS, MOST_RESTORE_KEYS = 8, 16, 10
"""Of one command, of one cache, of one cache."""

LONGEST_KEY = 512
"""Characters of a key, after what stands in it for files has been put in."""

_LONGEST_TEMPLATE = 4096
_LONGEST_PATH = 1000

DEEPEST = 40
"""Names of a path, or of a pattern."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a cache is mounted. `path` is plain: relative, without `.` and `..`."""

    root: Literal["workspace", "home"]
    path: str

    def __str__(self) -> str:
        return f"~/{self.path}" if self.root == "home" else self.path

    def meets(self, other: Place) -> bool:
        """Whether one of the two is in the other, or both are the same."""
        mine, theirs = self.path.split("/"), other.path.split("/")
        shared = min(len(mine), len(theirs))
        return self.root == other.root and mine[:shared] == theirs[:shared]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One cache that a command asks for. `key` and `restore_keys` still have `hash_files` in them."""

    key: str
    places: tuple[Place, ...]
    restore_keys: tuple[str, ...]


def checked(specs: Any) -> tuple[Wanted, ...]:
    """Return what a command's `cache` asks for. Raises CacheInvalidError that names the value."""
    if not isinstance(specs, tuple) or len(specs) > MOST_CACHES:
        raise CacheInvalidError(f"cache= takes at most {MOST_CACHES} caches, not {specs!r:.100}")
    wanted = tuple(map(_one, specs))
    places = [place for each in wanted for place in each.places]
    for number, place in enumerate(places):
        for other in places[:number]:
            if place.meets(other):
                raise CacheInvalidError(
                    f"cache: the paths {str(other)!r:.100} and {str(place)!r:.100} overlap"
                )
    return wanted


def needs_files(specs: Any) -> bool:
    """Whether the files of a workspace have to be on disk for these caches: for keys that follow from them, or mounts.

    True for what cannot be caches: that is said where they are opened.
    """
    try:
        wanted = checked(specs)
    except CacheInvalidError:
        return True
    return any(
        any(place.root == "workspace" for place in each.places)
        or any("{" in key for key in (each.key, *each.restore_keys))
        for each in wanted
    )


def _one(spec: Any) -> Wanted:
    key: Any = getattr(spec, "key", None)
    paths, restore_keys = (_texts(getattr(spec, name, None), name) for name in ("paths", "restore_keys"))
    if not 0 < len(paths) <= MOST_PATHS:
        raise CacheInvalidError(f"cache: paths= takes 1 to {MOST_PATHS} paths, not {len(paths)}")
    if len(restore_keys) > MOST_RESTORE_KEYS:
        raise CacheInvalidError(
            f"cache: restore_keys= takes at most {MOST_RESTORE_KEYS}, not {len(restore_keys)}"
        )
    for each in (key, *restore_keys):
        if not isinstance(each, str) or not 0 < len(each) <= _LONGEST_TEMPLATE or not each.isprintable():
            raise CacheInvalidError(
                f"cache: keys are printable text of 1 to {LONGEST_KEY} characters, not {each!r:.100}"
            )
    # Sorted: the same paths in another order are the same cache.
    return Wanted(key, tuple(sorted(map(place_of, paths), key=str)), restore_keys)


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise CacheInvalidError(f"cache: {name}= is a list of text, not {values!r:.100}")
    return tuple(values)


def place_of(path: str) -> Place:
    """Return the place that a path names. Raises CacheInvalidError where it is in neither of the two."""
    if len(path) > _LONGEST_PATH or not path.isprintable():
        raise CacheInvalidError(f"cache: {path!r:.100} is too long for a path, or not printable")
    if path.startswith("/"):
        raise CacheInvalidError(
            f"cache: {path!r:.100} is outside: paths are relative to the workspace, or begin with ~/"
        )
    in_home = path == "~" or path.startswith("~/")
    parts = [part for part in path.removeprefix("~").split("/") if part not in {"", "."}]
    if ".." in parts:
        raise CacheInvalidError(f"cache: {path!r:.100} may leave its folder: '..' has no place in a path")
    if not parts:
        raise CacheInvalidError(f"cache: {path!r:.100} is a whole folder: name one below it")
    if ":" in path:  # a container's engine takes what follows for something else
        raise CacheInvalidError(f"cache: {path!r:.100} has a ':', which the path of a cache may not have")
    if len(parts) > DEEPEST or any(len(part.encode()) > 255 for part in parts):
        raise CacheInvalidError(
            f"cache: {path!r:.100} is nested too deep, or has names that no file can have"
        )
    if not in_home and parts[0].lower() == ".git":
        raise CacheInvalidError(
            f"cache: {path!r:.100} is a part of the workspace's .git, which is the platform's"
        )
    return Place("home" if in_home else "workspace", "/".join(parts))
