"""`dynflow token …`: what opens the API and git of a server."""

from __future__ import annotations

import click

from ci_platform.cli.asking import find_server, print_json


@click.group()
def token() -> None:
    """Make, list and revoke tokens."""


@token.command("create")
@click.argument("name")
@click.option(
    "--scope",
    type=click.Choice(["read", "write", "admin"]),
    default="write",
    show_default=True,
    help="Each holds those before it.",
)
@click.option("--repo", metavar="OWNER/NAME", help="Open the git, commits and files of one repository alone.")
@click.option("--expires-in", metavar="DURATION", help="Such as '30 days'. Default: when it is revoked.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def token_create(*, name: str, scope: str, repo: str | None, expires_in: str | None, as_json: bool) -> None:
    """Make a token for NAME and print it; it is not shown again."""
    body = {"name": name, "scopes": [scope], "repo": repo, "expires_in": expires_in}
    with find_server() as client:
        made = client.post("/api/v1/tokens", body)
    if as_json:
        print_json(made)
    else:
        click.echo(made["secret"])


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def token_list(*, as_json: bool) -> None:
    """List tokens, without their secrets."""
    with find_server() as client:
        items = client.get("/api/v1/tokens")["items"]
    if as_json:
        print_json(items)
        return
    for item in items:
        state = "revoked" if item["revoked_at"] else f"last used {item['last_used_at'] or 'never'}"
        scopes = ",".join(item["scopes"]) + (f" of {item['repo']}" if item["repo"] else "")
        state += f", until {item['expires_at']}" if item["expires_at"] else ""
        click.echo(f"{item['id']:>4}  {item['name']:<24} {scopes:<12} {state}")


@token.command("revoke")
@click.argument("token_id", type=int)
def token_revoke(*, token_id: int) -> None:
    """Make a token useless from now on."""
    with find_server() as client:
        client.delete(f"/api/v1/tokens/{token_id}")
    click.echo(f"token {token_id} is revoked")
