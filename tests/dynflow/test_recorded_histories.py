"""What earlier releases left in their files goes on in this one: tests/data/histories."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from dynflow.binding import WorkflowInstance
from dynflow.clock import to_datetime
from tests.dynflow import recorded
from tests.dynflow.recorded import INSTANCES
from tests.engine_world import World, step_of

# Those that were running, or about to, go on at once; a pause that was asked for has come into effect.
SEEN_AS = {"running": None, "queued": None, "waiting_for_pause": "paused"}


def test_there_are_recordings_with_every_status() -> None:
    assert recorded.RECORDINGS
    assert {known.status for known in INSTANCES.values()} == {
        "queued", "running", "waiting", "waiting_for_pause", "paused", "complete", "errored", "terminated",
    }  # fmt: skip


@pytest.mark.parametrize("recording", recorded.RECORDINGS, ids=lambda path: path.stem)
async def test_a_recorded_file_runs_to_the_end(recording: Path, tmp_path: Path) -> None:
    recorded.load(recording, tmp_path / "flow.db")
    await go_on(tmp_path / "flow.db")


async def go_on(file: Path) -> None:
    """Open a recorded file, and bring every instance in it to its end."""
    ids, stopped_at = look_into(file)
    names = [name for name in INSTANCES if name in ids]
    recorded.rolled_back.clear()
    recorded.gate.opened.set()
    world = recorded.new_world(file)
    world.advance(to_datetime(stopped_at) - world.clock.now())
    async with world:
        bindings = {run.__name__: world.register(run) for run in recorded.WORKFLOWS}
        instances = {name: await bindings[INSTANCES[name].workflow].get(name) for name in names}
        for name, instance in instances.items():
            recorded_as = INSTANCES[name].status
            expected = SEEN_AS.get(recorded_as, recorded_as)
            assert expected is None or (await instance.status()).status == expected, name
        for name, instance in instances.items():
            await check_end(world, name, instance)
    booked = {"to-roll-back": ["F1", "H1"], "rolling-back": ["H2"], "terminating": ["H2"]}
    assert sorted(recorded.rolled_back) == sorted(
        what for name in booked if name in names for what in booked[name]
    )


def look_into(file: Path) -> tuple[set[str], int]:
    """Return the ids of a file's instances, and when the last thing happened to one."""
    db = sqlite3.connect(file)
    ids = {id_ for (id_,) in db.execute("SELECT id FROM instances")}
    times = db.execute("SELECT max(max(at), (SELECT max(started_at) FROM instances)) FROM history")
    (last,) = times.fetchone()
    db.close()
    return ids, last


async def check_end(world: World, name: str, instance: WorkflowInstance) -> None:
    known = INSTANCES[name]
    if known.status in {"paused", "waiting_for_pause"}:
        await instance.resume()
    for payload in known.sent:
        await instance.send_event(type="go", payload=payload)
    if isinstance(known.end, type):
        with pytest.raises(known.end):
            await world.run_through(instance)
    else:
        assert await world.run_through(instance) == known.end
    status = await instance.status()
    assert status.ended_at is not None
    if name in {"rolled-back", "to-roll-back", "rolling-back", "terminating"}:
        assert status.rollback is not None
        assert status.rollback.outcome == "complete"
    if known.workflow == "held":
        attempts = [attempt.number for attempt in step_of(status, "held").attempts]
        assert attempts == [1, 2]  # the one that was cut off counts
    await check_history(instance)


async def check_history(instance: WorkflowInstance) -> None:
    """What was recorded and what happened since are one history."""
    events = [event async for event in instance.subscribe()]
    numbers = [event.event_id for event in events]
    assert numbers == sorted(set(numbers))
    assert events[0].type == "workflow.queued"
    assert events[-1].type in {"workflow.completed", "workflow.errored", "workflow.terminated"}
