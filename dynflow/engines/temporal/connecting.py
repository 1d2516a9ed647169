"""Connect to a Temporal server, or say within five seconds and in one sentence why that cannot be."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import socket
import ssl
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

from temporalio.api.enums.v1 import NamespaceState
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.runtime import LogForwardingConfig, LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError, RPCStatusCode, TLSConfig

from dynflow.engines.temporal.looking import look
from dynflow.errors import EngineRefusedError, EngineUnreachableError, InvalidArgumentError, StorageError

# Together with a look at what went wrong, less than the five seconds in which it has to be said.
_CONNECT_SECONDS = 3.0
# Between two words on a server that does not answer.
_SAID_SECONDS = 60.0
# Between two looks for a server that does not answer.
_AGAIN_SECONDS = 2.0
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_REFUSALS = frozenset({RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED})
_PASSING = frozenset(
    {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED}
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TemporalAddress:
    """Where a Temporal server is, and as whom to come to it.

    `address`: `host:port` of its frontend. `tls` None: as `api_key` and the certificates say, which need it.
    `tls_ca`, `tls_cert`, `tls_key`: PEM files, the authority that signed the server's certificate (None: those that
    this machine trusts) and the client's certificate with its key. `tls_server_name`: the name in the server's
    certificate, where that is not its host's. `api_key` is a secret: it is shown nowhere and sent over TLS alone.
    `identity`: by what name the server shows this process; None: its id and host.
    Raises InvalidArgumentError.
    """

    address: str = "localhost:7233"
    namespace: str = "default"
    tls: bool | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    identity: str | None = None

    def __post_init__(self) -> None:
        found = _ADDRESS.fullmatch(self.address)
        if found is None or not 0 < int(found["port"]) < 65536:
            raise InvalidArgumentError(
                f"the address of a Temporal server is host:port, such as localhost:7233, not {self.address!r:.100}"
            )
        if not self.namespace:
            raise InvalidArgumentError("the namespace of a Temporal server must not be empty")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidArgumentError(
                "a client certificate for Temporal needs its key, and a key its certificate"
            )
        if self.tls is False and (self.api_key or self.tls_cert or self.tls_ca):
            raise InvalidArgumentError(
                "an API key or certificates for Temporal need TLS, which is turned off"
            )
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise InvalidArgumentError("the API key for Temporal is empty, or has characters that no key has")

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return bool(self.tls or self.api_key or self.tls_cert or self.tls_ca)

    @property
    def host(self) -> str:
        """The host's name or address, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port."""
        return int(self.address.rpartition(":")[2])

    def tls_context(self) -> ssl.SSLContext:
        """Return what these files say as Python has it. Raises InvalidArgumentError that names the file."""
        context = ssl.create_default_context()
        context.set_alpn_protocols(["h2"])
        try:
            if self.tls_ca is not None:
                context.load_verify_locations(self.tls_ca)
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                f"cannot use the certificate authority {self.tls_ca}: {error}"
            ) from None
        try:
            if self.tls_cert is not None:
                # A key that needs a password fails in place of asking the terminal for it.
                context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                f"cannot use the client certificate {self.tls_cert} with the key {self.tls_key}: {error}"
            ) from None
        return context

    def tls_config(self) -> TLSConfig | bool:
        """Return the same as the SDK has it."""
        if not self.uses_tls:
            return False
        return TLSConfig(
            server_root_ca_cert=None if self.tls_ca is None else self.tls_ca.read_bytes(),
            domain=self.tls_server_name,
            client_cert=None if self.tls_cert is None else self.tls_cert.read_bytes(),
            client_private_key=None if self.tls_key is None else self.tls_key.read_bytes(),
        )


async def connect(options: TemporalAddress) -> Client:
    """Return a client whose namespace exists.

    Raises EngineUnreachableError where the server does not answer, which may pass; EngineRefusedError where it does
    and waiting does not help (TLS, namespace, permission); InvalidArgumentError for files that cannot be used. Each
    says what is wrong, with the address, and what to do.
    """
    context = options.tls_context() if options.uses_tls else None
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            client = await _client(options)
            await _check_namespace(client, options)
    except TimeoutError:
        raise await _unreachable(options, context, f"no answer within {_CONNECT_SECONDS:g} seconds") from None
    except RPCError as error:
        raise _refusal(error, options) from None
    except RuntimeError as error:  # the SDK's, when there is no connection
        if "PermissionDenied" in str(error) or "Unauthenticated" in str(error):
            raise _not_permitted(options) from None
        raise await _unreachable(options, context, str(error)) from None
    return client


