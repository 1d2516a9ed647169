"""`dynflow runs what-if`: a run out of another one, with something else than it had."""

from __future__ import annotations

import json
import sys
from typing import IO, Any

import click
from rich.console import Console

from ci_platform.cli.asking import find_server


@click.command("what-if")
@click.argument("run")
@click.option(
    "--from", "from_step", metavar="STEP", help="Keep what started before this step, files included."
)
@click.option("--count", type=click.IntRange(1), default=1, help="Which one, of several steps of that name.")
@click.option("--code", metavar="COMMIT", help="Run the pipeline of another commit or branch.")
@click.option(
    "--input",
    "inputs",
    metavar="NAME=VALUE",
    multiple=True,
    help="Give a part of event.payload another value: JSON, or else text.",
)
@click.option("--patch", type=click.File("rb"), help="Apply a diff to the files before the step; - reads it.")
@click.option("--workspace", metavar="STEP", help="Which step's workspace to patch, of several.")
@click.option(
    "-w", "--watch", is_flag=True, help="Watch it until it ends; the exit code is its conclusion's."
)
def what_if(*, run: str, inputs: tuple[str, ...], patch: IO[bytes] | None, watch: bool, **how: Any) -> None:
    """Try a run again with something changed, as a new run; RUN stays as it is.

    The new run reports nothing to the forge, and asks at gates of its own.
    """
    from ci_platform.cli.runs import conclusion_code
    from ci_platform.terminal import RunWatcher, resolve_run

    body = how | {"inputs": _inputs(inputs), "patch": None if patch is None else _text(patch)}
    with find_server() as client:
        made = client.post(f"/api/v1/runs/{resolve_run(client, run)}/what-if", body)
        click.echo(f"{made['id']} is {made['repo']}#{made['number']}")
        if watch:
            sys.exit(conclusion_code(RunWatcher(client, Console()).watch(made["id"])))


def _inputs(given: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise click.BadParameter(f"{each!r} is not NAME=VALUE", param_hint="--input")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _text(patch: IO[bytes]) -> str:
    try:
        return patch.read().decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"it is not UTF-8: {error}", param_hint="--patch") from None
