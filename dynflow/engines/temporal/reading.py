"""Reading instances: the interpreter's book by queries, and what a running segment has recorded beside it."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from weakref import WeakValueDictionary

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import PendingActivityState, WorkflowExecutionStatus
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import WorkflowQueryFailedError, WorkflowQueryRejectedError
from temporalio.common import QueryRejectCondition
from temporalio.service import RPCError, RPCStatusCode

from dynflow.engines.temporal.book import Book, Entry, load
from dynflow.engines.temporal.interpreter import BOOK, SEGMENT, TOLD
from dynflow.engines.temporal.names import missing
from dynflow.engines.temporal.wire import Wire, is_gone, storage_error
from dynflow.errors import InstanceNotFoundError, StorageError

# How often a book is read anew that changes while its pages are read, and how long a worker may take to answer.
_TRIES = 20
_NO_WORKER = 10.0


class Reader:
    """Reads what is known of instances, from any process."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def exists(self, workflow_id: str) -> bool:
        """Whether there is an instance."""
        description = await self._describe(workflow_id)
        return description is not None

    async def book(self, workflow_id: str) -> Book | None:
        """Return the book of an instance with all that is durable; None where there is no such instance."""
        description = await self._describe(workflow_id)
        if description is None:
            return None
        pending = await self._pending(description)
        try:
            book = load(await self.text(workflow_id))
        except InstanceNotFoundError:
            return None
        first, entries = pending
        for entry in entries[max(book.entries + 1 - first, 0) :]:
            book.apply(entry)
        return book

    async def text(self, workflow_id: str) -> str:
        """Return the interpreter's book as text. Raises InstanceNotFoundError."""
        for _ in range(_TRIES):
            count, stamp, text = self._page(await self._query(workflow_id, BOOK, b"0"))
            for number in range(1, count):
                _, other, more = self._page(await self._query(workflow_id, BOOK, str(number).encode()))
                if other != stamp:
                    break
                text += more
            else:
                return text
        raise StorageError(f"the instance {workflow_id!r} changes faster than it can be read")

    async def told(self, workflow_id: str, uids: list[str]) -> list[Any]:
        """Return what became of mail, see `Interpreter.told`. Raises InstanceNotFoundError."""
        found: list[Any] = json.loads(await self._query(workflow_id, TOLD, json.dumps(uids).encode()))
        return found

    async def status(self, workflow_id: str) -> str | None:
        """Return how an instance has ended; None where it has not. Raises InstanceNotFoundError."""
        description = await self._describe(workflow_id)
        if description is None:
            raise missing(workflow_id)
        kept = description.workflow_execution_info.memo.fields.get("status")
        if kept is None:
            return None
        found: list[str] = await self._wire.client.data_converter.decode([kept], [str])
        return found[0]

    async def is_queued(self, workflow_id: str) -> bool:
        """Whether an instance has a segment that nobody has taken yet."""
        description = await self._describe(workflow_id)
        scheduled = PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
        asked = PendingActivityState.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED
        return description is not None and any(
            activity.activity_type.name == SEGMENT
            and (
                activity.state == scheduled
                or (activity.state == asked and not activity.HasField("last_started_time"))
            )
            for activity in description.pending_activities
        )

    @staticmethod
    def _page(answer: bytes) -> tuple[int, str, str]:
        count, stamp, text = answer.decode().split(" ", 2)
        return int(count), stamp, text

    async def _query(self, workflow_id: str, name: str, argument: bytes) -> bytes:
        """Ask one thing at a time: of two queries to one workflow, workers answer the second a second later."""
        lock = self._locks.setdefault(workflow_id, asyncio.Lock())
        async with lock:
            return await self._query_alone(workflow_id, name, argument)

    async def _query_alone(self, workflow_id: str, name: str, argument: bytes) -> bytes:
        handle = self._wire.client.get_workflow_handle(workflow_id)
        for pause in (0.02, 0.1, 0.5, None):
            try:
                return await handle.query(  # type: ignore[no-any-return]
                    name, argument, result_type=bytes, reject_condition=QueryRejectCondition.NOT_OPEN
                )
            except WorkflowQueryRejectedError:
                raise missing(workflow_id) from None
            except WorkflowQueryFailedError as error:
                # Before its first task a workflow has no book yet.
                if pause is None:
                    raise storage_error(error) from error
            except RPCError as error:
                if is_gone(error):
                    raise missing(workflow_id) from None
                if pause is None or error.status not in {
                    RPCStatusCode.UNAVAILABLE,
                    RPCStatusCode.FAILED_PRECONDITION,
                    RPCStatusCode.DEADLINE_EXCEEDED,
                }:
                    raise storage_error(error) from error
            await asyncio.sleep(pause or 0)
        raise AssertionError("unreachable")

    async def _describe(self, workflow_id: str) -> Any:
        request = DescribeWorkflowExecutionRequest(
            namespace=self._wire.client.namespace, execution=WorkflowExecution(workflow_id=workflow_id)
        )
        service = self._wire.client.workflow_service
        try:
            answer = await service.describe_workflow_execution(request, retry=True)
        except RPCError as error:
            if is_gone(error):
                return None
            raise storage_error(error) from error
        running = WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING
        return answer if answer.workflow_execution_info.status == running else None

    async def _pending(self, description: Any) -> tuple[int, list[Entry]]:
        for activity in description.pending_activities:
            if activity.activity_type.name == SEGMENT and activity.HasField("heartbeat_details"):
                details = await self._wire.unpack(activity.heartbeat_details)
                if details:
                    plain = json.loads(details)
                    return plain["first"], plain["entries"]
        return 1, []
