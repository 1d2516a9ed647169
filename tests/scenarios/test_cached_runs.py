"""Caches from a pipeline's words to the next run's files, over the whole platform."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
from rich.console import Console

from ci_platform.terminal import print_run
from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import concluded, running_server
from tests.scenarios.test_main_job import REPO, pull_request_opened, push_to_main, server_log

PIPELINE = """\
from dynflow import WorkflowEntrypoint
from pipelines import CacheSpec, hash_files, run_in_sandbox

LIB = CacheSpec(key=f"lib-{hash_files('src/*.py')}", paths=["lib", "~/.cache/tool"], restore_keys=["lib-"])


class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha, branch = (event.payload[key] for key in ("repo", "sha", "branch"))
        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))
        script = f"cat lib/made ~/.cache/tool/x || echo none; echo of {branch} | tee lib/made >~/.cache/tool/x"
        await step.do("build", lambda: run_in_sandbox(workspace, ["sh", "-c", script], cache=LIB))
        if branch != "main":
            out = CacheSpec("k", ["../../etc"])
            await step.do("outside", lambda: run_in_sandbox(workspace, ["true"], cache=[LIB, out]))
"""


def test_a_run_finds_what_an_earlier_one_left_and_says_so(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE)
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            first = server.wait_for_run(concluded, "the first run to conclude")
            assert first["conclusion"] == "success", first
            server.deliver("pull_request", pull_request_opened(sha))
            server.wait_until(lambda: len(server.api("GET", "/runs")["items"]) == 2, "the second run")
            second = server.wait_for_run(concluded, "the second run to conclude")
            (missed,), (hit,) = first["caches"], second["caches"]
            assert (missed["step"], missed["outcome"], hit["outcome"]) == ("build", "miss", "hit")
            assert len(missed["key"]) == len("lib-") + 32
            assert missed["saved"].startswith(f"saved '{missed['key']}' of refs/heads/main, 2 files, ")
            assert "none" in server_log(server, first, "build")
            log = server_log(server, second, "build")
            assert log.count("of main") == 2
            assert f"cache: hit: '{hit['key']}' of refs/heads/main" in log
            page = httpx.get(
                f"{server.url}/runs/{second['id']}", headers=server.headers, follow_redirects=True
            )
            assert "of refs/heads/main, 2 files" in page.text
            console = Console(file=io.StringIO(), width=200)
            print_run(first, console)
            assert f"cache of build: {missed['reason']}; saved" in console.file.getvalue().replace("\n", " ")  # type: ignore[attr-defined]
            # A path that leaves the workspace is the pipeline's failure, with the value.
            assert second["conclusion"] == "failure"
            assert (
                "&#39;../../etc&#39; may leave its folder" in page.text
                or "'../../etc' may leave" in second["reason"]
            )
