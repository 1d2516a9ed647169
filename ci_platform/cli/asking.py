"""What commands that ask a server share."""

from __future__ import annotations

import json
from typing import Any

import click


def find_server() -> Any:
    """Return a client of the server that the environment or the data folder names."""
    from ci_platform.client import Client

    return Client.find()


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, default=str))
