"""Processes that run instances on Temporal are killed, and so is its server: nothing is lost, nothing is repeated."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from dynflow.engines import InstanceRef
from dynflow.engines.temporal.interpreter import POST, TOLD, Interpreter
from dynflow.engines.temporal.names import Names
from tests.dynflow.temporal_worker import STEPS, engine_of
from tests.temporal_server import new_queue

INSTANCES, KILLS = 50, 10
DEADLINE = 100.0


def _worker(address: str, queue: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.dynflow.temporal_worker", address, queue]
    return subprocess.Popen(command)


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


async def _until(log: Path, lines: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while len(_lines(log)) < lines:  # noqa: ASYNC110 - written by another process
            await asyncio.sleep(0.02)


async def test_killed_workers_and_a_killed_server_lose_and_repeat_nothing(
    temporal_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, log = new_queue(), tmp_path / "log"
    monkeypatch.setenv("COUNTING_LOG", str(log))
    chance = random.Random(7)
    client = await temporal_server.client()
    async with engine_of(client, queue) as engine:
        await engine.binding("counting").create_batch([{"id": f"i{number}"} for number in range(INSTANCES)])
    workers = [_worker(temporal_server.address, queue) for _ in range(2)]
    try:
        for kill in range(KILLS):
            before = len(_lines(log))
            which = chance.randrange(2)
            workers[which].kill()
            workers[which].wait()
            workers[which] = _worker(temporal_server.address, queue)
            if kill == KILLS // 2:
                temporal_server.kill()
                temporal_server.start()
            await _until(log, min(before + 20, 2 * INSTANCES * STEPS))
        async with engine_of(client, queue) as engine:
            binding = engine.binding("counting")
            instances = [await binding.get(f"i{number}") for number in range(INSTANCES)]
            results = await asyncio.gather(*(instance.result(timeout=DEADLINE) for instance in instances))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert results == [STEPS] * INSTANCES
    _check_that_nothing_was_repeated(log, INSTANCES)


async def test_a_pause_before_a_lost_segment_is_taken_again_forgets_nothing(
    temporal_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, log = new_queue(), tmp_path / "log"
    monkeypatch.setenv("COUNTING_LOG", str(log))
    client = await temporal_server.client()
    async with engine_of(client, queue) as engine:
        await engine.binding("counting").create(id="one")
    before = len(_lines(log))
    worker = _worker(temporal_server.address, queue)
    await _until(log, before + 4)  # a step has ended there
    worker.kill()
    worker.wait()
    handle = client.get_workflow_handle(Names(queue).workflow_id(InstanceRef("counting", "one", "")))
    async with asyncio.timeout(DEADLINE):
        while any(  # noqa: ASYNC110 - until the server has noticed
            activity.attempt == 1 for activity in (await handle.describe()).raw_description.pending_activities
        ):
            await asyncio.sleep(0.05)
    await handle.signal(POST, json.dumps({"op": "pause", "uid": "a pause", "at": 0}).encode())
    interpreting = Worker(
        client, task_queue=queue, workflows=[Interpreter], workflow_runner=UnsandboxedWorkflowRunner()
    )
    async with interpreting, asyncio.timeout(DEADLINE):  # and nobody who would take a segment
        while b'"paused"' not in await handle.query(TOLD, b"[]", result_type=bytes):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    async with engine_of(client, queue) as engine:
        instance = await engine.binding("counting").get("one")
        await instance.resume()
        assert await instance.result(timeout=DEADLINE) == STEPS
    _check_that_nothing_was_repeated(log, 1)


def _check_that_nothing_was_repeated(log: Path, instances: int) -> None:
    """A step whose result the workflow has been given is never started again."""
    happened: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in _lines(log):
        what, instance, step = line.split()
        happened[instance, step].append(what)
    assert len(happened) == instances * STEPS
    for events in happened.values():
        assert "started" not in events[events.index("returned") :] if "returned" in events else True
