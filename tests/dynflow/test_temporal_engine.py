"""What only the Temporal engine has: runs that grow too long, values too large to travel, a server that is away."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client

from dynflow.engines.temporal import FolderBlobs, TemporalEngine, interpreter, lease
from dynflow.engines.temporal.search_attributes import ensure_search_attributes
from dynflow.errors import InvalidArgumentError
from dynflow.workflow import WorkflowEntrypoint
from tests.temporal_server import new_queue

DEADLINE = 60.0
MEBIBYTE = 1024 * 1024


class Long(WorkflowEntrypoint):
    """As many steps, sleeps between them, and events as it is told."""

    async def run(self, event: Any, step: Any) -> list[Any]:
        """Return what the steps returned and the events said."""
        asked, found = event.payload, []
        for number in range(asked["steps"]):
            found.append(await step.do("work", lambda number=number: "x" * asked.get("size", 0) or number))
            if asked.get("sleeps"):
                await step.sleep("a moment", 0.001)
        found += [(await step.wait_for_event("w", type="go")).payload for _ in range(asked.get("events", 0))]
        return [len(item) if isinstance(item, str) else item for item in found]


def _engine(client: Client, **options: Any) -> TemporalEngine:
    engine = TemporalEngine(client, task_queue=new_queue(), **options)
    engine.register("long", Long)
    return engine


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def _client(server: Any) -> Client:
    client: Client = await server.client()
    return client


async def test_a_history_that_grows_long_goes_on_as_a_new_run(
    temporal_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "_MOST_EVENTS", 40)
    monkeypatch.setattr(interpreter, "_INLINE", 2_000)  # so that the book has to be put aside as well
    async with _engine(await _client(temporal_server)) as engine:
        binding = engine.binding("long")
        instance = await binding.create(params={"steps": 20, "sleeps": True})
        assert await instance.result(timeout=DEADLINE) == list(range(20))
        status = await instance.status()
        assert len(status.steps) == 40
        history = [event.event_id async for event in instance.subscribe()]
        assert history == list(range(1, len(history) + 1))


async def test_many_events_are_kept_in_order_over_new_runs(
    temporal_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "_MOST_EVENTS", 60)
    async with _engine(await _client(temporal_server)) as engine:
        instance = await engine.binding("long").create(params={"steps": 0, "events": 100})
        for number in range(100):
            await instance.send_event(type="go", payload=number)
        assert await instance.result(timeout=DEADLINE) == list(range(100))


async def test_many_steps_in_one_go(temporal_server: Any) -> None:
    async with _engine(await _client(temporal_server)) as engine:
        instance = await engine.binding("long").create(params={"steps": 500})
        assert await instance.result(timeout=DEADLINE) == list(range(500))
        assert len((await instance.status()).steps) == 500


@pytest.mark.parametrize("where", ["server", "folder"])
async def test_large_values_are_kept_aside(temporal_server: Any, tmp_path: Path, where: str) -> None:
    blobs = FolderBlobs(tmp_path / "blobs") if where == "folder" else None
    size = MEBIBYTE - 100
    async with _engine(await _client(temporal_server), blobs=blobs) as engine:
        instance = await engine.binding("long").create(
            params={"steps": 2, "size": size, "events": 1, "more": "y" * 100_000}
        )
        await instance.send_event(type="go", payload="z" * 200_000)
        assert await instance.result(timeout=DEADLINE) == [size, size, 200_000]
        status = await instance.status()
        assert [len(step.output) for step in status.steps if step.kind == "do"] == [size, size]
        await instance.delete()
        assert _files(tmp_path) == []


async def test_what_was_kept_aside_goes_with_an_instance_that_expires(
    temporal_server: Any, tmp_path: Path
) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    async with _engine(await _client(temporal_server), blobs=blobs) as engine:
        instance = await engine.binding("long").create(params={"steps": 1, "size": 100_000}, retention=3)
        await instance.result(timeout=DEADLINE)
        await instance.restart()
        await instance.result(timeout=DEADLINE)
        assert _files(tmp_path) != []
        async with asyncio.timeout(DEADLINE):
            while _files(tmp_path):  # noqa: ASYNC110 - the server's timer tells nobody here
                await asyncio.sleep(0.05)


async def test_many_results_at_once_are_more_than_one_heartbeat_carries(temporal_server: Any) -> None:
    class Wide(WorkflowEntrypoint):
        async def run(self, event: Any, step: Any) -> int:
            calls = (step.do("wide", lambda: "x" * 30_000) for _ in range(150))
            return sum(len(result) for result in await asyncio.gather(*calls))

    engine = TemporalEngine(await _client(temporal_server), task_queue=new_queue())
    engine.register("wide", Wide)
    async with engine:
        instance = await engine.binding("wide").create()
        assert await instance.result(timeout=DEADLINE) == 150 * 30_000
        assert {step.status for step in (await instance.status()).steps} == {"complete"}


async def test_what_is_sent_as_mail_behind_a_restart_is_not_forgotten(
    temporal_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_MOST_ENTRIES", 0)  # each heartbeat becomes mail
    calls: list[str] = []

    class Many(WorkflowEntrypoint):
        async def run(self, event: Any, step: Any) -> int:
            first = await step.do("first", lambda: calls.append("first"))
            for number in range(5):
                await step.do(f"step {number}", lambda: asyncio.sleep(0))
            return len(calls) if first is None else 0

    engine = TemporalEngine(await _client(temporal_server), task_queue=new_queue())
    engine.register("many", Many)
    async with engine:
        instance = await engine.binding("many").create()
        await instance.result(timeout=DEADLINE)
        for spins in range(15):
            for _ in range(4 * spins):
                await asyncio.sleep(0)
            with contextlib.suppress(InvalidArgumentError):  # not begun again yet
                await instance.restart(from_step=("step 0", 1))
        assert await instance.result(timeout=DEADLINE) == 1
        history = [event.event_id async for event in instance.subscribe()]
        assert history == list(range(1, len(history) + 1))


async def test_a_server_that_goes_away_in_a_step_is_waited_for(temporal_server: Any) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()
    calls = []

    class Held(WorkflowEntrypoint):
        async def run(self, event: Any, step: Any) -> str:
            async def work() -> str:
                calls.append("work")
                started.set()
                await go_on.wait()
                return "done"

            return str(await step.do("work", work))

    client = await _client(temporal_server)
    engine = TemporalEngine(client, task_queue=new_queue(), heartbeat=30)
    engine.register("held", Held)
    async with engine:
        instance = await engine.binding("held").create()
        await asyncio.wait_for(started.wait(), DEADLINE)
        temporal_server.kill()
        go_on.set()
        temporal_server.start()
        assert await instance.result(timeout=DEADLINE) == "done"
    assert calls == ["work"]


async def test_instances_are_found_by_their_search_attributes(temporal_client: Client) -> None:
    assert await ensure_search_attributes(temporal_client) == []
    async with _engine(temporal_client) as engine:
        await engine.binding("long").create(id="open", params={"steps": 0, "events": 1})
        ended = await engine.binding("long").create(id="ended", params={"steps": 1})
        await ended.result(timeout=DEADLINE)
        for status, wanted in (("open", "open"), ("complete", "ended")):
            query = f"DynWorkflow = 'long' AND DynStatus = '{status}' AND DynInstance = '{wanted}'"
            async with asyncio.timeout(DEADLINE):
                while not [each async for each in temporal_client.list_workflows(query)]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)  # the server indexes in its own time
