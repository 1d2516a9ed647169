"""What GitHub's payloads say, read with suspicion: any field may be missing, of another type, or hostile."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs

from ci_platform.errors import InvalidInputError
from ci_platform.forges import Change

# What is kept of texts that are shown, not compared.
_MAX_TITLE = 300
_MAX_MESSAGE = 4000
_ZERO = re.compile(r"0+")
# What neither git allows in a ref nor a database or terminal takes.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_STARTING_ACTIONS = frozenset({"opened", "synchronize", "reopened"})


class Fields:
    """A JSON object that refuses politely: InvalidInputError names the field by its path."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values, self._path = values, path

    def object(self, name: str) -> Fields:
        """Return the object under `name`."""
        found = self.optional(name)
        if found is None:
            raise InvalidInputError(f"the payload has no {self._path}{name}")
        return found

    def optional(self, name: str) -> Fields | None:
        """Return the object under `name`, None where it is missing or null."""
        value = self._values.get(name)
        if value is None:
            return None
        return Fields(self._typed(name, value, dict), f"{self._path}{name}.")

    def text(self, name: str, *, default: str | None = None, limit: int = 1024) -> str:
        """Return the text under `name`, cleaned and cut at `limit` characters; `default` for null."""
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise InvalidInputError(f"the payload has no {self._path}{name}")
            return default
        return clean(self._typed(name, value, str), limit)

    def exact(self, name: str, *, limit: int = 1024) -> str:
        """Return the text under `name` as it is; one that cannot be meant is refused."""
        value: str = self._typed(name, self._values.get(name), str)
        if not value or len(value) > limit or _FORBIDDEN.search(value):
            raise InvalidInputError(
                f"{self._path}{name} is empty, too long, or has characters that it may not have"
            )
        return value

    def number(self, name: str) -> int:
        """Return the positive integer under `name`."""
        value: int = self._typed(name, self._values.get(name), int)
        if isinstance(value, bool) or not 0 < value < 2**31:
            raise InvalidInputError(f"{self._path}{name} is not a number that can be meant")
        return value

    def flag(self, name: str) -> bool:
        """Return the boolean under `name`; false where it is missing."""
        return self._values.get(name) is True

    def _typed(self, name: str, value: Any, kind: type[Any]) -> Any:
        if not isinstance(value, kind):
            shown = "missing" if value is None else f"a {type(value).__name__}"
            raise InvalidInputError(f"{self._path}{name} is {shown}, not a {kind.__name__}")
        return value


def parse_body(content_type: str, body: bytes) -> Fields:
    """Return the object in a delivery's body, JSON or a form with JSON in `payload`.

    Raises InvalidInputError.
    """
    if content_type.partition(";")[0].strip().lower() == "application/x-www-form-urlencoded":
        try:
            body = parse_qs(body, strict_parsing=True, max_num_fields=10)[b"payload"][0]
        except (KeyError, ValueError):
            raise InvalidInputError("the form has no field 'payload'") from None
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInputError("the body is not JSON") from None
    if not isinstance(values, dict):
        raise InvalidInputError("the body is not a JSON object")
    return Fields(values)


def change_of_push(payload: Fields) -> tuple[Change, str]:
    """Return the change in a `push`, and its head commit's message."""
    repository, head = payload.object("repository"), payload.optional("head_commit")
    ref, after = payload.exact("ref"), payload.exact("after", limit=64)
    if head is not None and ref.startswith("refs/tags/"):
        after = head.exact("id", limit=64)  # of an annotated tag, `after` is the tag itself, not its commit
    pusher, sender = payload.optional("pusher"), payload.optional("sender")
    message = head.text("message", default="", limit=_MAX_MESSAGE) if head else ""
    change = Change(
        event="push",
        action="push",
        repo=repository.exact("full_name", limit=200),
        sha=after,
        ref=ref,
        branch=short_name(ref),
        before=payload.text("before", default="", limit=64) or None,
        actor=_login(sender) or (pusher.text("name", default="", limit=200) if pusher else ""),
        title=first_line(message),
        deleted=payload.flag("deleted") or _ZERO.fullmatch(after) is not None,
        clone_url=repository.text("clone_url", default=""),
    )
    return change, message


def change_of_pull_request(payload: Fields) -> Change | str:
    """Return the change in a `pull_request`, or why it starts nothing."""
    action = payload.text("action", limit=40)
    if action not in _STARTING_ACTIONS:
        return f"a pull request that was {action} starts nothing"
    pull, repository = payload.object("pull_request"), payload.object("repository")
    head, base = pull.object("head"), pull.object("base")
    name = repository.exact("full_name", limit=200)
    source = head.optional("repo")  # null where the fork was deleted
    number = pull.number("number")
    return Change(
        event="pull_request",
        action=action,
        repo=name,
        sha=head.exact("sha", limit=64),
        ref=f"refs/pull/{number}/head",
        branch=head.exact("ref"),
        base_branch=base.exact("ref"),
        before=payload.text("before", default="", limit=64) or None,
        pr=number,
        actor=_login(payload.optional("sender")) or _login(pull.optional("user")),
        title=pull.text("title", default="", limit=_MAX_TITLE),
        trusted=source is not None and source.exact("full_name", limit=200) == name,
        clone_url=repository.text("clone_url", default=""),
    )


def short_name(ref: str) -> str:
    """Return `main` for `refs/heads/main`, `v1` for `refs/tags/v1`."""
    return ref.removeprefix("refs/heads/").removeprefix("refs/tags/")


def first_line(message: str) -> str:
    """Return what stands for a commit in a list."""
    return message.partition("\n")[0].strip()[:_MAX_TITLE]


def clean(text: str, limit: int) -> str:
    """Return at most `limit` characters of `text`, line feeds and tabs being the only ones not printable.

    So NUL (which Postgres refuses), lone surrogates and marks that turn the reading direction are gone.
    """
    return "".join(char for char in text[:limit] if char.isprintable() or char in "\n\t")


def _login(person: Fields | None) -> str:
    return person.text("login", default="", limit=200) if person else ""
