"""How a failed command is told to the pipeline: one error for each way to fail, all of one family."""

from __future__ import annotations

from datetime import timedelta

import pytest

from dynflow.failure import Failure
from pipelines.contract import (
    CommandFailedError,
    CommandKilledError,
    CommandNotStartedError,
    CommandResult,
    failure_of,
)


@pytest.mark.parametrize(
    ("code", "ended", "kind", "text"),
    [
        (3, "", CommandFailedError, "'make all' exited with 3\nboom"),
        (
            139,
            "killed by signal 11 (SIGSEGV)",
            CommandKilledError,
            "'make all' was killed by signal 11 (SIGSEGV)\nboom",
        ),
        (127, "not found", CommandNotStartedError, "'make' could not be started: not found\nboom"),
        (
            126,
            "Permission denied",
            CommandNotStartedError,
            "'make' could not be started: Permission denied\nboom",
        ),
    ],
)
def test_each_way_to_fail_has_its_error(code: int, ended: str, kind: type, text: str) -> None:
    error = failure_of(CommandResult(("make", "all"), code, "boom\n", timedelta(seconds=1), ended))
    assert type(error) is kind
    assert isinstance(error, CommandFailedError)
    assert str(error) == text
    assert (error.exit_code, error.ended) == (code, ended)
    # A failing command fails again most of the time, however it failed.
    assert Failure.of(error).retry == "when_configured"
