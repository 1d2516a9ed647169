"""`dynflow repo …`: repositories of the server, from importing to deleting."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from ci_platform.cli.asking import find_server, print_json

_PASSWORD = "DYNFLOW_IMPORT_PASSWORD"  # noqa: S105 - the name of a variable
_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.group()
def repo() -> None:
    """Make, import, fork, read and delete repositories. NAME is owner/repository."""


@repo.command("list")
@_AS_JSON
def repo_list(*, as_json: bool) -> None:
    """List repositories."""
    with find_server() as client:
        items = client.get("/api/v1/repos")["items"]
    if as_json:
        print_json(items)
        return
    for item in items:
        click.echo(f"{item['name']:<40} {item['forge']:<8} {_notes(item)}".rstrip())


@repo.command("show")
@click.argument("name")
@_AS_JSON
def repo_show(*, name: str, as_json: bool) -> None:
    """Show a repository, and for an import how far it is."""
    from ci_platform.client import ApiError

    with find_server() as client:
        found = dict(client.get(_path(name)))
        try:
            found["import"] = client.get(_path(name, "import"))
        except ApiError as error:
            if error.status != 404:
                raise
    if as_json:
        print_json(found)
        return
    click.echo(f"{found['name']}  {found['forge']}  {_notes(found)}".rstrip())
    if "import" in found:
        _print_import(found["import"])


@repo.command("create")
@click.argument("name")
@click.option("--branch", default="main", show_default=True, help="The default branch.")
def repo_create(*, name: str, branch: str) -> None:
    """Make an empty repository."""
    with find_server() as client:
        client.post("/api/v1/repos", {"name": name, "default_branch": branch})
        click.echo(f"{client.url}/git/{name}.git")


@repo.command("import")
@click.argument("name")
@click.argument("url")
@click.option(
    "--username", help=f"Who to be at the remote; the password comes from {_PASSWORD} or is asked for."
)
@click.option("--depth", type=click.IntRange(1), help="Import that many commits of each branch.")
@click.option("--blobs/--no-blobs", default=True, help="Without, files come when they are first read.")
@_AS_JSON
def repo_import(*, name: str, url: str, username: str | None, as_json: bool, **shape: Any) -> None:
    """Fill the new repository NAME from URL, and keep it like that. The same again gives new credentials."""
    password = os.environ.get(_PASSWORD)
    if username and password is None:
        password = click.prompt("Password or token", hide_input=True, err=True)
    body = {"name": name, "url": url, "username": username, "password": password, **shape}
    with find_server() as client:
        made = client.post("/api/v1/imports", body)
    if as_json:
        print_json(made)
        return
    click.echo(f"importing {name}; `dynflow repo show {name}` says how far it is")
    click.echo(f"webhook   {made['hook_url']}")
    click.echo(f"secret    {made['hook_secret']}")


@repo.command("refresh")
@click.argument("name")
@click.option("--verify", is_flag=True, help="Look at every object, and fetch all anew where one is damaged.")
def repo_refresh(*, name: str, verify: bool) -> None:
    """Bring an import to what its remote has now."""
    with find_server() as client:
        client.post(_path(name, "refresh"), {"verify": verify})
    click.echo(f"{name} is being refreshed")


@repo.command("fork")
@click.argument("name")
@click.argument("fork")
def repo_fork(*, name: str, fork: str) -> None:
    """Make the repository FORK with what NAME has now."""
    with find_server() as client:
        client.post(_path(name, "fork"), {"name": fork})
        click.echo(f"{client.url}/git/{fork}.git")


@repo.command("set")
@click.argument("name")
@click.option("--read-only/--no-read-only", default=None, help="Whether nobody may push to it.")
@click.option("--enabled/--no-enabled", default=None, help="Whether it starts runs.")
@click.option(
    "--reads",
    metavar="NAMES",
    help="Repositories that its runs may have as submodules, with commas between them; empty: none.",
)
def repo_set(*, name: str, reads: str | None, **changes: bool | None) -> None:
    """Change what a repository does, and what its runs may read."""
    others = None if reads is None else [other.strip() for other in reads.split(",") if other.strip()]
    with find_server() as client:
        found = client.patch(_path(name), {**changes, "reads": others})
    click.echo(f"{found['name']}  {_notes(found)}".rstrip())


@repo.command("delete")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def repo_delete(*, name: str, yes: bool) -> None:
    """Delete a repository with its tokens. Forks of it stay whole."""
    if not yes:
        click.confirm(f"Delete {name} and all commits in it?", abort=True)
    with find_server() as client:
        client.delete(_path(name))
    click.echo(f"{name} is deleted")


@repo.command("log")
@click.argument("name")
@click.argument("ref", required=False)
@click.option("-n", "--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@_AS_JSON
def repo_log(*, name: str, ref: str | None, limit: int, as_json: bool) -> None:
    """List the commits that the branch, tag or commit REF leads to, the newest first."""
    with find_server() as client:
        found = client.get(_path(name, "log"), ref=ref, limit=limit)
    if as_json:
        print_json(found)
        return
    for item in found["items"]:
        # Titles are strangers' text: none drives a terminal.
        title = "".join(char for char in item["title"] if char.isprintable())
        click.echo(f"{item['sha'][:12]}  {item['committed_at'][:10]}  {title}")


def _path(name: str, *more: str) -> str:
    from ci_platform.client import segment

    owner, _, own = name.partition("/")
    return "/".join(["/api/v1/repos", segment(owner), segment(own), *more])


def _notes(found: Mapping[str, Any]) -> str:
    notes = [f"fork of {found['parent']}"] if found["parent"] else []
    notes += ["read-only"] if found["read_only"] else []
    notes += [f"reads {' '.join(found['reads'])}"] if found["reads"] else []
    return ", ".join([*notes, *([] if found["enabled"] else ["starts no runs"])])


def _print_import(found: Mapping[str, Any]) -> None:
    click.echo(f"  from       {found['url']}")
    click.echo(f"  state      {found['state']}{', a refresh is due' if found['due_at'] else ''}")
    click.echo(f"  refreshed  {found['refreshed_at'] or 'never'}")
    if found["last_error"]:
        click.echo(f"  error      {found['last_error']}")
