"""The main job from a signed webhook to its conclusion, over everything real but GitHub itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.scenarios.github_server import serve_github
from tests.scenarios.pipelines import make_repository
from tests.scenarios.server import Server, at_gate, concluded, running_server, step_named

PAYLOADS = Path(__file__).parents[1] / "data" / "github"
FAILING = (
    "import unittest\nclass T(unittest.TestCase):\n    def test_no(self):\n        self.fail('not today')\n"
)
REPO = "Codertocat/Hello-World"  # the repository of the recorded payloads


def recorded(name: str) -> Any:
    """Return a payload that GitHub sent."""
    return json.loads((PAYLOADS / f"{name}.json").read_text())


def push_to_main(sha: str) -> Any:
    """Return the recorded push, of a commit that our repository has."""
    payload = recorded("push")
    payload |= {"ref": "refs/heads/main", "after": sha, "deleted": False}
    payload["head_commit"] = {
        "id": sha,
        "message": "Add the application",
        "timestamp": "2026-11-23T08:00:00Z",
    }
    return payload


def pull_request_opened(sha: str) -> Any:
    """Return the recorded pull request, with a head that our repository has."""
    payload = recorded("pull_request.opened")
    payload["pull_request"]["head"]["sha"] = sha
    return payload


def approve(server: Server, run: dict[str, Any]) -> None:
    server.api(
        "POST", f"/runs/{run['id']}/gates/approval", json={"decision": "approve", "comment": "ship it"}
    )


def test_a_push_to_main_runs_to_the_gate_and_after_the_approval_to_success(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo")
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            answer = server.deliver("push", push_to_main(sha))
            assert answer.status_code == 202, answer.text

            run = server.wait_for_run(at_gate, "the gate to open")
            assert [step["name"] for step in run["steps"]][:2] == ["checkout", "install"]
            assert all(step["status"] == "complete" for step in run["steps"] if step["kind"] == "do")
            github.wait_for(lambda: any("approval" in body["description"] for body in github.statuses(sha)))

            approve(server, run)
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "success"
            assert "deployed" in server_log(server, run, "deploy")
            github.wait_for(lambda: github.statuses(sha)[-1]["state"] == "success")

        bodies = github.statuses(sha)
        assert bodies[0]["state"] == "pending"
        assert {body["context"] for body in bodies} == {"dynflow/push"}
        assert all(body["target_url"].endswith(f"/runs/{run['id']}") for body in bodies)
        assert all(0 < len(body["description"]) <= 140 for body in bodies)
        assert all(call.authorization and call.authorization.endswith("a-token") for call in github.calls)
        assert not github.comments


def test_a_pull_request_gets_its_statuses_and_one_comment(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", branch="changes")
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            assert server.deliver("pull_request", pull_request_opened(sha)).status_code == 202
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "success"
            assert run["pr"] == 2
            github.wait_for(lambda: github.statuses(sha) and github.statuses(sha)[-1]["state"] == "success")
            github.wait_for(lambda: len(github.comments) == 1)
        (comment,) = github.comments.values()
        assert "| test | passed |" in comment["body"]
        assert github.statuses(sha)[0]["state"] == "pending"


def test_a_redelivery_starts_no_second_run(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", branch="main")
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            for delivery in ("11111111-aaaa", "11111111-aaaa", "22222222-bbbb"):
                assert server.deliver("push", push_to_main(sha), delivery=delivery).status_code == 202
            server.wait_for_run(at_gate, "the gate to open")
            assert len(server.api("GET", "/runs")["items"]) == 1


def test_at_the_gate_nothing_of_the_run_exists(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo")
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            assert server.process is not None
            process = psutil.Process(server.process.pid)
            before = quiet_count(server, process)
            server.deliver("push", push_to_main(sha))
            server.wait_for_run(at_gate, "the gate to open")
            after = quiet_count(server, process)
            assert after == before
            mounts = Path(f"/proc/{process.pid}/mounts").read_text()
            assert str(tmp_path / "data") not in mounts


def quiet_count(server: Server, process: psutil.Process) -> int:
    """Return how many processes the server has once the number stays the same."""
    seen: list[int] = []

    def same_for_a_while() -> bool:
        seen.append(len(process.children(recursive=True)))
        return len(seen) > 25 and len(set(seen[-25:])) == 1

    server.wait_until(same_for_a_while, "the number of processes to settle", lambda: str(seen[-40:]))
    return seen[-1]


def test_errors_of_a_pipeline_conclude_failure_with_file_and_line(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", "import nowhere_to_be_found\n")
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "failure"
            github.wait_for(lambda: github.statuses(sha) and github.statuses(sha)[-1]["state"] == "failure")
            description = github.statuses(sha)[-1]["description"]
            assert ".dynflow/ci.py:1" in description
            assert "nowhere_to_be_found" in description


def test_a_failing_command_fails_the_run_and_names_the_step(tmp_path: Path) -> None:
    bare, sha = make_repository(
        tmp_path / "repo",
        files={"test_app.py": FAILING},
    )
    with serve_github() as github:
        settings = {"github_api_url": github.url, "allow_file_remotes": "true"}
        with running_server(tmp_path / "data", **settings) as server:
            server.register(REPO, bare)
            server.deliver("push", push_to_main(sha))
            run = server.wait_for_run(concluded, "the run to conclude")
            assert run["conclusion"] == "failure"
            test = step_named(run, "test")
            assert test["status"] == "errored"
            assert len(test["attempts"]) == 1
            assert "not today" in server_log(server, run, "test")


def server_log(server: Server, run: dict[str, Any], step: str) -> str:
    """Return a step's log as plain text."""
    response = httpx.get(
        f"{server.url}/api/v1/runs/{run['id']}/steps/{step}/log", headers=server.headers, timeout=30
    )
    assert response.is_success, response.text
    return response.text
