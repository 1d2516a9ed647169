"""The main job on a Temporal server, with everything real: killed platforms, a server that is away, wrong addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from ci_platform.backup import restore_folder
from ci_platform.doctor import engine_findings
from ci_platform.settings import load_settings
from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import ROOT, Server, at_gate, concluded, running_server, step_named
from tests.scenarios.test_crash import PIPELINE, approve, log_of, run_is_in
from tests.scenarios.test_main_job import REPO, push_to_main
from tests.temporal_server import TemporalServer, new_queue

STEPS = ["checkout", "install", "lint", "test", "deploy"]


def temporal(server: TemporalServer) -> dict[str, str]:
    """Settings of a platform whose runs are in this server."""
    return {
        "engine": "temporal",
        "temporal_address": server.address,
        "temporal_task_queue": new_queue(),
        "allow_file_remotes": "true",
        "allow_containers": "false",
    }


def test_the_main_job_runs_on_temporal_through_kills_at_the_gate_and_in_a_step(
    temporal_server: TemporalServer, tmp_path: Path
) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE.format(slow="deploy", seconds=60))
    settings = temporal(temporal_server)
    with (
        serve_github() as github,
        running_server(tmp_path / "data", github_api_url=github.url, **settings) as server,
    ):
        server.register(REPO, bare)
        assert server.deliver("push", push_to_main(sha)).status_code == 202
        run = server.wait_for_run(at_gate, "the gate to open")
        assert not (tmp_path / "data" / "engine.db").exists()
        github.wait_for(lambda: any("approval" in body["description"] for body in github.statuses(sha)))

        server.kill()
        server.start()
        run = server.wait_for_run(at_gate, "the gate to be open again")
        approve(server, run)
        run_is_in(server, "deploy")
        server.kill()
        server.start()
        run = server.wait_for_run(concluded, "the run to conclude")

        assert run["conclusion"] == "success", run
        for step in STEPS:
            text = log_of(server, run, step)
            assert text.count(f"{step}-finished\n") == 1, (step, text)
            attempts = len(step_named(run, step)["attempts"])
            assert attempts == (2 if step == "deploy" else 1), (step, attempts)
        counted = log_of(server, run, "count")
        assert [counted.count(f"{step}\n") for step in STEPS] == [1] * len(STEPS), counted
        github.wait_for(lambda: github.statuses(sha)[-1]["state"] == "success")


def test_runs_go_on_when_temporal_was_away_in_a_step_and_at_a_wait(
    temporal_server: TemporalServer, tmp_path: Path
) -> None:
    bare, sha = make_repository(tmp_path / "repo", PIPELINE.format(slow="lint", seconds=3))
    settings = temporal(temporal_server)
    with (
        serve_github() as github,
        running_server(tmp_path / "data", github_api_url=github.url, **settings) as server,
    ):
        server.register(REPO, bare)
        server.deliver("push", push_to_main(sha))
        run_is_in(server, "lint")
        temporal_server.kill()
        # What comes meanwhile is taken.
        assert server.deliver("push", push_to_main(sha)).status_code == 202
        wait_for_log(server, "Temporal does not answer")
        temporal_server.start()
        run = server.wait_for_run(at_gate, "the gate to open")
        assert [len(step_named(run, step)["attempts"]) for step in STEPS[:4]] == [1] * 4

        temporal_server.kill()
        refused = decide(server, run)
        assert refused.status_code == 503, refused.text
        assert "cannot do it now" in refused.text
        temporal_server.start()
        approve(server, run)
        run = server.wait_for_run(concluded, "the run to conclude")
        assert run["conclusion"] == "success", run
        assert all(log_of(server, run, step).count(f"{step}-finished\n") == 1 for step in STEPS)


def test_a_platform_says_that_temporal_is_away_and_begins_when_it_is_there(
    temporal_server: TemporalServer, tmp_path: Path
) -> None:
    temporal_server.kill()
    settings = temporal(temporal_server)
    server = Server(tmp_path / "data", {f"DYNFLOW_{name.upper()}": value for name, value in settings.items()})
    server.spawn()
    try:
        wait_for_log(server, f"the Temporal server at {temporal_server.address} cannot be reached")
        assert "nobody listens there" in server.log()
        temporal_server.start()
        server.wait_until(server.is_ready, "the platform to be ready")
        done = dynflow("backup", str(tmp_path / "backup"), folder=tmp_path, settings=settings)
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "backup").iterdir()] == ["platform.db"]
    assert (
        f"runs are in the namespace 'default' of the Temporal server at {temporal_server.address}"
        in done.stderr
    )
    restored = load_settings({"data": tmp_path / "restored", **settings}, {})
    assert restore_folder(restored, tmp_path / "backup").made == [tmp_path / "restored" / "platform.db"]


def test_a_wrong_namespace_is_one_line_and_the_end(temporal_server: TemporalServer, tmp_path: Path) -> None:
    settings = temporal(temporal_server)
    done = dynflow("serve", "--port", "0", "--namespace", "nowhere", folder=tmp_path, settings=settings)
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith("dynflow: the Temporal server at ")
    assert "has no namespace 'nowhere'" in line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"temporal_tls": True}, "does not speak TLS"), ({"temporal_address": "nothing"}, "is host:port")],
    ids=["tls", "address"],
)
async def test_doctor_says_what_is_wrong_with_a_connection(
    temporal_server: TemporalServer, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    settings = load_settings({"data": tmp_path, **temporal(temporal_server), **wrong}, {})
    (bad,) = await engine_findings(settings)
    assert bad.state == "bad"
    assert said in bad.value


def test_doctor_says_what_it_finds_of_temporal(temporal_server: TemporalServer, tmp_path: Path) -> None:
    options = ("--engine", "temporal", "--temporal-address", temporal_server.address)
    done = dynflow("doctor", "--json", *options, folder=tmp_path, settings={})
    found = {each["name"]: each for each in json.loads(done.stdout) if each["area"] == "engine"}
    assert set(found) == {"server", "namespace", "search attributes", "queues", "fairness"}
    assert "not for production" in found["server"]["advice"]


def dynflow(
    *command: str, folder: Path, settings: dict[str, str], data: str = "data"
) -> subprocess.CompletedProcess[str]:
    """Call the command line, as somebody whose environment has these settings."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("DYNFLOW_")}
    environ |= {f"DYNFLOW_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "ci_platform", *command],
        env=environ | {"DYNFLOW_DATA": str(folder / data)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for_log(server: Server, text: str) -> None:
    server.wait_until(lambda: text in server.log(), f"the server to say: {text}")


def decide(server: Server, run: dict[str, Any]) -> httpx.Response:
    """Try to approve."""
    return httpx.post(
        f"{server.url}/api/v1/runs/{run['id']}/gates/approval",
        headers=server.headers,
        json={"decision": "approve"},
        timeout=60,
    )
