"""`dynflow runs`, `show`, `logs`, `approve`, `reject`, `cancel`, `rerun`: the runs of a server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console

from ci_platform.cli.asking import find_server, print_json
from ci_platform.cli.what_if import what_if

# Exit codes: all of them are in the package's docstring.
SUCCESS, FAILURE, UNAVAILABLE = 0, 1, 4


def conclusion_code(run: Mapping[str, Any]) -> int:
    """Return the exit code that says how a run ended."""
    if run["conclusion"] == "success":
        return SUCCESS
    return UNAVAILABLE if run["conclusion"] == "error" else FAILURE


@click.group(invoke_without_command=True)
@click.option("--repo", help="Of one repository.")
@click.option("--ref", help="Of one branch or ref.")
@click.option("--status", help="In one state: queued, running, waiting, success, failure, …")
@click.option("-n", "--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def runs(
    context: click.Context,
    /,
    *,
    repo: str | None,
    ref: str | None,
    status: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List runs, the newest first, or try one again with something changed."""
    from ci_platform.terminal import runs_table

    if context.invoked_subcommand is not None:
        return
    with find_server() as client:
        page = client.get("/api/v1/runs", repo=repo, ref=ref, status=status, limit=limit)
    if as_json:
        print_json(page)
    elif page["items"]:
        Console().print(runs_table(page["items"]))
    else:
        click.echo("no runs", err=True)


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option(
    "-w", "--watch", is_flag=True, help="Watch it until it ends; the exit code is its conclusion's."
)
def show(*, run: str, as_json: bool, watch: bool) -> None:
    """Show a run and its steps."""
    from ci_platform.terminal import RunWatcher, print_run, resolve_run

    console = Console(stderr=as_json)
    with find_server() as client:
        run_id = resolve_run(client, run)
        found = RunWatcher(client, console).watch(run_id) if watch else client.get(f"/api/v1/runs/{run_id}")
    if as_json:
        print_json(found)
    elif not watch:
        print_run(found, console)
    if watch:
        sys.exit(conclusion_code(found))


@click.command()
@click.argument("run")
@click.argument("step", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on while it grows.")
@click.option("--count", type=click.IntRange(1), default=1, help="Which one, of several steps of that name.")
def logs(*, run: str, step: str | None, follow: bool, count: int) -> None:
    """Print the log of a run's STEP, or of all its steps."""
    from ci_platform.terminal import LogFollower, print_log, resolve_run, steps_with_logs

    console = Console(highlight=False)
    with find_server() as client:
        run_id = resolve_run(client, run)
        follower = LogFollower(client, console, run_id)
        if follow and step:
            follower.follow_step(step, count)
        elif follow:
            follower.follow_run()
        elif step:
            print_log(client, console, run_id, step, count)
        else:
            for found in steps_with_logs(client.get(f"/api/v1/runs/{run_id}")):
                console.rule(found["name"])
                print_log(client, console, run_id, found["name"], found["count"])


@click.command()
@click.argument("run")
@click.argument("gate")
@click.option("-m", "--comment", help="Why; it is kept with the decision.")
def approve(*, run: str, gate: str, comment: str | None) -> None:
    """Approve the GATE that a run waits at."""
    _decide(run, gate, "approve", comment)


@click.command()
@click.argument("run")
@click.argument("gate")
@click.option("-m", "--comment", help="Why; it is kept with the decision.")
def reject(*, run: str, gate: str, comment: str | None) -> None:
    """Reject the GATE that a run waits at; the run ends."""
    _decide(run, gate, "reject", comment)


@click.command()
@click.argument("run")
def cancel(*, run: str) -> None:
    """Cancel a run; what it is doing is stopped."""
    from ci_platform.terminal import resolve_run

    with find_server() as client:
        run_id = resolve_run(client, run)
        client.post(f"/api/v1/runs/{run_id}/cancel")
    click.echo(f"{run_id} is being cancelled")


@click.command()
@click.argument("run")
@click.option("--from-step", metavar="STEP", help="Keep what finished before this step, files included.")
@click.option("--count", type=click.IntRange(1), default=1, help="Which one, of several steps of that name.")
@click.option(
    "-w", "--watch", is_flag=True, help="Watch it until it ends; the exit code is its conclusion's."
)
def rerun(*, run: str, from_step: str | None, count: int, watch: bool) -> None:
    """Run a finished run again, whole or from one of its steps."""
    from ci_platform.terminal import RunWatcher, resolve_run

    with find_server() as client:
        run_id = resolve_run(client, run)
        body = {"from_step": from_step, "count": count} if from_step else {}
        client.post(f"/api/v1/runs/{run_id}/rerun", body)
        click.echo(f"{run_id} runs again")
        if watch:
            sys.exit(conclusion_code(RunWatcher(client, Console()).watch(run_id)))


def _decide(run: str, gate: str, decision: str, comment: str | None) -> None:
    from ci_platform.client import segment
    from ci_platform.terminal import resolve_run

    with find_server() as client:
        run_id = resolve_run(client, run)
        body = {"decision": decision, "comment": comment}
        decided = client.post(f"/api/v1/runs/{run_id}/gates/{segment(gate)}", body)
    click.echo(f"gate {gate} is {decided['state']} by {decided['decided_by']}")


runs.add_command(what_if)

COMMANDS = (runs, show, logs, approve, reject, cancel, rerun)
