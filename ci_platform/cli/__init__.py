"""The command line `dynflow`.

Exit codes: 0 done, and a run that was waited for concluded `success` · 1 the run concluded otherwise, or the
pipeline is invalid · 2 wrong usage or input · 3 the run waits at a gate that nobody here decides · 4 the server
or this machine cannot do it now · 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import click
from rich.console import Console

from ci_platform.cli.artifacts import artifact
from ci_platform.cli.asking import print_json
from ci_platform.cli.garbage import gc
from ci_platform.cli.repositories import repo
from ci_platform.cli.runs import COMMANDS, FAILURE, SUCCESS, UNAVAILABLE, conclusion_code
from ci_platform.cli.snapshots import snapshot
from ci_platform.cli.tokens import token
from ci_platform.errors import FailedError, PlatformError, RejectedError
from ci_platform.options import engine_settings, settings_from, settings_options
from dynflow.errors import StorageError

USAGE, AT_GATE, INTERRUPTED = 2, 3, 130

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Program(click.Group):
    """Turns errors into one line and an exit code; tracebacks are for defects alone."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except* KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except* (PlatformError, StorageError) as group:
            _fail(_leaf(group))
        except* BrokenPipeError:
            # The reader of a pipe (`head`) has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=_Program, context_settings=_CONTEXT)
@click.version_option(package_name="dynflow", prog_name="dynflow")
@click.option("-v", "--verbose", count=True, help="Say more on standard error; -vv says everything.")
def main(verbose: int) -> None:
    """CI/CD on your own machine, in which a pipeline is a Python function that survives anything.

    \b
    Commands that ask a server take its address from DYNFLOW_URL and DYNFLOW_TOKEN; without them they
    find the server that runs on this machine. A RUN is an id, the start of one, `last`, or owner/repo#3.
    """  # noqa: D301 - \b is click's own mark
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr
    )


# --- platforms of one's own ------------------------------------------------------------------------


@main.command()
@settings_options()
def serve(**options: Any) -> None:
    """Run the platform until Ctrl-C or SIGTERM."""
    from ci_platform.serving import Running, stopping_in_time, until_stopped

    settings = settings_from(options)
    console = Console()

    async def started(served: Running) -> None:
        link = await anyio.to_thread.run_sync(_login_link, served.address.url, served.token)
        console.print(f"dynflow answers at [bold]{served.url}[/bold]", highlight=False)
        console.print(f"  log in     {link}", highlight=False, soft_wrap=True)
        console.print(f"  git        {served.url}/git/<owner>/<name>.git", highlight=False, soft_wrap=True)
        console.print(f"  data       {settings.data}", highlight=False, soft_wrap=True)

    with stopping_in_time() as begin_stop:

        def stopping() -> None:
            begin_stop()
            console.print("Going down; runs go on at the next start.", highlight=False)

        anyio.run(until_stopped, settings, started, stopping)


@main.command()
@click.option("--yes", is_flag=True, help="Approve the gate at once, without asking anybody.")
@click.option(
    "--approve-after", type=click.FloatRange(0), metavar="SECONDS", help="Approve the gate after a while."
)
@click.option("--stay", is_flag=True, help="Keep serving after the conclusion, until Ctrl-C.")
@settings_options("data", "host", "port")
def demo(*, yes: bool, approve_after: float | None, stay: bool, **options: Any) -> None:
    """Show the whole thing: a platform, a repository, a push, a gate, a conclusion."""
    from ci_platform.demo import DemoOptions, temporary_data
    from ci_platform.demo import demo as show

    console = Console()
    choices = DemoOptions(0.0 if yes else approve_after, stay, _own_command())
    with temporary_data() as folder:
        settings = settings_from(options, data=folder, port=0)
        run = anyio.run(lambda: show(settings, console, choices))
    sys.exit(conclusion_code(run))


@main.command("run")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--approve", is_flag=True, help="Approve every gate.")
@click.option("--json", "as_json", is_flag=True, help="Print the run as JSON at the end.")
def run_pipeline(*, path: Path, approve: bool, as_json: bool) -> None:
    """Run the pipeline of the folder PATH here, uncommitted changes included, without a server."""
    from ci_platform.demo import temporary_data
    from ci_platform.here import NobodyToAskError, run_here

    console = Console(stderr=as_json)
    ask = _always_approve if approve else _ask_in_terminal
    with temporary_data() as folder:
        settings = settings_from({}, data=folder, port=0, host="127.0.0.1")
        try:
            run = anyio.run(lambda: run_here(path.resolve(), settings, console, ask))
        except* NobodyToAskError as group:
            _say_error(str(_leaf(group)))
            sys.exit(AT_GATE)
    if as_json:
        print_json(run)
    sys.exit(conclusion_code(run))


