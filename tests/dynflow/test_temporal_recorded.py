"""What earlier releases of the interpreter did is what this one does: tests/data/temporal_histories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner

from dynflow.engines.temporal.interpreter import Interpreter
from tests.dynflow.temporal_recorded import RECORDINGS


def history_of(recording: Path) -> WorkflowHistory:
    return WorkflowHistory.from_json(recording.stem, recording.read_text())


def test_there_are_recordings() -> None:
    assert len(RECORDINGS) >= 7


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
async def test_a_recorded_history_is_replayed(recording: Path) -> None:
    replayer = Replayer(workflows=[Interpreter], workflow_runner=UnsandboxedWorkflowRunner())
    history = history_of(recording)
    result = await replayer.replay_workflow(history, raise_on_replay_failure=False)
    assert result.replay_failure is None


async def test_a_history_of_another_interpreter_is_not() -> None:
    recording = next(path for path in RECORDINGS if path.stem == "plain")
    plain = history_of(recording).to_json_dict()
    for event in plain["events"]:
        if "activityTaskScheduledEventAttributes" in event:
            event["activityTaskScheduledEventAttributes"]["activityType"]["name"] = "another"
    replayer = Replayer(workflows=[Interpreter], workflow_runner=UnsandboxedWorkflowRunner())
    result = await replayer.replay_workflow(
        WorkflowHistory.from_json("plain", json.dumps(plain)), raise_on_replay_failure=False
    )
    assert result.replay_failure is not None
