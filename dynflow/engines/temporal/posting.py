"""Sending mail to instances, and telling what happened by it.

Mail is durable when the server has it. What became of it only the interpreter knows: it is asked, for many pieces at
once where many are sent. Events are not waited for while the instance has plenty of room and has not ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

from dynflow.clock import Clock
from dynflow.engines import InstanceRef
from dynflow.engines.happened import Happened
from dynflow.engines.telling import End
from dynflow.engines.temporal.interpreter import POST
from dynflow.engines.temporal.moves import OK
from dynflow.engines.temporal.reading import Reader
from dynflow.engines.temporal.wire import Wire
from dynflow.errors import EngineClosedError, InstanceNotFoundError, StorageError
from dynflow.instance import FINISHED

# Between questions what became of mail that waits for a segment to end, in seconds: the first, and the longest.
_FIRST, _LONGEST = 0.02, 1.0
# With less room than this, in bytes, each event is waited for. Of how many instances the size is remembered.
_PLENTY = 64 * 1024 * 1024
_REMEMBERED = 10_000

Told = Callable[[InstanceRef, list[Happened], str, int | None, End | None], Awaitable[None]]
# What is asked of one instance: the future answer to each uid, with the end that it may bring.
Asked = dict[str, tuple[asyncio.Future[str], End | None]]


class Post:
    """Sends mail for one engine. `told` is called with what happened, the status, when to look again, and the end."""

    def __init__(self, wire: Wire, reader: Reader, clock: Clock, told: Told) -> None:
        self._wire, self._reader, self._clock, self._told = wire, reader, clock, told
        self._asked: dict[str, Asked] = {}
        self._sizes: dict[str, int] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def send(self, ref: InstanceRef, workflow_id: str, mail: dict[str, Any]) -> asyncio.Future[str]:
        """Send mail; the future is what becomes of it. Raises InstanceNotFoundError."""
        uid = os.urandom(12).hex()
        if not await self._wire.signal(workflow_id, POST, mail | {"uid": uid, "at": self._clock.now_us()}):
            raise InstanceNotFoundError(f"there is no instance {ref.id!r} of workflow {ref.workflow!r}")
        return self.ask(ref, workflow_id, uid)

    async def send_event(self, ref: InstanceRef, workflow_id: str, mail: dict[str, Any], size: int) -> str:
        """Send an event; returns what became of it, as far as that may matter to its sender."""
        async with self._turns.setdefault(workflow_id, asyncio.Lock()):  # in the order of the calls
            return await self._send_event(ref, workflow_id, mail, size)

    async def _send_event(self, ref: InstanceRef, workflow_id: str, mail: dict[str, Any], size: int) -> str:
        known = self._sizes.get(workflow_id)
        if known is None or known + size > mail["limit"] - _PLENTY:
            return await (await self.send(ref, workflow_id, mail))
        status = await self._reader.status(workflow_id)
        if status in FINISHED:
            return status
        await self.send(ref, workflow_id, mail)
        if workflow_id in self._sizes:
            self._sizes[workflow_id] += size
        return OK

    def ask(
        self, ref: InstanceRef, workflow_id: str, uid: str, end: End | None = None
    ) -> asyncio.Future[str]:
        """Return what becomes of mail, or of a segment's end, and have it told. `end`: what it brings, if it does."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asked = self._asked.get(workflow_id)
        if asked is None:
            asked = self._asked[workflow_id] = {}
            self._keep(asyncio.get_running_loop().create_task(self._ask_all(ref, workflow_id, asked)))
        asked[uid] = future, end
        return future

    async def _ask_all(self, ref: InstanceRef, workflow_id: str, asked: Asked) -> None:
        pause = _FIRST
        try:
            while asked:
                uids = list(asked)
                answers, status, look_at, size = await self._reader.told(workflow_id, uids)
                self._remember(workflow_id, size)
                found = [
                    (uid, answer) for uid, answer in zip(uids, answers, strict=True) if answer is not None
                ]
                for uid, (how, happened) in found:
                    future, end = asked.pop(uid)
                    told = [Happened(number, at, tuple(types), data) for number, at, types, data in happened]
                    await self._told(ref, told, status, look_at, end)
                    if not future.done():
                        future.set_result(how)
                pause = _FIRST if found else min(1.5 * pause, _LONGEST)
                if not found:
                    await asyncio.sleep(pause)
        except (InstanceNotFoundError, StorageError, EngineClosedError) as error:
            _fail(asked, error)
        finally:
            if self._asked.get(workflow_id) is asked:
                del self._asked[workflow_id]
            _fail(asked, EngineClosedError("the engine was closed meanwhile"))

    def _remember(self, workflow_id: str, size: int) -> None:
        self._sizes.pop(workflow_id, None)
        self._sizes[workflow_id] = size
        if len(self._sizes) > _REMEMBERED:
            del self._sizes[next(iter(self._sizes))]

    def wake(self, workflow_id: str, at: int) -> None:
        """Tell an instance that it is time, where the server does not know what time it is."""

        async def post() -> None:
            with contextlib.suppress(StorageError):
                await self._wire.signal(workflow_id, POST, {"op": "wake", "uid": "", "at": at})

        self._keep(asyncio.get_running_loop().create_task(post()))

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ask no more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _fail(asked: Asked, error: Exception) -> None:
    for future, _ in asked.values():
        if not future.done():
            future.set_exception(error)
            future.exception()  # nobody may wait for it any more
