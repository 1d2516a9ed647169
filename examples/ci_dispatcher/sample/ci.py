"""The pipeline of this repository: ordinary Python, run in an isolate at the commit that it is in."""

import asyncio

from dynflow import WorkflowEntrypoint


class Pipeline(WorkflowEntrypoint):
    """Compile and test side by side, then pack."""

    async def run(self, event, step):
        ci = self.env.CI
        await step.do("checkout", lambda: ci.checkout())
        await asyncio.gather(
            step.do("compile", lambda: ci.run(["python3", "-m", "compileall", "-q", "."])),
            step.do("test", lambda: ci.run(["python3", "-m", "unittest", "-q"])),
        )
        archive = f"app-{event.payload['sha'][:7]}.tar"
        await step.do("pack", lambda: ci.run(["git", "archive", "-o", archive, "HEAD"]))
        return f"tested, and packed as {archive}"
