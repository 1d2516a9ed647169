"""Runs that a Temporal server keeps: connect as the settings say, and say what is found there."""

from __future__ import annotations

import logging

from ci_platform.errors import InvalidInputError
from ci_platform.settings import Settings
from dynflow.clock import Clock
from dynflow.engines.temporal import TemporalEngine
from dynflow.engines.temporal.connecting import TemporalAddress, connect, connect_patiently
from dynflow.engines.temporal.examining import Finding, examine
from dynflow.engines.temporal.search_attributes import ensure_search_attributes, how_to_add
from dynflow.errors import InvalidArgumentError

_log = logging.getLogger(__name__)


async def make_engine(settings: Settings, clock: Clock) -> TemporalEngine:
    """Return the engine, once the server is there: until then say every few seconds what is wrong.

    Raises InvalidInputError, EngineRefusedError.
    """
    try:
        client = await connect_patiently(address_of(settings))
    except InvalidArgumentError as error:  # a file of certificates
        raise InvalidInputError(str(error)) from None
    missing = await ensure_search_attributes(client)
    if missing:
        _log.warning(
            "search attributes are missing in Temporal, and this client may not add them; an operator may: %s",
            how_to_add(missing, client.namespace),
        )
    return TemporalEngine(
        client,
        task_queue=settings.temporal_task_queue,
        clock=clock,
        concurrency=settings.concurrency,
        tenant_concurrency=settings.repository_share,
    )


async def examine_server(settings: Settings) -> list[Finding]:
    """Return what is found of the server. Raises InvalidInputError, StorageError where it cannot be used."""
    try:
        client = await connect(address_of(settings))
    except InvalidArgumentError as error:  # a file of certificates
        raise InvalidInputError(str(error)) from None
    return await examine(client)


def address_of(settings: Settings) -> TemporalAddress:
    """Return where the server is, and as whom to come to it. Raises InvalidInputError."""
    key = settings.temporal_api_key
    try:
        return TemporalAddress(
            address=settings.temporal_address,
            namespace=settings.temporal_namespace,
            tls=settings.temporal_tls,
            tls_ca=settings.temporal_tls_ca,
            tls_cert=settings.temporal_tls_cert,
            tls_key=settings.temporal_tls_key,
            tls_server_name=settings.temporal_tls_server_name,
            api_key=None if key is None else key.get_secret_value(),
        )
    except InvalidArgumentError as error:
        raise InvalidInputError(str(error)) from None
