"""The Workflow binding and the instance handle: what callers hold to create, follow and control instances."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from dynflow.durations import parse_duration
from dynflow.engines import Engine, InstanceRef, NewFork, NewInstance, StepKey
from dynflow.errors import InstanceExistsError, InstanceNotFoundError, InvalidArgumentError
from dynflow.instance import check_batch, check_event_type, check_instance_id, check_options, is_list
from dynflow.router import METADATA_KEY
from dynflow.serialization import encode
from dynflow.types import HISTORY_TYPES, HistoryEvent, InstanceStatus

TenantKey = str | Callable[[Any], str]

_OUTCOMES = frozenset({"complete", "errored", "terminated"})
_STEP_KINDS = ("do", "sleep", "sleep_until", "wait_for_event")
_NO_PARAMS = encode({})
_SURROGATE = re.compile("[\ud800-\udfff]")
_HIGHEST_COUNT = 2**63 - 1


def tenant_of(metadata: Any, key: TenantKey) -> str:
    """Return whose an instance with this metadata is: what `key` says, else a digest of the metadata."""
    found = key(metadata) if callable(key) else metadata.get(key) if isinstance(metadata, Mapping) else None
    if found is not None:
        if not str(found):  # the empty tenant is the host's own
            raise InvalidArgumentError(
                f"{key!r} of the metadata {metadata!r:.200} is empty: it names the tenant"
            )
        if _SURROGATE.search(str(found)):
            raise InvalidArgumentError(
                f"the tenant {str(found)!a:.200} cannot be stored: it is no valid text"
            )
        return str(found)
    return hashlib.sha256(encode(metadata)).hexdigest()[:32]


class WorkflowBinding:
    """Instances of one workflow. `tenant` None reaches all tenants' (and creates outside of any)."""

    def __init__(self, engine: Engine, workflow: str, *, tenant: str | None, tenant_key: TenantKey) -> None:
        self._engine, self._workflow, self._tenant, self._tenant_key = engine, workflow, tenant, tenant_key

    def for_metadata(self, metadata: Any) -> WorkflowBinding:
        """Return the binding that reaches only the instances of the metadata's tenant."""
        tenant = tenant_of(metadata, self._tenant_key)
        return WorkflowBinding(self._engine, self._workflow, tenant=tenant, tenant_key=self._tenant_key)

    async def create(
        self,
        id: str | None = None,  # noqa: A002 - the contract's name
        params: Any = None,
        retention: Any = None,
    ) -> WorkflowInstance:
        """Create an instance; it is queued durably when this returns.

        `id`: made up where None. `params`: plain data up to 1 MiB; `{}` where None. `retention`: how long a
        finished instance is kept, a duration or a dict of them by outcome. Raises InstanceExistsError.
        """
        tenant, item = self._item({"id": id, "params": params, "retention": retention})
        if not (await self._engine.create(self._workflow, tenant, [item]))[0]:
            raise InstanceExistsError(
                f"there is an instance {item.id!r} of workflow {self._workflow!r} already"
            )
        return self._handle(item.id, tenant)

    async def create_batch(self, batch: Sequence[Mapping[str, Any]]) -> list[WorkflowInstance]:
        """Create 1 to 100 instances from dicts with create's options; existing ids are left out of the result."""
        made: dict[str, list[NewInstance]] = {}
        for options in check_batch(batch, "dicts", self._engine.limits.batch):
            tenant, item = self._item(options)
            made.setdefault(tenant, []).append(item)
        handles = []
        for tenant, items in made.items():
            created = await self._engine.create(self._workflow, tenant, items)
            handles += [
                self._handle(item.id, tenant) for item, new in zip(items, created, strict=True) if new
            ]
        return handles

    async def fork(
        self,
        source_id: str,
        *,
        before: Sequence[Any],
        id: str | None = None,  # noqa: A002 - the contract's name
        params: Any = None,
        retention: Any = None,
    ) -> WorkflowInstance:
        """Create an instance that has what another one had finished before a step, and goes on from there.

        `before`: `(name, count)` or `(name, count, kind)`. `params`: the other one's where None. It starts with the
        code that is current and asks for events anew. Raises InstanceNotFoundError, InstanceExistsError.
        """
        tenant, item = self._item({"id": id, "params": params, "retention": retention})
        source = await self._engine.find(
            InstanceRef(self._workflow, check_instance_id(source_id), tenant or self._tenant)
        )
        new = NewFork(item.id, None if params is None else item.params, item.retention)
        if not await self._engine.fork(source, _step_key(before), new):
            raise InstanceExistsError(
                f"there is an instance {item.id!r} of workflow {self._workflow!r} already"
            )
        return self._handle(item.id, source.tenant or "")

    async def get(self, id: str) -> WorkflowInstance:  # noqa: A002 - the contract's name
        """Return the handle of an instance. Raises InstanceNotFoundError."""
        ref = await self._engine.find(InstanceRef(self._workflow, check_instance_id(id), self._tenant))
        return WorkflowInstance(self._engine, ref)

    async def delete_batch(self, ids: Sequence[str]) -> list[str]:
        """Delete up to 100 instances; returns the ids that existed."""
        checked = check_batch(ids, "ids", self._engine.limits.batch)
        refs = [InstanceRef(self._workflow, check_instance_id(id_), self._tenant) for id_ in checked]
        deleted = await self._engine.delete(refs)
        return [ref.id for ref, existed in zip(refs, deleted, strict=True) if existed]

    def _handle(self, instance_id: str, tenant: str) -> WorkflowInstance:
        return WorkflowInstance(self._engine, InstanceRef(self._workflow, instance_id, tenant))

    def _item(self, options: Mapping[str, Any]) -> tuple[str, NewInstance]:
        given_id, params = check_options(options).get("id"), options.get("params")
        instance_id = os.urandom(16).hex() if given_id is None else check_instance_id(given_id)
        limit = self._engine.limits.payload
        encoded = _NO_PARAMS if params is None else encode(params, limit=limit, what="params")
        return self._tenant_for(params), NewInstance(
            instance_id, encoded, None, _retention(options.get("retention"))
        )

    def _tenant_for(self, params: Any) -> str:
        if self._tenant is not None:
            return self._tenant
        if isinstance(params, Mapping) and METADATA_KEY in params:
            return tenant_of(params[METADATA_KEY], self._tenant_key)
        return ""


