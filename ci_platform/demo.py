"""The demonstration: a platform of its own, a repository, a push, a gate, a conclusion."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from rich.console import Console

from ci_platform.client import ApiError, Client, forget_address, read_address, segment, write_address
from ci_platform.errors import UnavailableError
from ci_platform.repository_push import Destination, push_folder
from ci_platform.service_settings import default_data_folder
from ci_platform.serving import Running, running, stop_signal
from ci_platform.settings import Settings
from ci_platform.terminal import RunJson, RunWatcher, run_title, state_of
from ci_platform.web.ansi import plain

REPOSITORY = "demo/hello"
FILES = Path(__file__).parent / "demo_repository"

T = TypeVar("T")

# From the push to the run: the delivery is dispatched at once, so this is for a machine that is very busy.
_RUN_WITHIN = 60.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`approve_after`: seconds after which the demo approves by itself; None waits for a person.

    `stay` keeps serving after the conclusion. `command` is how the user calls this program.
    """

    approve_after: float | None = None
    stay: bool = False
    command: str = "dynflow"


async def demo(settings: Settings, console: Console, options: DemoOptions) -> RunJson:
    """Run the demonstration and return the run as it ended."""
    async with running(settings) as served:
        with Client(served.address.url, served.token) as client, found_by_default(served) as prefix:
            guide = _Guide(console, client, options, prefix)
            async with cancelled_by_signal():
                run = await in_thread(lambda: guide.lead(served))
                if options.stay:
                    console.print("Still serving. Ctrl-C ends it.")
                    await anyio.sleep_forever()
            return run


@contextmanager
def temporary_data() -> Any:
    """Give a data folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dynflow-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def found_by_default(served: Running) -> Any:
    """Let command lines in other terminals find this server; yields what they have to be told besides.

    That is nothing, unless another server is running with the default data folder.
    """
    default, own = default_data_folder(), served.platform.settings.data
    held = read_address(default)
    if default == own:
        yield ""
        return
    try:
        if held is not None and held.alive:
            raise FileExistsError
        write_address(default, served.address)
    except OSError:
        yield f"DYNFLOW_DATA={own} "
        return
    try:
        yield ""
    finally:
        forget_address(default, served.address)


class _Guide:
    def __init__(self, console: Console, client: Client, options: DemoOptions, prefix: str) -> None:
        self._console, self._client, self._options = console, client, options
        self._command = f"{prefix}{options.command}"

    def lead(self, served: Running) -> RunJson:
        say = self._console.print
        say(f"The platform answers at [bold]{served.url}[/bold]", highlight=False)
        say(f"Its web page, logged in: {self._login_link()}", highlight=False, soft_wrap=True)
        self._client.post("/api/v1/repos", {"name": REPOSITORY, "forge": "local"})
        with tempfile.TemporaryDirectory(prefix="dynflow-hello-") as scratch:
            folder = Path(shutil.copytree(FILES, Path(scratch) / "hello", ignore=_ignore))
            destination = Destination(served.address.url, REPOSITORY, "main", served.token)
            say(f"$ git push {served.url}/git/{REPOSITORY}.git main", highlight=False, soft_wrap=True)
            sha = push_folder(folder, destination, "Greet the world")
        run = wait_for_run(self._client, REPOSITORY, sha)
        say(f"Run {run['id']} of {run_title(run)}", highlight=False, soft_wrap=True)
        run = RunWatcher(self._client, self._console, self._at_gate).watch(run["id"])
        self._conclude(run)
        return run

    def _at_gate(self, run: RunJson, gate: Mapping[str, Any]) -> None:
        approve = f"{self._command} approve {run['id']} {shlex.quote(gate['name'])}"
        link = self._login_link(f"/runs/{run['id']}")
        self._console.print(
            f"\nThe run waits at its gate [bold]{gate['name']}[/bold], and holds no process while it does. "
            "Approve in the browser:\n\n"
            f"    {link}\n\n"
            f"or in another terminal:\n\n    [bold]{approve}[/bold]\n",
            highlight=False,
            soft_wrap=True,
        )
        if self._options.approve_after is not None:
            timer = threading.Timer(self._options.approve_after, self._approve, (run["id"], gate["name"]))
            timer.daemon = True
            timer.start()

    def _approve(self, run_id: str, gate: str) -> None:
        try:
            self._client.post(
                f"/api/v1/runs/{run_id}/gates/{segment(gate)}",
                {"decision": "approve", "comment": "approved by the demo itself"},
            )
        except ApiError as error:
            self._console.print(f"Not approved by the demo: {error}", highlight=False)  # somebody was faster

    def _login_link(self, path: str = "/") -> str:
        link = self._client.post("/api/v1/login-links")["url"]
        return str(link) if path == "/" else f"{link}?next={path}"

    def _conclude(self, run: RunJson) -> None:
        state = state_of(run)
        style = "green" if state == "success" else "red"
        self._console.print(f"\nConclusion: [{style}]{state}[/{style}]", highlight=False)
        if run["reason"]:
            self._console.print(plain(run["reason"].partition("\n")[0]), highlight=False, markup=False)
        if self._options.stay:
            link = self._login_link(f"/runs/{run['id']}")
            self._console.print(f"Look at it: {link}", highlight=False, soft_wrap=True)


def wait_for_run(client: Client, repo: str, sha: str) -> RunJson:
    """Return the run of this commit once there is one. Raises UnavailableError with the reason if none comes."""
    pause = threading.Event()
    for _ in range(int(_RUN_WITHIN / 0.05)):
        for run in client.get("/api/v1/runs", repo=repo, limit=10)["items"]:
            if run["sha"] == sha:
                found: RunJson = run
                return found
        pause.wait(0.05)
    raise UnavailableError(f"the push of {sha[:10]} to {repo} started no run within {_RUN_WITHIN:.0f} s")


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking `work` in a thread that is left behind on cancellation: its client ends it."""
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)


@asynccontextmanager
async def cancelled_by_signal() -> AsyncIterator[None]:
    """Raise KeyboardInterrupt in place of what runs in the block when SIGINT or SIGTERM comes."""
    stopped = False
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal stopped
            await stop_signal()
            stopped = True
            group.cancel_scope.cancel()

        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()
    if stopped:
        raise KeyboardInterrupt


def _ignore(_folder: str | os.PathLike[str], names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__"}
