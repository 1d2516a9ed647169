"""TrustedLoader: the contract of isolates for code that the host itself ships, in this process.

Nothing is confined and nothing is limited: code runs with all rights of the host.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self
from uuid import uuid4

from dynflow.failure import RemoteError
from dynflow.isolates import (
    Caller,
    CallLimits,
    CodeSource,
    EntrypointStub,
    WorkerCode,
    WorkerLoader,
    WorkerStub,
)
from dynflow.isolates.bindings import OUTBOUND, HostBinding, Wrap, make_bindings
from dynflow.isolates.host_stubs import own_kind
from dynflow.isolates.loader import code_digest
from dynflow.isolates.proxies import CapabilityProxy, WorkflowsProxy
from dynflow.isolates.remotes import Kind
from dynflow.isolates.stubs import Kept, copied
from dynflow.isolates.worker import Env, Worker
from dynflow.loop import outside
from dynflow.outbound import HttpRequest, HttpResponse, Outbound, current_outbound
from dynflow.serialization import pack, unpack
from dynflow.workflow import (
    ExecutionContext,
    WorkerEntrypoint,
    WorkflowStep,
    awaitable,
    current_env,
    current_step,
)


class TrustedLoader(WorkerLoader):
    """Runs workers in this process."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._wraps: dict[str, Wrap] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def get(self, worker_id: str, code: CodeSource) -> WorkerStub:
        """Return the worker `worker_id`."""
        if worker_id not in self._workers:
            self._workers[worker_id] = _Worker(worker_id, code, self._wraps)
        return self._workers[worker_id]

    def load(self, code: WorkerCode) -> WorkerStub:
        """Return a worker of its own for `code`."""
        worker = _Worker(f"loaded:{uuid4().hex}", lambda: code, self._wraps)
        self._workers[worker.id] = worker
        return worker

    def bind(self, name: str, wrap: Wrap) -> None:
        """Make a workflow binding known."""
        self._wraps[name] = wrap


class _Worker(WorkerStub):
    def __init__(self, worker_id: str, source: CodeSource, wraps: Mapping[str, Wrap]) -> None:
        self.id, self._source, self._wraps = worker_id, source, wraps
        self.code: WorkerCode | None = None
        self._loaded: dict[str, Worker] = {}

    def get_entrypoint(
        self, name: str | None = None, *, props: Any = None, limits: CallLimits | None = None
    ) -> EntrypointStub:
        del limits  # nothing is limited here
        return _Entrypoint(self, name, props)

    async def ask_code(self) -> WorkerCode:
        """Return the code, asked for once."""
        if self.code is None:
            made = self._source()
            self.code = await outside(made) if inspect.isawaitable(made) else made
        return self.code

    def load(self, code: WorkerCode, modules: Mapping[str, Any]) -> Worker:
        """Return `modules`, loaded once."""
        digest = code_digest(code.main_module, modules)
        if digest not in self._loaded:
            # The name is the same in every process, so that stored errors find their classes again.
            prefix = "worker_" + digest.removeprefix("sha256:")[:16]
            self._loaded[digest] = Worker(code.main_module, modules, prefix=prefix)
        return self._loaded[digest]

    def env(self, code: WorkerCode, caller: Caller) -> tuple[Env, Outbound | None]:
        """Return `env` as `caller` gets it, and where its HTTP goes."""
        told, bindings = make_bindings(code.env, self._wraps, code.global_outbound)
        outbound = bindings.pop(OUTBOUND, None)
        fetch = None if outbound is None else _Fetch(outbound, caller)
        made = {name: unpack(pack(value)) for name, (kind, value) in told.items() if kind == "value"}
        for name, binding in bindings.items():
            proxy = WorkflowsProxy if binding.kind == "workflows" else CapabilityProxy
            made[name] = proxy(_Ask(binding, caller))
        return Env(made), fetch

    def close(self) -> None:
        """Forget the modules."""
        for worker in self._loaded.values():
            worker.close()


class _Ask:
    """Calls one binding as `caller`, with copies of what is passed, as a wire would make them."""

    def __init__(self, binding: HostBinding, caller: Caller) -> None:
        self._binding, self._caller = binding, caller

    async def __call__(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        step = current_step.get()
        caller = replace(self._caller, step=step)
        given, named = copied(list(args), _own_kind), copied(dict(kwargs), _own_kind)
        try:
            return copied(await outside(self._call(caller, method, tuple(given), named)), _own_kind)
        except RemoteError as error:
            raise error.__cause__ or error from None

    async def _call(self, caller: Caller, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A task of its own: the caller's identity is set in its context alone.
        return await asyncio.create_task(self._binding.call(caller, method, args, kwargs))


class _Fetch:
    """Sends requests of trusted code to its worker's outbound."""

    def __init__(self, binding: HostBinding, caller: Caller) -> None:
        self._ask = _Ask(binding, caller)

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        answer: HttpResponse = await self._ask("fetch", [request], {})
        return answer


class _Entrypoint(EntrypointStub):
    def __init__(self, worker: _Worker, name: str | None, props: Any) -> None:
        self._worker, self._name, self._props = worker, name, props

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the entrypoint."""
        code = await self._worker.ask_code()
        worker = self._worker.load(code, code.modules)
        env, outbound = self._worker.env(code, Caller(self._worker.id, code.metadata, self._props))

        async def call() -> Any:
            current_env.set(env)
            current_outbound.set(outbound)
            function = worker.find(
                self._name, method, ExecutionContext(_plain(self._props), code.metadata), env
            )
            result = function(*copied(list(args), _own_kind), **copied(kwargs, _own_kind))
            result = await result if inspect.isawaitable(result) else result
            return copied(result, _own_kind)

        return await asyncio.get_running_loop().create_task(call(), context=contextvars.copy_context())

    async def run(self, event: Any, step: WorkflowStep) -> Any:
        """Run the workflow class in the loop that this is called on."""
        port: Any = step.port
        code = await self._worker.ask_code()
        pinned = await outside(port.pin(code_digest(code.main_module, code.modules), code.modules))
        worker = self._worker.load(code, pinned)
        caller = Caller(self._worker.id, code.metadata, self._props, port.instance_id, port.workflow_name)
        env, outbound = self._worker.env(code, caller)
        current_env.set(env)
        current_outbound.set(outbound)
        run = worker.find_workflow(self._name, ExecutionContext(_plain(self._props), code.metadata), env)
        # Awaited where it is made: a coroutine that a variable holds too is not dropped unnoticed (discard.py).
        return await awaitable(run(event, step), run)


def _own_kind(value: Any) -> tuple[Kind, Any] | None:
    if isinstance(value, WorkerEntrypoint):
        return "object", Kept("object", value)
    return own_kind(value)


def _plain(props: Any) -> Any:
    try:
        return unpack(pack(props))
    except TypeError:
        return None
