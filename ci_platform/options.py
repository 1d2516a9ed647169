"""Command-line options made from the settings, so that each setting is described once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ci_platform.settings import Settings, load_settings

# Shorter names of options.
_ALSO = {"temporal_namespace": ("--namespace",)}

F = TypeVar("F", bound=Callable[..., Any])


def settings_options(*names: str) -> Callable[[F], F]:
    """Add options for these settings, or for all that are no secrets; the command gets them as keywords.

    A secret on a command line would show in the list of processes: those come from the environment or a file.
    """
    chosen = names or tuple(name for name in Settings.model_fields if not is_secret(name))

    def decorate(function: F) -> F:
        for name in reversed(chosen):
            function = _option(name)(function)
        return function

    return decorate


def engine_settings() -> list[str]:
    """Return the settings that say what keeps runs, but for secrets."""
    names = [name for name in Settings.model_fields if name == "engine" or name.startswith("temporal_")]
    return [name for name in names if not is_secret(name)]


def is_secret(name: str) -> bool:
    """Return whether a setting is a secret."""
    return "SecretStr" in str(Settings.model_fields[name].annotation)


def settings_from(options: dict[str, Any], **defaults: Any) -> Settings:
    """Return the settings: options first, then environment and file, then `defaults` of the command."""
    given = {name: value for name, value in options.items() if value is not None}
    return load_settings({**defaults, **given})


def _option(name: str) -> Callable[[F], F]:
    field = Settings.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    text = f"{field.description}  [env: DYNFLOW_{name.upper()}]"
    if field.annotation in {bool, bool | None}:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    return click.option(flag, *_ALSO.get(name, ()), name, default=None, metavar="VALUE", help=text)
