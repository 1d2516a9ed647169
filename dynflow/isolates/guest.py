"""The program inside an isolate: loads a tenant's code and runs it, speaking to the host over one socket.

Nothing here is trusted by the host. Stdlib only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import socket
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynflow.errors import WorkerLoadError
from dynflow.failure import Failure, RemoteError
from dynflow.isolates import determinism, guest_http
from dynflow.isolates.guest_loop import GuestLoop
from dynflow.isolates.guest_output import Output
from dynflow.isolates.guest_steps import Callbacks, StepWire, current_scope
from dynflow.isolates.proxies import CapabilityProxy, WorkflowsProxy, reference_of
from dynflow.isolates.remotes import Kind
from dynflow.isolates.stubs import Kept, Stubs, WireLink
from dynflow.isolates.wire import Call, Peer, ProtocolError, WireLimits
from dynflow.isolates.worker import Env, Worker
from dynflow.outbound import HttpRequest, HttpResponse, current_outbound
from dynflow.workflow import ExecutionContext, WorkerEntrypoint, WorkflowStep, awaitable, current_env, invoke

# The host is trusted: this only catches a stream that is out of step.
_FROM_HOST = 1 << 30


class Guest:
    """What the host talks to: performs `load`, `run`, `call`, `callback`."""

    def __init__(self, loop: GuestLoop, *, until_idle: bool = False) -> None:
        self._loop, self.until_idle = loop, until_idle
        self._peer = Peer(loop.write, self._perform, WireLimits(), incoming=_FROM_HOST)
        self._output = Output(self._peer)
        self._worker: Worker | None = None
        self._load_error: WorkerLoadError | None = None
        self._env = Env({})
        self._metadata: Any = None
        self._callbacks = Callbacks()
        self._ended = self._has_outbound = False
        self._peer.stubs = self._stubs = self._make_stubs()

    def _make_stubs(self) -> Stubs:
        async def ask(number: int, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            return await self._ask("stub", method, [number, *args], kwargs)

        def link(stubs: Stubs, number: int) -> WireLink:
            return WireLink(stubs, number, ask, lambda gone: self._peer.send("release", gone))

        return Stubs(self._peer.stub_numbers, _FROM_HOST, link=link, own=_own_kind, refer=reference_of)

    def serve(self, connect: Callable[[], socket.socket]) -> None:
        """Serve the host, to whom `connect` returns the socket, until it closes its end."""
        self._loop.attach(connect, self._received, self._before_wait)
        self._output.install()
        while not self._ended:
            # A tenant's task may raise SystemExit or KeyboardInterrupt, which asyncio lets out of the loop.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()

    def _received(self, data: bytes) -> None:
        if not data:
            self._end()
            return
        self._peer.feed(data)

    def _before_wait(self, timeout: float | None) -> None:
        if not self._ended:
            self._output.flush()
            self._peer.send("idle", self._peer.seen, timeout is None, timeout)
        if self.until_idle:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._loop.stop()

    async def _perform(self, call: Call) -> Any:
        try:
            return await getattr(self, _METHODS[call.target])(call)
        except (RemoteError, asyncio.CancelledError):
            raise
        except BaseException as error:  # noqa: BLE001 - it is the answer, whatever class a tenant has made up
            failure = Failure.of(error.with_traceback(_own_part(error.__traceback__)))
            raise RemoteError(
                failure, getattr(error, "step", None), getattr(error, "attempts", None)
            ) from None
        finally:
            self._output.flush()  # what was said is heard before the answer

    async def _load(self, call: Call) -> None:
        main_module, modules, bindings, metadata, memory, message = call.args
        limit_memory(memory)
        self._peer.set_limits(WireLimits(message=message))
        self._metadata = metadata
        self._has_outbound = bindings.pop("", None) is not None
        guest_http.install(self._fetch_now if self._has_outbound else None)
        made = {name: self._binding(name, *given) for name, given in bindings.items()}
        self._env = Env(made)
        self._enter(call)
        try:
            self._worker = Worker(main_module, modules)
        except WorkerLoadError as error:
            self._load_error = error
            raise

    def _binding(self, name: str, kind: str, value: Any) -> Any:
        if kind == "value":
            return value
        proxy = WorkflowsProxy if kind == "workflows" else CapabilityProxy
        return proxy(functools.partial(self._ask, "env:" + name))

    async def _ask(self, target: str, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        future = self._peer.call(target, method, args, kwargs, current_scope.get())
        try:
            return await future
        except RemoteError as error:
            raise error.failure.rebuild(only_loaded=True) or error from None

    async def _fetch(self, request: HttpRequest) -> HttpResponse:
        answer: HttpResponse = await self._ask("outbound", "fetch", [request], {})
        return answer

    def _fetch_now(self, request: HttpRequest) -> HttpResponse:
        asked = self._peer.call("outbound", "fetch", [request], {}, current_scope.get())
        try:
            answer: HttpResponse = self._loop.wait_here(asked)
        except RemoteError as error:
            raise error.failure.rebuild(only_loaded=True) or error from None
        return answer

    def _loaded(self) -> Worker:
        if self._worker is None:
            raise self._load_error or WorkerLoadError("no code was loaded")
        return self._worker

    async def _call(self, call: Call) -> Any:
        entrypoint, props, args, kwargs = call.args
        self._enter(call)
        ctx = ExecutionContext(props, self._metadata)
        function = self._loaded().find(entrypoint, call.method, ctx, self._env)
        try:
            return await _result(function(*args, **kwargs))
        finally:
            self._cancel_leftovers()

    async def _run(self, call: Call) -> Any:
        name, props, event = call.args
        self._enter(call)
        run = self._loaded().find_workflow(name, ExecutionContext(props, self._metadata), self._env)
        determinism.begin(self._loaded().modules, run, self._output.advise)
        try:
            return await awaitable(run(event, WorkflowStep(StepWire(self._peer, self._callbacks))), run)
        finally:
            self._cancel_leftovers()

    async def _call_stub(self, call: Call) -> Any:
        number, *args = call.args
        self._enter(call)
        return await _result(self._stubs.given(number).kept.find(call.method)(*args, **call.kwargs))

    def _enter(self, call: Call) -> None:
        current_scope.set(call.id)
        determinism.orchestrating.set(False)
        current_env.set(self._env)
        if self._has_outbound:
            current_outbound.set(self._fetch)

    def _cancel_leftovers(self) -> None:
        ours = {asyncio.current_task(), *self._peer.performing.values()}
        for task in asyncio.all_tasks() - ours:
            task.cancel()

    async def _callback(self, call: Call) -> Any:
        self._enter(call)
        return await self._callbacks.call(call)


def _own_part(trace: types.TracebackType | None) -> types.TracebackType | None:
    # What the tenant reads begins in the tenant's code, not in ours.
    while trace is not None and trace.tb_frame.f_code.co_filename in _OUR_FILES:
        trace = trace.tb_next
    return trace


_OUR_FILES = {__file__, Callbacks.call.__code__.co_filename, invoke.__code__.co_filename}


_METHODS = {"load": "_load", "call": "_call", "run": "_run", "callback": "_callback", "stub": "_call_stub"}


def _own_kind(value: Any) -> tuple[Kind, Kept] | None:
    return ("object", Kept("object", value)) if isinstance(value, WorkerEntrypoint) else None


async def _result(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value


def limit_memory(more: int | None) -> None:
    """Allow `more` bytes of address space from now on (None: no limit of ours)."""
    if more is None or _address_space is None:
        return
    size = _address_space + more
    with contextlib.suppress(ValueError):  # the hard limit is lower already
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def measure_address_space() -> None:
    """Remember how large this process is; call it before /proc is out of sight."""
    global _address_space  # noqa: PLW0603 - one process, one size
    with open("/proc/self/statm") as file:  # noqa: PTH123 - pathlib is not needed for one read
        _address_space = int(file.read().split()[0]) * resource.getpagesize()


_address_space: int | None = None


def serve(connect: Callable[[], socket.socket], guest: Guest) -> None:
    """Let `guest` serve who holds the other end of a socket; returns when they close it, or it has no more to do."""
    try:
        guest.serve(connect)
    except (ProtocolError, OSError) as error:  # the host is gone, or not our host
        os.write(2, f"isolate: {error}\n".encode())
