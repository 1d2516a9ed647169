"""The platform's own way to hosts that tenants name: through a gateway, to public addresses alone.

What a commit says where something is to be fetched from must not lead into the operator's network. The gateway
looks each name up, judges each address and connects to the one that it judged, redirects included.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from ci_platform.egress import Connection, GatewayLimits
from ci_platform.egress.gateway import Gateway
from ci_platform.egress.policy import Policy
from ci_platform.egress.records import Records
from ci_platform.egress.tunnels import SPENT
from ci_platform.errors import ForbiddenError

_ENDS_WITHIN = 5.0
"""Seconds. The gateway gives its connections two of them to say goodbye."""


@dataclass(slots=True)
class Way:
    """A way out, open for the time of a block. `proxy` is its address, as programs are told it."""

    proxy: str
    port: int
    _thread: threading.Thread = field(repr=False)
    _lifeline: socket.socket = field(repr=False)
    _file: int = field(repr=False)

    async def close(self) -> None:
        """Close it, with all that goes through it."""
        with suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_RDWR)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join, _ENDS_WITHIN)

    async def refusals(self) -> list[str]:
        """Close it, and return what was refused, in words."""
        told = [f"{each.host}:{each.port}: {each.refused}" for each in await self._told() if each.refused]
        return list(dict.fromkeys(told))

    async def is_spent(self) -> bool:
        """Close it, and return whether what may go through it was not enough."""
        return any(each.cut == SPENT for each in await self._told())

    async def _told(self) -> list[Connection]:
        await self.close()  # the gateway tells a connection when it is over
        told = list[Connection]()
        with suppress(ValueError, TypeError):
            Records(self._file, told.append).tell_new()
        return told


WayAsNeeded = Callable[[], Awaitable[Way]]


class Guard:
    """Opens ways out. `inner` are the operator's own exceptions, for trusted runs; `most` bytes go through one."""

    def __init__(self, inner: Sequence[str] = (), *, allowed: bool = True, most: int = 8 * 1024**3) -> None:
        self._inner, self._allowed, self.most = tuple(inner), allowed, most

    @asynccontextmanager
    async def open(
        self, *, trusted: bool, also: Sequence[str] = (), most: int | None = None
    ) -> AsyncIterator[Way]:
        """Open a way out for the time of the block. `also` are an administrator's hosts (`name:port`), at any address.

        Where the operator lets nothing of tenants out it leads to these alone; ForbiddenError where there are none.
        """
        if not self._allowed and not also:
            raise ForbiddenError("nothing is fetched from hosts that a commit names (setting allow_network)")
        policy = Policy(None if self._allowed else also, [*also, *(self._inner if trusted else ())])
        limits = GatewayLimits(bytes=most or self.most)
        ours, theirs = socket.socketpair()
        with (
            ours,
            theirs,
            tempfile.TemporaryFile("a+b", buffering=0) as file,
            socket.create_server(("127.0.0.1", 0)) as listener,
        ):
            port = listener.getsockname()[1]
            gateway = Gateway(listener, theirs, file.fileno(), policy, limits)
            thread = threading.Thread(target=gateway.serve, name="guarded", daemon=True)
            thread.start()
            way = Way(f"http://127.0.0.1:{port}", port, thread, ours, file.fileno())
            try:
                yield way
            finally:
                await way.close()

    @asynccontextmanager
    async def as_needed(self, *, trusted: bool) -> AsyncIterator[WayAsNeeded]:
        """Yield what opens a way out when it is called first, and then returns the same: what is fetched adds up."""
        async with AsyncExitStack() as stack:
            opened = list[Way]()

            async def way() -> Way:
                if not opened:
                    opened.append(await stack.enter_async_context(self.open(trusted=trusted)))
                return opened[0]

            yield way
