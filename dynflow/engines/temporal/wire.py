"""Talking to a Temporal server: calls that its SDK has no words for, with our errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.message import Message
from temporalio.api.common.v1 import Payloads, WorkflowExecution
from temporalio.api.failure.v1 import ApplicationFailureInfo
from temporalio.api.failure.v1 import Failure as ApiFailure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    GetWorkflowExecutionHistoryRequest,
    PollActivityTaskQueueRequest,
    PollActivityTaskQueueResponse,
    RecordActivityTaskHeartbeatRequest,
    RespondActivityTaskCompletedRequest,
    RespondActivityTaskFailedRequest,
)
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from dynflow.engines.temporal.book import compact
from dynflow.errors import LeaseLostError, StorageError

T = TypeVar("T")

# The server answers a poll that finds nothing after about a minute.
_LONG_POLL = timedelta(seconds=75)
_CALL = timedelta(seconds=10)
# Between tries while the server does not answer, in seconds.
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)
_TRANSIENT = frozenset(
    {
        RPCStatusCode.UNAVAILABLE,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.RESOURCE_EXHAUSTED,
        RPCStatusCode.ABORTED,
        RPCStatusCode.INTERNAL,
        RPCStatusCode.UNKNOWN,
        RPCStatusCode.CANCELLED,
    }
)


def is_gone(error: RPCError) -> bool:
    """Whether there is no such execution or task (any more)."""
    return error.status == RPCStatusCode.NOT_FOUND


def is_transient(error: RPCError) -> bool:
    """Whether the same call may succeed later."""
    return error.status in _TRANSIENT


def storage_error(error: Exception) -> StorageError:
    """Return what the instance API raises where the server cannot do what it was asked."""
    return StorageError(f"the Temporal server did not do it: {str(error) or type(error).__name__:.300}")


class Wire:
    """A client's connection, for one task queue."""

    def __init__(self, client: Client, queue: str) -> None:
        self.client, self.queue = client, queue
        self._service, self._converter = client.workflow_service, client.data_converter

    # --- payloads: through the client's own converter, which may encrypt them ---

    async def _pack(self, data: bytes) -> Payloads:
        return Payloads(payloads=await self._converter.encode([data]))

    async def unpack(self, payloads: Payloads) -> bytes | None:
        """Return the bytes that were packed; None where there are none."""
        if not payloads.payloads:
            return None
        found: list[bytes] = await self._converter.decode(list(payloads.payloads), [bytes])
        return found[0]

    # --- activities ---

    async def poll(self) -> PollActivityTaskQueueResponse | None:
        """Wait for a segment to run; None where none came."""
        request = PollActivityTaskQueueRequest(
            namespace=self.client.namespace,
            task_queue=TaskQueue(name=self.queue),
            identity=self.client.identity,
        )
        task = await self._service.poll_activity_task_queue(request, timeout=_LONG_POLL)
        return task if task.task_token else None

    async def beat(self, token: bytes, details: bytes) -> bool:
        """Record a segment's heartbeat, durably; returns whether it has been asked to end."""
        request = RecordActivityTaskHeartbeatRequest(
            namespace=self.client.namespace,
            task_token=token,
            details=await self._pack(details),
            identity=self.client.identity,
        )
        answer = await self._while_it_may(self._service.record_activity_task_heartbeat, request)
        return bool(answer.cancel_requested or answer.activity_paused)

    async def completed(self, token: bytes, result: bytes) -> None:
        """Say that a segment has ended."""
        request = RespondActivityTaskCompletedRequest(
            namespace=self.client.namespace,
            task_token=token,
            result=await self._pack(result),
            identity=self.client.identity,
        )
        await self._while_it_may(self._service.respond_activity_task_completed, request)

    async def failed(self, task: PollActivityTaskQueueResponse, why: str, details: bytes = b"") -> None:
        """Give a task back. `details`: what heartbeats have last recorded."""
        kept = await self._pack(details) if details else None
        failure = ApiFailure(
            message=why, application_failure_info=ApplicationFailureInfo(type="again", details=kept)
        )
        request = RespondActivityTaskFailedRequest(
            namespace=self.client.namespace,
            task_token=task.task_token,
            identity=self.client.identity,
            failure=failure,
        )
        await self._service.respond_activity_task_failed(request, timeout=_CALL)

    async def _while_it_may(self, call: Any, request: Message) -> Any:
        """Call until the server answers. Raises LeaseLostError once the task is somebody else's."""
        tries = 0
        while True:
            try:
                return await call(request, timeout=_CALL)
            except RPCError as error:
                if is_gone(error):
                    raise LeaseLostError("the instance was ended, deleted or taken over") from None
                if not is_transient(error):
                    raise storage_error(error) from error
            await asyncio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
            tries += 1

    # --- workflows ---

    async def events(
        self, workflow_id: str, run_id: str, token: bytes, *, wait: bool
    ) -> tuple[list[HistoryEvent], bytes]:
        """Return events of a run from `token` on, and the token to go on with, empty at the end."""
        request = GetWorkflowExecutionHistoryRequest(
            namespace=self.client.namespace,
            execution=WorkflowExecution(workflow_id=workflow_id, run_id=run_id),
            next_page_token=token,
            wait_new_event=wait,
        )
        answer = await self._service.get_workflow_execution_history(
            request, timeout=_LONG_POLL if wait else _CALL
        )
        return list(answer.history.events), answer.next_page_token

    async def signal(self, workflow_id: str, name: str, mail: dict[str, Any]) -> bool:
        """Send mail, durably; False where there is no such open workflow."""
        handle = self.client.get_workflow_handle(workflow_id)
        try:
            await handle.signal(name, compact(mail).encode())
        except RPCError as error:
            if is_gone(error):
                return False
            raise storage_error(error) from error
        return True


async def tried(call: Awaitable[T]) -> T:
    """Await a call; what the server refuses, or does not answer, is a StorageError."""
    try:
        return await call
    except RPCError as error:
        raise storage_error(error) from error
