"""The platform's own part, put together over a real engine and a real database, with trusted workflows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from ci_platform.admission import Admission
from ci_platform.deliveries import CommitInfo, Deliveries
from ci_platform.errors import ConflictError, FailedError, UnavailableError
from ci_platform.forges import Change, Forge
from ci_platform.forges.local import LocalForge
from ci_platform.gates import Gates
from ci_platform.instances import WorkflowsBinding
from ci_platform.model import OutboxRow
from ci_platform.notices import Notices
from ci_platform.reports import Reports
from ci_platform.run_forks import RunForks
from ci_platform.run_views import RunView
from ci_platform.runs import Runs
from ci_platform.store import Store, col
from ci_platform.triggers import RunRequest, run_id_of
from ci_platform.workspace_forks import Patch
from dynflow import NonRetryableError, WorkflowEntrypoint
from dynflow.clock import ManualClock
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.types import InstanceStatus

SHA = "a" * 40


class Pipeline(WorkflowEntrypoint):
    """What the branch says: `main` has a gate, `two-gates` two of one type, `broken` fails, others pass."""

    async def run(self, event: Any, step: Any) -> Any:
        branch, done = event.payload["branch"], self.env.DONE

        def does(name: str) -> Callable[[], str]:
            def body() -> str:
                done.append(name)
                return name

            return body

        await step.do("build", does("build"))
        if branch == "broken":
            await step.do("test", {"retries": {"limit": 0, "delay": 0}}, fails)
        if branch == "nested":
            await step.do("outer", lambda: step.do("inner", does("inner")))
        if branch == "endless":
            await step.do("hang", hangs)
        for gate in {"main": ["approval"], "two-gates": ["first", "second"]}.get(branch, []):
            approval = await step.wait_for_event(gate, type="deploy-approval", timeout="24 hours")
            await step.do(f"after-{gate}", does(f"{gate}: {approval.payload}"))
        await step.do("deploy", does("deploy"))


def fails() -> None:
    raise NonRetryableError("boom\nsecond line")


async def hangs() -> None:
    await asyncio.Event().wait()


class KilledError(Exception):
    """Stands for a kill -9 at this point: what comes after it does not happen."""


@dataclass
class Breakable:
    """The engine's binding, whose calls can be cut off before or after they take effect."""

    binding: WorkflowsBinding
    before: set[str] = field(default_factory=set)
    after: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    async def create(self, *, id: str, params: Any) -> Any:  # noqa: A002 - the binding's name
        return await self.cut("create", lambda: self.binding.create(id=id, params=params))

    async def fork(self, source_id: str, **options: Any) -> Any:
        return await self.cut("fork", lambda: self.binding.fork(source_id, **options))

    async def get(self, id: str) -> Any:  # noqa: A002 - the binding's name
        return BreakableHandle(await self.binding.get(id), self)

    async def cut(self, name: str, call: Callable[[], Any]) -> Any:
        if name in self.before:
            raise KilledError(f"before {name}")
        self.calls.append(name)
        result = await call()
        if name in self.after:
            raise KilledError(f"after {name}")
        return result


@dataclass
class BreakableHandle:
    handle: Any
    breakable: Breakable

    def __getattr__(self, name: str) -> Any:
        if name in {"status", "subscribe"}:
            return getattr(self.handle, name)
        return lambda *args, **options: self.breakable.cut(
            name, lambda: getattr(self.handle, name)(*args, **options)
        )


@dataclass
class Commits:
    """What commits there are, and how their remote behaves."""

    message: str = "A message"
    digest: str | None = "sha256:1"
    trouble: list[Exception] = field(default_factory=list)
    asked: list[Change] = field(default_factory=list)

    async def describe(
        self, change: Change, *, clone_url: str, credentials: tuple[str, str] | None
    ) -> CommitInfo:
        del clone_url, credentials
        self.asked.append(change)
        if self.trouble:
            raise self.trouble.pop(0)
        return CommitInfo(self.message, self.digest)


class ForgeOfTests(LocalForge):
    """The local forge, which can be down."""

    trouble: list[Exception]

    async def set_status(self, status: Any) -> None:
        self.shown.append((status.state, status.description))
        if self.trouble:
            raise self.trouble.pop(0)
        await super().set_status(status)

    def prepare(self) -> ForgeOfTests:
        self.trouble, self.shown = [], list[tuple[str, str]]()
        return self


