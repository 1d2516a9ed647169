"""Runs forked from others: decided in rows, then carried out.

A fork is a row before anything of it is made. `carry_out` makes its workspaces and its instance from those of the
other run; it can be repeated at any point, so a crash in between leaves nothing half made.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ci_platform.errors import ConflictError, ForbiddenError, InvalidInputError, NotFoundError
from ci_platform.instances import WorkflowsBinding
from ci_platform.lineage import in_run
from ci_platform.model import Repository, Run, RunFork, RunImage
from ci_platform.run_queries import existing_run, params_of
from ci_platform.store import Store, Transaction, col
from ci_platform.workspace_forks import Patch
from dynflow.clock import Clock
from dynflow.errors import InstanceExistsError, InstanceNotFoundError, InvalidArgumentError
from dynflow.types import InstanceStatus, StepStatus
from pipelines.contract import Workspace

_MOST_INPUT = 64 * 1024
_LONGEST_KEY = 100
# What a run is, and not what it is told: these decide what it may do.
_NOT_INPUTS = frozenset({"repo", "trusted", "number", "what_if"})


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What to try: from the step `step` (the `count`th of its name) of a run on, with something else.

    Without a step from the start. `code` is a commit or a branch whose pipeline takes the place of the run's own,
    `inputs` take the place of parts of the event's payload, `patch` changes the files of the workspace that
    `workspace`, a step, forked.
    """

    step: str | None = None
    count: int = 1
    code: str | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    patch: str | None = None
    workspace: str | None = None


class Files(Protocol):
    """The workspaces of runs, as far as a fork needs them."""

    def staying(self, run_id: str) -> AbstractAsyncContextManager[None]:
        """Have a run's workspaces stay until the fork is decided. Raises ConflictError where they were collected."""

    async def of_run(self, run_id: str) -> Sequence[str]:
        """Return the ids of a run's workspaces."""

    async def check(
        self, source: str, kept: Collection[tuple[str, int]], text: str, step: str | None = None
    ) -> Patch:
        """Return the patch as it fits onto what the kept steps left. Raises PatchError, InvalidInputError."""

    async def fork(
        self, source: str, run_id: str, kept: Collection[tuple[str, int]], patch: Patch | None
    ) -> None:
        """Make the workspaces of a run out of another's; may be repeated."""


class Codes(Protocol):
    """The pipelines of commits."""

    async def digest_at(self, repo: str, sha: str) -> str:
        """Return the digest of the pipeline of a commit. Raises NotFoundError, PipelineInvalidError."""

    async def commit_of(self, repo: str, name: str) -> str:
        """Return the full id of a commit, a branch or a tag. Raises NotFoundError, InvalidInputError."""