async def connect_patiently(options: TemporalAddress) -> Client:
    """Return a client as `connect` does, and wait for a server that does not answer: what is wrong is logged, at once.

    Raises EngineRefusedError and InvalidArgumentError, for which waiting does not help.
    """
    while True:
        try:
            return await connect(options)
        except EngineUnreachableError as error:
            _log.warning("%s. Trying again until it answers", error)
        await asyncio.sleep(_AGAIN_SECONDS)


async def _client(options: TemporalAddress) -> Client:
    return await Client.connect(
        options.address,
        namespace=options.namespace,
        tls=options.tls_config(),
        api_key=options.api_key,
        # What is shared between namespaces finds out by it whose a key is.
        rpc_metadata={"temporal-namespace": options.namespace},
        identity=options.identity or f"dynflow-{os.getpid()}@{socket.gethostname()}",
        runtime=_runtime(),
    )


class _InShort(logging.Filter):
    """Says of a server that does not answer so, and no more often than each minute: the SDK does at every try."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record, and have it say what matters to people."""
        text = record.getMessage()
        if "Unavailable" not in text and "retried" not in text:
            return True
        if record.created - self._said_at < _SAID_SECONDS:
            return False
        self._said_at = record.created
        record.msg = (
            "Temporal does not answer. What runs waits for it, and it is tried again until it does: %s"
        )
        record.args = (text.partition("message:")[2][:200],)
        return True


@cache
def _runtime() -> Runtime:
    """Return the SDK's threads, once in this process; what they log goes where Python's logs go."""
    logger = logging.getLogger("dynflow.engines.temporal.sdk")
    logger.addFilter(_InShort())
    forwarding = LogForwardingConfig(
        logger=logger, append_target_to_name=False, prepend_target_on_message=False
    )
    telemetry = TelemetryFilter(core_level="WARN", other_level="ERROR")
    return Runtime(telemetry=TelemetryConfig(logging=LoggingConfig(filter=telemetry, forwarding=forwarding)))


async def _check_namespace(client: Client, options: TemporalAddress) -> None:
    found = await client.workflow_service.describe_namespace(
        DescribeNamespaceRequest(namespace=options.namespace), timeout=timedelta(seconds=_CONNECT_SECONDS)
    )
    if found.namespace_info.state != NamespaceState.NAMESPACE_STATE_REGISTERED:
        raise EngineRefusedError(
            f"the namespace {options.namespace!r} of the Temporal server at {options.address} is being deleted: "
            "use another one"
        )


async def _unreachable(options: TemporalAddress, context: ssl.SSLContext | None, said: str) -> StorageError:
    """Find out by a look at the port why there is no connection."""
    where = f"the Temporal server at {options.address}"
    seen = await asyncio.to_thread(look, options.host, options.port, context, options.tls_server_name)
    if seen is None:
        return EngineUnreachableError(f"{where} cannot be used: {said:.300}")
    if seen.is_passing:
        return EngineUnreachableError(f"{where} cannot be reached: {seen.problem}")
    return EngineRefusedError(f"{where} cannot be used: {seen.problem}")


def _refusal(error: RPCError, options: TemporalAddress) -> StorageError:
    where = f"the Temporal server at {options.address}"
    if error.status in _REFUSALS:
        return _not_permitted(options)
    if error.status == RPCStatusCode.NOT_FOUND:
        return EngineRefusedError(
            f"{where} has no namespace {options.namespace!r}: name one that it has, or make it with "
            f"`temporal operator namespace create --namespace {options.namespace}`"
        )
    if error.status in _PASSING:
        return EngineUnreachableError(f"{where} does not answer as it should: {error.message:.300}")
    if error.status == RPCStatusCode.UNIMPLEMENTED:
        return EngineRefusedError(
            f"what answers at {options.address} is no Temporal server: look at the address"
        )
    return EngineRefusedError(f"{where} refuses: {error.message:.300}")


def _not_permitted(options: TemporalAddress) -> StorageError:
    shown = (
        "the API key"
        if options.api_key
        else "the client certificate"
        if options.tls_cert
        else "no credentials"
    )
    return EngineRefusedError(
        f"the Temporal server at {options.address} does not permit the use of the namespace {options.namespace!r} "
        f"with {shown}: it may be of another namespace, without the permission, or expired; "
        "in Temporal Cloud the namespace's full name is name.account"
    )
