"""A CI dispatcher with dynflow alone: run the `ci.py` of a repository, as it is at a commit, durably.

`ci.py` orchestrates in an isolate; `env.CI.run(argv)` runs a command in a clone, with your rights.
"""

import argparse
import asyncio
import hashlib
import shutil
import subprocess
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path
from typing import Any

from dynflow import DynamicWorkflowBinding, LoadContext, NonRetryableError, create_dynamic_workflow_entrypoint
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.isolates import Capability, ProcessLoader, WorkerCode


def git(*arguments: str | Path) -> str:
    """Run git; return what it printed, or raise what it complains about."""
    done = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise NonRetryableError(done.stderr.strip(), name="GitError")
    return done.stdout.strip()


class Ci(Capability):
    """What a pipeline can do: check its own commit out, and run commands there."""

    def __init__(self, repository: str, sha: str, clone: Path) -> None:
        self._repository, self._sha, self._clone = repository, sha, clone

    async def checkout(self) -> None:
        """Clone the commit; from nothing each time, so that a crash in the middle does no harm."""
        shutil.rmtree(self._clone, ignore_errors=True)
        git("clone", "--quiet", "--no-checkout", "--", self._repository, self._clone)
        git("-C", self._clone, "checkout", "--quiet", "--detach", self._sha)

    async def run(self, argv: list[str]) -> str:
        """Run a command; return its output. One that fails would fail again: no retries."""
        process = await asyncio.create_subprocess_exec(*argv, cwd=self._clone, stdout=PIPE, stderr=STDOUT)
        try:
            output = (await process.communicate())[0].decode(errors="replace")
        except asyncio.CancelledError:  # the step timed out
            process.kill()
            raise
        if process.returncode:
            raise NonRetryableError(f"{' '.join(argv)} exited with {process.returncode}:\n{output}")
        return output


async def dispatch(repository: str, revision: str, data: Path) -> None:
    """Run the pipeline of a commit to its end, or go on with it where it was interrupted."""
    loader, engine = ProcessLoader(), EmbeddedEngine(data / "runs.db", tenant_key="repository")

    def load(context: LoadContext) -> Any:
        of, sha = context.metadata["repository"], context.metadata["sha"]
        modules = {"ci.py": git("-C", of, "show", f"{sha}:ci.py")}
        code = WorkerCode("ci.py", modules, env={"CI": Ci(of, sha, data / "clones" / run_id(of, sha))})
        return loader.get(run_id(of, sha), lambda: code).get_entrypoint("Pipeline")

    engine.register("ci", create_dynamic_workflow_entrypoint(load))
    sha = git("-C", repository, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    async with loader, engine:
        runs = DynamicWorkflowBinding(engine.binding("ci"), {"repository": repository, "sha": sha})
        await runs.create_batch([{"id": run_id(repository, sha), "params": {"sha": sha}}])  # unless it exists
        run = await runs.get(run_id(repository, sha))
        async for event in run.subscribe(types={"step.started", "step.completed", "step.errored"}):
            print(f"{event.timestamp:%H:%M:%S}  {event.data['step']}: {event.type[5:]}", flush=True)
        status = await run.status()
    print(f"{sha[:10]} is {status.status}: {status.error.message if status.error else status.output}")
    sys.exit(1 if status.error else 0)


def run_id(repository: str, sha: str) -> str:
    """Return the id of the run of a commit: the same each time, so that a commit is built once."""
    return hashlib.sha256(f"{repository}@{sha}".encode()).hexdigest()[:32]


parser = argparse.ArgumentParser(description="Run the ci.py of a commit.")
parser.add_argument("repository", nargs="?", type=Path, help="a local git repository (default: a sample)")
parser.add_argument("revision", nargs="?", default="HEAD")
parser.add_argument("--data", type=Path, help="where runs and clones are kept (default: nowhere)")
given = parser.parse_args()
with tempfile.TemporaryDirectory() as temporary:
    data, repository = given.data or Path(temporary, "data"), given.repository
    data.mkdir(parents=True, exist_ok=True)
    if repository is None:
        repository = shutil.copytree(Path(__file__).parent / "sample", Path(temporary, "sample"))
        git("init", "--quiet", repository)
        git("-C", repository, "add", ".")
        git("-C", repository, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "Sample")
    try:
        asyncio.run(dispatch(str(repository.resolve()), given.revision, data))
    except NonRetryableError as error:
        sys.exit(str(error))
