"""Commands that need no server: run, validate, doctor, demo, and what happens without one."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from ci_platform.demo import FILES
from tests.ci_platform.api.world import FAILING, GATED, QUICK
from tests.ci_platform.command_line.conftest import CommandLine


def project(folder: Path, pipeline: str) -> Path:
    (folder / "project" / ".dynflow").mkdir(parents=True)
    (folder / "project" / ".dynflow" / "ci.py").write_text(pipeline)
    return folder / "project"


@pytest.mark.parametrize("command", ["runs", "token list", "approve x y", "logs x"])
def test_without_a_server_it_says_how_to_start_one(dynflow: CommandLine, command: str) -> None:
    done = dynflow(*command.split())
    assert done.returncode == 4
    assert "dynflow serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there_is_one_line(dynflow: CommandLine) -> None:
    done = dynflow("runs", DYNFLOW_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stderr) == (4, "dynflow: nothing answers at http://127.0.0.1:9\n")


def test_a_wrong_setting_is_named_and_a_secret_not_shown(dynflow: CommandLine) -> None:
    assert "port" in dynflow("serve", "--port", "many").stderr
    done = dynflow("serve", DYNFLOW_DATABASE_URL="nonsense://user:hunter2@host")
    assert done.returncode == 2
    assert "hunter2" not in done.stderr + done.stdout


def test_help_names_every_setting_but_secrets(dynflow: CommandLine) -> None:
    text = dynflow("serve", "--help").stdout
    assert "DYNFLOW_RUN_TIMEOUT" in text
    assert "--github-token" not in text


def test_a_folder_is_run_with_what_is_not_committed(dynflow: CommandLine, tmp_path: Path) -> None:
    folder = project(tmp_path, QUICK)
    subprocess.run(["git", "init", "-q", "-b", "topic", folder], check=True)
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "ignored").write_text("x")
    done = dynflow("run", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert (run["conclusion"], run["branch"]) == ("success", "topic")
    assert subprocess.run(
        ["git", "status", "--porcelain"], cwd=folder, capture_output=True, check=True
    ).stdout
    assert not list((tmp_path / "project" / ".git" / "objects").glob("??"))


def test_a_failure_shows_its_output_and_is_the_exit_code(dynflow: CommandLine, tmp_path: Path) -> None:
    done = dynflow("run", str(project(tmp_path, FAILING)))
    assert done.returncode == 1
    assert "broken" in done.stdout
    assert "Conclusion: failure" in done.stdout


def test_a_gate_that_nobody_decides_is_an_exit_code_of_its_own(dynflow: CommandLine, tmp_path: Path) -> None:
    done = dynflow("run", str(project(tmp_path, GATED)))
    assert done.returncode == 3
    assert "approval" in done.stderr
    assert dynflow("run", str(tmp_path / "project"), "--approve").returncode == 0


def test_a_folder_without_a_pipeline_says_so(dynflow: CommandLine, tmp_path: Path) -> None:
    done = dynflow("run", str(tmp_path))
    assert done.returncode == 2
    assert ".dynflow/ci.py" in done.stderr


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("x = (\n", 1, "SyntaxError"),
        ("import os\nimport nothere\n", 2, "nothere"),
        ("raise ValueError('no')\n", 1, "no"),
        ("class Other: pass\n", None, "CIPipeline"),
        ("from dynflow import WorkflowEntrypoint\nclass CIPipeline(WorkflowEntrypoint): pass\n", None, "run"),
    ],
)
def test_validate_says_file_line_and_reason(
    dynflow: CommandLine, tmp_path: Path, source: str, line: int | None, message: str
) -> None:
    done = dynflow("validate", str(project(tmp_path, source)), "--json")
    assert done.returncode == 1, done.stderr
    problem = json.loads(done.stdout)["problem"]
    assert (problem["file"], problem["line"]) == (".dynflow/ci.py", line)
    assert message in problem["message"]


def test_validate_takes_our_own_pipelines(dynflow: CommandLine) -> None:
    for folder in (FILES, Path(__file__).parents[3]):
        done = dynflow("validate", str(folder))
        assert (done.returncode, done.stdout[:2]) == (0, "ok"), done.stderr


def test_doctor_names_walls_and_methods(dynflow: CommandLine) -> None:
    done = dynflow("doctor", "--json")
    findings = json.loads(done.stdout)
    named = {(finding["area"], finding["name"]) for finding in findings}
    assert named >= {("isolates", "seccomp"), ("workspaces", "copy-on-write"), ("machine", "git")}
    assert any(finding["area"] == "sandbox isolate" for finding in findings)
    assert done.returncode == (4 if any(finding["state"] == "bad" for finding in findings) else 0)
    assert "copy-on-write" in dynflow("doctor").stdout


def test_the_demo_goes_from_push_to_conclusion(dynflow: CommandLine) -> None:
    seen, approve = [], None
    with dynflow.start("demo", DYNFLOW_COMMAND="scripts/run") as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            seen.append(line)
            if "scripts/run approve" in line:
                approve = line.split()
                done = dynflow(*approve[1:])
                assert done.returncode == 0, done.stderr
    assert demo.returncode == 0, "".join(seen)
    assert approve is not None
    assert any("Conclusion: success" in line for line in seen)
    assert not list(dynflow.cwd.glob("**/server.json"))


def test_a_demo_that_is_interrupted_leaves_nothing(dynflow: CommandLine, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with dynflow.start("demo", TMPDIR=str(temporary)) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if " approve " in line:
                demo.send_signal(signal.SIGINT)
                break
        rest = demo.communicate(timeout=30)[0]
    assert demo.returncode == 130, rest
    assert "Traceback" not in rest
    assert list(temporary.iterdir()) == []
