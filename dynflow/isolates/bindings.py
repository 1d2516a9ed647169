"""A worker's `env` on the host's side: what each binding is, and how a call of it is performed."""

from __future__ import annotations

import inspect
import logging
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from dynflow.errors import DynflowError, InvalidArgumentError
from dynflow.failure import Failure, RemoteError
from dynflow.isolates import BoundObject, Caller, Capability, EntrypointStub, WrappedBinding, current_caller
from dynflow.isolates.proxies import INSTANCE_METHODS
from dynflow.outbound import HttpRequest, HttpResponse
from dynflow.serialization import encode

_log = logging.getLogger(__name__)
_WORKFLOW_METHODS = frozenset({"create", "create_batch", "get", "delete_batch"})

_METHOD = re.compile(r"[A-Z]{1,20}")
_URL = re.compile(r"https?://[\x21-\x7e]{1,8000}", re.IGNORECASE)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}")  # RFC 9110, a token
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]{0,8000}")

# Names of methods may be a tenant's inventions, where what they are called of is another tenant's.
_MOST_KEPT, _LONGEST_KEPT = 100, 200

OUTBOUND = ""
"""The key of a worker's outbound among its bindings; no attribute of env has this name."""

Wrap = Callable[[Any], Any]


class HostBinding(ABC):
    """One binding that is called through the wire."""

    kind: str

    def __init__(self, name: str) -> None:
        self.name = name
        self._signatures: dict[str, inspect.Signature] = {}

    async def call(self, caller: Caller, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Perform a call of tenant code. What the tenant may not see of an error is taken off it."""
        current_caller.set(caller)
        function = self.find(method)
        signature = self._signatures.get(method)
        if signature is None:  # kept: reading one costs as much as the rest of a call
            signature = inspect.signature(function)
            if len(self._signatures) < _MOST_KEPT and len(method) <= _LONGEST_KEPT:
                self._signatures[method] = signature
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArgumentError(f"{self.name}.{method}: {error}") from None
        try:
            return await function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not carry the platform's insides
            failed = error
        raise RemoteError(self._shown(failed, method)) from failed

    @abstractmethod
    def find(self, method: str) -> Callable[..., Any]:
        """Return what performs `method`. Raises InvalidArgumentError where tenants cannot reach it."""

    def given(self) -> Any:
        """Return what the host gets where a tenant passes this binding to another one."""
        raise InvalidArgumentError(f"{self.name} cannot be passed on")

    def _shown(self, error: Exception, method: str) -> Failure:
        failure = error.failure if isinstance(error, RemoteError) else Failure.of(error)
        told = isinstance(
            error, (DynflowError, RemoteError, ValueError, TypeError, LookupError, TimeoutError)
        )
        if told or hasattr(error, "code") or type(error).__module__.partition(".")[0] == "pipelines":
            return Failure(failure.name, failure.message, failure.type, failure.args, "", failure.retry)
        # Errors may hold a tenant's words: they shall not look like lines of the log, or talk to a terminal.
        trace = "".join(traceback.format_exception(error)).splitlines()
        told_safely = "\n".join("  | " + _printable(line) for line in trace)
        _log.error("%s.%s failed:\n%s", self.name, _printable(method[:100]), told_safely)
        return Failure(
            "PlatformError", f"the platform failed to perform {self.name}.{method}", "dynflow:PlatformError"
        )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


class ObjectBinding(HostBinding):
    """An object of the host: the public `async def` methods of its class, or those of them in `methods`."""

    kind = "capability"

    def __init__(self, name: str, target: object, methods: frozenset[str] | None = None) -> None:
        super().__init__(name)
        self._target, self._methods = target, methods

    def find(self, method: str) -> Callable[..., Any]:
        """Return the bound method."""
        function = inspect.getattr_static(type(self._target), method, None)
        hidden = method.startswith("_") or (self._methods is not None and method not in self._methods)
        if hidden or not inspect.iscoroutinefunction(function):
            sync = not hidden and callable(function) and method in vars(type(self._target))
            why = ": methods of capabilities are `async def`" if sync else ""
            raise InvalidArgumentError(f"{self.name} has no method {method!r:.100}{why}")
        found: Callable[..., Any] = getattr(self._target, method)
        return found

    def given(self) -> Any:
        """Return the object itself, or what has only the methods that tenants reach: it may go on to others."""
        return self._target if self._methods is None else LimitedObject(self._target, self._methods)


class LimitedObject:
    """An object of the host's of which tenants reach some methods only, on its way through another capability."""

    def __init__(self, target: object, methods: frozenset[str]) -> None:
        self._target, self._methods = target, methods

    def __getattr__(self, method: str) -> Any:
        if method not in self._methods:
            raise AttributeError(method)
        return getattr(self._target, method)

    def binding(self) -> ObjectBinding:
        """Return what performs the calls of a tenant who gets this."""
        return ObjectBinding(type(self._target).__name__, self._target, self._methods)


class EntrypointBinding(HostBinding):
    """An entrypoint of another worker: one tenant's code as a service of another's."""

    kind = "capability"

    def __init__(self, name: str, stub: EntrypointStub) -> None:
        super().__init__(name)
        self._stub = stub

    def find(self, method: str) -> Callable[..., Any]:
        """Return what calls `method` over there."""
        if method.startswith("_"):
            raise InvalidArgumentError(f"{self.name} has no method {method!r:.100}")

        async def of_worker(*args: Any, **kwargs: Any) -> Any:
            return await self._stub.call(method, *args, **kwargs)

        return of_worker

    def given(self) -> Any:
        """Return the entrypoint."""
        return self._stub


class OutboundBinding(HostBinding):
    """What gets all of a worker's HTTP: an object with `async def fetch(request)`, or another worker's entrypoint."""

    kind = "outbound"

    def __init__(self, target: Any) -> None:
        super().__init__("global_outbound")
        target = target.target if isinstance(target, BoundObject) else target
        if not callable(getattr(target, "fetch", None)):
            raise InvalidArgumentError(
                f"global_outbound has to have an async method fetch(request): {target!r:.200}"
            )
        self._target = target

    def find(self, method: str) -> Callable[..., Any]:
        """Return the way of a request."""
        if method != "fetch":
            raise InvalidArgumentError(f"{self.name} has no method {method!r:.100}")
        return self._fetch

    async def _fetch(self, request: HttpRequest) -> HttpResponse:
        answer = await self._target.fetch(_checked(request))
        if not isinstance(answer, HttpResponse):
            raise TypeError(f"global_outbound answered {type(answer).__name__}, not an HttpResponse")
        return answer


def _checked(request: Any) -> HttpRequest:
    # Bytes of a tenant: what would make two requests of one, or is no text, never reaches the host's client.
    if not isinstance(request, HttpRequest) or type(request.body) is not bytes:
        raise InvalidArgumentError("not a request")
    if type(request.method) is not str or not _METHOD.fullmatch(request.method):
        raise InvalidArgumentError(f"not a method: {request.method!r:.100}")
    if type(request.url) is not str or not _URL.fullmatch(request.url):
        raise InvalidArgumentError(f"not an http or https URL: {request.url!r:.200}")
    headers = request.headers
    if type(headers) is not dict or not all(
        type(value) is str and _HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)
        for name, value in headers.items()
    ):
        raise InvalidArgumentError("a header is malformed")
    return request