@dataclass
class Rewound:
    """Which steps' layers were forgotten."""

    calls: list[tuple[str, list[tuple[str, int]]]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    collected: set[str] = field(default_factory=set)

    async def delete_run(self, run_id: str) -> None:
        self.deleted.append(run_id)

    @asynccontextmanager
    async def rerunning(self, run_id: str) -> AsyncIterator[None]:
        if run_id in self.collected:
            raise ConflictError("collected to make room")
        yield

    async def rewind_run(self, run_id: str, steps: Collection[tuple[str, int]]) -> None:
        self.calls.append((run_id, list(steps)))


@dataclass
class ForkedFiles:
    """Which runs' workspaces were forked, for which steps; and what their patches say."""

    calls: list[tuple[str, str, list[tuple[str, int]], str | None]] = field(default_factory=list)
    trouble: list[Exception] = field(default_factory=list)

    @asynccontextmanager
    async def staying(self, run_id: str) -> AsyncIterator[None]:
        del run_id
        yield

    async def of_run(self, run_id: str) -> list[str]:
        return [f"{run_id}.checkout-1"]

    async def check(self, source: str, kept: Any, text: str, step: str | None = None) -> Patch:
        del kept, step
        if self.trouble:
            raise self.trouble.pop(0)
        return Patch(text, f"{source}.checkout-1", ("a.txt",))

    async def fork(self, source: str, run_id: str, kept: Any, patch: Patch | None) -> None:
        self.calls.append((source, run_id, sorted(kept), None if patch is None else patch.text))

    async def digest_at(self, repo: str, sha: str) -> str:
        return f"sha256:{repo}@{sha}"

    async def commit_of(self, repo: str, name: str) -> str:
        del repo
        return name


@dataclass
class Harness:
    store: Store
    clock: ManualClock
    engine: EmbeddedEngine
    workflows: Breakable
    forge: ForgeOfTests
    reports: Reports
    gates: Gates
    runs: Runs
    deliveries: Deliveries
    commits: Commits
    layers: Rewound
    forked: ForkedFiles
    done: list[str]
    shortage: list[str]

    async def start(self, branch: str = "topic", sha: str = SHA, **fields: Any) -> RunView:
        return await self.runs.start(request(branch, sha, **fields))

    async def status(self, run_id: str) -> InstanceStatus:
        status: InstanceStatus = await (await self.workflows.get(run_id)).status()
        return status

    async def reach(self, run_id: str, wanted: str, waiting_for: str | None = None) -> InstanceStatus:
        """Wait until the engine says this status (and waits at this gate), then have it written down."""
        handle = await self.workflows.get(run_id)
        with anyio.fail_after(30):
            async for _ in handle.subscribe():
                status: InstanceStatus = await handle.status()
                waits = {step.name for step in status.steps if step.status == "waiting"}
                if status.status == wanted and (waiting_for is None or waiting_for in waits):
                    break
        await self.runs.project(run_id)
        return await self.status(run_id)

    async def at_gate(self, branch: str = "main", gate: str = "approval") -> RunView:
        run = await self.start(branch)
        await self.reach(run.id, "waiting", gate)
        return await self.runs.get(run.id)

    async def statuses(self, run_id: str) -> list[tuple[str, str]]:
        """Return state and description of every status report of a run, in order."""
        rows = await self.store.read(
            lambda tx: tx.all(
                OutboxRow,
                col(OutboxRow.run_id) == run_id,
                col(OutboxRow.kind) == "status",
                order=col(OutboxRow.id),
            )
        )
        return [(row.payload["state"], row.payload["description"]) for row in rows]

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)


def request(branch: str = "topic", sha: str = SHA, **fields: Any) -> RunRequest:
    values: dict[str, Any] = {
        "event": "push",
        "action": "push",
        "repo": "o/r",
        "actor": "alice",
        "title": "Add",
    }
    values |= {"sha": sha, "ref": f"refs/heads/{branch}", "branch": branch, **fields}
    change = Change(**values)
    return RunRequest(run_id_of("local", change), change)


@asynccontextmanager
async def harness(store: Store, clock: ManualClock, folder: Path) -> AsyncIterator[Harness]:
    done: list[str] = []
    shortage: list[str] = []
    admission = Admission(lambda: next(iter(shortage), None))
    engine = EmbeddedEngine(folder / "engine.db", clock=clock, synchronous="NORMAL")
    engine.register("ci", Pipeline, env={"DONE": done})
    notices = Notices(clock)
    engine.add_listener(lambda ref, event: notices.add(ref.id))
    forge = ForgeOfTests(store, clock, lambda repo: f"/mirrors/{repo}").prepare()
    forges: dict[str, Forge] = {"local": forge}
    reports = Reports(store, clock, forges=forges, public_url="http://here")
    gates = Gates(store, clock, notices)
    workflows, layers, commits = Breakable(engine.binding("ci")), Rewound(), Commits()
    forked = ForkedFiles()
    runs = Runs(
        store,
        clock,
        notices,
        workflows=workflows,
        gates=gates,
        reports=reports,
        layers=layers,
        forks=RunForks(store, clock, workflows, files=forked, codes=forked),
        admission=admission,
    )
    deliveries = Deliveries(store, clock, forges=forges, runs=runs, commits=commits)
    async with engine:
        yield Harness(
            store=store,
            clock=clock,
            engine=engine,
            workflows=workflows,
            forge=forge,
            reports=reports,
            gates=gates,
            runs=runs,
            deliveries=deliveries,
            commits=commits,
            layers=layers,
            forked=forked,
            done=done,
            shortage=shortage,
        )


__all__ = ["Commits", "FailedError", "Harness", "KilledError", "UnavailableError", "harness", "request"]
