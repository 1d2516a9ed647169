"""One command: workspace -> sandbox -> redact -> log -> layer."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal
from weakref import WeakValueDictionary

import anyio

from ci_platform.connections import ConnectionLog
from ci_platform.egress import Connection
from ci_platform.egress.policy import MOST_RULES, Rule
from ci_platform.errors import (
    FailedError,
    InvalidInputError,
    LimitExceededError,
    PlatformError,
    UnavailableError,
)
from ci_platform.images import PinnedImages
from ci_platform.logs import LogKey, Logs, LogWriter
from ci_platform.redaction import Redactor, redact_text
from ci_platform.sandboxes import MEBIBYTE, Sandbox, SandboxJob, SandboxLimits, SandboxOutcome, Tree
from ci_platform.workspaces import LayerAuthor, Workspaces, describe
from pipelines.contract import Command, CommandResult, SandboxKind

KEPT_OUTPUT = 8 * 1024
"""Bytes of output that a CommandResult carries: it is stored with the step, so it has to stay small."""

_LONGEST_ECHO = 4000
"""Characters of a command that its log shows."""

_SHOWN_CONNECTIONS = 500
"""Of one command, in its log: a package manager makes some hundreds."""

_OF_ONE_RUN = 16
_AT_ONCE = max(64, 8 * (os.cpu_count() or 1))
"""Commands side by side, of one run and of all: each may take all the memory and processes that one may."""

_MOST_ARGUMENTS = 100_000
_LARGEST_ARGUMENTS = MEBIBYTE
"""Bytes of argv and env together; Linux takes 2 MiB by default and the platform adds a little."""


class Execution:
    """Runs commands of pipelines.

    *Order of calls*: any. *Concurrency*: one event loop; any number of commands, also of one workspace and step,
    `of_one_run` and `at_once` of which work at a time; the others wait.
    *Idempotency*: a repeated attempt starts from a clean tree, see `Workspaces.prepare`. *Cancellation*: kills the
    command and drops its layer. *Errors*: FailedError and LimitExceededError are the command's matter,
    UnavailableError is ours; a command that exits non-zero is a result.
    """

    def __init__(
        self,
        workspaces: Workspaces,
        logs: Logs,
        sandboxes: Mapping[SandboxKind, Sandbox],
        *,
        images: PinnedImages | None = None,
        limits: SandboxLimits | None = None,
        at_once: int = _AT_ONCE,
        of_one_run: int = _OF_ONE_RUN,
    ) -> None:
        self._workspaces, self._logs, self._sandboxes = workspaces, logs, sandboxes
        self._images, self._limits = images, limits or SandboxLimits()
        self._all, self._of_one_run = anyio.CapacityLimiter(at_once), of_one_run
        self._runs: WeakValueDictionary[str, anyio.CapacityLimiter] = WeakValueDictionary()
        self._started = 0

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
        _check(command)
        sandbox = self._sandboxes.get(command.sandbox)
        if sandbox is None:
            raise FailedError(f"this platform has no sandbox of kind {command.sandbox!r}")
        # Its own run's places first: a run that asks for thousands holds none of those that others wait for.
        of_run = self._runs.setdefault(run_id, anyio.CapacityLimiter(self._of_one_run))
        async with of_run, self._all:
            return await self._run(command, sandbox, run_id, author, limits or self._limits, redact)

    async def _run(
        self,
        command: Command,
        sandbox: Sandbox,
        run_id: str,
        author: LayerAuthor,
        limits: SandboxLimits,
        redact: Collection[str],
    ) -> CommandResult:
        key = LogKey(run_id, author.step, author.count)
        printer = _Printer(self._logs.writer(key), redact, self._logs.connections(key))
        with printer.report_failure():
            printer.say("command", _cut(shlex.join(command.argv)))
            if self._images is not None:
                command = await self._images.pin_all(sandbox, run_id, command, printer.notice)
            tree = await self._workspaces.prepare(command.workspace.id, author)
            try:
                job = self._job(command, run_id, tree, limits, printer)
                outcome = await _guarded(sandbox, job, printer)
                return await self._conclude(command, job, outcome, printer)
            finally:
                # Nothing to drop after a commit. Shielded, or a cancelled command would leave its files.
                with anyio.CancelScope(shield=True):
                    await self._workspaces.drop(tree, keep=True)

    def _job(
        self, command: Command, run_id: str, tree: Tree, limits: SandboxLimits, printer: _Printer
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
        self, command: Command, job: SandboxJob, outcome: SandboxOutcome, printer: _Printer
    ) -> CommandResult:
        _raise_over_limit(job, outcome)
        if outcome.exit_code == 0:
            report = await self._workspaces.commit(job.tree)
            if conflicts := describe(report):
                printer.say("notice", conflicts)
        how = f" ({outcome.ended})" if outcome.ended else ""
        printer.say("result", f"exited with {outcome.exit_code}{how} after {_seconds(outcome.duration)}")
        return CommandResult(command.argv, outcome.exit_code, printer.tail(), outcome.duration, outcome.ended)


class _Printer:
    """Redacts what a command prints, logs it and remembers its end."""

    def __init__(self, log: LogWriter, secrets: Collection[str], connections: ConnectionLog) -> None:
        self._log, self._secrets, self._connections = log, secrets, connections
        self._shown = 0
        self._redactor = Redactor(secrets)
        self._end = bytearray()

    def output(self, piece: bytes) -> None:
        """Take a piece of output."""
        self._pass_on(self._redactor.feed(piece))

    def finish(self) -> None:
        """Pass on what redaction held back."""
        self._pass_on(self._redactor.flush())

    def _pass_on(self, clean: bytes) -> None:
        if clean:
            self._log.write(clean)
            self._end += clean[-KEPT_OUTPUT:]
            del self._end[:-KEPT_OUTPUT]

    def tail(self) -> str:
        """Return the end of the output, at most KEPT_OUTPUT bytes of UTF-8."""
        text = self._end.decode("utf-8", "replace").lstrip("\ufffd").replace("\0", "\ufffd")
        return text.encode()[-KEPT_OUTPUT:].decode("utf-8", "ignore")

    def say(self, kind: Literal["command", "result", "notice"], text: str) -> None:
        """Log a line of the platform's own."""
        self._log.note(kind, redact_text(text, self._secrets))

    def notice(self, text: str) -> None:
        """Log a line of the platform's own that is no part of the result."""
        self.say("notice", text)

    def connected(self, connection: Connection) -> None:
        """Record a connection that the command made or was refused, and show the first ones in its log."""
        self._connections.append(connection)
        self._shown += 1
        if self._shown <= _SHOWN_CONNECTIONS:
            self.say("notice", str(connection))
        elif self._shown == _SHOWN_CONNECTIONS + 1:
            self.say("notice", "network: more connections are in the step's list of them")

    @contextmanager
    def report_failure(self) -> Iterator[None]:
        """Log why a command ends without a result; close the log in any case."""
        started = time.monotonic()
        try:
            yield
        except PlatformError as error:
            self.say("notice", str(error))
            raise
        except anyio.get_cancelled_exc_class():
            self.say("notice", f"stopped after {_seconds(timedelta(seconds=time.monotonic() - started))}")
            raise
        finally:
            self._log.finish()


