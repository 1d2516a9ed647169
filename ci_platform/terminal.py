"""What the command line shows: tables, a live run, plain lines where nobody looks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ci_platform.client import Client, segment
from ci_platform.errors import NotFoundError, PlatformError
from ci_platform.fork_words import forks_in_words
from ci_platform.web.ansi import Terminal, plain

RunJson = Mapping[str, Any]

_LOOKS = {
    "success": ("✓", "green"),
    "complete": ("✓", "green"),
    "approved": ("✓", "green"),
    "failure": ("✗", "red"),
    "errored": ("✗", "red"),
    "error": ("✗", "red"),
    "timed_out": ("✗", "red"),
    "rejected": ("✗", "red"),
    "cancelled": ("-", "bright_black"),
    "running": ("●", "yellow"),
    "queued": ("○", "yellow"),
    "waiting": ("‖", "magenta"),
}
_MOST_CACHES = 20
"""That a run is shown with: the newest."""

# The engine has ended a moment before the conclusion is stored.
_CONCLUSION_WITHIN = 30.0
_GATE_WITHIN = 10.0


def parse_time(text: str | None) -> datetime | None:
    """Return an API timestamp as an aware datetime."""
    return datetime.fromisoformat(text) if text else None


def duration(started: str | None, ended: str | None) -> str:
    """Return how long something took, or has taken up to now."""
    start = parse_time(started)
    if start is None:
        return ""
    seconds = max(((parse_time(ended) or datetime.now(UTC)) - start).total_seconds(), 0.0)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def state_of(run: RunJson) -> str:
    """Return the one word for a run's state: its conclusion, or what it is doing."""
    return str(run["conclusion"] or run["status"])


def waiting_line(run: RunJson) -> str:
    """Return what a run waits for that may not begin yet, an empty text of others."""
    held = run["status"] == "queued" and run["waiting_for"]
    return f"queued, waiting for {plain(run['waiting_for'])}" if held else ""


def look(state: str) -> Text:
    """Return a state with its mark and colour."""
    mark, style = _LOOKS.get(state, ("·", ""))
    return Text(f"{mark} {state.replace('_', ' ')}", style=style)


def _mark_of(state: str) -> Text:
    mark, style = _LOOKS.get(state, ("·", ""))
    return Text(mark, style=style)


def run_title(run: RunJson) -> str:
    """Return what a run is called: `owner/repo #3 main 1234567 title`."""
    return (
        f"{run['repo']} #{run['number']}  {run['branch']} {run['sha'][:10]}  {plain(run['title'])}".rstrip()
    )


def runs_table(runs: Iterable[RunJson]) -> Table:
    """Return a table of runs."""
    table = Table(box=None, pad_edge=False)
    for name in ("Run", "Status", "Repository", "#", "Branch", "Title", "Time"):
        table.add_column(name, overflow="ellipsis", no_wrap=True, justify="right" if name == "#" else "left")
    for run in runs:
        table.add_row(
            run["id"][:12],
            look(state_of(run)),
            run["repo"],
            str(run["number"]),
            Text(run["branch"]),
            Text(plain(run["title"])),
            duration(run["started_at"], run["ended_at"]),
        )
    return table


