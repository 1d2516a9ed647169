"""Artifacts from a pipeline's words to a download, over the whole platform: killed, forked, collected."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import httpx

from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import concluded, running_server, step_named
from tests.scenarios.test_crash import log_of
from tests.scenarios.test_main_job import REPO, pull_request_opened, push_to_main, server_log

# The first attempt at keeping has kept, and is then killed with the server.
PIPELINE = """\
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox


class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        artifacts, repo, sha = self.env.ARTIFACTS, event.payload["repo"], event.payload["sha"]
        workspace = await step.do("checkout", lambda: artifacts.fork(repo, sha=sha))
        script = "mkdir dist && head -c 3000000 /dev/urandom >dist/app && chmod 755 dist/app && ln -s app dist/latest"
        await step.do("build", lambda: run_in_sandbox(workspace, ["sh", "-c", script]))

        async def keep(ctx):
            made = await artifacts.upload("app", workspace, ["dist"])
            if ctx.attempt == 1 and event.payload["trusted"]:
                await run_in_sandbox(workspace, ["sh", "-c", "echo kept-once; sleep 60"])
            return made

        made = await step.do("keep", keep)
        other = await step.do("other", lambda: artifacts.fork(repo, sha=sha))
        await step.do("fetch", lambda: artifacts.download("app", other, path="got"))
        await step.do("sum", lambda: run_in_sandbox(other, ["sh", "-c", "cd got/dist && sha256sum latest && ls -l"]))
        if event.payload["pr"]:
            await step.do("wrong", lambda: artifacts.download("app", other, branch="main"))
        return made
"""


def test_what_a_pipeline_keeps_survives_a_kill_and_is_downloaded_byte_by_byte(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE)
    data = tmp_path / "data"
    settings = {
        "allow_file_remotes": "true",
        "allow_containers": "false",
        "keep_recent": "0",
        "artifact_floor": "1",
        "artifact_budget": "1",
    }
    with serve_github() as github, running_server(data, github_api_url=github.url, **settings) as server:
        server.register(REPO, bare)
        server.deliver("push", push_to_main(sha))
        run = server.wait_for_run(lambda run: bool(run["steps"]), "the run to begin")
        server.wait_until(lambda: "kept-once\n" in log_of(server, run, "keep"), "the first upload")
        server.kill()
        server.start()
        run = server.wait_for_run(concluded, "the run to conclude")
        assert run["conclusion"] == "success", run
        assert len(step_named(run, "keep")["attempts"]) == 2
        path = f"/runs/{run['id']}/artifacts"
        (kept,) = server.api("GET", path)["items"]
        assert (kept["name"], kept["files"], kept["size"], kept["trusted"]) == ("app", 2, 3_000_000, True)
        assert len(list(data.glob("artifacts/[!.]*/[!.]*"))) == 1, "that of the killed attempt is gone"

        whole = f"{server.url}/api/v1{path}/app/download?format=tar"
        assert httpx.get(whole).status_code == 401
        with tarfile.open(fileobj=io.BytesIO(httpx.get(whole, headers=server.headers).content)) as archive:
            member = archive.extractfile("dist/app")
            assert member is not None
            content = member.read()
            assert archive.getmember("dist/app").mode == 0o755
            assert archive.getmember("dist/latest").linkname == "app"
        # What a command printed of it, in another workspace, is what came over HTTP.
        assert hashlib.sha256(content).hexdigest() in server_log(server, run, "sum")

        # A fork's pull request has its own, and neither gives it nor gets another's.
        opened = pull_request_opened(sha)
        opened["pull_request"]["head"]["repo"]["full_name"] = "stranger/app"
        opened["pull_request"]["head"]["repo"]["id"] = 1
        server.deliver("pull_request", opened)
        server.wait_until(lambda: len(server.api("GET", "/runs")["items"]) == 2, "the second run")
        theirs = server.wait_for_run(concluded, "the pull request's run to conclude")
        assert theirs["trusted"] is False
        assert theirs["conclusion"] == "failure"
        assert "its own artifacts only" in theirs["reason"]
        (outside,) = server.api("GET", f"/runs/{theirs['id']}/artifacts")["items"]
        assert outside["trusted"] is False
        assert outside["digest"] != kept["digest"]

        # Over its budget it goes, once nothing that has not ended may need it, and says why.
        would = server.api("POST", "/gc", json={"dry_run": True})
        assert sum(each["collected"]["items"] for each in would["kinds"] if "artifacts" in each["kind"]) == 2
        assert {each["why"] for each in would["items"] if "artifacts" in each["kind"]} == {
            "all artifacts may take 1 bytes and take 2.9 MiB",
            "all artifacts of forks may take 0 bytes and take 2.9 MiB",
        }
        assert httpx.get(whole, headers=server.headers).status_code == 200
        server.api("POST", "/gc", json={})
        (gone,) = server.api("GET", path)["items"]
        assert gone["why_deleted"] == "there was no room for it"
        answer = httpx.get(whole, headers=server.headers)
        assert (answer.status_code, "there was no room for it" in answer.text) == (404, True)
        assert list(data.glob("artifacts/[!.]*/[!.]*")) == []
