"""Runs as the API, the pages and the command line show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from ci_platform.errors import Conclusion
from ci_platform.gates import GateView, gate_view
from ci_platform.model import DeliveryRow, Gate, Run, RunCache, RunFork, RunImage
from ci_platform.outcomes import Phase, phase_of, waiting_for
from dynflow.types import AttemptInfo, ErrorInfo, InstanceStatus, StepKind, StepStatus


@dataclass(frozen=True, slots=True)
class StepView:
    """A step; times are aware UTC. `status` is `running`, `waiting`, `complete` or `errored`.

    `kept`: it was not performed here, its result and files are those of the run that this one was forked from.
    """

    name: str
    count: int
    kind: StepKind
    status: str
    started_at: datetime
    ended_at: datetime | None
    attempts: tuple[AttemptInfo, ...]
    error: ErrorInfo | None
    event_type: str | None
    deadline: datetime | None
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a run exists: the delivery that asked for it."""

    delivery: int
    forge: str
    delivery_id: str
    event: str
    received_at: datetime


@dataclass(frozen=True, slots=True)
class CacheView:
    """What a command of a step found of a cache (`hit`, `restored` or `miss`), why, and what became of what it left.

    `saved` is None where nothing was to be saved, or the command did not succeed.
    """

    step: str
    count: int
    attempt: int
    key: str
    outcome: str
    reason: str
    saved: str | None


@dataclass(frozen=True, slots=True)
class Forked:
    """What a run was forked from, and what it has instead. `number` is None where that run is not kept any more.

    Without a `step` it began at the start. `code` is the commit of its pipeline where that is not the run's own,
    `inputs` are the parts of the event's payload that were given, `patched_files` what a patch changed: files are
    for who may look at snapshots.
    `unused_steps` (`name #count`) were kept, but its code did not call them; `reached` says whether it called
    `step`. Both are null until its code has come to its end.
    """

    run: str
    number: int | None
    step: str | None
    count: int
    by: str
    code: str | None
    inputs: Mapping[str, Any]
    patched_files: tuple[str, ...]
    unused_steps: tuple[str, ...] | None
    reached: bool | None


@dataclass(frozen=True, slots=True)
class Fork:
    """A run that was forked from this one."""

    run: str
    number: int
    by: str
    conclusion: Conclusion | None


@dataclass(frozen=True, slots=True)
class RunView:
    """A run. Lists leave `steps`, `gates` and `cause` empty.

    `status` is `queued`, `running`, `waiting`, `paused` or `finished`; `waiting_for` says for what. A finished
    run has a `conclusion` and its `reason`. `images` are the images that its commands named, with the exact name
    of what each means in this run; `caches` the newest 200 that they asked for. `stopping` is true from a
    cancellation, a rejection or the run's time limit until the run has ended. `forked_from` is the run that a
    what-if comes from, `forked` says more of that, `forks` are the runs that come from this one, the
    first 100.
    """

    id: str
    number: int
    repo: str
    sha: str
    ref: str
    branch: str
    base_branch: str | None
    pr: int | None
    event: str
    action: str
    actor: str
    title: str
    trusted: bool
    attempt: int
    pipeline_digest: str | None
    status: Phase
    waiting_for: str | None
    stopping: bool
    conclusion: Conclusion | None
    reason: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    cause: Cause | None = None
    steps: tuple[StepView, ...] = ()
    gates: tuple[GateView, ...] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    caches: tuple[CacheView, ...] = ()
    forked_from: str | None = None
    forked: Forked | None = None
    forks: tuple[Fork, ...] = ()


def run_view(  # noqa: PLR0913 - the rows that a run is shown by, each of its own
    run: Run,
    *,
    status: InstanceStatus | None = None,
    gates: Sequence[Gate] = (),
    delivery: DeliveryRow | None = None,
    images: Sequence[RunImage] = (),
    caches: Sequence[RunCache] = (),
    fork: RunFork | None = None,
    source: Run | None = None,
    forks: Sequence[Run] = (),
) -> RunView:
    """Return the row as the API shows it, with what the engine says where it was asked."""
    live = status if run.conclusion is None else None
    return RunView(
        id=run.id,
        number=run.number,
        repo=run.repo,
        sha=run.sha,
        ref=run.ref,
        branch=run.branch,
        base_branch=run.base_branch,
        pr=run.pr,
        event=run.event,
        action=run.action,
        actor=run.actor,
        title=run.title,
        trusted=run.trusted,
        attempt=run.attempt,
        pipeline_digest=run.pipeline_digest,
        status=_phase(run, live),
        waiting_for=waiting_for(live) if live is not None and not run.rerun_pending else run.waiting_for,
        stopping=run.stop_conclusion is not None and run.conclusion is None,
        conclusion=cast("Conclusion | None", run.conclusion),
        reason=run.conclusion_reason or (run.stop_reason if run.conclusion is None else None),
        created_at=run.created_at,
        started_at=run.started_at,
        ended_at=run.ended_at if run.conclusion is not None else None,
        cause=None if delivery is None else _cause(delivery),
        steps=()
        if status is None
        else tuple(_step_view(step, kept=is_kept(step, run, fork)) for step in status.steps),
        gates=tuple(gate_view(gate) for gate in gates),
        images={image.name: image.exact for image in images},
        caches=tuple(
            CacheView(each.step, each.count, each.attempt, each.key, each.outcome, each.reason, each.saved)
            for each in caches
        ),
        forked_from=run.forked_from,
        forked=None if fork is None else _forked(run, fork, source),
        forks=tuple(
            Fork(each.id, each.number, each.actor, cast("Conclusion | None", each.conclusion))
            for each in forks
        ),
    )


def _phase(run: Run, live: InstanceStatus | None) -> Phase:
    if run.conclusion is not None:
        return "finished"
    if live is None or run.rerun_pending:
        return cast("Phase", run.phase)
    phase = phase_of(live)
    # Ended, and not concluded yet: a moment's matter. "finished" without a conclusion would be a riddle.
    return "running" if phase == "finished" else phase


def _forked(run: Run, fork: RunFork, source: Run | None) -> Forked:
    unused = None if fork.unused is None else tuple(f"{name} #{count}" for name, count in fork.unused)
    return Forked(
        run=run.forked_from or "",
        number=None if source is None else source.number,
        step=fork.step,
        count=fork.count,
        by=fork.asked_by,
        code=fork.code,
        inputs=fork.inputs,
        patched_files=tuple(fork.patched_files),
        unused_steps=unused,
        reached=fork.reached,
    )


def is_kept(step: StepStatus, run: Run, fork: RunFork | None) -> bool:
    """Whether a step was performed by the run that this one was forked from."""
    if fork is None:
        return False
    kept = any((step.name, step.count) == (name, count) for name, count, _ in fork.kept)
    return (kept and step.kind == "do") or step.started_at < run.created_at


def _step_view(step: StepStatus, *, kept: bool) -> StepView:
    return StepView(
        name=step.name,
        count=step.count,
        kind=step.kind,
        status=step.status,
        started_at=step.started_at,
        ended_at=step.ended_at,
        attempts=tuple(step.attempts),
        error=step.error,
        event_type=step.event_type,
        deadline=step.deadline,
        kept=kept,
    )


def _cause(delivery: DeliveryRow) -> Cause:
    return Cause(
        delivery=cast("int", delivery.id),
        forge=delivery.forge,
        delivery_id=delivery.delivery_id,
        event=delivery.event,
        received_at=delivery.received_at,
    )
