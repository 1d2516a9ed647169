"""Run a folder's pipeline here: no server to set up, uncommitted changes included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ci_platform.client import Client, segment
from ci_platform.demo import cancelled_by_signal, in_thread, wait_for_run
from ci_platform.errors import NotFoundError
from ci_platform.repository_push import Destination, current_branch, push_folder, repository_name
from ci_platform.serving import Running, running
from ci_platform.settings import Settings
from ci_platform.terminal import RunJson, RunWatcher, failed_steps, print_log, run_title, state_of
from ci_platform.web.ansi import plain

PIPELINE = Path(".dynflow") / "ci.py"

AskAtGate = Callable[[Mapping[str, Any]], str | None]
"""Given a gate, answers `approve`, `reject`, or None where nobody can be asked."""


class NobodyToAskError(Exception):
    """The run waits at a gate and nobody can decide it here."""


async def run_here(folder: Path, settings: Settings, console: Console, ask: AskAtGate) -> RunJson:
    """Run the pipeline of `folder` on a platform of its own and return the run as it ended.

    Raises NotFoundError where there is no pipeline, NobodyToAskError at a gate that nobody decides.
    """
    if not (folder / PIPELINE).is_file():
        raise NotFoundError(f"there is no {PIPELINE} in {folder}")
    async with running(settings) as served:
        with Client(served.address.url, served.token) as client:
            visit = _Visit(client, console, ask)
            async with cancelled_by_signal():
                return await in_thread(lambda: visit.run(folder, served))


class _Visit:
    def __init__(self, client: Client, console: Console, ask: AskAtGate) -> None:
        self._client, self._console, self._ask = client, console, ask
        self._undecided: str | None = None

    def run(self, folder: Path, served: Running) -> RunJson:
        repo, branch = repository_name(folder), current_branch(folder)
        self._client.post("/api/v1/repos", {"name": repo, "forge": "local", "default_branch": branch})
        destination = Destination(served.address.url, repo, branch, served.token)
        sha = push_folder(folder, destination, f"Working tree of {folder}")
        run = wait_for_run(self._client, repo, sha)
        self._console.print(run_title(run), highlight=False, markup=False)
        run = RunWatcher(self._client, self._console, self._at_gate).watch(run["id"])
        if self._undecided is not None:
            raise NobodyToAskError(
                f"the run waits at the gate {self._undecided!r}: say --approve, or run this in a terminal"
            )
        self._explain(run)
        return run

    def _at_gate(self, run: RunJson, gate: Mapping[str, Any]) -> None:
        decision = self._ask(gate)
        path = f"/api/v1/runs/{run['id']}"
        if decision is None:
            self._undecided = str(gate["name"])
            self._client.post(f"{path}/cancel")
        else:
            self._client.post(f"{path}/gates/{segment(gate['name'])}", {"decision": decision})

    def _explain(self, run: RunJson) -> None:
        if run["conclusion"] != "success":
            for step in failed_steps(run):
                self._console.rule(step["name"], style="red")
                print_log(self._client, self._console, run["id"], step["name"], step["count"], last=40)
            if run["reason"]:
                reason = plain(run["reason"].partition("\n")[0])
                self._console.print(reason, highlight=False, markup=False, soft_wrap=True)
        state = state_of(run)
        self._console.print(
            f"Conclusion: {state}", highlight=False, style="green" if state == "success" else "red"
        )
