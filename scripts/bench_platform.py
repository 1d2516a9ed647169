"""Measure the platform from outside: from webhook, approval, rerun or what-if to the next command.

A server process on its embedded defaults, a bare repository as clone URL, GitHub's place taken by a loopback
server. Each sample is a push of another branch of one commit, so that mirror and tree are warm. The commands
print the time themselves (`date +%s.%N` in the sandbox); the clock starts when the 202 (or the approval's
answer) has arrived here, and for reruns and what-ifs when the request goes out.
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
        if event.payload["branch"] == "many":
            fill = "mkdir many && cd many && seq 2000 | split -l 1 -a 4"
            await step.do("fill", lambda: run_in_sandbox(workspace, ["sh", "-c", fill]))
        await step.do("first", lambda: run_in_sandbox(workspace, ["date", "+now=%s.%N"]))
        await step.wait_for_event("approval", type="approval", timeout="1 hour")
        await step.do("next", lambda: run_in_sandbox(workspace, ["date", "+now=%s.%N"]))
"""


def printed_time(server: Server, run: dict[str, Any], step: str) -> float:
    """Return the time that the step's command printed."""
    text = server_log(server, run, step)
    return float(text.rpartition("now=")[2].split()[0])


PATCH = """\
--- a/src/app.py
+++ b/src/app.py
@@ -1,2 +1,2 @@
 def answer():
-    return 42
+    return 43
"""


def again(server: Server, run: dict[str, Any], step: str, path: str, **body: Any) -> float:
    """Ask for a rerun or a what-if of a run from a step on; return the ms until that step's command started."""
    asked = time.time()
    made = server.api("POST", f"/runs/{run['id']}/{path}", json={"from_step": step, **body})
    time.sleep(0.3)
    wanted = concluded if path == "rerun" else at_gate
    found = server.wait_for_run(lambda each: each["id"] == made["id"] and wanted(each), "the step")
    return (printed_time(server, found, step) - asked) * 1e3


def sample(server: Server, sha: str, number: int, many: dict[str, Any]) -> dict[str, float]:
    """Push, wait for the gate, approve, wait for the end, do it again; return the times in ms."""
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
        "rerun from a step → that step's command": again(server, run, "next", "rerun"),
        "what-if from a step → that step's command": again(server, run, "first", "what-if"),
        "the same with a patch": again(server, run, "first", "what-if", patch=PATCH),
        "the same behind a layer of 2,000 files": again(server, many, "first", "what-if", patch=PATCH),
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
            payload = push_to_main(sha) | {"ref": "refs/heads/many"}
            assert server.deliver("push", payload).status_code == 202
            many = server.wait_for_run(at_gate, "the gate")
            sample(server, sha, 0, many)  # cold: mirror, tree, isolates
            samples = [sample(server, sha, number, many) for number in range(1, rounds + 1)]
    print("| what | median | p95 | runs |\n|---|--:|--:|--:|")
    for name in samples[0]:
        values = sorted(each[name] for each in samples)
        p95 = values[min(len(values) - 1, int(len(values) * 0.95))]
        print(f"| {name} | {statistics.median(values):.1f} ms | {p95:.1f} ms | {len(values)} |")


if __name__ == "__main__":
    main()