def steps_table(run: RunJson) -> RenderableType:
    """Return the steps of a run, the ones that work with a spinner."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(min_width=16, overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for step in run["steps"]:
        working = step["status"] == "running"
        mark = Spinner("dots", style="yellow") if working else _mark_of(_step_state(step))
        table.add_row(
            mark,
            Text(step["name"] + (f" ({step['count']})" if step["count"] > 1 else "")),
            duration(step["started_at"], step["ended_at"]),
            _remark(step),
        )
    return table


def _step_state(step: Mapping[str, Any]) -> str:
    return "success" if step["status"] == "complete" else str(step["status"])


def _remark(step: Mapping[str, Any]) -> Text:
    attempts = len(step["attempts"])
    parts = [f"attempt {attempts}"] if attempts > 1 else []
    if step["status"] == "waiting" and step["kind"] == "wait_for_event":
        parts.append("waits for a decision")
    if step["error"]:
        parts.append(_first_line(f"{step['error']['name']}: {step['error']['message']}"))
    return Text(", ".join(parts), style="red" if step["error"] else "bright_black")


def _first_line(text: str) -> str:
    return plain(text.strip().partition("\n")[0])[:200]


class RunWatcher:
    """Shows a run until it ends. `on_gate` is called once per gate that opens, with the gate.

    In a terminal as a table that changes in place; elsewhere as one plain line per event.
    """

    def __init__(
        self,
        client: Client,
        console: Console,
        on_gate: Callable[[RunJson, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._client, self._console = client, console
        self._on_gate = on_gate
        self._announced: set[tuple[str, int, str]] = set()

    def watch(self, run_id: str) -> RunJson:
        """Return the run as it ended."""
        path = f"/api/v1/runs/{segment(run_id)}"
        return self._in_place(path) if self._console.is_terminal else self._in_lines(path)

    def _in_place(self, path: str) -> RunJson:
        shown = _Shown(self._client.get(path))
        with Live(get_renderable=shown.render, console=self._console, refresh_per_second=8) as live:
            for _ in self._client.stream(f"{path}/events"):
                shown.run = self._with_gates(path)
                self._announce_gates(shown.run)
            shown.run = self._concluded(path)
            live.refresh()
        return shown.run

    def _in_lines(self, path: str) -> RunJson:
        if held := waiting_line(self._client.get(path)):
            self._console.print(held, highlight=False, markup=False, soft_wrap=True)
        for event in self._client.stream(f"{path}/events"):
            line = _event_line(event.data)
            if line:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            if event.data["type"] == "wait.started":
                self._announce_gates(self._with_gates(path))
        return self._concluded(path)

    def _with_gates(self, path: str) -> RunJson:
        """Return the run once each of its waits shows as a gate, which is a moment after the engine parks it."""
        deadline = time.monotonic() + _GATE_WITHIN
        while True:
            run: RunJson = self._client.get(path)
            gates = {(gate["name"], gate["count"]) for gate in run["gates"] if gate["state"] != "closed"}
            if run["conclusion"] or waits_of(run) <= gates or time.monotonic() > deadline:
                return run
            threading.Event().wait(0.05)

    def _announce_gates(self, run: RunJson) -> None:
        for gate in run["gates"]:
            identity = (gate["name"], gate["count"], gate["opened_at"])
            if gate["state"] == "open" and identity not in self._announced:
                self._announced.add(identity)
                if self._on_gate is not None:
                    self._on_gate(run, gate)

    def _concluded(self, path: str) -> RunJson:
        deadline = time.monotonic() + _CONCLUSION_WITHIN
        while True:
            run: RunJson = self._client.get(path)
            if run["conclusion"] or time.monotonic() > deadline:
                return run
            threading.Event().wait(0.05)


def waits_of(run: RunJson) -> set[tuple[str, int]]:
    """Return names and counts of the steps that wait for an event."""
    return {
        (step["name"], step["count"])
        for step in run["steps"]
        if step["kind"] == "wait_for_event" and step["status"] == "waiting"
    }


class _Shown:
    """What the live table shows; replaced by the reader's thread, read by the painter's."""

    def __init__(self, run: RunJson) -> None:
        self.run = run

    def render(self) -> RenderableType:
        run = self.run
        state = Text(held) if (held := waiting_line(run)) else look(state_of(run))
        return Group(steps_table(run), Text(), state) if run["steps"] else state


def _event_line(event: Mapping[str, Any]) -> str:
    kind, data = event["type"], event["data"]
    moment = parse_time(event["timestamp"])
    if kind.startswith("attempt.") and kind != "attempt.errored":
        return ""
    what = data.get("step") or ""
    if what and data.get("count", 1) > 1:
        what += f" ({data['count']})"
    error = data.get("error")
    if isinstance(error, Mapping):
        error = f"{error.get('name')}: {error.get('message')}"
    words = [f"{moment:%H:%M:%S}" if moment else "", f"{kind:<20}", what, _first_line(error) if error else ""]
    return "  ".join(word for word in words if word).rstrip()


def resolve_run(client: Client, name: str) -> str:
    """Return the id of the run that `name` means: an id, the unique start of one, `last`, or `owner/repo#3`."""
    if len(name) == 32:
        return name
    repo, _, number = name.partition("#")
    page = client.get("/api/v1/runs", repo=repo if "/" in repo else None, limit=100)
    items = page["items"]
    if name == "last" and items:
        return str(items[0]["id"])
    if "/" in repo and number.isdecimal():
        items = [run for run in items if run["number"] == int(number)]
    elif "/" not in name:
        items = [run for run in items if run["id"].startswith(name)]
    if len(items) == 1:
        return str(items[0]["id"])
    if items:
        raise NotFoundError(f"{name!r} can mean {len(items)} runs: give more of the id")
    raise NotFoundError(f"there is no run {name!r} among the newest hundred: `dynflow runs` lists them")


def failed_steps(run: RunJson) -> list[Mapping[str, Any]]:
    """Return the steps that failed and may have printed something."""
    return [step for step in run["steps"] if step["status"] == "errored" and step["kind"] == "do"]


def print_log(
    client: Client, console: Console, run_id: str, step: str, count: int = 1, *, last: int | None = None
) -> None:
    """Print a step's log, or its last lines, without what could drive the terminal."""
    text = client.text(f"/api/v1/runs/{segment(run_id)}/steps/{segment(step)}/log?count={count}")
    lines = text.splitlines()
    if last is not None and len(lines) > last:
        console.print(f"… {len(lines) - last} lines before", style="bright_black", highlight=False)
        lines = lines[-last:]
    terminal = Terminal()
    for line in lines:
        console.print(styled(terminal, line), soft_wrap=True)