def _retention(given: Any) -> dict[str, timedelta] | None:
    if given is None:
        return None
    by_outcome = given if isinstance(given, Mapping) else dict.fromkeys(_OUTCOMES, given)
    if not set(by_outcome) <= _OUTCOMES:
        raise InvalidArgumentError(
            f"retention is a duration or a dict by outcome {sorted(_OUTCOMES)}, not {given!r:.100}"
        )
    return {outcome: _duration(duration, "retention") for outcome, duration in by_outcome.items()}


class WorkflowInstance:
    """A handle: `id`, and calls that go to the engine each time."""

    def __init__(self, engine: Engine, ref: InstanceRef) -> None:
        self._engine, self._ref = engine, ref

    @property
    def id(self) -> str:
        """The instance's id."""
        return self._ref.id

    async def status(self) -> InstanceStatus:
        """Return status, output or error, and steps."""
        return await self._engine.status(self._ref)

    async def pause(self) -> None:
        """Let running attempts finish, start no more, hold all deadlines. No effect where nothing can pause."""
        await self._engine.control(self._ref, "pause")

    async def resume(self) -> None:
        """Go on after a pause, with every deadline later by the time paused. No effect elsewhere."""
        await self._engine.control(self._ref, "resume")

    async def terminate(self, rollback: bool = False) -> None:  # noqa: FBT001, FBT002 - the contract's signature
        """End the instance now. Raises IllegalMoveError if it has ended."""
        if not isinstance(rollback, bool):
            raise InvalidArgumentError(f"rollback is True or False, not {rollback!r:.100}")
        await self._engine.control(self._ref, "terminate", rollback=rollback)

    async def restart(self, from_step: Sequence[Any] | None = None) -> None:
        """Start again from the top, or from `(name, count)` or `(name, count, kind)`, keeping what came before."""
        await self._engine.restart(self._ref, None if from_step is None else _step_key(from_step))

    async def send_event(self, *, type: str, payload: Any = None) -> None:  # noqa: A002 - the contract's name
        """Send an event; it is delivered or buffered durably when this returns."""
        encoded = encode(payload, limit=self._engine.limits.payload, what="the event's payload")
        await self._engine.send_event(self._ref, check_event_type(type), encoded)

    async def delete(self) -> None:
        """Delete the instance with all it has. Raises InstanceNotFoundError."""
        if not (await self._engine.delete([self._ref]))[0]:
            raise InstanceNotFoundError(
                f"there is no instance {self._ref.id!r} of workflow {self._ref.workflow!r}"
            )

    def subscribe(
        self, cursor: int | None = None, types: Iterable[str] | None = None
    ) -> AsyncGenerator[HistoryEvent, None]:
        """Yield history after `cursor`, then what happens, up to the terminal event; of these `types` only.

        `types` are of `dynflow.types.HISTORY_TYPES`.
        """
        if cursor is not None and (type(cursor) is not int or cursor < 0):
            raise InvalidArgumentError(f"a cursor is the event_id of an event, not {cursor!r:.100}")
        return self._follow(cursor or 0, None if types is None else _history_types(types))

    async def _follow(self, cursor: int, types: frozenset[str] | None) -> AsyncGenerator[HistoryEvent, None]:
        async with contextlib.aclosing(self._engine.history(self._ref, cursor)) as events:
            async for event in events:
                if types is None or event.type in types:
                    yield event

    async def result(self, timeout: Any = None) -> Any:  # noqa: ASYNC109 - the contract's name
        """Wait for the end; return the output or raise the instance's error. Raises TimeoutError."""
        if timeout is None:
            return await self._engine.result(self._ref)
        async with asyncio.timeout(_duration(timeout, "timeout").total_seconds()):
            return await self._engine.result(self._ref)


def _history_types(given: Iterable[str]) -> frozenset[str]:
    try:
        types = None if isinstance(given, (str, bytes)) else frozenset(given)
    except TypeError:
        types = None
    if types is None:
        raise InvalidArgumentError(f"types is a collection of types of history events, not {given!r:.100}")
    if unknown := types - HISTORY_TYPES:
        raise InvalidArgumentError(
            f"{min(unknown, key=repr)!r:.100} is no type of history events; known are {sorted(HISTORY_TYPES)}"
        )
    return types


def _duration(given: Any, what: str) -> timedelta:
    try:
        return parse_duration(given)
    except ValueError as error:
        raise InvalidArgumentError(f"{what}: {error}") from None


def _step_key(given: object) -> StepKey:
    if is_list(given) and len(given) in (2, 3):
        name, count, kind = (*given, "do")[:3]
        if _may_be_a_step(name, count) and kind in _STEP_KINDS:
            return kind, name, count
    raise InvalidArgumentError(
        f"a step is (name, count) or (name, count, kind of {_STEP_KINDS}), not {given!r:.100}"
    )


def _may_be_a_step(name: object, count: object) -> bool:
    return (
        isinstance(name, str)
        and not _SURROGATE.search(name)  # no database takes them
        and type(count) is int
        and 1 <= count <= _HIGHEST_COUNT
    )
