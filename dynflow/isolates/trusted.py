"""TrustedLoader: the contract of isolates for code that the host itself ships, in this process.

Nothing is confined: code runs with all rights of the host.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self
from uuid import uuid4

from dynflow.errors import InstanceFailedError
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
from dynflow.isolates.loader import code_digest
from dynflow.isolates.places import Places
from dynflow.isolates.proxies import CapabilityProxy, WorkflowsProxy
from dynflow.isolates.tails import Tails, last_words
from dynflow.isolates.trusted_calls import TrustedCall
from dynflow.isolates.voices import voices, without_voice
from dynflow.isolates.worker import Env, Worker
from dynflow.loop import outside
from dynflow.outbound import HttpRequest, HttpResponse, Outbound, current_outbound
from dynflow.serialization import pack, unpack
from dynflow.workflow import (
    ExecutionContext,
    WorkflowStep,
    awaitable,
    current_env,
    current_step,
)


class TrustedLoader(WorkerLoader):
    """Runs workers in this process.

    Tails hear what the code prints, warns of, fails with, and what it logs at the levels of the host's own logging.
    Of the limits it holds `wall`, `subrequests`, `outstanding`, `message`, `output` and `output_rate`: over one of
    them the call is cancelled, and fails as it would in an isolate. `cpu_ms`, `isolate_cpu_ms`, `busy` and `memory`
    are not held: one call cannot be told from the rest of a process there, nor can code be stopped that does not await.
    """

    def __init__(self, *, per_tenant: int = 64) -> None:
        self._workers: dict[str, _Worker] = {}
        self._places = Places(per_tenant)
        self._wraps: dict[str, Wrap] = {}
        self._telling: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        voices.want()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        voices.release()
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        await last_words(self._telling)

    def get(self, worker_id: str, code: CodeSource) -> WorkerStub:
        """Return the worker `worker_id`."""
        if worker_id not in self._workers:
            self._workers[worker_id] = _Worker(worker_id, code, self._wraps, self._telling, self._places)
        return self._workers[worker_id]

    def load(self, code: WorkerCode) -> WorkerStub:
        """Return a worker of its own for `code`."""
        worker = _Worker(f"loaded:{uuid4().hex}", lambda: code, self._wraps, self._telling, self._places)
        self._workers[worker.id] = worker
        return worker

    def bind(self, name: str, wrap: Wrap) -> None:
        """Make a workflow binding known."""
        self._wraps[name] = wrap


class _Worker(WorkerStub):
    def __init__(
        self,
        worker_id: str,
        source: CodeSource,
        wraps: Mapping[str, Wrap],
        telling: set[asyncio.Task[None]],
        places: Places,
    ) -> None:
        self.id, self._source, self._wraps, self.places = worker_id, source, wraps, places
        self._telling = telling
        self._code: asyncio.Future[tuple[WorkerCode, Tails]] | None = None
        self._loaded: dict[str, Worker] = {}

    def get_entrypoint(
        self, name: str | None = None, *, props: Any = None, limits: CallLimits | None = None
    ) -> EntrypointStub:
        return _Entrypoint(self, name, props, limits)

    async def begin(self, limits: CallLimits | None) -> tuple[WorkerCode, TrustedCall]:
        """Return the code, asked for once, and the account of a call of it; on the host's loop."""
        if self._code is None:
            self._code = asyncio.get_running_loop().create_task(
                self._ask_code(), context=without_voice(contextvars.copy_context())
            )
        asked = self._code
        try:
            code, tails = await asyncio.shield(asked)
        except BaseException:
            if asked.done() and self._code is asked:
                self._code = None  # after an error it is asked for again
            raise
        return code, TrustedCall(code.limits.lowered(limits), self.id, code.modules, tails)

    async def _ask_code(self) -> tuple[WorkerCode, Tails]:
        made = self._source()
        code = await made if inspect.isawaitable(made) else made
        return code, Tails(code.tails, self._telling)

    def load(self, code: WorkerCode, modules: Mapping[str, Any]) -> Worker:
        """Return `modules`, loaded once."""
        digest = code_digest(code.main_module, modules)
        if digest not in self._loaded:
            # The name is the same in every process, so that stored errors find their classes again.
            prefix = "worker_" + digest.removeprefix("sha256:")[:16]
            self._loaded[digest] = Worker(code.main_module, modules, prefix=prefix)
        return self._loaded[digest]

    def env(self, code: WorkerCode, caller: Caller, call: TrustedCall) -> tuple[Env, Outbound | None]:
        """Return `env` as `caller` gets it, and where its HTTP goes."""
        told, bindings = make_bindings(code.env, self._wraps, code.global_outbound)
        outbound = bindings.pop(OUTBOUND, None)
        fetch = None if outbound is None else _Fetch(outbound, caller, call)
        made = {name: unpack(pack(value)) for name, (kind, value) in told.items() if kind == "value"}
        for name, binding in bindings.items():
            proxy = WorkflowsProxy if binding.kind == "workflows" else CapabilityProxy
            made[name] = proxy(_Ask(binding, caller, call))
        return Env(made), fetch

    def close(self) -> None:
        """Forget the modules."""
        for worker in self._loaded.values():
            worker.close()


