"""Stubs on the host's side: what of the host's may go into an isolate by reference, and who is asked for what comes."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from dynflow.errors import InvalidArgumentError
from dynflow.isolates import BoundObject, Capability, EntrypointStub
from dynflow.isolates.bindings import (
    EntrypointBinding,
    HostBinding,
    LimitedObject,
    ObjectBinding,
    WorkflowsBinding,
)
from dynflow.isolates.proxies import INSTANCE_METHODS
from dynflow.isolates.remotes import Kind, Remote, kind_of
from dynflow.isolates.stubs import Kept, Stubs, WireLink

Ask = Callable[[int, str, Sequence[Any], Mapping[str, Any]], Awaitable[Any]]


class StubBinding(HostBinding):
    """A function, iterator or stream of the host's that a tenant holds."""

    kind = "stub"

    def __init__(self, kept: Kept) -> None:
        super().__init__("stub")
        self._kept = kept

    def find(self, method: str) -> Callable[..., Any]:
        """Return what performs `method`."""
        function = self._kept.find(method)
        if inspect.iscoroutinefunction(function):
            return function

        async def called(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return called


class HandleBinding(HostBinding):
    """The handle of an instance that a tenant holds."""

    kind = "instance"

    def __init__(self, handle: Any) -> None:
        super().__init__("instance")
        self._handle = handle

    def find(self, method: str) -> Callable[..., Any]:
        """Return a method of the handle that tenants have."""
        if method not in INSTANCE_METHODS:
            raise InvalidArgumentError(f"an instance has no method {method!r:.100}")
        found: Callable[..., Any] = getattr(self._handle, method)
        return found


class EnvInstance:
    """The handle of an instance that a tenant got from its own binding and passed to a capability."""

    def __init__(self, binding: WorkflowsBinding, instance_id: str) -> None:
        self._binding, self.id = binding, instance_id

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method not in INSTANCE_METHODS:
            raise AttributeError(method)

        async def of_instance(*args: Any, **kwargs: Any) -> Any:
            return await self._binding.find(f"instance.{method}")(self.id, *args, **kwargs)

        return of_instance


def own_kind(value: Any) -> tuple[Kind, HostBinding] | None:
    """Return what `value` of the host's becomes in an isolate, and what performs its calls."""
    if isinstance(value, Capability):
        return "object", ObjectBinding(type(value).__name__, value)
    if isinstance(value, BoundObject):
        return "object", ObjectBinding(type(value.target).__name__, value.target, value.methods)
    if isinstance(value, LimitedObject):
        return "object", value.binding()
    if isinstance(value, EntrypointStub):
        return "object", EntrypointBinding("worker", value)
    if _is_handle(value):
        return "instance", HandleBinding(value)
    kind = kind_of(value)
    return None if kind is None else (kind, StubBinding(Kept(kind, value)))


def _is_handle(value: Any) -> bool:
    # Engines have classes of their own for handles; what they have in common are their methods.
    if isinstance(value, Remote) or not isinstance(getattr(value, "id", None), str):
        return False
    return all(callable(getattr(value, method, None)) for method in INSTANCE_METHODS)


def host_stubs(
    numbers: Iterator[int],
    most: int,
    bindings: Mapping[str, HostBinding],
    ask: Ask,
    send_release: Callable[[int], None],
    on_empty: Callable[[], None],
) -> Stubs:
    """Return the stubs of one session."""

    def resolve(name: Any, instance_id: Any) -> Any:
        binding = bindings.get(name) if type(name) is str else None
        if binding is None:
            raise InvalidArgumentError(f"there is no binding {name!r:.100}")
        if type(binding) is WorkflowsBinding and type(instance_id) is str:
            return EnvInstance(binding, instance_id)
        return binding.given()

    return Stubs(
        numbers,
        most,
        link=lambda stubs, number: WireLink(stubs, number, ask, send_release),
        own=own_kind,
        resolve=resolve,
        on_empty=on_empty,
    )
