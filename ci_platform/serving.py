"""Serve the platform over HTTP: bind, assemble, say where, and go down gracefully."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass

import anyio
import uvicorn
from anyio.abc import TaskStatus

from ci_platform.app import create_app
from ci_platform.assembly import Platform, open_platform
from ci_platform.client import Address, forget_address, write_address
from ci_platform.errors import InvalidInputError
from ci_platform.settings import Settings, make_data_folder

# Requests that are answered when the signal comes get this long; streams are ended at once.
_GRACE_SECONDS = 3
# A stop takes no longer, whatever hangs: an engine of containers, a disk. A kill loses nothing either.
_STOP_SECONDS = 8.0
_BACKLOG = 2048
_THREAD_SECONDS = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """A platform that answers at `url`. `token` is the local administrator's."""

    platform: Platform
    url: str
    token: str
    address: Address


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """Serve as long as the block runs. Port 0 takes a free one.

    Raises InvalidInputError where the address is taken or the data folder cannot be made.
    """
    make_data_folder(settings)
    _leave_no_core()
    with closing(_bind(settings)) as listener:
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        async with open_platform(settings) as platform:
            app = create_app(platform)
            server = _Server(_config(app))
            async with anyio.create_task_group() as group:
                group.start_soon(server.serve, [listener])
                served = await _announce(platform, settings)
                try:
                    yield served
                finally:
                    forget_address(settings.data, served.address)
                    app.state.stopping.set()
                    server.should_exit = True


async def stop_signal() -> None:
    """Return at SIGTERM or SIGINT."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            return


async def until_stopped(
    settings: Settings, started: Callable[[Running], Awaitable[None]], stopping: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT. `started` is called then, `stopping` at the signal.

    A signal that comes during the start, and a second one, are answered by less patience.
    """
    stop, up = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:

            async def listen(*, task_status: TaskStatus[None]) -> None:
                with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                    task_status.started()
                    async for _ in signals:
                        if stop.is_set() or not up.is_set():
                            scope.cancel()
                        stop.set()
                        stopping()

            await group.start(listen)
            async with running(settings) as served:
                up.set()
                await started(served)
                await stop.wait()
        group.cancel_scope.cancel()


@contextmanager
def stopping_in_time(seconds: float = _STOP_SECONDS) -> Generator[Callable[[], None]]:
    """Yield what to call when the stop begins: this process then ends `seconds` later at the latest.

    It ends at the end of the block where abandoned threads would hold it up.
    """
    timer = threading.Timer(seconds, _leave, ["it took too long"])
    timer.daemon = True
    begun = threading.Event()

    def begin() -> None:
        if not begun.is_set():
            begun.set()
            timer.start()

    yield begin
    timer.cancel()
    threads = [thread for thread in threading.enumerate() if not thread.daemon]
    if begun.is_set() and any(_outlives(thread) for thread in threads if thread is not timer):
        _leave("calls that do not return")


def _outlives(thread: threading.Thread) -> bool:
    """Whether a thread is busy. Those that only wait for work end by themselves, within moments."""
    if thread is not threading.main_thread():
        thread.join(_THREAD_SECONDS)
    return thread is not threading.main_thread() and thread.is_alive()


def _leave(why: str) -> None:
    _log.warning("stopped without waiting any longer (%s); the next start cleans up", why)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _config(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # Litestar is an ASGI application
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


def _leave_no_core() -> None:
    """Have a crash write no memory to disk: tokens and keys are in it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        # Listening before there is a server: who reads the address may connect at once.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidInputError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; "
            "another port is chosen with --port, a free one with --port 0"
        ) from None
    listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
    return listener


async def _announce(platform: Platform, settings: Settings) -> Running:
    token = await platform.access.ensure_local_token(settings.token_path)
    address = Address(_local_url(settings), str(settings.token_path), os.getpid())
    write_address(settings.data, address)
    return Running(platform, settings.base_url, token, address)


def _local_url(settings: Settings) -> str:
    """Return how programs on this machine reach the server, whatever its public address is."""
    wildcard = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - replaced, not bound
    host = wildcard.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