@main.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def validate(*, path: Path, as_json: bool) -> None:
    """Load the pipeline of the folder PATH in an isolate, and say what is wrong with it."""
    from ci_platform.validation import validate_folder

    problem = anyio.run(lambda: validate_folder(path.resolve()))
    if as_json:
        found = (
            None
            if problem is None
            else {"file": problem.file, "line": problem.line, "message": problem.message}
        )
        print_json({"valid": problem is None, "problem": found})
    elif problem is None:
        click.echo("ok: .dynflow/ci.py loads and has a CIPipeline")
    else:
        click.echo(str(problem), err=True)
    sys.exit(SUCCESS if problem is None else FAILURE)


_ENGINE_FILE = click.option(
    "--engine",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The file of an engine of the library alone, in the place of a data folder.",
)


_FACETS_FOLDER = click.option(
    "--facets",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="A folder of tenants' databases of the library alone, in the place of a data folder.",
)


@main.command()
@click.argument("target", type=click.Path(path_type=Path))
@settings_options("data")
@_ENGINE_FILE
@_FACETS_FOLDER
def backup(*, target: Path, engine: Path | None, facets: Path | None, **options: Any) -> None:
    """Copy the databases of a data folder, in use or not, into the new folder TARGET.

    With --engine, copy that one file to the new file TARGET; with --facets, that folder to the new folder TARGET.
    """
    from ci_platform.backup import back_up_engine, back_up_folder, copy_all_facets

    if engine is not None and facets is not None:
        raise click.UsageError("either --engine or --facets")
    if facets is not None:
        copies = copy_all_facets(facets, target)
    else:
        copies = back_up_engine(engine, target) if engine else back_up_folder(settings_from(options), target)
    _show(copies)
    for path, why in copies.left_out.items():
        _say_error(f"{path} {why}, and was left out")
    sys.exit(UNAVAILABLE if copies.left_out else SUCCESS)


@main.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@settings_options("data")
@_ENGINE_FILE
@_FACETS_FOLDER
def restore(*, source: Path, engine: Path | None, facets: Path | None, **options: Any) -> None:
    """Put the databases of the backup SOURCE into a data folder that has none.

    With --engine, copy the file SOURCE to that one, which must not exist; with --facets, the folder SOURCE to that one.
    """
    from ci_platform.backup import restore_engine, restore_facets, restore_folder

    if engine is not None and facets is not None:
        raise click.UsageError("either --engine or --facets")
    if facets is not None:
        copies = restore_facets(source, facets)
    else:
        copies = restore_engine(source, engine) if engine else restore_folder(settings_from(options), source)
    _show(copies)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@settings_options("data", "unsafe_no_isolation", *engine_settings())
def doctor(*, as_json: bool, **options: Any) -> None:
    """Say what this machine offers: walls, copy-on-write, Docker, disk, engine, and what to do about the rest."""
    from ci_platform.doctor import examine, print_findings

    findings = anyio.run(lambda: examine(settings_from(options)))
    if as_json:
        print_json([finding.as_json() for finding in findings])
    else:
        print_findings(findings, Console())
    sys.exit(SUCCESS if all(finding.state != "bad" for finding in findings) else UNAVAILABLE)


for _command in (*COMMANDS, artifact, token, repo, snapshot, gc):
    main.add_command(_command)


# --- what commands share -------------------------------------------------------------------------------


def _login_link(url: str, secret: str) -> str:
    from ci_platform.client import Client

    with Client(url, secret) as client:
        return str(client.post("/api/v1/login-links")["url"])


def _always_approve(_gate: Mapping[str, Any]) -> str:
    return "approve"


def _ask_in_terminal(gate: Mapping[str, Any]) -> str | None:
    if not sys.stdin.isatty():
        return None
    return "approve" if click.confirm(f"Approve the gate {gate['name']}?", default=False) else "reject"


def _own_command() -> str:
    """Return how the user calls this program: `scripts/run` says so in the environment."""
    return os.environ.get("DYNFLOW_COMMAND") or "dynflow"


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _fail(error: BaseException) -> NoReturn:
    _say_error(str(error))
    if isinstance(error, RejectedError) or 400 <= getattr(error, "status", 500) < 500:
        sys.exit(FAILURE if isinstance(error, FailedError) else USAGE)
    sys.exit(UNAVAILABLE)


def _show(copies: Any) -> None:
    for path in copies.made:
        click.echo(path)
    for text in copies.elsewhere:
        click.echo(f"dynflow: not here: {text}", err=True)


def _say_error(message: str) -> None:
    click.echo(f"dynflow: {message}", err=True)