async def _guarded(sandbox: Sandbox, job: SandboxJob, printer: _Printer) -> SandboxOutcome:
    """Run a job; what a sandbox did not mean to raise is our failure, never the tenant's."""
    try:
        return await sandbox.run(job, printer.output)
    except PlatformError:
        raise
    except Exception as error:
        raise UnavailableError(f"the sandbox failed: {error!r}") from error
    finally:
        printer.finish()


def _raise_over_limit(job: SandboxJob, outcome: SandboxOutcome) -> None:
    limits = job.limits
    if outcome.reason == "exited":
        return
    processors = _seconds(limits.cpu or limits.timeout)
    over = {
        "timeout": f"timed out: it ran longer than its limit (timeout) of {_seconds(limits.timeout)}",
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


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}… ({len(text):,} characters)"


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():.3g} s"


def _can_be_passed(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _check(command: Command) -> None:
    """Refuse values of wrong types: they come out of an isolate, so annotations promise nothing."""
    argv: Any = command.argv
    env: Any = command.env
    timeout: Any = command.timeout
    if not isinstance(argv, tuple) or not argv or not isinstance(env, dict):
        raise InvalidInputError("argv must be a list of text that is not empty, env a dict")
    texts: list[Any] = [*argv, *env, *env.values(), command.cwd, command.image or "", command.sandbox]
    if len(texts) > _MOST_ARGUMENTS:
        raise InvalidInputError(f"argv and env have more than {_MOST_ARGUMENTS:,} items")
    if not all(isinstance(text, str) and _can_be_passed(text) for text in texts):
        raise InvalidInputError(
            "argv, env, cwd and image must be text without NUL characters and lone surrogates"
        )
    if sum(map(len, texts)) > _LARGEST_ARGUMENTS:
        raise InvalidInputError(f"argv and env together are larger than {_LARGEST_ARGUMENTS // MEBIBYTE} MiB")
    if any(not name or "=" in name for name in env):
        raise InvalidInputError("names in env must not be empty nor contain '='")
    _check_network(command.network, command.sandbox)
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta()):
        raise InvalidInputError(f"timeout must be longer than zero, not {timeout!r:.100}")


def _check_network(network: Any, sandbox: str) -> None:
    if isinstance(network, bool):
        return
    if not isinstance(network, tuple) or len(network) > MOST_RULES:
        raise InvalidInputError(
            f"network must be True, False or at most {MOST_RULES} hosts, not {network!r:.100}"
        )
    if sandbox != "isolate" and network:
        raise InvalidInputError('a list of hosts in network= holds in sandbox="isolate" alone')
    for text in network:
        if not isinstance(text, str):
            raise InvalidInputError(f"network: {text!r:.100} is no text")
        try:
            Rule.parse(text)
        except ValueError as error:
            raise InvalidInputError(f"network: {error}") from None
