"""`dynflow snapshot …`: what runs had in their workspaces, after each step and where one failed."""

from __future__ import annotations

import sys
from typing import Any

import click

from ci_platform.cli.asking import find_server, print_json


@click.group()
def snapshot() -> None:
    """Look at what a run had in its workspaces.

    A SNAPSHOT is named as `list` shows it, such as checkout-1@3: a workspace, and a moment of it.
    """


@snapshot.command("list")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def snapshot_list(*, run: str, as_json: bool) -> None:
    """List the snapshots of a RUN, with what each step changed."""
    from ci_platform.terminal import resolve_run

    with find_server() as client:
        run_id = resolve_run(client, run)
        items = client.get(f"/api/v1/runs/{run_id}/snapshots")["items"]
    if as_json:
        print_json(items)
        return
    for item in items:
        name = f"{item['workspace'].removeprefix(f'{run_id}.')}@{item['name']}"
        click.echo(f"{name:<40} {item['outcome']:<10} {_notes(item)}".rstrip())


def _notes(item: dict[str, Any]) -> str:
    if item["step"] is None:
        return ""
    size = "" if item["paths"] is None else f"  {item['paths']} paths, {item['size']} bytes"
    others = ", ".join(sorted({each["step"] for each in item["conflicts"]}))
    conflicts = f"  {item['conflict_count']} overruled of {others}" if others else ""
    return ascii(f"{item['step']}{size}{conflicts}")[1:-1]


@snapshot.command("files")
@click.argument("run")
@click.argument("snapshot")
@click.argument("folder", default="")
def snapshot_files(*, run: str, snapshot: str, folder: str) -> None:
    """List a FOLDER of a SNAPSHOT; without one, its top."""
    with find_server() as client:
        for item in client.get(f"{_path(client, run, snapshot)}/files", path=folder)["items"]:
            arrow = f" -> {item['target']}" if item["target"] else ""
            click.echo(f"{item['kind']:<8} {item['size']:>12} " + ascii(item["name"] + arrow)[1:-1])


@snapshot.command("cat")
@click.argument("run")
@click.argument("snapshot")
@click.argument("file")
def snapshot_cat(*, run: str, snapshot: str, file: str) -> None:
    """Write a FILE of a SNAPSHOT to the standard output, as it is."""
    with find_server() as client:
        client.download(f"{_path(client, run, snapshot)}/file", sys.stdout.buffer, path=file)


@snapshot.command("download")
@click.argument("run")
@click.argument("snapshot")
@click.option("-o", "--output", type=click.File("wb"), default="-", help="Default: standard output.")
def snapshot_download(*, run: str, snapshot: str, output: Any) -> None:
    """Write all files of a SNAPSHOT as a tar, without its .git."""
    with find_server() as client:
        client.download(f"{_path(client, run, snapshot)}/tar", output)


def _path(client: Any, run: str, snapshot: str) -> str:
    from ci_platform.client import segment
    from ci_platform.terminal import resolve_run

    workspace, _, name = snapshot.rpartition("@")
    if not workspace:
        raise click.UsageError(f"a snapshot is named like checkout-1@3, not {snapshot!r}")
    run_id = resolve_run(client, run)
    return f"/api/v1/runs/{run_id}/snapshots/{segment(f'{run_id}.{workspace}')}/{segment(name)}"
