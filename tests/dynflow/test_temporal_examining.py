"""What `dynflow doctor` says of a Temporal server: found by asking and trying, with what to change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes

from dynflow.engines.temporal.examining import Finding, examine
from dynflow.engines.temporal.search_attributes import SEARCH_ATTRIBUTES, ensure_search_attributes
from dynflow.errors import EngineRefusedError
from tests.temporal_server import new_queue, require_program, serving

DEADLINE = 20.0


async def found(client: Client, **states: str) -> dict[str, Finding]:
    """What is found; what is tried is tried again until it is as it should be: a busy machine tells half truths."""
    async with asyncio.timeout(DEADLINE):
        while True:
            findings = {finding.name: finding for finding in await examine(client)}
            if all(findings[name].state == state for name, state in states.items()):
                return findings


async def seen(client: Client, query: str, count: int) -> None:
    """Wait until so many workflows are found."""
    async with asyncio.timeout(DEADLINE):
        while len([each async for each in client.list_workflows(query)]) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # between two looks at another process, which indexes in its own time


async def test_a_server_that_is_set_up_right(temporal_client: Client) -> None:
    assert await ensure_search_attributes(temporal_client) == []
    findings = await found(temporal_client, fairness="good")
    states = {name: finding.state for name, finding in findings.items()}
    # How quick queues are is the machine's matter: here it is only said.
    assert states.pop("queues") in {"good", "fair"}
    assert states == {
        "server": "fair",
        "namespace": "good",
        "search attributes": "good",
        "fairness": "good",
    }
    assert "sqlite" in findings["server"].value
    assert "not for production" in findings["server"].advice
    await seen(temporal_client, "", 0)  # what was tried is gone


async def test_a_server_as_it_comes(tmp_path: Path) -> None:
    slow = {"matching.numTaskqueueReadPartitions": "1", "matching.numTaskqueueWritePartitions": "1"}
    with serving(require_program(), tmp_path, slow) as server:
        client = await server.client()
        findings = await found(client, queues="fair", fairness="fair")
    assert findings["search attributes"].state == "fair"
    assert "--name DynTenant --type Keyword" in findings["search attributes"].advice
    assert "history.transferProcessorMaxPollRPS" in findings["queues"].advice
    assert findings["fairness"].advice == "matching.enableFairness=true"


async def test_partitions_are_said_where_they_hide_whether_tenants_take_turns(tmp_path: Path) -> None:
    with serving(require_program(), tmp_path, {}) as server:
        findings = await found(await server.client())
    assert "4 partitions" in findings["fairness"].value


async def test_search_attributes_can_be_used_once_they_are_ensured(temporal_client: Client) -> None:
    assert await ensure_search_attributes(temporal_client) == []
    assert await ensure_search_attributes(temporal_client) == []
    pairs = [SearchAttributePair(SearchAttributeKey.for_keyword(name), "x") for name in SEARCH_ATTRIBUTES]
    await temporal_client.start_workflow(
        "nobody's", id="one", task_queue=new_queue(), search_attributes=TypedSearchAttributes(pairs)
    )
    await seen(temporal_client, "DynTenant = 'x' AND DynStatus = 'x'", 1)


async def test_two_that_ensure_at_once(temporal_client: Client) -> None:
    both = await asyncio.gather(*(ensure_search_attributes(temporal_client) for _ in range(4)))
    assert both == [[]] * 4


async def test_an_attribute_of_another_type_is_refused(temporal_client: Client) -> None:
    integer = {"DynStatus": IndexedValueType.INDEXED_VALUE_TYPE_INT}
    await temporal_client.operator_service.add_search_attributes(
        AddSearchAttributesRequest(namespace=temporal_client.namespace, search_attributes=integer)
    )
    with pytest.raises(EngineRefusedError, match=r"DynStatus .* is not of type Keyword"):
        await ensure_search_attributes(temporal_client)
    assert (await found(temporal_client))["search attributes"].state == "bad"
