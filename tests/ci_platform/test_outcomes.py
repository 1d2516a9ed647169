"""What an engine's status means in the platform's words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ci_platform.outcomes import Outcome, Stop, in_words, outcome_of, shown, waiting_for
from dynflow.types import ErrorInfo, InstanceStatus, Status, StepKind, StepStatus

START = datetime(2026, 1, 1, tzinfo=UTC)
END = START + timedelta(seconds=12)


def step(
    name: str, kind: StepKind = "do", error: ErrorInfo | None = None, *, waiting: bool = False
) -> StepStatus:
    state = "waiting" if waiting else ("errored" if error else "complete")
    return StepStatus(name, kind, 1, state, START, error=error)  # type: ignore[arg-type]


def status(name: Status, *steps: StepStatus, error: ErrorInfo | None = None) -> InstanceStatus:
    return InstanceStatus("r", name, START, END, error=error, steps=steps)


def failed_by(error: ErrorInfo, *steps: StepStatus) -> Outcome:
    outcome = outcome_of(status("errored", *steps, error=error), None, START)
    assert outcome is not None
    return outcome


def test_success_counts_steps_and_time() -> None:
    done = status("complete", step("a"), step("b"), step("pause", "sleep"))
    assert outcome_of(done, None, START) == Outcome("success", "2 steps passed in 12 s")


def test_a_failed_command_is_the_tenants_matter_and_its_step_is_named() -> None:
    error = ErrorInfo("CommandFailedError", "'make test' exited with 2\nboom")
    assert failed_by(error, step("lint"), step("test", error=error)) == Outcome(
        "failure", "test: 'make test' exited with 2\nboom"
    )


def test_an_error_outside_of_steps_is_told_as_it_is() -> None:
    error = ErrorInfo("WorkerLoadError", ".dynflow/ci.py:3: invalid syntax")
    assert failed_by(error) == Outcome("failure", ".dynflow/ci.py:3: invalid syntax")


@pytest.mark.parametrize("name", ["UnavailableError", "IsolateCrashedError", "StorageError"])
def test_what_is_ours_concludes_error(name: str) -> None:
    assert failed_by(ErrorInfo(name, "gone")).conclusion == "error"


def test_what_is_ours_is_seen_through_the_error_of_its_step() -> None:
    inner = ErrorInfo("UnavailableError", "no disk")
    outer = ErrorInfo("StepFailedError", "step 'a' failed after 6 attempt(s): UnavailableError: no disk")
    assert failed_by(outer, step("a", error=inner)) == Outcome("error", "a: no disk")


def test_an_error_that_the_pipeline_caught_is_not_its_end() -> None:
    caught = step("flaky", error=ErrorInfo("UnavailableError", "no disk"))
    assert failed_by(ErrorInfo("ValueError", "bad"), caught) == Outcome("failure", "bad")


def test_a_gate_that_nobody_decided_times_the_run_out() -> None:
    error = ErrorInfo("WorkflowTimeoutError", "no event came")
    gate = step("approval", "wait_for_event", error)
    assert failed_by(error, gate) == Outcome("timed_out", "nobody decided approval in time")


def test_a_step_over_its_time_times_the_run_out() -> None:
    error = ErrorInfo("WorkflowTimeoutError", "longer than 10 minutes")
    assert failed_by(error, step("build", error=error)) == Outcome(
        "timed_out", "build: longer than 10 minutes"
    )


@pytest.mark.parametrize("name", ["terminated", "errored"])
def test_a_stopped_run_concludes_as_was_decided(name: Status) -> None:
    stop = Stop("failure", "gate approval rejected by alice")
    outcome = outcome_of(status(name), stop, START)
    assert outcome == Outcome("failure", "gate approval rejected by alice")


def test_a_run_that_completed_before_it_could_be_stopped_is_a_success() -> None:
    outcome = outcome_of(status("complete"), Stop("cancelled", "cancelled by alice"), START)
    assert outcome is not None
    assert outcome.conclusion == "success"


@pytest.mark.parametrize("name", ["queued", "running", "waiting", "paused", "waiting_for_pause"])
def test_what_has_not_ended_has_no_outcome(name: Status) -> None:
    assert outcome_of(status(name), None, START) is None


def test_a_waiting_run_says_for_what() -> None:
    gates = status("waiting", step("a"), step("approval", "wait_for_event", waiting=True))
    assert waiting_for(gates) == "approval: approval"
    assert shown(gates) == ("pending", "waiting for approval: approval")
    assert waiting_for(status("waiting", step("cool-down", "sleep", waiting=True))) == "cool-down"
    assert waiting_for(status("running")) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (12.3, "12 s"),
        (59.7, "1 min 0 s"),
        (184, "3 min 4 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_told_in_words(seconds: float, words: str) -> None:
    assert in_words(timedelta(seconds=seconds)) == words
