"""The agent's plan: its question, both answers, a kill while it waits, plans that do not keep to the rules."""

from __future__ import annotations

from pathlib import Path

from tests.examples.running import read_until, run, started

NAME = "agent_plan"
QUESTION = "It asks for your consent to delete report-2024-q3.txt, report-2024-q4.txt."


def files(data: Path) -> set[str]:
    return {path.name for path in (data / "files").iterdir()}


def plan(path: Path, body: str) -> Path:
    """A plan with this body, in the place of the recorded one."""
    path.write_text(
        "from dynflow import WorkflowEntrypoint\n\n\n"
        "class Plan(WorkflowEntrypoint):\n"
        "    async def run(self, event, step):\n"
        f"        tools = self.env.TOOLS\n        {body}\n"
    )
    return path


def test_it_asks_and_does_what_it_may(tmp_path: Path) -> None:
    done = run(NAME, "--data", tmp_path, stdin="yes\n")
    assert done.returncode == 0, done.stdout
    assert QUESTION in done.stdout
    assert "deleted 2 files, 81 bytes" in done.stdout
    assert files(tmp_path) == {"report-2025-q1.txt", "index.txt"}
    assert "Fourth quarter of 2024" in (tmp_path / "files" / "index.txt").read_text()


def test_no_is_respected(tmp_path: Path) -> None:
    done = run(NAME, "--data", tmp_path, stdin="no\n")
    assert "kept everything: the answer was no" in done.stdout
    assert "report-2024-q3.txt" in files(tmp_path)


def test_where_nobody_answers_it_waits_for_the_next_start(tmp_path: Path) -> None:
    first = run(NAME, "--data", tmp_path)
    assert first.returncode == 0
    assert "Nobody answers" in first.stdout
    second = run(NAME, "--data", tmp_path, "--answer", "yes")
    assert "deleted 2 files" in second.stdout
    # It is forgotten with its end: a third start is a new plan.
    assert "The agent has a plan." in run(NAME, "--data", tmp_path).stdout


def test_killed_while_it_waits_it_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    with started(NAME, "--data", tmp_path) as process:
        printed = read_until(process, QUESTION)
        process.kill()
    done = run(NAME, "--data", tmp_path, "--answer", "yes")
    assert "deleted 2 files" in done.stdout
    calls = [line for line in (printed + done.stdout).splitlines() if line.startswith("  tool: ")]
    assert len(calls) == len(set(calls)) == 7


def test_a_plan_that_does_not_ask_deletes_nothing(tmp_path: Path) -> None:
    rogue = plan(
        tmp_path / "rogue.txt", "await step.do('x', lambda: tools.delete_file('report-2024-q3.txt'))"
    )
    done = run(NAME, "--data", tmp_path / "data", "--plan", rogue)
    assert done.returncode == 1
    assert "NotAllowedError: nobody agreed to delete report-2024-q3.txt" in done.stdout
    assert "report-2024-q3.txt" in files(tmp_path / "data")


def test_consent_to_one_name_is_no_consent_to_another(tmp_path: Path) -> None:
    sly = plan(
        tmp_path / "sly.txt",
        "await step.do('ask', lambda: tools.ask_to_delete(['report-2024-q3.txt']))\n"
        "        await step.wait_for_event('approval', type='approval')\n"
        "        await step.do('x', lambda: tools.delete_file('report-2025-q1.txt'))",
    )
    done = run(NAME, "--data", tmp_path / "data", "--plan", sly, "--answer", "yes")
    assert "nobody agreed to delete report-2025-q1.txt" in done.stdout
    assert "report-2025-q1.txt" in files(tmp_path / "data")


def test_a_plan_reaches_the_tools_files_and_no_others(tmp_path: Path) -> None:
    for reach in ("tools.read_file('../plans.db')", "tools.read_file(7)", "open('/etc/passwd').read()"):
        done = run(
            NAME, "--data", tmp_path / "data", "--plan", plan(tmp_path / "p.txt", f"return await {reach}")
        )
        assert "The plan failed: " in done.stdout
        assert "NoSuchFileError" in done.stdout or "FileNotFoundError" in done.stdout
