"""What a command may be made of. Its values come out of an isolate, so annotations promise nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from ci_platform.egress.policy import MOST_RULES, Rule
from ci_platform.errors import InvalidInputError
from ci_platform.sandboxes import MEBIBYTE
from pipelines.contract import Command

_MOST_ARGUMENTS = 100_000
_LARGEST_ARGUMENTS = MEBIBYTE
"""Bytes of argv and env together; Linux takes 2 MiB by default and the platform adds a little."""


def _can_be_passed(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def check_command(command: Command) -> None:
    """Refuse values of wrong types: they come out of an isolate, so annotations promise nothing."""
    argv: Any = command.argv
    env: Any = command.env
    timeout: Any = command.timeout
    if not isinstance(argv, tuple) or not argv or not isinstance(env, dict):
        raise InvalidInputError("argv must be a list of text that is not empty, env a dict")
    texts: list[Any] = [*argv, *env, *env.values(), command.cwd, command.image or "", command.sandbox]
    if len(texts) > _MOST_ARGUMENTS:
        raise InvalidInputError(f"argv and env have more than {_MOST_ARGUMENTS:,} items")
    if not all(isinstance(text, str) and _can_be_passed(text) for text in texts):
        raise InvalidInputError(
            "argv, env, cwd and image must be text without NUL characters and lone surrogates"
        )
    if sum(map(len, texts)) > _LARGEST_ARGUMENTS:
        raise InvalidInputError(f"argv and env together are larger than {_LARGEST_ARGUMENTS // MEBIBYTE} MiB")
    if any(not name or "=" in name for name in env):
        raise InvalidInputError("names in env must not be empty nor contain '='")
    _check_network(command.network, command.sandbox)
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta()):
        raise InvalidInputError(f"timeout must be longer than zero, not {timeout!r:.100}")


def _check_network(network: Any, sandbox: str) -> None:
    if isinstance(network, bool):
        return
    if not isinstance(network, tuple) or len(network) > MOST_RULES:
        raise InvalidInputError(
            f"network must be True, False or at most {MOST_RULES} hosts, not {network!r:.100}"
        )
    if sandbox != "isolate" and network:
        raise InvalidInputError('a list of hosts in network= holds in sandbox="isolate" alone')
    for text in network:
        if not isinstance(text, str):
            raise InvalidInputError(f"network: {text!r:.100} is no text")
        try:
            Rule.parse(text)
        except ValueError as error:
            raise InvalidInputError(f"network: {error}") from None