class _Ask:
    """Calls one binding as `caller`, with copies of what is passed, as a wire would make them."""

    def __init__(self, binding: HostBinding, caller: Caller, call: TrustedCall) -> None:
        self._binding, self._caller, self._call = binding, caller, call

    async def __call__(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        step = current_step.get()
        caller = replace(self._caller, step=step)
        given = self._call.given(list(args), to_worker=False)
        named = self._call.given(dict(kwargs), to_worker=False)
        self._call.asks()
        try:
            result = await outside(self._perform(caller, method, tuple(given), named))
        except RemoteError as error:
            raise error.__cause__ or error from None
        finally:
            self._call.answered()
        return self._call.given(result, to_worker=True)

    async def _perform(
        self, caller: Caller, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # A task of its own: the caller's identity is set in its context alone, and its words are the host's.
        performing = self._binding.call(caller, method, args, kwargs)
        context = without_voice(contextvars.copy_context())
        return await asyncio.get_running_loop().create_task(performing, context=context)


class _Fetch:
    """Sends requests of trusted code to its worker's outbound."""

    def __init__(self, binding: HostBinding, caller: Caller, call: TrustedCall) -> None:
        self._ask = _Ask(binding, caller, call)

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        answer: HttpResponse = await self._ask("fetch", [request], {})
        return answer


class _Entrypoint(EntrypointStub):
    def __init__(self, worker: _Worker, name: str | None, props: Any, limits: CallLimits | None) -> None:
        self._worker, self._name, self._props, self._limits = worker, name, props, limits

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the entrypoint."""
        return await outside(self._call(method, args, kwargs))

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        code, call = await self._worker.begin(self._limits)
        env, outbound = self._worker.env(code, Caller(self._worker.id, code.metadata, self._props), call)

        async def perform() -> Any:
            call.begin()
            current_env.set(env)
            current_outbound.set(outbound)
            ctx = ExecutionContext(_plain(self._props), code.metadata)
            function = self._worker.load(code, code.modules).find(self._name, method, ctx, env)
            given, named = call.given(list(args), to_worker=True), call.given(kwargs, to_worker=True)
            try:
                result = function(*given, **named)
                result = await result if inspect.isawaitable(result) else result
            except SystemExit as error:  # it would end the host's loop
                raise InstanceFailedError("SystemExit", str(error)) from error
            return call.given(result, to_worker=False)

        give_back = await self._worker.places.take(code.tenant or self._worker.id)
        performing = asyncio.get_running_loop().create_task(perform(), context=contextvars.copy_context())
        try:
            result = await performing
        except BaseException as error:
            call.end(error)
            raise
        finally:
            give_back()
        call.end()
        return result

    async def run(self, event: Any, step: WorkflowStep) -> Any:
        """Run the workflow class in the loop that this is called on."""
        port: Any = step.port
        code, call = await outside(self._worker.begin(self._limits))
        pinned = await outside(port.pin(code_digest(code.main_module, code.modules), code.modules))
        caller = Caller(self._worker.id, code.metadata, self._props, port.instance_id, port.workflow_name)
        env, outbound = self._worker.env(code, caller, call)
        call.begin()
        current_env.set(env)
        current_outbound.set(outbound)
        try:
            ctx = ExecutionContext(_plain(self._props), code.metadata)
            run = self._worker.load(code, pinned).find_workflow(self._name, ctx, env)
            # Awaited where it is made: a coroutine that a variable holds too is not dropped unnoticed (discard.py).
            result = await awaitable(run(event, step), run)
        except BaseException as error:
            call.end(error)
            raise
        call.end()
        return result


def _plain(props: Any) -> Any:
    try:
        return unpack(pack(props))
    except TypeError:
        return None
