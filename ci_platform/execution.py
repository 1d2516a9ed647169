"""One command: workspace -> sandbox -> redact -> log -> layer."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import anyio

from ci_platform.caches import Caches
from ci_platform.caches.specs import needs_files
from ci_platform.command_checks import check_command
from ci_platform.errors import (
    FailedError,
    LimitExceededError,
    PlatformError,
    UnavailableError,
)
from ci_platform.images import PinnedImages
from ci_platform.logs import LogKey, Logs
from ci_platform.printing import Printer, seconds
from ci_platform.sandboxes import (
    MEBIBYTE,
    Mount,
    Output,
    Sandbox,
    SandboxJob,
    SandboxLimits,
    SandboxOutcome,
    Tree,
)
from ci_platform.survival import Progress, Survival, Survivor
from ci_platform.workspaces import LayerAuthor, Workspaces, describe
from pipelines.contract import Command, CommandResult, SandboxKind

_LONGEST_ECHO = 4000
"""Characters of a command that its log shows."""

_LOOK_EVERY = 1.0
"""Seconds between two looks whether somebody may still ask for what an earlier process has left."""

_OF_ONE_RUN = 16
_AT_ONCE = max(64, 8 * (os.cpu_count() or 1))
"""Commands side by side, of one run and of all: each may take all the memory and processes that one may."""


_Run = Callable[[SandboxJob, Output], Awaitable[SandboxOutcome | None]]


class Execution:
    """Runs commands of pipelines.

    *Order of calls*: any. *Concurrency*: one event loop; any number of commands, also of one workspace and step,
    `of_one_run` and `at_once` of which work at a time; the others wait.
    *Idempotency*: a repeated attempt starts from a clean tree, see `Workspaces.prepare`. *Cancellation*: kills the
    command and drops its layer; after `leave` it goes on, for a process that opens the same `survival`.
    *Errors*: FailedError and LimitExceededError are the command's matter, UnavailableError is ours; a command that
    exits non-zero is a result.
    """

    def __init__(  # noqa: PLR0913 - everything of a command comes together here
        self,
        workspaces: Workspaces,
        logs: Logs,
        sandboxes: Mapping[SandboxKind, Sandbox],
        *,
        images: PinnedImages | None = None,
        limits: SandboxLimits | None = None,
        at_once: int = _AT_ONCE,
        of_one_run: int = _OF_ONE_RUN,
        survival: Survival | None = None,
        caches: Caches | None = None,
    ) -> None:
        self._workspaces, self._logs, self._sandboxes = workspaces, logs, sandboxes
        self._images, self._limits = images, limits or SandboxLimits()
        self._all, self._of_one_run = anyio.CapacityLimiter(at_once), of_one_run
        self._runs: WeakValueDictionary[str, anyio.CapacityLimiter] = WeakValueDictionary()
        self._started = 0
        self._survival, self._leaving = survival, False
        self._caches = caches
        self._reopened: dict[Path, Tree] = {}

    async def run(
        self,
        command: Command,
        *,
        run_id: str,
        author: LayerAuthor,
        limits: SandboxLimits | None = None,
        redact: Collection[str] = (),
    ) -> CommandResult:
        """Run one command over its workspace; its layer is kept if it exits with 0 and dropped otherwise.

        `redact` are the secrets that may turn up in its output. Everything goes to the log of the author's step.
        """
        check_command(command)
        sandbox = self._sandboxes.get(command.sandbox)
        if sandbox is None:
            raise FailedError(f"this platform has no sandbox of kind {command.sandbox!r}")
        survivor = await self._claim(command, run_id, author)
        # Its own run's places first: a run that asks for thousands holds none of those that others wait for.
        of_run = self._runs.setdefault(run_id, anyio.CapacityLimiter(self._of_one_run))
        limits = limits or self._limits
        try:
            async with of_run, self._all:
                if survivor is not None:
                    result = await self._go_on(survivor, command, sandbox, author, limits, redact)
                    if result is not None:
                        return result
                return await self._begin(command, sandbox, run_id, author, limits, redact)
        finally:
            if survivor is not None and survivor.folder in self._reopened and not self._leaving:
                await self._abandon([survivor])

    async def recover(self, still_open: Collection[str]) -> None:
        """Find the commands that an earlier process has left; call once at start, before workspaces are swept.

        Those of runs that are not `still_open` are killed; the others wait for their step to ask for them.
        """
        if self._survival is None:
            return
        found = self._survival.load(lambda *key: self._logs.size(LogKey(*key)))
        for each in found:
            tree = self._workspaces.reopen(each.tree) if each.run_id in still_open else None
            if tree is not None:
                self._reopened[each.folder] = tree
                if self._caches is not None:
                    self._caches.reopen(each.tree.get("caches"), tree)
        await self._abandon(self._survival.drop(lambda each: each.folder not in self._reopened))

    async def see_off(self, still_open: Callable[[], Awaitable[Collection[str]]]) -> None:
        """Kill what an earlier process has left of runs that end without asking for it, until nothing is left.

        `still_open` returns the runs that have not ended. A run may have ended in the moment in which that process did.
        """
        while self._survival is not None and self._survival.has_any:
            runs = await still_open()
            await self._abandon(self._survival.drop(lambda each: each.run_id not in runs))  # noqa: B023 - called now
            await anyio.sleep(_LOOK_EVERY)

    async def release(self, scope: str) -> None:
        """Kill what an earlier process has left of a run that has ended, or waits, without asking for it."""
        if self._survival is not None:
            await self._abandon(self._survival.drop(lambda each: each.run_id == scope))

    def leave(self) -> None:
        """Hear that this process ends: commands that are cancelled from now on, and can, go on for the next one."""
        self._leaving = True
        for sandbox in self._sandboxes.values():
            sandbox.detach()

    async def _claim(self, command: Command, run_id: str, author: LayerAuthor) -> Survivor | None:
        if self._survival is None:
            return None
        found, useless = self._survival.claim(command, run_id, author)
        await self._abandon(useless)
        return found

    async def _abandon(self, survivors: Collection[Survivor]) -> None:
        for each in survivors:
            with anyio.CancelScope(shield=True):
                if (sandbox := self._sandboxes.get(each.kind)) is not None:
                    await sandbox.abandon(each.folder)
                await self._forget(each.folder, self._reopened.pop(each.folder, None))

    async def _forget(self, folder: Path | None, tree: Tree | None) -> None:
        """Drop what an ended command has left. There is nothing to drop after a commit."""
        if tree is not None:
            if self._caches is not None:
                await self._caches.close(tree)
            await self._workspaces.drop(tree, keep=True)
        if folder is not None and self._survival is not None:
            self._survival.remove(folder)

    def _printer(self, run_id: str, author: LayerAuthor, redact: Collection[str]) -> Printer:
        key = LogKey(run_id, author.step, author.count)
        return Printer(self._logs.writer(key), redact, self._logs.connections(key))

    async def _begin(
        self,
        command: Command,
        sandbox: Sandbox,
        run_id: str,
        author: LayerAuthor,
        limits: SandboxLimits,
        redact: Collection[str],
    ) -> CommandResult:
        asked, printer = command, self._printer(run_id, author, redact)
        with printer.report_failure():
            printer.say("command", _cut(shlex.join(command.argv)))
            if self._images is not None:
                command = await self._images.pin_all(sandbox, run_id, command, printer.notice)
            lazy = sandbox.takes_lazy and not needs_files(command.cache)
            tree = await self._workspaces.prepare(command.workspace.id, author, lazy=lazy)
            tree, mounts = await self._with_caches(command, run_id, author, tree, printer)
            job = replace(self._job(command, run_id, tree, limits, printer), mounts=mounts)
            about = self._described(tree)
            if self._survival is not None and sandbox.outlives and about is not None:
                # Where the disk is full it will not survive, and will fail for that reason soon enough.
                with contextlib.suppress(OSError):
                    folder = self._survival.create(asked, run_id, author, about)
                    printer.keep(Progress(folder / "progress"))
                    job = replace(job, survive=folder)
            result = await self._see_through(command, sandbox, job, printer, sandbox.run)
            if result is None:
                raise UnavailableError("the sandbox lost its command")
            return result

    async def _with_caches(
        self, command: Command, run_id: str, author: LayerAuthor, tree: Tree, printer: Printer
    ) -> tuple[Tree, tuple[Mount, ...]]:
        """Find the command's caches; returns its tree with room for them, and what to mount."""
        if not command.cache or self._caches is None:
            return tree, ()
        try:
            return await self._caches.open(run_id, author, command.cache, tree, printer.notice)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._workspaces.drop(tree)
            raise

    def _described(self, tree: Tree) -> dict[str, Any] | None:
        about = self._workspaces.describe_open(tree)
        caches = None if self._caches is None else self._caches.describe(tree)
        return about if about is None or caches is None else about | {"caches": caches}

    async def _go_on(
        self,
        survivor: Survivor,
        command: Command,
        sandbox: Sandbox,
        author: LayerAuthor,
        limits: SandboxLimits,
        redact: Collection[str],
    ) -> CommandResult | None:
        """Go on with a command of an earlier process; None where it is gone."""
        tree = self._reopened[survivor.folder]
        printer = self._printer(survivor.run_id, author, redact)
        with printer.report_failure():
            job = self._job(command, survivor.run_id, tree, limits, printer)
            progress = Progress(survivor.folder / "progress")
            progress.recover(-1)
            printer.keep(progress, survivor.logged)
            await self._workspaces.adopt(tree, author)
            # From here on it is in the hands of `resume`; until here, `run` abandons it.
            del self._reopened[survivor.folder]
            job = replace(job, survive=survivor.folder)
            return await self._see_through(command, sandbox, job, printer, sandbox.resume)

    async def _see_through(
        self, command: Command, sandbox: Sandbox, job: SandboxJob, printer: Printer, run: _Run
    ) -> CommandResult | None:
        """Follow a command to its end and keep or drop what it changed, unless it goes on without us."""
        try:
            outcome = await _guarded(run, job, printer)
            return None if outcome is None else await self._conclude(command, job, outcome, printer)
        except anyio.get_cancelled_exc_class():
            printer.left = self._leaving and job.survive is not None
            printer.finish()
            raise
        finally:
            if not printer.left:
                # Before its folder goes: a supervisor that nobody can find would wait for an hour to be heard.
                if job.survive is not None:
                    sandbox.settled(job.survive)
                # Shielded, or a cancelled command would leave its files.
                with anyio.CancelScope(shield=True):
                    await self._forget(job.survive, job.tree)

    def _job(
        self, command: Command, run_id: str, tree: Tree, limits: SandboxLimits, printer: Printer
    ) -> SandboxJob:
        self._started += 1
        timeout = limits.timeout if command.timeout is None else min(command.timeout, limits.timeout)
        return SandboxJob(
            id=f"{run_id}-{self._started}",
            argv=command.argv,
            tree=tree,
            env=command.env,
            cwd=command.cwd,
            image=command.image,
            network=command.network,
            limits=replace(limits, timeout=timeout),
            scope=run_id,
            services=command.services,
            say=printer.notice,
            connected=printer.connected,
        )

    async def _conclude(
        self, command: Command, job: SandboxJob, outcome: SandboxOutcome, printer: Printer
    ) -> CommandResult:
        await self._workspaces.check(job.tree)
        _raise_over_limit(job, outcome)
        if outcome.exit_code != 0:
            _raise_if_full(job.tree.upper)
        else:
            if self._caches is not None:
                await self._caches.save(job.tree, printer.notice)
            report = await self._workspaces.commit(job.tree)
            if conflicts := describe(report):
                printer.say("notice", conflicts)
        how = f" ({outcome.ended})" if outcome.ended else ""
        printer.say("result", f"exited with {outcome.exit_code}{how} after {seconds(outcome.duration)}")
        return CommandResult(command.argv, outcome.exit_code, printer.tail(), outcome.duration, outcome.ended)