class RunForks:
    """Makes runs out of others. The other run is left as it is."""

    def __init__(
        self, store: Store, clock: Clock, workflows: WorkflowsBinding, *, files: Files, codes: Codes
    ) -> None:
        self._store, self._clock = store, clock
        self._workflows, self._files, self._codes = workflows, files, codes

    async def decide(self, run_id: str, wanted: WhatIf, *, by: str) -> Run:
        """Store that a run is to be forked; durable when this returns, and then to be carried out.

        Everything is checked before. Raises NotFoundError (also for step and commit), InvalidInputError,
        ConflictError, ForbiddenError, PatchError.
        """
        _check_inputs(wanted.inputs)
        source, ancestors = await self._store.read(lambda tx: _source(tx, run_id))
        if wanted.step is None and wanted.patch is None:
            return await self._decide(source, ancestors, (), wanted, by)
        async with self._files.staying(run_id):
            steps = () if wanted.step is None else await self._kept(source, wanted.step, wanted.count)
            await self._check_files(source, ancestors, steps)
            return await self._decide(source, ancestors, steps, wanted, by)

    async def _decide(
        self, source: Run, ancestors: list[str], steps: Sequence[StepStatus], wanted: WhatIf, by: str
    ) -> Run:
        kept = tuple((step.name, step.count) for step in steps)
        code, digest = await self._code(source, wanted.code)
        patch = None
        if wanted.patch is not None:
            patch = await self._files.check(source.id, kept, wanted.patch, wanted.workspace)
        fork = RunFork(
            run_id=secrets.token_hex(16),
            step=wanted.step,
            count=wanted.count,
            ancestors=[source.id, *ancestors],
            kept=[[step.name, step.count, step.within] for step in steps],
            asked_by=by[:200],
            code=code,
            inputs=dict(wanted.inputs),
            patch=wanted.patch,
            patched=None if patch is None else patch.workspace,
            patched_files=[] if patch is None else list(patch.files),
        )
        return await self._store.write(lambda tx: self._insert(tx, source, fork, digest))

    async def _kept(self, source: Run, name: str, count: int) -> tuple[StepStatus, ...]:
        try:
            status = await (await self._workflows.get(source.id)).status()
        except InstanceNotFoundError:
            raise ConflictError("the run's history is gone: leave out the step") from None
        return kept_before(status, name, count)

    async def _check_files(self, source: Run, ancestors: Sequence[str], steps: Sequence[StepStatus]) -> None:
        """See that the workspaces that kept steps have forked are still here."""
        made = {step.name: step.output.id for step in steps if isinstance(step.output, Workspace)}
        here = await self._files.of_run(source.id) if made else []
        for name, workspace_id in made.items():
            own = in_run(workspace_id, source.id, ancestors)
            if own is not None and own not in here:
                raise ConflictError(
                    f"the files of step {name[:256]!r} are not kept any more: leave out the step"
                )

    async def _code(self, source: Run, name: str | None) -> tuple[str | None, str | None]:
        """Return the commit to take the pipeline from, None for the run's own, and the pipeline's digest."""
        if name is None:
            return None, source.pipeline_digest
        sha = await self._codes.commit_of(source.repo, name)
        if source.trusted and sha != source.sha:
            same = (col(Run.repo) == source.repo, col(Run.sha) == sha, col(Run.trusted).is_(True))
            if await self._store.read(lambda tx: tx.first(Run, *same)) is None:
                raise ForbiddenError(
                    f"{sha} has had no trusted run here: its code may be a stranger's, and would get what "
                    "a trusted run has. Push it to a branch of the repository first"
                )
        return sha, await self._codes.digest_at(source.repo, sha)

    def _insert(self, tx: Transaction, source: Run, fork: RunFork, digest: str | None) -> Run:
        repository = tx.lock(Repository, col(Repository.name) == source.repo)
        if repository is None or repository.deleted_at is not None:
            raise NotFoundError(f"repository {source.repo!r} is not registered here")
        now = existing_run(tx, source.id)
        if now.attempt != source.attempt or now.rerun_pending:
            raise ConflictError("the run is being rerun: try again when that has ended")
        number = repository.last_number + 1
        tx.change(Repository, {"last_number": number}, col(Repository.name) == source.repo)
        values = {name: getattr(source, name) for name in _SAME}
        row = Run(
            **values,
            id=fork.run_id,
            number=number,
            actor=fork.asked_by,
            pipeline_digest=digest,
            created_at=self._clock.now(),
            forked_from=source.id,
            fork_pending=True,
        )
        tx.add(row)
        tx.add(fork)
        for image in tx.all(RunImage, col(RunImage.run_id) == source.id):
            tx.add(
                RunImage(**(image.model_dump() | {"run_id": row.id}))
            )  # its name means here what it meant there
        return row

    async def carry_out(self, run: Run) -> str | None:
        """Make workspaces and instance of a run that was decided to be forked; return why that cannot be any more."""
        fork = await self._store.read(lambda tx: tx.get(RunFork, run.id))
        if fork is None or run.forked_from is None:
            return "what it was forked from is not known any more"
        kept = [(str(name), int(count)) for name, count, _ in fork.kept]
        patch = None
        if fork.patch is not None and fork.patched is not None:
            patch = Patch(fork.patch, fork.patched)
        params = params_of(run) | _told(run, fork)
        try:
            await self._files.fork(run.forked_from, run.id, kept, patch)
            with suppress(InstanceExistsError):
                if fork.step is None:
                    await self._workflows.create(id=run.id, params=params)
                else:
                    before = (fork.step, fork.count)
                    await self._workflows.fork(run.forked_from, before=before, id=run.id, params=params)
        except (InstanceNotFoundError, InvalidArgumentError, NotFoundError) as error:
            return f"the run that it was to be forked from is not what it was: {error}"
        return None


