"""Pipelines and repositories of the scenarios."""
# ruff: noqa: E501 - the pipeline that must run stands as it is given

from __future__ import annotations

import subprocess
from pathlib import Path

# The pipeline that the product must run, as it stands.
DEMO = """\
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
"""

SOURCES = {
    "src/app.py": "def answer():\n    return 42\n",
    "test_app.py": (
        "import sys, unittest\nsys.path.insert(0, 'src')\nimport app\n\n"
        "class AnswerTest(unittest.TestCase):\n"
        "    def test_answer(self):\n        self.assertEqual(app.answer(), 42)\n"
    ),
}


def git(folder: Path, *arguments: str) -> str:
    """Run git as nobody in particular, without anybody's configuration."""
    identity = ["-c", "user.name=A Developer", "-c", "user.email=developer@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_SYSTEM": "/dev/null",
        },
    )
    return done.stdout.strip()


def make_repository(
    folder: Path, pipeline: str | None = DEMO, *, branch: str = "main", files: dict[str, str] | None = None
) -> tuple[Path, str]:
    """Make a bare repository with one commit; return its path and the commit's id."""
    work, bare = folder / "work", folder / "origin.git"
    work.mkdir(parents=True)
    git(work, "init", "--quiet", "-b", branch)
    contents = {**SOURCES, **(files or {})}
    if pipeline is not None:
        contents[".dynflow/ci.py"] = pipeline
    for name, content in contents.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    git(work, "add", "-A")
    git(work, "commit", "--quiet", "-m", "Add the application")
    git(folder, "clone", "--quiet", "--bare", str(work), str(bare))
    return bare, git(work, "rev-parse", "HEAD")
