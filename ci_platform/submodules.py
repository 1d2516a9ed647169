"""What a commit says of its submodules: names, paths and addresses, every byte of it hostile.

A file of the commit decides where the platform connects to and what it writes where; nothing of it is used that was
not looked at here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ci_platform import git_commands
from ci_platform.errors import FailedError
from ci_platform.git_commands import GitError

FILE = ".gitmodules"
LARGEST = 256 * 1024
"""Bytes of the file that names submodules."""

MOST = 200
"""Submodules of one workspace, those of submodules included."""

DEEPEST = 5
"""Submodules inside of each other."""

_LONGEST_NAME, _LONGEST_PATH, _LONGEST_URL = 255, 1024, 2000
_SCHEMES = ("https", "http", "file")
_URL = re.compile(r"[!-~]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Declared:
    """A submodule as its file names it. `url` may be relative, and empty where the file has none."""

    name: str
    path: str
    url: str


@dataclass(frozen=True, slots=True)
class Module:
    """A submodule of a workspace: the commit `sha` of the repository `store`, which came from `url`.

    `path` is relative to the workspace, `folder` to its `.git`; `above` is the path of the submodule that it is in.
    `store` is fetched from `url` without credentials, unless it is `registered`.
    """

    name: str
    path: str
    folder: str
    above: str
    url: str
    store: str
    sha: str
    registered: bool

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Module:
        """Read what `as_json` returned."""
        return cls(**record)


async def parse(content: bytes) -> list[Declared]:
    """Return the submodules that a `.gitmodules` names. Raises FailedError that names the value at fault."""
    try:
        listed = await git_commands.read_configuration(content)
    except GitError as error:
        raise FailedError(f"{FILE} cannot be read: {error}") from None
    found = dict[str, dict[str, str]]()
    for key, value in listed:
        section, _, rest = key.partition(".")
        name, _, variable = rest.rpartition(".")
        if section == "submodule" and name and variable in {"path", "url"}:
            found.setdefault(name, {})[variable] = value
    return _checked(found)


def _checked(found: Mapping[str, Mapping[str, str]]) -> list[Declared]:
    if len(found) > MOST:
        raise FailedError(f"{FILE} names {len(found)} submodules, more than {MOST}")
    paths, made = set[str](), list[Declared]()
    for name, values in found.items():
        if "path" not in values:
            continue
        path = _path(name, values["path"])
        if path in paths:
            raise FailedError(f"{FILE} has two submodules at {path!r}")
        paths.add(path)
        made.append(Declared(_name(name), path, values.get("url", "")))
    return made


def _name(name: str) -> str:
    if len(name) > _LONGEST_NAME or not _is_plain(name) or ".." in re.split(r"[/\\]", name):
        raise FailedError(f"a submodule cannot be named {name!r:.120}")
    return name


def _path(name: str, path: str) -> str:
    parts = path.split("/")
    if (
        len(path) > _LONGEST_PATH
        or not _is_plain(path)
        or "\\" in path
        or any(part in {"", ".", ".."} or part.lower().rstrip(" .") == ".git" for part in parts)
    ):
        raise FailedError(f"the submodule {name!r:.80} cannot be at the path {path!r:.120}")
    return path


def _is_plain(text: str) -> bool:
    return text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text and not text.startswith("-")


def resolve(declared: Declared, base: str) -> str:
    """Return where a submodule is fetched from; relative addresses begin at `base`, that of the repository.

    Raises FailedError for what is no plain address, with the address as it is written.
    """
    url = declared.url
    if not url:
        raise FailedError(f"{FILE} has no url for the submodule at {declared.path!r}")
    if len(url) > _LONGEST_URL or not _URL.fullmatch(url) or url.startswith("-"):
        raise _refused(declared, "it is no plain address")
    whole = _joined(declared, base) if url.startswith(("./", "../")) else url
    try:
        parts = urlsplit(whole)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _refused(declared, "it is no plain address") from None
    if parts.scheme not in _SCHEMES or "://" not in whole:
        raise _refused(declared, "submodules are fetched over https or http")
    if "@" in parts.netloc or (parts.scheme != "file" and not host) or not parts.path.strip("/"):
        raise _refused(declared, "an address has a host, a path and no user in it")
    if parts.query or parts.fragment or {".", ".."} & set(parts.path.split("/")):
        raise _refused(declared, "it is more than an address")
    return whole


def _joined(declared: Declared, base: str) -> str:
    parts = urlsplit(base)
    folders, rest = parts.path.strip("/").split("/"), declared.url
    while rest.startswith(("./", "../")):
        step, _, rest = rest.partition("/")
        if step == "..":
            if not folders or folders == [""]:
                raise _refused(declared, f"it leads above {parts.scheme}://{parts.netloc}")
            folders.pop()
    return urlunsplit((parts.scheme, parts.netloc, "/" + "/".join([*folders, rest]), "", ""))


def _refused(declared: Declared, why: str) -> FailedError:
    shown = git_commands.redact(declared.url)
    return FailedError(f"the submodule at {declared.path!r} has the url {shown!r:.200}: {why}")


def canonical(url: str) -> str:
    """Return an address so that two of the same repository are equal."""
    parts = urlsplit(url)
    usual = parts.port == {"https": 443, "http": 80}.get(parts.scheme)
    host = (parts.hostname or "").lower() + (f":{parts.port}" if parts.port and not usual else "")
    return f"{parts.scheme}://{host}{parts.path.rstrip('/').removesuffix('.git')}"


def section(name: str, url: str) -> str:
    """Return what git's configuration says of a submodule that is in use."""
    named = name.replace("\\", "\\\\").replace('"', '\\"')
    quoted = url.replace("\\", "\\\\").replace('"', '\\"')
    return f'[submodule "{named}"]\n\tactive = true\n\turl = "{quoted}"\n'
