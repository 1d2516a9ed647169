"""Runs: started once per cause, cancelled, rerun, decided about.

A run is a row and an instance of one id. Whatever is decided about it is a row first; `RunProjection` makes the
instance follow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from ci_platform.errors import ConflictError, NotFoundError, UnavailableError
from ci_platform.gates import Decision, GateView
from ci_platform.model import Repository, Run, RunFork
from ci_platform.run_forks import WhatIf
from ci_platform.run_projection import RunProjection
from ci_platform.run_queries import existing_run
from ci_platform.run_views import RunView, is_kept, run_view
from ci_platform.store import Transaction, col
from ci_platform.triggers import RunRequest
from dynflow.errors import InstanceNotFoundError
from dynflow.types import HistoryEvent


class Runs(RunProjection):
    """Starts runs, cancels them, runs them again, and answers for them."""

    # --- decisions -----------------------------------------------------------------------------

    async def start(
        self, request: RunRequest, *, delivery: int | None = None, pipeline_digest: str | None = None
    ) -> RunView:
        """Start the run of a cause. The same cause again gives the same run, whatever became of it."""
        row, is_new = await self._store.write(lambda tx: self._insert(tx, request, delivery, pipeline_digest))
        if row.conclusion is None:
            await self._instance(row, is_new=is_new)
            self._notices.add(row.id, urgent=False)
            self._reports.wake()
        return run_view(row)

    def _insert(
        self, tx: Transaction, request: RunRequest, delivery: int | None, pipeline_digest: str | None
    ) -> tuple[Run, bool]:
        """Return the run of a cause, and whether it was made just now."""
        change = request.change
        # Locked before looking, so that of two starts of one cause the second finds the first.
        repository = tx.lock(Repository, col(Repository.name) == change.repo)
        if repository is None:
            raise NotFoundError(f"repository {change.repo!r} is not registered here")
        held = tx.first(Run, col(Run.id) == request.run_id)
        if held is not None:
            return held, False
        number = repository.last_number + 1
        tx.change(Repository, {"last_number": number}, col(Repository.name) == change.repo)
        row = Run(
            id=request.run_id,
            repo=change.repo,
            number=number,
            event=change.event,
            action=change.action[:40],
            sha=change.sha,
            ref=change.ref,
            branch=change.branch,
            base_branch=change.base_branch,
            before=change.before,
            pr=change.pr,
            actor=change.actor[:200],
            title=change.title[:500],
            trusted=change.trusted,
            pipeline_digest=pipeline_digest,
            delivery=delivery,
            created_at=self._clock.now(),
        )
        tx.add(row)
        self._reports.put_status(tx, row, "pending", "queued")
        return row, True

    async def cancel(self, run_id: str, *, by: str, reason: str = "") -> RunView:
        """Have a run end now, whatever it is doing. Durable when this returns; once is enough.

        Raises NotFoundError, or ConflictError if the run has ended.
        """
        why = f"cancelled by {by}" + (f": {reason[:500]}" if reason else "")

        def mark(tx: Transaction) -> Run:
            run = existing_run(tx, run_id)
            if run.conclusion is not None:
                raise ConflictError(f"the run has ended already: {run.conclusion}")
            stop = {"stop_conclusion": "cancelled", "stop_reason": why}
            tx.change(Run, stop, col(Run.id) == run_id, col(Run.stop_conclusion).is_(None))
            return existing_run(tx, run_id)

        run = await self._store.write(mark)
        self._notices.add(run_id)
        return run_view(run)

    async def what_if(self, run_id: str, wanted: WhatIf, *, by: str) -> RunView:
        """Fork a run before one of its steps, with something else than it had; see `RunForks.decide`.

        Durable when this returns. The other run stays as it is.
        """
        run = await self._forks.decide(run_id, wanted, by=by)
        self._notices.add(run.id, urgent=False)
        with suppress(UnavailableError):  # it is made later
            await self.project(run.id)
        return await self.summary(run.id)

    async def rerun(self, run_id: str, *, from_step: tuple[str, int] | None = None) -> RunView:
        """Run a run that has ended once more, under its id: all of it, or from the step (name, count) on.

        What came before that step is kept, files too. All of a run that was forked is what it did itself. Durable
        when this returns. Raises NotFoundError (also for the step), or ConflictError while the run has not ended.
        """
        run = await self._store.read(lambda tx: existing_run(tx, run_id))
        if run.conclusion is None:
            raise ConflictError("the run has not ended: cancel it first, or wait")
        begin: tuple[Any, ...] | None = from_step
        if from_step is not None or run.forked_from is not None:
            begin = await self._checked_step(run, from_step)
        values: dict[str, Any] = {
            "attempt": run.attempt + 1,
            "phase": "queued",
            "waiting_for": None,
            "started_at": None,
            "active_since": None,
            # ended_at stays until the instance is restarted: it tells that end from the next one.
            "conclusion": None,
            "conclusion_reason": None,
            "stop_conclusion": None,
            "stop_reason": None,
            "rerun_pending": True,
            "rerun_from": None if begin is None else list(begin),
        }

        def mark(tx: Transaction) -> Run:
            if tx.first(Run, col(Run.forked_from) == run_id, col(Run.fork_pending).is_(True)) is not None:
                raise ConflictError("another run is being forked from it: try again in a moment")
            if not tx.change(Run, values, col(Run.id) == run_id, col(Run.conclusion).is_not(None)):
                raise ConflictError("the run is being rerun already")
            again = existing_run(tx, run_id)
            self._reports.put_status(tx, again, "pending", "queued")
            return again

        if from_step is None:
            again = await self._store.write(mark)
        else:
            async with self._layers.rerunning(run_id):
                again = await self._store.write(mark)
        self._reports.wake()
        self._notices.add(run_id)
        return run_view(again)

    async def _checked_step(self, run: Run, step: tuple[str, int] | None) -> tuple[str, int, str] | None:
        """Return name, count and kind of where a rerun begins; of a fork without `step`: the first step of its own."""
        try:
            status = await (await self._workflows.get(run.id)).status()
        except InstanceNotFoundError:
            raise ConflictError("the run's history is gone: rerun all of it") from None
        fork = await self._store.read(lambda tx: tx.get(RunFork, run.id))
        own = [one for one in status.steps if not is_kept(one, run, fork)]
        if step is None:
            if not own and status.steps:
                raise ConflictError("the run did nothing of its own: fork the other one again")
            return (own[0].name, own[0].count, own[0].kind) if own else None
        for found in status.steps:
            if (found.kind, found.name, found.count) == ("do", *step):
                if found not in own:
                    raise ConflictError(f"step {step[0]!r} is of the run that this one was forked from")
                if found.within:  # what that one returned is kept: nothing would be done again
                    raise ConflictError(
                        f"step {step[0]!r} is a step of {found.within!r}: rerun from that one"
                    )
                return (*step, "do")
        raise NotFoundError(f"the run has no step {step[0][:256]!r} number {step[1]} to rerun from")

    async def concluded(self, run_id: str) -> RunView:
        """Wait until a run has ended, and return it. Raises NotFoundError."""
        while True:
            changed = self._concluded
            view = await self.summary(run_id)
            if view.conclusion is not None:
                return await self.get(run_id)
            await changed.wait()

    # --- questions that need a run to be under way ---

    async def events(self, run_id: str, cursor: int | None = None) -> AsyncIterator[HistoryEvent]:
        """Yield the run's history after `cursor`, then what happens, until it has ended. Raises NotFoundError."""
        while True:
            changed = self._concluded
            run = await self._store.read(lambda tx: existing_run(tx, run_id))
            # Its row can be there a moment before its instance, or much longer where it is held back.
            if run.conclusion is not None or await self._instance(run) is not None:
                break
            await changed.wait()
        async for event in super().events(run_id, cursor):
            yield event

    async def decide(
        self, run_id: str, name: str, decision: Decision, *, by: str, comment: str | None = None
    ) -> GateView:
        """Decide a gate, see `Gates.decide`: also one that has opened in the engine just now."""
        await self.project(run_id)
        return await self._gates.decide(run_id, name, decision, by=by, comment=comment)
