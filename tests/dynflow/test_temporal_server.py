"""The Temporal server that tests have: quick to be had, durable, and gone with its process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from tests.temporal_server import TemporalServer, new_queue

DEADLINE = 20.0


async def test_what_it_was_told_is_there_after_a_kill(
    temporal_server: TemporalServer, temporal_client: Client
) -> None:
    address = temporal_server.address
    await temporal_client.start_workflow("nobody's", id="kept", task_queue=new_queue())
    temporal_server.kill()
    temporal_server.start()
    assert temporal_server.address == address
    async with asyncio.timeout(DEADLINE):
        found = await temporal_client.get_workflow_handle("kept").describe()
    assert found.status == WorkflowExecutionStatus.RUNNING


async def test_namespaces_of_two_tests_know_nothing_of_each_other(
    temporal_server: TemporalServer, temporal_client: Client
) -> None:
    await temporal_client.start_workflow("nobody's", id="mine", task_queue=new_queue())
    other = await temporal_server.client(await temporal_server.new_namespace())
    with pytest.raises(RPCError) as refused:
        await other.get_workflow_handle("mine").describe()
    assert refused.value.status == RPCStatusCode.NOT_FOUND


STARTS_ONE = """\
import pathlib, sys, time
from tests.temporal_server import TemporalServer
server = TemporalServer(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
server.start()
print(server.process.pid, flush=True)
time.sleep(600)
"""


def test_it_goes_with_the_process_that_started_it(temporal_server: TemporalServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_ONE, str(temporal_server.program), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        starter.send_signal(signal.SIGKILL)
    server.wait(timeout=DEADLINE)
