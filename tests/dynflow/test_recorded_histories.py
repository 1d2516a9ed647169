"""What earlier releases left in their files goes on in this one: tests/data/histories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dynflow import recorded
from tests.engine_world import World, step_of

RECORDINGS = sorted((Path(__file__).parents[1] / "data" / "histories").glob("*.sql"))
STATES = {
    "waiting": "waiting",
    "retrying": "waiting",
    "sleeping": "waiting",
    "paused": "paused",
    "both-sent": "waiting",
    "timing-out": "waiting",
    "rolled-back": "errored",
    "to-roll-back": "waiting",
}


def test_there_are_recordings() -> None:
    assert RECORDINGS


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
async def test_a_recorded_file_runs_to_the_end(recording: Path, tmp_path: Path) -> None:
    recorded.load(recording, tmp_path / "flow.db")
    recorded.rolled_back.clear()
    recorded.gate.opened.set()
    world = recorded.new_world(tmp_path / "flow.db")
    world.advance(3600)
    async with world:
        bindings = {run.__name__: world.register(run) for run in recorded.WORKFLOWS}
        instances = {id_: await found(bindings, id_) for id_ in recorded.ENDS}
        for id_, status in STATES.items():
            assert (await instances[id_].status()).status == status, id_
        for id_, end in recorded.ENDS.items():
            await check_end(world, id_, instances[id_], end)
    assert sorted(recorded.rolled_back) == ["F1", "H1"]


async def found(bindings: dict[str, Any], instance_id: str) -> Any:
    workflow = {"timing-out": "deadline", "cut-off": "held"}.get(instance_id, "order")
    return await bindings["saga" if "roll" in instance_id else workflow].get(instance_id)


async def check_end(world: World, instance_id: str, instance: Any, end: Any) -> None:
    if instance_id == "paused":
        await instance.resume()
    if isinstance(end, list):
        status = await instance.status()
        # Some have been sent one of the two events before they were recorded, others none or both.
        for payload in {"waiting": ("one", "two"), "retrying": (), "both-sent": ()}.get(
            instance_id, ("two",)
        ):
            assert status.ended_at is None
            await instance.send_event(type="go", payload=payload)
    if end is ValueError:
        with pytest.raises(ValueError, match="no taxi"):
            await world.run_through(instance)
        rollback = (await instance.status()).rollback
        assert rollback is not None
        assert rollback.outcome == "complete"
    else:
        assert await world.run_through(instance) == end
    if instance_id == "cut-off":
        assert [attempt.number for attempt in step_of(await instance.status(), "held").attempts] == [1, 2]
    assert (await instance.status()).ended_at is not None
