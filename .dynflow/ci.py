"""The pipeline of this repository itself: all gates and all tests, side by side."""

import asyncio
from typing import Any

from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox, summarise


class CIPipeline(WorkflowEntrypoint):
    """Check out, set up once, then check and test in parallel over the same files."""

    async def run(self, event: Any, step: Any) -> None:
        """Run for one change."""
        repo, sha, pr = (event.payload[key] for key in ("repo", "sha", "pr"))

        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        await step.do(
            "set up",
            {"timeout": "15 minutes", "retries": {"limit": 2, "delay": "10 seconds"}},
            lambda: run_in_sandbox(workspace, ["scripts/setup", "test"], network=True),
        )
        check, test = await asyncio.gather(
            step.do("check", lambda: run_in_sandbox(workspace, ["scripts/check"], check=False)),
            step.do(
                "test",
                {"timeout": "30 minutes"},
                lambda: run_in_sandbox(workspace, ["scripts/test"], check=False),
            ),
        )
        results = {"check": check, "test": test}
        if pr:
            await step.do("comment", lambda: self.env.GITHUB.comment_on_pr(repo, pr, summarise(results)))
        failed = [name for name, result in results.items() if not result.ok]
        if failed:
            raise RuntimeError(f"failed: {', '.join(failed)}")
