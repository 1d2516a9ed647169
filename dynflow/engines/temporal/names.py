"""Which Temporal workflow an instance is, and which instances there are of an id."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from urllib.parse import quote, unquote

from temporalio.client import Client
from temporalio.service import RPCError

from dynflow.engines import InstanceRef
from dynflow.engines.temporal.wire import storage_error
from dynflow.errors import InstanceNotFoundError

_TYPE = "dynflow.Instance"
# Databases of Temporal keep 255 characters of an id: longer tenants are in it as a digest.
_LONGEST_TENANT = 60
_REMEMBERED = 10_000
# The server's list of workflows is behind by about this much, in seconds.
_BEHIND = 0.3


class Names:
    """Names of one task queue's workflows: `queue/workflow/id/tenant`."""

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self._known: OrderedDict[tuple[str, str], set[str]] = OrderedDict()

    def workflow_id(self, ref: InstanceRef) -> str:
        """Return the id of an instance's workflow."""
        tenant = quote(ref.tenant or "", safe="").replace(
            ".", "%2E"
        )  # no path: ids are folders of `FolderBlobs`
        if len(tenant) > _LONGEST_TENANT:
            tenant = "%" + hashlib.sha256((ref.tenant or "").encode()).hexdigest()[:40]
        return f"{self._prefix(ref)}{tenant}"

    def _prefix(self, ref: InstanceRef) -> str:
        return f"{self._queue}/{ref.workflow}/{ref.id}/"

    def note(self, ref: InstanceRef) -> None:
        """Remember an instance: the server's list does not have it at once."""
        self._known.setdefault((ref.workflow, ref.id), set()).add(ref.tenant or "")
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def forget(self, ref: InstanceRef) -> None:
        """Forget an instance that was deleted."""
        self._known.get((ref.workflow, ref.id), set()).discard(ref.tenant or "")

    async def tenants(
        self, ref: InstanceRef, client: Client, exists: Callable[[str], Awaitable[bool]]
    ) -> list[str]:
        """Return the tenants that have an instance of this workflow and id."""
        guesses = {"", *self._known.get((ref.workflow, ref.id), ())}
        for pause in (_BEHIND, None):
            guesses |= await self._listed(ref, client)
            found = [
                one for one in sorted(guesses) if await exists(self.workflow_id(ref._replace(tenant=one)))
            ]
            if found or pause is None:
                return found
            await asyncio.sleep(pause)
        return []

    async def _listed(self, ref: InstanceRef, client: Client) -> set[str]:
        """Return the tenants that the server lists. Names have no quotes: workflow names and ids are checked."""
        prefix = self._prefix(ref)
        query = (
            f"WorkflowId STARTS_WITH '{prefix}' AND WorkflowType = '{_TYPE}' AND ExecutionStatus = 'Running'"
        )
        found = set()
        try:
            async for execution in client.list_workflows(query, limit=10):
                rest = execution.id.removeprefix(prefix)
                if "/" in rest:  # a value of an instance
                    continue
                memo = await execution.memo() if rest.startswith("%") else {}
                found.add(memo.get("tenant", unquote(rest)))
        except RPCError as error:
            raise storage_error(error) from error
        return found


def missing(workflow_id: str) -> InstanceNotFoundError:
    """Return the error that says that there is no such instance."""
    _, workflow, instance_id, _ = workflow_id.rsplit("/", 3)
    return InstanceNotFoundError(f"there is no instance {instance_id!r} of workflow {workflow!r}")
