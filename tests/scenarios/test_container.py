"""The main job with one step in a container, on a real Docker engine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.docker_engine import IMAGE, require_image
from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import DEMO, make_repository
from tests.scenarios.server import at_gate, concluded, running_server
from tests.scenarios.test_main_job import REPO, approve, push_to_main, server_log
from tests.tiny_image import docker, forget_image

PLAIN = 'run_in_sandbox(workspace, ["python3", "-m", "unittest", "discover"])'
INSIDE = "echo made in a container > from-container.txt && ls src && echo inside $(hostname)"
SERVICE = f"""Service("{IMAGE}", name="db", port=8000, command=("perl", "-e", "use IO::Socket::INET;"
    "my $s = IO::Socket::INET->new(LocalPort => 8000, Listen => 5); sleep 600"))"""
CONTAINED = f'run_in_sandbox(workspace, ["bash", "-c", "exec 3<>/dev/tcp/db/8000; {INSIDE}"], \
sandbox="container", services=[{SERVICE}])'


@pytest.mark.docker
def test_a_step_in_a_container_sees_the_workspace_and_the_others_see_its_files(tmp_path: Path) -> None:
    require_image()
    assert PLAIN in DEMO
    pipeline = DEMO.replace(PLAIN, CONTAINED).replace("import run_in", "import Service, run_in")
    pipeline = pipeline.replace("test -f dist", "cat from-container.txt && test -f dist")
    bare, sha = make_repository(tmp_path / "repo", pipeline)
    with serve_github() as github:
        settings = {
            "github_api_url": github.url,
            "allow_file_remotes": "true",
            "container_image": IMAGE,
        }
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(at_gate, "the gate to open")
            inside = server_log(server, run, "test")
            assert "app.py" in inside
            assert f"inside {socket.gethostname()}" not in inside
            assert "service db is ready" in inside
            # A run that waits holds neither container nor network, though it has not ended.
            server.wait_until(lambda: left(run["id"]) == [], "services to end")
            approve(server, run)
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "success"
            assert run["images"] == {IMAGE: docker("image", "inspect", "--format", "{{.Id}}", IMAGE)}
            assert f"image {IMAGE} is sha256:" in inside
            assert "made in a container" in server_log(server, run, "deploy")
    assert left(run["id"]) == []


MAKING = """\
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        workspace = await step.do(
            "checkout", lambda: self.env.ARTIFACTS.fork(event.payload["repo"], sha=event.payload["sha"])
        )
        install = ["sh", "-c", "echo tool >/opt/tool"]
        image = await step.do("install", lambda: self.env.IMAGES.snapshot(workspace, install, key="tool"))
        cat = ["cat", "/opt/tool"]
        await step.do("use", lambda: run_in_sandbox(workspace, cat, sandbox="container", image=image))
        built = await step.do("build", lambda: self.env.IMAGES.build(workspace, "src/Dockerfile"))
        show = ["cat", "/built"]
        await step.do("show", lambda: run_in_sandbox(workspace, show, sandbox="container", image=built.image))
"""


@pytest.mark.docker
def test_a_pipeline_makes_images_and_runs_in_them(tmp_path: Path) -> None:
    require_image()
    files = {"src/Dockerfile": f"FROM {IMAGE}\nRUN echo built >/built\n"}
    bare, sha = make_repository(tmp_path / "repo", MAKING, files=files)
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true", "container_image": IMAGE}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "success", run["reason"]
            assert "tool" in server_log(server, run, "use")
            assert "built" in server_log(server, run, "show")
    forget_image(*docker("images", "--quiet", "--filter", "reference=dynflow-made/*").split())


SLOW = "echo begun; for n in $(seq 1 400); do echo line $n; sleep 0.01; done; echo over"
LASTING = f"""\
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        workspace = await step.do(
            "checkout", lambda: self.env.ARTIFACTS.fork(event.payload["repo"], sha=event.payload["sha"])
        )
        slow = ["sh", "-c", "{SLOW}; echo made >result"]
        await step.do("slow", lambda: run_in_sandbox(workspace, slow, sandbox="container"))
        await step.do("after", lambda: run_in_sandbox(workspace, ["cat", "result"]))
"""


@pytest.mark.docker
@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="commands in containers survive where root keeps them warm")
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_step_in_a_container_goes_on_when_the_server_comes_back(tmp_path: Path, how: str) -> None:
    require_image()
    bare, sha = make_repository(tmp_path / "repo", LASTING)
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true", "container_image": IMAGE}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(lambda run: any(s["name"] == "slow" for s in run["steps"]), "the step")
            server.wait_until(lambda: "line 20" in server_log(server, run, "slow"), "output")
            if how == "killed":
                server.kill()
            else:
                server.stop()
            server.start()
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "success", run["reason"]
            lines = [
                line for line in server_log(server, run, "slow").splitlines() if line.startswith("line ")
            ]
            assert lines == [f"line {n}" for n in range(1, 401)]
            assert (
                server_log(server, run, "slow").count("begun") - server_log(server, run, "slow").count("$")
                <= 1
            )
            assert "made" in server_log(server, run, "after")
            server.wait_until(lambda: left(run["id"]) == [], "containers to end")


def left(run: str) -> list[str]:
    """Return containers and networks of a run."""
    chosen = ["--filter", f"label=dynflow.run={run}"]
    return [
        *docker("ps", "--all", "--quiet", *chosen).split(),
        *docker("network", "ls", "--quiet", *chosen).split(),
    ]


@pytest.mark.docker
def test_an_image_that_does_not_exist_fails_the_run_with_its_name(tmp_path: Path) -> None:
    require_image()
    named = PLAIN.replace("])", '], sandbox="container", image="dynflow/nothing:9")')
    bare, sha = make_repository(tmp_path / "repo", DEMO.replace(PLAIN, named))
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true", "container_image": IMAGE}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "failure"
            assert "the image 'dynflow/nothing:9' is not on this machine" in run["reason"]
            assert "dynflow/nothing:9" in server_log(server, run, "test")
