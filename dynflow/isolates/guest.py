"""The program inside an isolate: loads a tenant's code and runs it, speaking to the host over one socket.

Nothing here is trusted by the host. Stdlib only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import resource
import select
import socket
import sys
import types
from asyncio.base_events import BaseEventLoop
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from dynflow.errors import StepFailedError, UnserializableError, WorkerLoadError, WorkflowFatalError
from dynflow.failure import Failure, RemoteError
from dynflow.isolates.proxies import CapabilityProxy, WorkflowsProxy
from dynflow.isolates.wire import Call, Peer, ProtocolError, WireLimits
from dynflow.isolates.worker import Env, Worker
from dynflow.serialization import pack
from dynflow.types import RollbackContext
from dynflow.workflow import (
    Callback,
    ExecutionContext,
    StepCall,
    WorkflowStep,
    awaitable,
    current_env,
    current_step,
    invoke,
)

# The host is trusted: this only catches a stream that is out of step.
_FROM_HOST = 1 << 30
_READ = 256 * 1024
_FLUSH_AT = 64 * 1024

_scope: ContextVar[int | None] = ContextVar("_scope", default=None)
_NO_THREADS = "isolates have no threads: await a capability, or do the work right here"


class GuestLoop(BaseEventLoop):
    """An event loop over one socket, that says so before it waits.

    It is its own selector: no epoll, no self-pipe, so that the system-call filter can be short.
    """

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._socket: socket.socket | None = None
        self._out = bytearray()
        self._poll = select.poll()
        self._on_data: Callable[[bytes], None] = _nothing
        self._before_wait: Callable[[float | None], None] = _nothing

    def attach(
        self,
        sock: socket.socket,
        on_data: Callable[[bytes], None],
        before_wait: Callable[[float | None], None],
    ) -> None:
        """Read from `sock` from now on; `on_data(b"")` is the end of the stream."""
        self._socket, self._on_data, self._before_wait = sock, on_data, before_wait
        self._poll.register(sock, select.POLLIN)

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this turn of the loop, or at once when much has gathered."""
        self._out += data
        if len(self._out) > _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        if self._out and self._socket is not None:
            data, self._out = self._out, bytearray()
            self._socket.sendall(data)

    # --- what BaseEventLoop asks of a selector and of its subclass ---

    def select(self, timeout: float | None) -> list[bytes]:
        """Return what arrived, within `timeout` seconds (None: whenever it comes)."""
        if self._socket is None:
            return []
        try:
            return [self._socket.recv(_READ, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        if timeout is not None and timeout <= 0:
            self.flush()
            return []
        self._before_wait(timeout)
        self.flush()
        if self._stopping:  # type: ignore[attr-defined]  # BaseEventLoop's, set by stop()
            return []
        if timeout is not None and not self._poll.poll(timeout * 1000 + 1):
            return []
        return [self._socket.recv(_READ)]

    def _process_events(self, event_list: list[bytes]) -> None:
        for data in event_list:
            self._on_data(data)

    def _write_to_self(self) -> None:
        pass  # nobody else can wake this loop: there are no threads

    def run_in_executor(self, *_: Any) -> Any:  # type: ignore[override]
        """Refuse."""
        raise RuntimeError(_NO_THREADS)


class Guest:
    """What the host talks to: performs `load`, `run`, `call`, `callback`."""

    def __init__(self, loop: GuestLoop, *, until_idle: bool = False) -> None:
        self._loop, self._until_idle = loop, until_idle
        self._peer = Peer(loop.write, self._perform, WireLimits(), incoming=_FROM_HOST)
        self._output = Output(self._peer)
        self._worker: Worker | None = None
        self._load_error: WorkerLoadError | None = None
        self._env = Env({})
        self._metadata: Any = None
        self._callbacks: dict[int, Callback] = {}
        self._next_callback = 0
        self._ended = False

    def serve(self, sock: socket.socket) -> None:
        """Serve the host until it closes its end."""
        self._loop.attach(sock, self._received, self._before_wait)
        sys.stdout = sys.stderr = self._output
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
        if self._until_idle:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._loop.stop()

    async def _perform(self, call: Call) -> Any:
        try:
            return await getattr(self, _METHODS[call.target])(call)
        except RemoteError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - it is the answer
            failure = Failure.of(error.with_traceback(_own_part(error.__traceback__)))
            raise RemoteError(
                failure, getattr(error, "step", None), getattr(error, "attempts", None)
            ) from None

    async def _load(self, call: Call) -> None:
        main_module, modules, bindings, metadata, memory, message = call.args
        limit_memory(memory)
        self._peer.set_limits(WireLimits(message=message))
        self._metadata = metadata
        made = {name: self._binding(name, *given) for name, given in bindings.items()}
        self._env = Env(made)
        current_env.set(self._env)
        try:
            self._worker = Worker(main_module, modules)
        except WorkerLoadError as error:
            self._load_error = error
            raise

    def _binding(self, name: str, kind: str, value: Any) -> Any:
        if kind == "value":
            return value
        proxy = WorkflowsProxy if kind == "workflows" else CapabilityProxy
        return proxy(functools.partial(self._ask, name))

    async def _ask(self, name: str, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        future = self._peer.call("env:" + name, method, args, kwargs, _scope.get())
        try:
            return await future
        except RemoteError as error:
            raise error.failure.rebuild(only_loaded=True) or error from None

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
        try:
            return await awaitable(run(event, WorkflowStep(StepWire(self))), run)
        finally:
            self._cancel_leftovers()

    def _enter(self, call: Call) -> None:
        _scope.set(call.id)
        current_env.set(self._env)

    def _cancel_leftovers(self) -> None:
        ours = {asyncio.current_task(), *self._peer.performing.values()}
        for task in asyncio.all_tasks() - ours:
            task.cancel()

    async def _callback(self, call: Call) -> Any:
        number, argument, *more = call.args
        callback = self._callbacks[number]
        self._enter(call)
        current_step.set(argument.ctx if isinstance(argument, RollbackContext) else argument)
        if call.method == "delay":
            return await _result(callback(argument, _error_of(*more)))
        return await invoke(callback, argument)

    def keep(self, callback: Any) -> int:
        """Return a number under which the host can call `callback`; 0 where that is not possible."""
        if not callable(callback):
            return 0
        self._next_callback += 1
        self._callbacks[self._next_callback] = callback
        return self._next_callback

    def drop(self, number: int) -> None:
        """Forget a callback."""
        self._callbacks.pop(number, None)

    @property
    def peer(self) -> Peer:
        """The wire."""
        return self._peer


def _nothing(_: Any) -> None:
    pass


def _own_part(trace: types.TracebackType | None) -> types.TracebackType | None:
    # What the tenant reads begins in the tenant's code, not in ours.
    while trace is not None and trace.tb_frame.f_code.co_filename in _OUR_FILES:
        trace = trace.tb_next
    return trace


_OUR_FILES = {__file__, invoke.__code__.co_filename}


_METHODS = {"load": "_load", "call": "_call", "run": "_run", "callback": "_callback"}


async def _result(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value


def _error_of(failure: Failure, step: str, attempts: int) -> BaseException:
    return failure.rebuild(only_loaded=True) or StepFailedError(step, attempts, str(failure))


class StepWire:
    """The port of a `step` in an isolate: a step call is a call to the host, its functions become numbers."""

    is_over = False  # a workflow that is put to rest goes with its process

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    async def call(self, call: StepCall) -> Any:
        """Have the host perform `call`. Where the workflow is suspended this never returns."""
        kept: dict[str, int] = {}
        if call.callback is not None:
            kept["callback"] = self._guest.keep(call.callback)
        if call.rollback is not None:
            kept["rollback"] = self._guest.keep(call.rollback)
        config = self._without_delay(call.config, "delay", kept)
        rollback_config = self._without_delay(call.rollback_config, "rollback_delay", kept)
        fields = [
            call.kind,
            call.name,
            call.count,
            config,
            rollback_config,
            call.argument,
            call.event_type,
            kept,
        ]
        try:
            for field in fields:
                pack(field)
        except UnserializableError as error:
            raise WorkflowFatalError(f"step.{call.kind}: {error}") from None
        future = self._guest.peer.call("step", call.kind, fields, scope=_scope.get())
        try:
            return await future
        except RemoteError as error:
            raise _step_error(error) from None
        finally:
            for what, number in kept.items():
                if not what.startswith("rollback"):  # those are called after `run` has failed
                    self._guest.drop(number)

    def _without_delay(self, config: Any, what: str, kept: dict[str, int]) -> Any:
        retries = config.get("retries") if isinstance(config, Mapping) else None
        if not isinstance(retries, Mapping) or not callable(retries.get("delay")):
            return config
        kept[what] = self._guest.keep(retries["delay"])
        return {**config, "retries": {**retries, "delay": None}}


def _step_error(error: RemoteError) -> BaseException:
    if error.step is not None and error.attempts is not None:
        return error.failure.as_step_error(error.step, error.attempts)
    return error.failure.rebuild(only_loaded=True) or error


class Output(io.TextIOBase):
    """stdout and stderr of the tenant: whole lines become frames to the host."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = peer
        self._begun = ""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Take `text`; send the lines that are complete."""
        self._begun += text
        if "\n" in text:
            lines, _, self._begun = self._begun.rpartition("\n")
            self._send(lines + "\n")
        if len(self._begun) > _FLUSH_AT:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Send what there is."""
        text, self._begun = self._begun, ""
        self._send(text)

    def _send(self, text: str) -> None:
        for start in range(0, len(text), _FLUSH_AT):  # in pieces that fit a frame
            self._peer.send("output", text[start : start + _FLUSH_AT])


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


def serve(sock: socket.socket, loop: GuestLoop, *, until_idle: bool = False) -> None:
    """Be the guest of whoever holds the other end of `sock`; returns when they close it (or there is no more to do)."""
    try:
        Guest(loop, until_idle=until_idle).serve(sock)
    except (ProtocolError, OSError) as error:  # the host is gone, or not our host
        os.write(2, f"isolate: {error}\n".encode())