async def _guarded(run: _Run, job: SandboxJob, printer: Printer) -> SandboxOutcome | None:
    """Run a job; what a sandbox did not mean to raise is our failure, never the tenant's."""
    try:
        outcome = await run(job, printer.output)
    except PlatformError:
        printer.finish()
        raise
    except Exception as error:
        printer.finish()
        raise UnavailableError(f"the sandbox failed: {error!r}") from error
    printer.finish()
    return outcome


def _raise_over_limit(job: SandboxJob, outcome: SandboxOutcome) -> None:
    limits = job.limits
    if outcome.reason == "exited":
        return
    processors = seconds(limits.cpu or limits.timeout)
    over = {
        "timeout": f"timed out: it ran longer than its limit (timeout) of {seconds(limits.timeout)}",
        "memory": f"ran out of memory: its limit (memory) is {limits.memory // MEBIBYTE} MiB",
        "output": f"printed too much: its limit (output) is {limits.output // MEBIBYTE} MiB",
        "processes": f"failed for want of processes: its limit (processes) is {limits.processes:,} at once",
        "cpu": f"computed too long: it took {outcome.used} s of the processors, its limit (cpu) is {processors}",
        "disk": f"wrote too much: {outcome.used // MEBIBYTE:,} MiB, its limit (disk) is "
        f"{limits.disk // MEBIBYTE:,} MiB",
        "files": f"made too many files: {outcome.used:,}, its limit (files) is {limits.files:,}",
        "depth": f"made folders {outcome.used:,} deep and more, which is too deep to be kept",
    }
    if outcome.reason in over:
        raise LimitExceededError(f"{shlex.join(job.argv)!r:.200} {over[outcome.reason]}")


def _raise_if_full(path: Path) -> None:
    """Answer for a command that failed where nothing could be written: that may be why, and is no fault of its own."""
    disk = os.statvfs(path)
    if disk.f_bavail * disk.f_frsize < MEBIBYTE or (disk.f_files and not disk.f_favail):
        raise UnavailableError("the command failed while the platform's disk was full")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}… ({len(text):,} characters)"
