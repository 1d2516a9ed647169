"""A repository's pipeline at a commit: found in git, made into a worker for its run.

The code of `.dynflow/` at the run's commit is loaded under an id that holds tenant, trust and digest, so that an
isolate is shared by runs of one repository, one trust and one version of the code alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol

from ci_platform.called_steps import Called, NotingRunner
from ci_platform.capabilities import RunIdentity
from ci_platform.deliveries import CommitInfo
from ci_platform.errors import FailedError, PipelineInvalidError
from ci_platform.forges import Change
from ci_platform.source import Remote, Source
from dynflow.isolates import IsolateLimits, WorkerCode, WorkerLoader
from dynflow.router import LoadContext, Runner

FOLDER = ".dynflow"
MAIN_MODULE = f"{FOLDER}/ci.py"  # the whole path: it is what errors and tracebacks show
PIPELINE_CLASS = "CIPipeline"

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Pipelines in memory: a few KiB each.
_REMEMBERED = 500


class Identities(Protocol):
    """Where the platform keeps what a run may be taken for."""

    async def identity(self, run_id: str) -> RunIdentity:
        """Return what the run was started as. Raises NotFoundError."""


class PipelineCode:
    """Looks pipelines up and loads them for their runs. `env` is what pipelines get as `self.env`.

    `note` is told the steps that the code of a what-if run has called.
    """

    def __init__(
        self,
        source: Source,
        loader: WorkerLoader,
        identities: Identities,
        env: Mapping[str, Any],
        limits: IsolateLimits,
        note: Callable[[str, Called], Awaitable[None]] | None = None,
    ) -> None:
        self._source, self._loader, self._identities = source, loader, identities
        self._env, self._limits, self._note = env, limits, note
        # A commit's files never change: what was looked up at the delivery need not be at the start and each wake.
        self._known: OrderedDict[tuple[str, str], dict[str, str | bytes]] = OrderedDict()

    async def describe(
        self, change: Change, *, clone_url: str, credentials: tuple[str, str] | None
    ) -> CommitInfo:
        """Fetch the change's commit; return its message and the digest of its pipeline."""
        if not await self._source.exists(change.repo):
            await self._source.fetch(change.repo, change.sha, Remote(clone_url, credentials), ref=change.ref)
        modules = await self._modules(change.repo, change.sha)
        digest = _digest(modules) if MAIN_MODULE in modules else None
        return CommitInfo(await self._source.commit_message(change.repo, change.sha), digest)

    async def load_runner(self, context: LoadContext) -> Runner:
        """Return the entrypoint of the run that the envelope routes to. The envelope says which run, no more."""
        identity = await self._identities.identity(str(context.metadata["run_id"]))
        modules = await self._pipeline(identity.repo, identity.code or identity.sha)
        trust = "trusted" if identity.trusted else f"pr-{identity.pr}"
        worker_id = f"{identity.repo}:{trust}:{_digest(modules)}"
        code = WorkerCode(
            MAIN_MODULE, modules, self._env, {"repo": identity.repo}, self._limits, tenant=identity.repo
        )
        stub = self._loader.get(worker_id, lambda: code).get_entrypoint(PIPELINE_CLASS, props=identity)
        if self._note is None or not identity.is_what_if:
            return stub
        return NotingRunner(stub, partial(self._note, identity.run_id))

    async def commit_of(self, repo: str, name: str) -> str:
        """Return the full id of a commit, a branch or a tag. Raises NotFoundError, InvalidInputError."""
        return name if _SHA.fullmatch(name) else await self._source.resolve(repo, name)

    async def digest_at(self, repo: str, sha: str) -> str:
        """Return the digest of the pipeline of a commit. Raises NotFoundError, PipelineInvalidError."""
        return _digest(await self._pipeline(repo, sha))

    async def _pipeline(self, repo: str, sha: str) -> dict[str, str | bytes]:
        modules = await self._modules(repo, sha)
        if MAIN_MODULE not in modules:
            raise PipelineInvalidError(f"{repo} has no {MAIN_MODULE} at {sha}")
        return modules

    async def _modules(self, repo: str, sha: str) -> dict[str, str | bytes]:
        found = self._known.pop((repo, sha), None)
        if found is None:
            found = await self._read(repo, sha)
        self._known[repo, sha] = found
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    async def _read(self, repo: str, sha: str) -> dict[str, str | bytes]:
        files = await self._source.read_folder(repo, sha, FOLDER)
        try:
            return {f"{FOLDER}/{name}": module_of(name, content) for name, content in files.items()}
        except UnicodeDecodeError as error:
            raise FailedError(f"{FOLDER}/ of {repo} at {sha} is not UTF-8: {error}") from None


def module_of(name: str, content: bytes) -> str | bytes:
    """Return a file of a pipeline as a module's content: bytes where it is no text.

    Raises UnicodeDecodeError where it should be code.
    """
    try:
        return content.decode()
    except UnicodeDecodeError:
        if name.endswith(".py"):
            raise
        return content


def _digest(modules: Mapping[str, str | bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(modules):
        held = modules[name]
        for part in (name.encode(), held if isinstance(held, bytes) else held.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return f"sha256:{digest.hexdigest()}"
