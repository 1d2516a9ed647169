"""The search attributes by which instances are found in Temporal: which are there, and add what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta

from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import GetSearchAttributesRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from dynflow.errors import EngineRefusedError

TENANT, WORKFLOW, INSTANCE, STATUS = "DynTenant", "DynWorkflow", "DynInstance", "DynStatus"
SEARCH_ATTRIBUTES = (TENANT, WORKFLOW, INSTANCE, STATUS)
"""All of type Keyword."""

_CALL = timedelta(seconds=5)
# Members of a cluster look at what is new every few seconds.
_SEEN_SECONDS = 15.0
_LOOK_SECONDS = 0.05
# What Temporal Cloud and locked-up clusters say of the operator's service.
_NOT_OURS = frozenset(
    {RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.UNIMPLEMENTED}
)
_KEYWORD = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD


async def ensure_search_attributes(client: Client) -> list[str]:
    """Add what is missing, where this client may; return the names that are missing still.

    Returns when they can be used. Raises EngineRefusedError where one has another type.
    """
    missing = await missing_search_attributes(client)
    if not missing:
        return []
    request = AddSearchAttributesRequest(
        namespace=client.namespace, search_attributes=dict.fromkeys(missing, _KEYWORD)
    )
    try:
        await client.operator_service.add_search_attributes(request, timeout=_CALL)
    except RPCError as error:
        if error.status in _NOT_OURS:
            return missing
        if error.status != RPCStatusCode.ALREADY_EXISTS:  # another process was quicker
            raise
    async with asyncio.timeout(_SEEN_SECONDS):
        while await missing_search_attributes(client):  # noqa: ASYNC110 - another machine's, which tells nobody
            await asyncio.sleep(_LOOK_SECONDS)
    return []


async def missing_search_attributes(client: Client) -> list[str]:
    """Return which are missing. Raises EngineRefusedError where one has another type."""
    found = await _present(client)
    for name in SEARCH_ATTRIBUTES:
        if found.get(name, _KEYWORD) != _KEYWORD:
            raise EngineRefusedError(
                f"the search attribute {name} of the namespace {client.namespace!r} is not of type Keyword: "
                "remove it, or use another namespace"
            )
    return [name for name in SEARCH_ATTRIBUTES if name not in found]


def how_to_add(names: list[str], namespace: str) -> str:
    """Return the command by which an operator adds them."""
    each = " ".join(f"--name {name} --type Keyword" for name in names)
    return f"temporal operator search-attribute create --namespace {namespace} {each}"


async def _present(client: Client) -> Mapping[str, int]:
    request = ListSearchAttributesRequest(namespace=client.namespace)
    try:
        listed = await client.operator_service.list_search_attributes(request, timeout=_CALL)
    except RPCError as error:
        if error.status not in _NOT_OURS:
            raise
        older = await client.workflow_service.get_search_attributes(
            GetSearchAttributesRequest(), timeout=_CALL
        )
        return older.keys
    return listed.custom_attributes
