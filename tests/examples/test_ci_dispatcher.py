"""The CI dispatcher: its sample, a failing commit, a kill in the middle, what it says of mistakes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.examples.running import EXAMPLES, read_until, run, started

NAME = "ci_dispatcher"


def repository(path: Path, pipeline: str) -> Path:
    """A repository with one commit, which has this `ci.py`."""
    path.mkdir()
    (path / "ci.py").write_text(
        "from dynflow import WorkflowEntrypoint\n\n\n"
        "class Pipeline(WorkflowEntrypoint):\n"
        "    async def run(self, event, step):\n"
        "        ci = self.env.CI\n"
        "        await step.do('checkout', lambda: ci.checkout())\n" + pipeline
    )
    commit(path)
    return path


def commit(path: Path) -> None:
    for arguments in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "A commit"],
    ):
        subprocess.run(["git", "-C", path, *arguments], check=True, timeout=30)


def test_the_sample_runs() -> None:
    done = run(NAME)
    assert done.returncode == 0, done.stdout
    assert "is complete: tested, and packed as app-" in done.stdout
    for step in ("checkout", "compile", "test", "pack"):
        assert f"{step}: completed" in done.stdout


def test_it_has_less_than_a_hundred_lines() -> None:
    assert len((EXAMPLES / NAME / "main.py").read_text().splitlines()) < 100


def test_a_failing_command_fails_the_run_and_shows_its_output(tmp_path: Path) -> None:
    path = repository(tmp_path / "r", "        await step.do('no', lambda: ci.run(['ls', '/nowhere']))\n")
    done = run(NAME, path)
    assert done.returncode == 1
    assert "no: errored" in done.stdout
    assert "is errored: ls /nowhere exited with" in done.stdout
    assert "No such file" in done.stdout


def test_each_commit_is_built_with_its_own_pipeline(tmp_path: Path) -> None:
    path = repository(tmp_path / "r", "        return 'one'\n")
    text = (path / "ci.py").read_text()
    (path / "ci.py").write_text(text.replace("'one'", "'two'"))
    commit(path)
    assert "is complete: two" in run(NAME, path, "--data", tmp_path / "data").stdout
    assert "is complete: one" in run(NAME, path, "HEAD^", "--data", tmp_path / "data").stdout


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    once, twice, up, gate = (tmp_path / name for name in ("once", "twice", "up", "gate"))
    os.mkfifo(up)
    os.mkfifo(gate)
    path = repository(
        tmp_path / "r",
        f"        await step.do('first', lambda: ci.run(['sh', '-c', 'echo x >> {once}']))\n"
        f"        second = 'echo x >> {twice}; echo up > {up}; cat {gate}'\n"
        "        await step.do('second', lambda: ci.run(['sh', '-c', second]))\n",
    )
    with started(NAME, path, "--data", tmp_path / "data") as process:
        assert up.read_text() == "up\n"
        process.kill()
    gate.write_text("go")  # to the command that the killed process has left behind
    with started(NAME, path, "--data", tmp_path / "data") as process:
        assert up.read_text() == "up\n"
        gate.write_text("go")
        read_until(process, "is complete")
    assert once.read_text() == "x\n"
    assert twice.read_text() == "x\nx\n"


def test_mistakes_are_said_in_one_line(tmp_path: Path) -> None:
    path = repository(tmp_path / "r", "        return 1\n")
    assert "fatal" in run(NAME, tmp_path).stdout
    assert "fatal: Needed a single revision" in run(NAME, path, "nothing").stdout
    (path / "ci.py").rename(path / "other.py")
    commit(path)
    missing = run(NAME, path)
    assert "path 'ci.py' does not exist in" in missing.stdout
    for done in (run(NAME, path, "nothing"), missing):
        assert done.returncode == 1
        assert "Traceback" not in done.stdout
