"""`dynflow artifact …`: what runs have kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from ci_platform.cli.asking import find_server, print_json


@click.group()
def artifact() -> None:
    """List and download what runs have kept."""


@artifact.command("list")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def artifact_list(*, run: str, as_json: bool) -> None:
    """List the artifacts of a RUN, also those that are gone."""
    from ci_platform.terminal import resolve_run

    with find_server() as client:
        items = client.get(f"/api/v1/runs/{resolve_run(client, run)}/artifacts")["items"]
    if as_json:
        print_json(items)
        return
    for item in items:
        until = f"until {item['expires_at'][:16]}"
        gone = f"deleted {(item['deleted_at'] or '')[:16]}: {item['why_deleted']}"
        files = "1 file" if item["files"] == 1 else f"{item['files']} files"
        click.echo(
            f"{item['name']:<32} {files:>12} {item['size']:>14}  {gone if item['deleted_at'] else until}"
        )


@artifact.command("files")
@click.argument("run")
@click.argument("name")
@click.argument("folder", default="")
def artifact_files(*, run: str, name: str, folder: str) -> None:
    """List a FOLDER of the artifact NAME; without one, its top."""
    with find_server() as client:
        for item in client.get(f"{_path(client, run, name)}/files", path=folder)["items"]:
            arrow = f" -> {item['target']}" if item["target"] else ""
            click.echo(f"{item['kind']:<8} {item['size']:>12} " + ascii(item["name"] + arrow)[1:-1])


@artifact.command("get")
@click.argument("run")
@click.argument("name")
@click.argument("file", required=False)
@click.option(
    "-o",
    "--output",
    help="Where to write it; - is the standard output. Default: a new file of its name in this folder.",
)
@click.option("--format", "form", type=click.Choice(["zip", "tar"]), help="Of several files. Default: zip.")
def artifact_get(*, run: str, name: str, file: str | None, output: str | None, form: str | None) -> None:
    """Download the artifact NAME of a RUN, or one FILE of it.

    An artifact of one file comes as that file, one of several as an archive.
    """
    with find_server() as client:
        path = _path(client, run, name)
        query = {key: value for key, value in (("path", file), ("format", form)) if value is not None}
        if output == "-":
            client.download(f"{path}/download", sys.stdout.buffer, **query)
            return
        target = Path(output or _name_of(client, path, name, file, form))
        # What is there already is somebody's, unless it was named.
        with _replaced(target) if output else _made(target) as opened:
            client.download(f"{path}/download", opened, **query)
    click.echo(target, err=True)


@contextmanager
def _made(target: Path) -> Iterator[BinaryIO]:
    """Open a new file, which is gone again where the block fails."""
    with target.open("xb") as opened:
        try:
            yield opened
        except BaseException:
            target.unlink()
            raise


@contextmanager
def _replaced(target: Path) -> Iterator[BinaryIO]:
    """Open a file that takes `target`'s place when the block is done: where it fails, what was there stays."""
    if target.exists() and not target.is_file():  # a device or a pipe: it cannot be replaced
        with target.open("wb") as opened:
            yield opened
        return
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with _made(part) as opened:
        yield opened
    part.replace(target)


@artifact.command("delete")
@click.argument("run")
@click.argument("name")
def artifact_delete(*, run: str, name: str) -> None:
    """Delete the artifact NAME of a RUN before its time."""
    with find_server() as client:
        client.delete(_path(client, run, name))
    click.echo(f"the artifact {name} is deleted")


def _name_of(client: Any, path: str, name: str, file: str | None, form: str | None) -> str:
    """Return what to call it here. Names of tenants lead nowhere: the last part alone counts."""
    if file is None and form is None:
        items = client.get(path.rpartition("/")[0])["items"]
        file = next((item["file"] for item in items if item["name"] == name), None)
    last = (file or f"{name}.{form or 'zip'}").rpartition("/")[2]
    target = Path(last)
    if last in {"", ".", ".."} or target.exists():
        raise click.UsageError(f"{last!r} is there already: say where to write it with -o")
    return last


def _path(client: Any, run: str, name: str) -> str:
    from ci_platform.client import segment
    from ci_platform.terminal import resolve_run

    return f"/api/v1/runs/{resolve_run(client, run)}/artifacts/{segment(name)}"
