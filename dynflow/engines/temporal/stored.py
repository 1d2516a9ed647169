"""Blobs that the Temporal server itself keeps, so that no other storage has to be set up."""

from __future__ import annotations

import contextlib
from datetime import timedelta

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError

from dynflow.engines.temporal.blobs import Blobs
from dynflow.engines.temporal.wire import is_gone, storage_error
from dynflow.errors import StorageError

NAME = "dynflow.Blob"
_NEVER = timedelta(days=3650)


class ServerBlobs(Blobs):
    """Each blob is the input of a workflow that never starts: durable, shared, and at most 1.5 MB."""

    def __init__(self, client: Client, queue: str) -> None:
        self._client, self._queue = client, queue

    async def put(self, key: str, data: bytes) -> None:
        """Start the workflow that has the data."""
        try:
            await self._client.start_workflow(
                NAME,
                data,
                id=key,
                task_queue=f"{self._queue}-blobs",
                start_delay=_NEVER,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            )
        except RPCError as error:
            raise storage_error(error) from error

    async def get(self, key: str) -> bytes:
        """Read the workflow's input."""
        try:
            async for event in self._client.get_workflow_handle(key).fetch_history_events(page_size=1):
                started = event.workflow_execution_started_event_attributes
                found: list[bytes] = await self._client.data_converter.decode(
                    list(started.input.payloads), [bytes]
                )
                return found[0]
        except RPCError as error:
            raise storage_error(error) from error
        raise StorageError(f"the value {key!r} is not where it was kept")

    async def delete(self, key: str) -> None:
        """Delete the workflow."""
        await delete_workflow(self._client, key)


async def delete_workflow(client: Client, workflow_id: str) -> None:
    """Have the server delete a workflow with its history; it does so in its own time."""
    request = DeleteWorkflowExecutionRequest(
        namespace=client.namespace, workflow_execution=WorkflowExecution(workflow_id=workflow_id)
    )
    with contextlib.suppress(RPCError):
        try:
            await client.workflow_service.delete_workflow_execution(request)
        except RPCError as error:
            if not is_gone(error):
                raise
