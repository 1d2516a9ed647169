"""`dynflow gc`: what can be deleted, why, and why the rest stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import anyio
import click

from ci_platform.cli.asking import print_json
from ci_platform.options import settings_from, settings_options

_PATIENCE = 3600.0
"""Seconds: a large disk is looked through, and deleting takes its time."""


@click.command()
@click.option("--dry-run", is_flag=True, help="Delete nothing; say what would be deleted, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@settings_options("data")
def gc(*, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Delete what is above its budget or past its time, and more where the disk is short of room.

    Asks the server that runs here (or that DYNFLOW_URL names); without one, works on the data folder itself.
    """
    found = _ask_server(dry_run, options) or _work_alone(dry_run, options)
    if as_json:
        print_json(found)
        return
    for line in _lines(found):
        click.echo(ascii(line)[1:-1])


def _ask_server(dry_run: bool, options: dict[str, Any]) -> Any:  # noqa: FBT001 - handed through
    from ci_platform.client import Client, read_address

    if "DYNFLOW_URL" not in os.environ:
        address = read_address(settings_from(options).data)
        if address is None or not address.alive:
            return None
    with Client.find(data=settings_from(options).data) as client:
        return client.post("/api/v1/gc", {"dry_run": dry_run}, seconds=_PATIENCE)


def _work_alone(dry_run: bool, options: dict[str, Any]) -> dict[str, Any]:  # noqa: FBT001 - handed through
    from ci_platform.garbage.offline import collect_offline

    return asdict(anyio.run(lambda: collect_offline(settings_from(options), dry_run=dry_run)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    from ci_platform.garbage.planning import in_bytes

    verb = "would go" if found["dry_run"] else "gone"
    for item in found["items"]:
        used = str(item["used_at"])[:16].replace("T", " ")
        size = in_bytes(item["size"])
        yield f"{verb}  {item['kind']:<10} {size:>10}  last used {used}  {item['name']}: {item['why']}"
    for kind in found["kinds"]:
        yield _sums(kind, verb)
    for disk in found["disks"]:
        free, must = in_bytes(disk["free"]), in_bytes(disk["min_free"])
        yield f"disk of {disk['folder']}: {free} free; new runs wait below {must}"
    if found["shortage"]:
        yield f"new runs wait for {found['shortage']}"


def _sums(kind: dict[str, Any], verb: str) -> str:
    from ci_platform.garbage.planning import in_bytes

    parts = [f"{verb} {_sum(kind['collected'])}"]
    parts += [f"stay {_sum(each)}: {why}" for why, each in kind["kept"].items()]
    trouble = f"; cannot be looked at: {kind['trouble']}" if kind["trouble"] else ""
    return f"{kind['kind']} (budget {in_bytes(kind['budget'])}): {'; '.join(parts)}{trouble}"


def _sum(some: dict[str, Any]) -> str:
    from ci_platform.garbage.planning import in_bytes

    return f"{some['items']} of {in_bytes(some['size'])}"
