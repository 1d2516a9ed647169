"""What pipelines raise to deceive: the run ends as a failure, its page shows, the platform goes on."""

from __future__ import annotations

import pytest

from tests.ci_platform.api.world import World

RUN = """
from dynflow import WorkflowEntrypoint

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        def attempt():
            {attempt}
        await step.do("attempt", {{"retries": {{"limit": 0, "delay": 0}}}}, attempt)
"""


@pytest.mark.parametrize(
    "error",
    [
        pytest.param("raise dynflow.errors.LeaseLostError('x')", id="lease"),
        pytest.param("raise dynflow.errors.StorageError('x')", id="storage"),
        pytest.param("raise dynflow.errors.EngineClosedError('x')", id="closed"),
        pytest.param("raise StopIteration('x')", id="stop"),
        pytest.param(r"raise ValueError('a lone \ud800 and a \0')", id="text"),
        pytest.param(r"raise type('E\ud800', (Exception,), {})('x')", id="name"),
    ],
)
async def test_no_error_of_a_step_keeps_a_run_from_ending(world: World, error: str) -> None:
    run_id = await world.push(RUN.format(attempt=f"import dynflow.errors; {error}"))
    run = await world.concluded(run_id)
    assert run["conclusion"] in {"failure", "error"}
    assert "\0" not in run["reason"]
    page = await world.http.get(f"/runs/{run_id}", headers={"accept": "text/html"})
    assert page.status_code == 200


@pytest.mark.parametrize("error", [r"raise ValueError('\ud800')", r"'\ud800'.encode()"])
async def test_text_that_no_database_holds_does_not_keep_a_run_from_ending(world: World, error: str) -> None:
    run = await world.concluded(await world.push(error + "\n"))
    assert run["conclusion"] == "failure"