async def note_calls(store: Store, run_id: str, called: Collection[tuple[str, str, int]]) -> None:
    """Store what of the steps that a fork kept its code did not call. `called`: kind, name, count."""
    do = {(name, count) for kind, name, count in called if kind == "do"}

    def write(tx: Transaction) -> None:
        fork = tx.get(RunFork, run_id)
        if fork is not None:
            # Steps of a step are not called where that one's result is known.
            top = [(name, count) for name, count, within in fork.kept if not within]
            unused = [list(each) for each in top if each not in do]
            reached = None if fork.step is None else (fork.step, fork.count) in do
            tx.change(RunFork, {"unused": unused, "reached": reached}, col(RunFork.run_id) == run_id)

    await store.write(write)


_SAME = (
    "repo",
    "event",
    "action",
    "sha",
    "ref",
    "branch",
    "base_branch",
    "before",
    "pr",
    "title",
    "trusted",
)


def _source(tx: Transaction, run_id: str) -> tuple[Run, list[str]]:
    run = existing_run(tx, run_id)
    if run.rerun_pending or run.fork_pending:
        raise ConflictError("the run has not begun yet: try again in a moment")
    fork = None if run.forked_from is None else tx.get(RunFork, run_id)
    return run, [] if fork is None else list(fork.ancestors)


def _told(run: Run, fork: RunFork) -> dict[str, Any]:
    """Return what a fork's payload has of its own."""
    what_if = {"from": run.forked_from, "step": fork.step, "count": fork.count, "inputs": sorted(fork.inputs)}
    return {**fork.inputs, "what_if": what_if | {"code": fork.code, "patched": fork.patched_files}}


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    for key in inputs:
        if not 1 <= len(key) <= _LONGEST_KEY:
            raise InvalidInputError(f"an input's name has 1 to {_LONGEST_KEY} characters, not {key!r:.100}")
        if key in _NOT_INPUTS:
            raise InvalidInputError(f"{key!r} is what a run is, no input")
    try:
        size = len(json.dumps(dict(inputs), ensure_ascii=False, allow_nan=False).encode())
    except ValueError as error:  # also of text that cannot be stored
        raise InvalidInputError(f"inputs are JSON: {error}") from None
    if size > _MOST_INPUT:
        raise InvalidInputError(f"inputs have at most {_MOST_INPUT:,} bytes as JSON")


def kept_before(status: InstanceStatus, name: str, count: int) -> tuple[StepStatus, ...]:
    """Return the steps whose results a fork before a step keeps: those that started before it.

    A step that it is within is not among them. Raises NotFoundError where there is no such step, ConflictError
    where one that started before it has not ended.
    """
    place = next(
        (step for step in status.steps if (step.kind, step.name, step.count) == ("do", name, count)), None
    )
    if place is None:
        raise NotFoundError(f"the run has no step {name[:256]!r} number {count} to begin at")
    before = [step for step in status.steps[: status.steps.index(place)] if step.kind == "do"]
    outer = _around(place, before)
    kept = [step for step in before if step not in outer]
    for step in kept:
        if step.status in {"running", "waiting"}:
            raise ConflictError(
                f"step {step.name[:256]!r} began before {name[:256]!r} and has not ended: wait, or begin there"
            )
    return tuple(kept)


def _around(place: StepStatus, before: Sequence[StepStatus]) -> list[StepStatus]:
    """Return the steps that a step is within."""
    found: list[StepStatus] = []
    while place.within:
        around = [
            step
            for step in before
            if step.name == place.within and (step.ended_at is None or step.ended_at >= place.started_at)
        ]
        if not around:
            break
        found += around
        place = around[-1]
    return found
