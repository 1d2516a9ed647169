"""Coming to a Temporal server: what is wrong is said within five seconds, and what to do."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest

from dynflow.engines.temporal.connecting import TemporalAddress, connect, connect_patiently
from dynflow.errors import EngineRefusedError, EngineUnreachableError, InvalidArgumentError, StorageError
from tests.dynflow.temporal_doors import Authority, listening, passing_on, refusing, web
from tests.temporal_server import TemporalServer, new_queue

KEY = "tmprl_a_very_secret_key"
# What `dynflow` promises, with what a busy machine of two cores takes on top.
SAID_WITHIN = 5.0 + 2.0
NOBODYS = "127.0.0.1:1"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.of(tmp_path / "authority")


async def refusal(options: TemporalAddress) -> StorageError:
    """What is said, and within the deadline."""
    with pytest.raises(StorageError) as refused:
        async with asyncio.timeout(SAID_WITHIN):
            await connect(options)
    message = str(refused.value)
    assert options.address in message
    assert "\n" not in message
    assert KEY not in f"{message} {refused.value.__cause__!r}"
    return refused.value


async def works(options: TemporalAddress) -> None:
    client = await connect(options)
    await client.start_workflow("nobody's", id=new_queue(), task_queue=new_queue())


async def test_a_server_takes_us_with_a_name_that_says_who_we_are(temporal_server: TemporalServer) -> None:
    client = await connect(TemporalAddress(temporal_server.address))
    assert client.namespace == "default"
    assert client.identity.startswith("dynflow-")


async def test_nobody_listens() -> None:
    error = await refusal(TemporalAddress(NOBODYS))
    assert isinstance(error, EngineUnreachableError)
    assert "nobody listens there" in str(error)


async def test_a_host_that_has_no_address() -> None:
    error = await refusal(TemporalAddress("temporal.invalid:7233"))
    assert "'temporal.invalid' has no address" in str(error)


async def test_a_namespace_that_is_not_there(temporal_server: TemporalServer) -> None:
    error = await refusal(TemporalAddress(temporal_server.address, "nowhere"))
    assert isinstance(error, EngineRefusedError)
    assert "no namespace 'nowhere'" in str(error)
    assert "namespace create" in str(error)


async def test_tls_where_the_server_has_none(temporal_server: TemporalServer) -> None:
    error = await refusal(TemporalAddress(temporal_server.address, tls=True))
    assert isinstance(error, EngineRefusedError)
    assert "does not speak TLS" in str(error)


async def test_no_tls_where_the_server_wants_it(
    temporal_server: TemporalServer, authority: Authority
) -> None:
    with listening(passing_on(temporal_server.address), authority.server_context()) as address:
        error = await refusal(TemporalAddress(address))
        assert "TLS" in str(error)
        assert "off here" in str(error)


async def test_tls_with_the_servers_own_authority(
    temporal_server: TemporalServer, authority: Authority
) -> None:
    with listening(passing_on(temporal_server.address), authority.server_context()) as address:
        await works(TemporalAddress(address, tls_ca=authority.file))
        await works(TemporalAddress(address, tls_ca=authority.file, api_key=KEY))
        await works(TemporalAddress(address, tls_ca=authority.file, tls_server_name="server"))
        error = await refusal(TemporalAddress(address, tls=True, api_key=KEY))
        assert isinstance(error, EngineRefusedError)
        assert "not to be trusted" in str(error)
        error = await refusal(TemporalAddress(address, tls_ca=authority.file, tls_server_name="another"))
        assert "not to be trusted" in str(error)


async def test_a_client_certificate(
    temporal_server: TemporalServer, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.sign("client")
    stranger = Authority.of(tmp_path / "stranger").sign("client")
    context = authority.server_context(asks_clients=True)
    with listening(passing_on(temporal_server.address), context) as address:
        await works(TemporalAddress(address, tls_ca=authority.file, tls_cert=certificate, tls_key=key))
        error = await refusal(TemporalAddress(address, tls_ca=authority.file))
        assert "it wants a client certificate" in str(error)
        error = await refusal(
            TemporalAddress(address, tls_ca=authority.file, tls_cert=stranger[0], tls_key=stranger[1])
        )
        assert "does not take the client certificate" in str(error)


@pytest.mark.parametrize("status", [7, 16])
async def test_what_is_not_permitted(authority: Authority, status: int) -> None:
    with listening(refusing(status, "Request unauthorized."), authority.server_context()) as address:
        error = await refusal(TemporalAddress(address, "ours.acct", tls_ca=authority.file, api_key=KEY))
        assert isinstance(error, EngineRefusedError)
        assert "does not permit the use of the namespace 'ours.acct' with the API key" in str(error)


async def test_a_server_of_something_else() -> None:
    with listening(web) as address:
        assert "a web server answers there" in str(await refusal(TemporalAddress(address)))


async def test_a_server_that_hangs(temporal_server: TemporalServer) -> None:
    temporal_server.freeze()
    try:
        error = await refusal(TemporalAddress(temporal_server.address))
    finally:
        temporal_server.thaw()
    assert isinstance(error, EngineUnreachableError)
    assert "nothing answers there" in str(error)
    await works(TemporalAddress(temporal_server.address))


async def test_a_killed_server_is_said_and_a_client_goes_on_when_it_is_back(
    temporal_server: TemporalServer, caplog: pytest.LogCaptureFixture
) -> None:
    options = TemporalAddress(temporal_server.address)
    client = await connect(options)
    temporal_server.kill()
    assert "nobody listens there" in str(await refusal(options))
    request = DescribeNamespaceRequest(namespace="default")
    with caplog.at_level(logging.WARNING):
        asked = asyncio.ensure_future(client.workflow_service.describe_namespace(request, retry=True))
        temporal_server.start()
        async with asyncio.timeout(30):
            assert (await asked).namespace_info.name == "default"


async def test_patience_says_at_once_what_is_wrong_and_waits(
    temporal_server: TemporalServer, caplog: pytest.LogCaptureFixture
) -> None:
    temporal_server.kill()
    connecting = asyncio.ensure_future(connect_patiently(TemporalAddress(temporal_server.address)))
    async with asyncio.timeout(SAID_WITHIN):
        while "nobody listens there" not in caplog.text:  # noqa: ASYNC110 - nothing tells of a log
            await asyncio.sleep(0.01)
    assert not connecting.done()
    temporal_server.start()
    async with asyncio.timeout(30):
        await connecting
    with pytest.raises(EngineRefusedError):
        await connect_patiently(TemporalAddress(temporal_server.address, "nowhere"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"address": "temporal"}, "host:port"),
        ({"address": "http://temporal:7233"}, "host:port"),
        ({"address": "temporal:77777"}, "host:port"),
        ({"namespace": ""}, "must not be empty"),
        ({"tls_cert": Path("/a")}, "needs its key"),
        ({"tls": False, "api_key": KEY}, "need TLS"),
        ({"api_key": f"{KEY} "}, "API key"),
    ],
    ids=["no-port", "url", "port", "namespace", "half-a-certificate", "key-in-clear", "key-with-space"],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said) as refused:
        TemporalAddress(**options)
    assert KEY not in str(refused.value)


async def test_files_that_are_no_certificates_are_named(tmp_path: Path) -> None:
    (tmp_path / "not.pem").write_text("no certificate")
    broken, missing = tmp_path / "not.pem", tmp_path / "missing.pem"
    for options in (
        TemporalAddress(NOBODYS, tls_ca=broken),
        TemporalAddress(NOBODYS, tls_ca=missing),
        TemporalAddress(NOBODYS, tls_cert=broken, tls_key=broken),
    ):
        with pytest.raises(InvalidArgumentError, match=str(tmp_path)):
            await connect(options)


def test_a_key_is_not_shown() -> None:
    assert KEY not in repr(TemporalAddress(api_key=KEY))
