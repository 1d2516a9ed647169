"""What tenants call in their `env`: objects that pass every call on. Stdlib only: isolates use it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

INSTANCE_METHODS = frozenset(
    {"status", "pause", "resume", "terminate", "restart", "send_event", "delete", "result"}
)
"""What can be called of an instance's handle; `instance.<method>` of its binding on the wire."""


class Ask(Protocol):
    """Calls `method` of one binding of the host."""

    def __call__(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Awaitable[Any]:
        """Return the result to come."""


class CapabilityProxy:
    """`env.NAME`: every public method is a call to the host."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self._ask, method)


class _Method:
    """A method of a capability. Given to `step.do` as it is, it is called without an argument."""

    __signature__ = inspect.Signature()

    def __init__(self, ask: Ask, name: str) -> None:
        self._ask, self._name = ask, name

    def __call__(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        return self._ask(self._name, args, kwargs)


class WorkflowsProxy:
    """`env.WORKFLOWS`: the tenant's workflow binding."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def create(self, id: str | None = None, params: Any = None, retention: Any = None) -> InstanceProxy:  # noqa: A002 - the contract's name
        """Create an instance; returns its handle."""
        given = {"id": id, "params": params, "retention": retention}
        return InstanceProxy(self._ask, await self._ask("create", (), given))

    async def create_batch(self, batch: Sequence[Mapping[str, Any]]) -> list[InstanceProxy]:
        """Create 1 to 100 instances; existing ids are left out of the result."""
        return [InstanceProxy(self._ask, found) for found in await self._ask("create_batch", (batch,), {})]

    async def get(self, id: str) -> InstanceProxy:  # noqa: A002 - the contract's name
        """Return the handle of an instance."""
        return InstanceProxy(self._ask, await self._ask("get", (id,), {}))

    async def delete_batch(self, ids: Sequence[str]) -> Any:
        """Delete instances."""
        return await self._ask("delete_batch", (ids,), {})


class InstanceProxy:
    """The handle of an instance."""

    def __init__(self, ask: Ask, instance_id: str) -> None:
        self._ask, self.id = ask, instance_id

    def __repr__(self) -> str:
        return f"<instance {self.id!r}>"

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method not in INSTANCE_METHODS:
            raise AttributeError(
                f"an instance has no {method!r}; it has: id, {', '.join(sorted(INSTANCE_METHODS))}"
            )
        return lambda *args, **kwargs: self._ask(f"instance.{method}", (self.id, *args), kwargs)


def reference_of(proxy: Any) -> list[Any] | None:
    """Return how a guest names something out of its env to the host: a binding's name, and an instance's id or None."""
    if not isinstance(proxy, (CapabilityProxy, WorkflowsProxy, InstanceProxy)):
        return None
    ask = vars(proxy)["_ask"]
    target: str = ask.args[0]  # a partial, see the guest
    return [target.removeprefix("env:"), proxy.id if isinstance(proxy, InstanceProxy) else None]