def styled(terminal: Terminal, line: str) -> Text:
    """Return a line of hostile output as text with colours and nothing else."""
    text = Text()
    for classes, piece in terminal.render(line):
        text.append(piece, style=_style(classes))
    return text


def _style(classes: str) -> str:
    words = []
    for name in classes.split():
        if name.startswith("fg-"):
            words.append(name[3:].replace("-", "_"))
        elif name.startswith("bg-"):
            words.append("on " + name[3:].replace("-", "_"))
        else:
            words.append({"inverse": "reverse"}.get(name, name))
    return " ".join(words)


class LogFollower:
    """Prints logs of a run while they grow; several steps at once get their names in front."""

    def __init__(self, client: Client, console: Console, run_id: str) -> None:
        self._client, self._console, self._run_id = client, console, run_id
        self._lock = threading.Lock()

    def follow_step(self, step: str, count: int = 1, *, prefix: str = "") -> None:
        """Print one step's log until the step is over."""
        path = f"/api/v1/runs/{segment(self._run_id)}/steps/{segment(step)}/log"
        terminal, pending = Terminal(), ""
        for event in self._client.stream(path, follow="true", count=count):
            for line in event.data["lines"]:
                pending += _mark(line["kind"]) * (not pending) + line["text"]
                if not line["goes_on"]:
                    self._print(prefix, styled(terminal, pending))
                    pending = ""
        if pending:
            self._print(prefix, styled(terminal, pending))

    def follow_run(self) -> None:
        """Print the logs of all steps until the run is over."""
        path = f"/api/v1/runs/{segment(self._run_id)}"
        started: dict[tuple[str, int], threading.Thread] = {}
        for event in self._client.stream(f"{path}/events"):
            step = event.data["data"].get("step"), event.data["data"].get("count", 1)
            if event.data["type"] == "step.started" and step[0] and step not in started:
                name = step[0] if step[1] == 1 else f"{step[0]} ({step[1]})"
                thread = threading.Thread(
                    target=self._follow_quietly, args=(*step,), kwargs={"prefix": f"{name} │ "}, daemon=True
                )
                started[step] = thread
                thread.start()
        for thread in started.values():
            thread.join(timeout=5)

    def _follow_quietly(self, step: str, count: int, *, prefix: str) -> None:
        try:
            self.follow_step(step, count, prefix=prefix)
        except PlatformError as error:
            self._print(prefix, Text(str(error), style="red"))

    def _print(self, prefix: str, text: Text) -> None:
        with self._lock:
            self._console.print(Text(prefix, style="cyan").append_text(text), soft_wrap=True)


def _mark(kind: str) -> str:
    return {"command": "$ ", "result": "= ", "notice": "! "}.get(kind, "")


def print_run(run: RunJson, console: Console) -> None:
    """Print a run with its steps, its reason and what it waits for."""
    console.print(run_title(run), highlight=False, markup=False, soft_wrap=True)
    console.print(look(state_of(run)), Text(_facts(run), style="bright_black"))
    if held := waiting_line(run):
        console.print(held, highlight=False, markup=False, soft_wrap=True)
    if run["reason"]:
        console.print(Text("\n".join(plain(line) for line in run["reason"].splitlines())))
    for line in forks_in_words(run):
        console.print(Text(line), style="bright_black")
    console.print(steps_table(run))
    for cache in run.get("caches", ())[-_MOST_CACHES:]:
        told = "; ".join(filter(None, (cache["reason"], cache["saved"])))
        console.print(Text(plain(f"cache of {cache['step']}: {told}")), style="bright_black")
    for gate in run["gates"]:
        if gate["state"] == "open":
            console.print(Text(f"open gate: {gate['name']}"), style="magenta")
        elif gate["decided_by"]:
            console.print(Text(f"gate {gate['name']}: {gate['state']} by {gate['decided_by']}"))


def steps_with_logs(run: RunJson) -> list[Mapping[str, Any]]:
    """Return the steps that may have printed something."""
    return [step for step in run["steps"] if step["kind"] == "do"]


def _facts(run: RunJson) -> str:
    took = duration(run["started_at"], run["ended_at"])
    parts = [run["id"], run["event"].replace("_", " "), f"by {run['actor']}" if run["actor"] else "", took]
    return "  ".join(part for part in parts if part)
