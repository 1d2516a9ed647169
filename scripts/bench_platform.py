"""Measure the platform from outside: webhook to first command, approval to next command.

A server process on its embedded defaults, a bare repository as clone URL, GitHub's place taken by a loopback
server. Each sample is a push of another branch of one commit, so that mirror and tree are warm. The commands
print the time themselves (`date +%s.%N` in the sandbox); the clock starts when the 202 (or the approval's
answer) has arrived here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import Server, at_gate, concluded, running_server
from tests.scenarios.test_main_job import REPO, push_to_main, server_log

PIPELINE = """\
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha = event.payload["repo"], event.payload["sha"]
        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        await step.do("first", lambda: run_in_sandbox(workspace, ["date", "+now=%s.%N"]))
        await step.wait_for_event("approval", type="approval", timeout="1 hour")
        await step.do("next", lambda: run_in_sandbox(workspace, ["date", "+now=%s.%N"]))
"""


def printed_time(server: Server, run: dict[str, Any], step: str) -> float:
    """Return the time that the step's command printed."""
    text = server_log(server, run, step)
    return float(text.rpartition("now=")[2].split()[0])


def sample(server: Server, sha: str, number: int) -> dict[str, float]:
    """Push, wait for the gate, approve, wait for the end; return the two times in ms."""
    payload = push_to_main(sha) | {"ref": f"refs/heads/branch-{number}"}
    assert server.deliver("push", payload).status_code == 202
    accepted = time.time()
    time.sleep(0.5)  # looking at the server would slow it down
    ref = f"refs/heads/branch-{number}"
    newest = server.wait_for_run(lambda run: run["ref"] == ref and at_gate(run), "the gate")
    server.api("POST", f"/runs/{newest['id']}/gates/approval", json={"decision": "approve"})
    approved = time.time()
    time.sleep(0.3)
    run = server.wait_for_run(lambda run: run["ref"] == ref and concluded(run), "the end")
    return {
        "webhook accepted → first command": (printed_time(server, run, "first") - accepted) * 1e3,
        "approval accepted → next command": (printed_time(server, run, "next") - approved) * 1e3,
    }


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder, serve_github() as github:
        bare, sha = make_repository(Path(folder) / "repo", PIPELINE)
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(Path(folder) / "data", **settings) as server:
            server.register(REPO, bare)
            sample(server, sha, 0)  # cold: mirror, tree, isolates
            samples = [sample(server, sha, number) for number in range(1, rounds + 1)]
    print("| what | median | p95 | runs |\n|---|--:|--:|--:|")
    for name in samples[0]:
        values = sorted(each[name] for each in samples)
        p95 = values[min(len(values) - 1, int(len(values) * 0.95))]
        print(f"| {name} | {statistics.median(values):.1f} ms | {p95:.1f} ms | {len(values)} |")


if __name__ == "__main__":
    main()
