import asyncio
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox, summarise

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha, branch, pr = (event.payload[key] for key in ("repo", "sha", "branch", "pr"))

        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        await step.do("install", lambda: run_in_sandbox(workspace, ["python3", "-m", "venv", ".venv"]))

        lint, test, build = await asyncio.gather(
            step.do("lint", lambda: run_in_sandbox(workspace, ["sh", "-c", "python3 -m compileall -q src"])),
            step.do("test", lambda: run_in_sandbox(workspace, ["python3", "-m", "unittest", "discover"])),
            step.do("build", lambda: run_in_sandbox(workspace, ["sh", "-c", "mkdir -p dist && tar czf dist/app.tgz src"])),
        )
        if pr:
            await step.do("comment", lambda: self.env.GITHUB.comment_on_pr(repo, pr, summarise({"lint": lint, "test": test, "build": build})))
        if branch == "main":
            await step.wait_for_event("approval", type="deploy-approval", timeout="24 hours")
            await step.do("deploy", lambda: run_in_sandbox(workspace, ["sh", "-c", "test -f dist/app.tgz && echo deployed"]))
