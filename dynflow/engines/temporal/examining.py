"""What a Temporal server is like, found by asking and by trying, and what its operator should change."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from temporalio.api.common.v1 import Priority, WorkflowExecution, WorkflowType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DeleteWorkflowExecutionRequest,
    DescribeNamespaceRequest,
    GetClusterInfoRequest,
    GetSystemInfoRequest,
    ListTaskQueuePartitionsRequest,
    PollWorkflowTaskQueueRequest,
    StartWorkflowExecutionRequest,
)
from temporalio.client import Client
from temporalio.service import RPCError

from dynflow.engines.temporal.search_attributes import how_to_add, missing_search_attributes
from dynflow.errors import EngineRefusedError

_CALL = timedelta(seconds=5)
# How long a task may take to a worker that waits for it. A queue that is polled 20 times a second, which is the
# default, takes up to 50 ms for each.
_SLOW_MS = 20.0
_TRIES, _LATER = 40, 10
# So many tasks of one tenant stand before one of another.
_BEFORE = 8
# Tasks come into a queue side by side, not in order; how many stand in it the server tells a second late.
_SETTLED_SECONDS = 0.4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `state`: `good`, `fair` (works, could be better), `bad` (does not work), `note`."""

    name: str
    value: str
    state: Literal["good", "fair", "bad", "note"] = "note"
    advice: str = ""


async def examine(client: Client) -> list[Finding]:
    """Return what is found of the server and the namespace of a client.

    Starts a few workflows that nobody runs, to see how their tasks are given out, and deletes them. Raises nothing but
    RPCError.
    """
    findings = [await _server(client), await _namespace(client), await _attributes(client)]
    try:
        async with _Probe(client).opened() as probe:
            findings += [
                _latency(await probe.latencies()),
                *_turns(await probe.turns(), await probe.partitions()),
            ]
    except RPCError as error:
        findings.append(
            Finding("a try", f"fails: {error.message:.200}", "bad", "workers need to start and poll")
        )
    return findings


async def _server(client: Client) -> Finding:
    system = await client.workflow_service.get_system_info(GetSystemInfoRequest(), timeout=_CALL)
    try:
        cluster = await client.workflow_service.get_cluster_info(GetClusterInfoRequest(), timeout=_CALL)
    except RPCError:  # not everybody may ask that
        return Finding("server", f"version {system.server_version}", "good")
    kept = f"{cluster.persistence_store}, {cluster.history_shard_count} history shard(s)"
    value = f"version {system.server_version}, {kept}"
    if cluster.persistence_store == "sqlite":
        return Finding("server", value, "fair", "a development server: not for production")
    return Finding("server", value, "good")


async def _namespace(client: Client) -> Finding:
    await client.workflow_service.describe_namespace(
        DescribeNamespaceRequest(namespace=client.namespace), timeout=_CALL
    )
    # How long it keeps what has ended is no matter: an instance is an open workflow for as long as it is kept.
    return Finding("namespace", client.namespace, "good")


async def _attributes(client: Client) -> Finding:
    try:
        missing = await missing_search_attributes(client)
    except EngineRefusedError as error:
        return Finding("search attributes", str(error), "bad")
    if missing:
        command = how_to_add(missing, client.namespace)
        return Finding(
            "search attributes", f"missing: {', '.join(missing)}", "fair", f"added at start, or by: {command}"
        )
    return Finding("search attributes", "all there", "good")


def _latency(milliseconds: float) -> Finding:
    value = f"{milliseconds:.0f} ms from a task to its worker"
    if milliseconds < _SLOW_MS:
        return Finding("queues", value, "good")
    advice = (
        "history.transferProcessorMaxPollRPS and history.timerProcessorMaxPollRPS of 5000, or it is far away"
    )
    return Finding("queues", value, "fair", advice)


def _turns(place: int, partitions: int) -> Iterator[Finding]:
    if partitions > 1:
        value = f"cannot be seen: a task queue has {partitions} partitions"
        advice = "matching.enableFairness=true; with few workers also one partition (matching.numTaskqueue…Partitions)"
        yield Finding("fairness", value, "note", advice)
    elif place <= 2:
        yield Finding("fairness", "tenants take turns", "good")
    else:
        value = f"no turns: a tenant's task came after {place - 1} of another's"
        yield Finding("fairness", value, "fair", "matching.enableFairness=true")


class _Probe:
    """Workflows of a task queue that nobody has, whose first tasks are taken by hand."""

    def __init__(self, client: Client) -> None:
        self._client, self._service = client, client.workflow_service
        self._queue = f"dynflow-examination-{uuid.uuid4().hex}"
        self._started: list[str] = []

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[_Probe]:
        """Take away in the end what was started."""
        try:
            yield self
        finally:
            await asyncio.gather(*(self._remove(name) for name in self._started))

    async def latencies(self) -> float:
        """Return the milliseconds from a workflow's start to its task at a poller that waits.

        The median of the last of many tries: a queue that has been idle is quicker at first.
        """
        took = []
        for _ in range(_TRIES):
            polled = asyncio.ensure_future(self._poll())
            start = time.perf_counter()
            await self._start("a")
            await polled
            took.append(1000 * (time.perf_counter() - start))
        return statistics.median(took[-_LATER:])

    async def turns(self) -> int:
        """Return the place, from 1, at which the task of a tenant comes that stands behind many of another's."""
        for _ in range(_BEFORE):
            await self._start("a")
        await asyncio.sleep(_SETTLED_SECONDS)
        last = await self._start("b")
        await asyncio.sleep(_SETTLED_SECONDS)
        for place in range(1, _BEFORE + 2):
            if await self._poll() == last:
                return place
        return _BEFORE + 1

    async def partitions(self) -> int:
        """Return how many parts a task queue has."""
        request = ListTaskQueuePartitionsRequest(
            namespace=self._client.namespace, task_queue=TaskQueue(name=self._queue)
        )
        try:
            found = await self._service.list_task_queue_partitions(request, timeout=_CALL)
        except RPCError:  # not everybody may ask that
            return 1
        return max(1, len(found.workflow_task_queue_partitions))

    async def _start(self, tenant: str) -> str:
        name = f"{self._queue}-{len(self._started)}"
        self._started.append(name)
        await self._service.start_workflow_execution(
            StartWorkflowExecutionRequest(
                namespace=self._client.namespace,
                workflow_id=name,
                workflow_type=WorkflowType(name="dynflow.Examination"),
                task_queue=TaskQueue(name=self._queue),
                request_id=name,
                priority=Priority(fairness_key=tenant),
            ),
            timeout=_CALL,
        )
        return name

    async def _poll(self) -> str:
        found = await self._service.poll_workflow_task_queue(
            PollWorkflowTaskQueueRequest(
                namespace=self._client.namespace,
                task_queue=TaskQueue(name=self._queue),
                identity=self._client.identity,
            ),
            timeout=2 * _CALL,
        )
        return found.workflow_execution.workflow_id

    async def _remove(self, name: str) -> None:
        # Of one that runs this is its end, too; to terminate it first delays what deletes it.
        request = DeleteWorkflowExecutionRequest(
            namespace=self._client.namespace, workflow_execution=WorkflowExecution(workflow_id=name)
        )
        try:
            await self._service.delete_workflow_execution(request, timeout=_CALL)
        except RPCError:  # it goes with the namespace's retention
            return