class WorkflowsBinding(HostBinding):
    """A workflow binding: handles become ids on the wire."""

    kind = "workflows"

    def __init__(self, name: str, target: Callable[[], Any]) -> None:
        super().__init__(name)
        self._target = target

    def find(self, method: str) -> Callable[..., Any]:
        """Return what performs a method of the binding or, as `instance.…`, of one of its handles."""
        if method in _WORKFLOW_METHODS:
            found: Callable[..., Any] = getattr(self, f"_{method}")
            return found
        name = method.removeprefix("instance.")
        if name == method or name not in INSTANCE_METHODS:
            raise InvalidArgumentError(f"{self.name} has no method {method!r:.100}")

        async def of_instance(instance_id: str, *args: Any, **kwargs: Any) -> Any:
            return await getattr(await self._target().get(instance_id), name)(*args, **kwargs)

        return of_instance

    def given(self) -> Any:
        """Return the tenant's own binding."""
        return self._target()

    async def _create(self, id: str | None = None, params: Any = None, retention: Any = None) -> str:  # noqa: A002
        instance_id: str = (await self._target().create(id=id, params=params, retention=retention)).id
        return instance_id

    async def _create_batch(self, batch: list[dict[str, Any]]) -> list[str]:
        return [handle.id for handle in await self._target().create_batch(batch)]

    async def _get(self, id: str) -> str:  # noqa: A002
        instance_id: str = (await self._target().get(id)).id
        return instance_id

    async def _delete_batch(self, ids: list[str]) -> Any:
        return await self._target().delete_batch(ids)


def make_bindings(
    env: Mapping[str, Any], wraps: Mapping[str, Wrap], outbound: Any = None
) -> tuple[dict[str, list[Any]], dict[str, HostBinding]]:
    """Return what the guest is told of `env`, and what performs the calls.

    `wraps` is what the loader's `bind` got, looked up at each call. Raises UnserializableError for a value that
    is neither plain data nor a binding.
    """
    told: dict[str, list[Any]] = {}
    bindings: dict[str, HostBinding] = {}
    for name, value in env.items():
        if isinstance(value, Capability):
            bindings[name] = ObjectBinding(name, value)
        elif isinstance(value, BoundObject):
            bindings[name] = ObjectBinding(name, value.target, value.methods)
        elif isinstance(value, EntrypointStub):
            bindings[name] = EntrypointBinding(name, value)
        elif isinstance(value, WrappedBinding):
            bindings[name] = WorkflowsBinding(name, _lookup(value, wraps))
        else:
            encode(value, what=f"env[{name!r}]")
            told[name] = ["value", value]
    if outbound is not None:
        bindings[OUTBOUND] = OutboundBinding(outbound)
    told.update({name: [binding.kind, None] for name, binding in bindings.items()})
    return told, bindings


def _lookup(wrapped: WrappedBinding, wraps: Mapping[str, Wrap]) -> Callable[[], Any]:
    def target() -> Any:
        if wrapped.binding_name not in wraps:
            raise InvalidArgumentError(
                f"no workflow binding {wrapped.binding_name!r} is bound to this loader"
            )
        return wraps[wrapped.binding_name](wrapped.metadata)

    return target
