"""The lease of one segment: what it records goes to the server as heartbeats, and news of the instance come back.

A heartbeat's details are kept by the server and come to the interpreter with the news that a segment was lost, so
that a step result is durable once its heartbeat is answered, without an event of history. What has been recorded so
far is written anew each time, so now and then it is sent as mail instead, which stays. Whoever has lost the lease is
told by the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import PollActivityTaskQueueResponse
from temporalio.service import RPCError

from dynflow.engines.temporal.book import Entry, compact
from dynflow.engines.temporal.interpreter import POST
from dynflow.engines.temporal.wire import Wire, is_gone
from dynflow.errors import LeaseLostError, StorageError

# What is kept in heartbeats at most; then it becomes mail.
_MOST_ENTRIES = 100
_MOST_CHARACTERS = 64_000
# What one heartbeat or one piece of mail carries at most, far below the server's 2 MB.
_MOST_OF_ONE = 256_000
# How long an entry that nobody waits for may wait for the next one, in seconds.
_SOON = 0.02
# How long after its start a segment begins to listen for news, in seconds; most have ended by then.
_LISTEN_AFTER = 0.2
_CLOSED = frozenset(
    {
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED,
    }
)

Mail = dict[str, Any]


class Lease:
    """One activity task. `known`: how many pieces of mail its book has.

    `on_mail` is called with each later one, `on_lost` once when the lease is lost.
    """

    def __init__(
        self,
        wire: Wire,
        task: PollActivityTaskQueueResponse,
        beat_every: float,
        known: int,
        on_mail: Callable[[Mail], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._wire, self._task, self._beat_every = wire, task, beat_every
        self._on_mail, self._on_lost = on_mail, on_lost
        self.workflow_id = task.workflow_execution.workflow_id
        self.run_id = task.workflow_execution.run_id
        self.first = 1
        """The number of the first entry that is kept in heartbeats."""
        self._texts: list[str] = []
        self._recorded = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._dirty = asyncio.Event()
        self._error: LeaseLostError | StorageError | None = None
        self._last_event = 0
        # Not what stands before the segment's own event in the history: the server's order of signals and commands is
        # not the order in which the interpreter has seen them, where a task of its was lost.
        self._known = known
        self._beating: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.TimerHandle | None = None

    # --- recording ---

    def begin(self, entries: int) -> None:
        """Begin: so many entries have been made before."""
        self.first, self._recorded = entries + 1, entries
        loop = asyncio.get_running_loop()
        self._beating = loop.create_task(self._beat())
        self._timer = loop.call_later(_LISTEN_AFTER, self.listen)

    @property
    def has_begun(self) -> bool:
        """Whether anything may have been recorded here."""
        return self._beating is not None

    def record(self, entry: Entry, *, soon: bool = False) -> asyncio.Future[None]:
        """Record an entry; the future is done when it is durable. `soon`: it may wait a moment for the next one's call.

        Raises LeaseLostError.
        """
        if self._error is not None:
            raise self._error
        self._texts.append(compact(entry))
        self._recorded += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((self._recorded, future))
        if soon:
            self._soon = asyncio.get_running_loop().call_later(_SOON, self._dirty.set)
        else:
            self._dirty.set()
        return future

    def _details(self, count: int | None = None) -> bytes:
        return f'{{"first":{self.first},"entries":[{",".join(self._texts[:count])}]}}'.encode()

    async def _beat_once(self) -> None:
        """Make what is recorded durable, as much of it as a heartbeat carries; the next one has the rest."""
        count = self._fitting()
        is_full = count < len(self._texts)
        if await self._wire.beat(self._task.task_token, self._details(count)):
            self.listen()
        self._made_durable(self.first + count - 1)
        if is_full or count > _MOST_ENTRIES or self._characters() > _MOST_CHARACTERS:
            await self._flush(count)

    def _fitting(self) -> int:
        """Return how many of the entries fit one heartbeat, at least one of them."""
        characters = 0
        for count, text in enumerate(self._texts):
            characters += len(text) + 1
            if characters > _MOST_OF_ONE and count:
                return count
        return len(self._texts)

    def _characters(self) -> int:
        return sum(map(len, self._texts))

    async def _beat(self) -> None:
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._beat_every):
                        await self._dirty.wait()
                self._dirty.clear()
                await self._beat_once()
        except (LeaseLostError, StorageError) as error:
            self._lose(error)

    def _made_durable(self, recorded: int) -> None:
        while self._waiting and self._waiting[0][0] <= recorded:
            future = self._waiting.pop(0)[1]
            if not future.done():
                future.set_result(None)

    async def _flush(self, count: int) -> None:
        """Send the first entries, which a heartbeat has made durable, as mail; the next heartbeat is without them."""
        entries = [json.loads(text) for text in self._texts[:count]]
        mail = {"uid": "", "op": "flush", "at": 0, "first": self.first, "entries": entries}
        if not await self._wire.signal(self.workflow_id, POST, mail):
            raise LeaseLostError("the instance was deleted")
        del self._texts[:count]
        self.first += count
        self._dirty.set()

    def _lose(self, error: LeaseLostError | StorageError) -> None:
        if self._error is None:
            self._error = error
            for _, future in self._waiting:
                if not future.done():
                    future.set_exception(error)
                    future.exception()
            self._waiting.clear()
            self._on_lost()

    # --- news ---

    def listen(self) -> None:
        """Begin to listen for news, if that has not been done yet."""
        if self._listening is None and self._error is None:
            self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def caught_up(self) -> None:
        """Return when all mail that has arrived by now has been given to `on_mail`."""
        token = b""
        while True:
            try:
                events, token = await self._wire.events(self.workflow_id, self.run_id, token, wait=False)
            except RPCError as error:
                raise StorageError(f"the Temporal server did not answer: {error}") from error
            await self._look_at(events)
            if not token:
                return

    async def _listen(self) -> None:
        token, pause = b"", 0.05
        while self._error is None:
            try:
                events, token = await self._wire.events(self.workflow_id, self.run_id, token, wait=True)
                pause = 0.05
            except RPCError as error:
                if is_gone(error):
                    self._lose(LeaseLostError("the instance was deleted"))
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, 2.0)
                continue
            await self._look_at(events)

    async def _look_at(self, events: list[HistoryEvent]) -> None:
        for event in events:
            if event.event_id <= self._last_event:
                continue
            signal = event.workflow_execution_signaled_event_attributes
            data = await self._wire.unpack(signal.input) if signal.signal_name == POST else None
            if event.event_id <= self._last_event:  # somebody else has read it meanwhile
                continue
            self._last_event = event.event_id
            if data is not None and self._known:
                self._known -= 1
            elif data is not None:
                self._on_mail(json.loads(data))
            elif event.event_type in _CLOSED:
                self._lose(LeaseLostError("the instance was ended or deleted"))

    # --- the end ---

    async def close(self) -> None:
        """Stop beating and listening."""
        for timer in (self._timer, self._soon):
            if timer is not None:
                timer.cancel()
        await self._stop(self._beating)
        await self._stop(self._listening)

    @staticmethod
    async def _stop(task: asyncio.Task[None] | None) -> None:
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def complete(self, outcome: dict[str, Any] | None, uid: str, at: int) -> None:
        """Say how the segment ended, with what no mail has of what it recorded. Raises LeaseLostError."""
        await self._stop(self._beating)
        while self._fitting() < len(self._texts):
            await self._beat_once()
        ended = compact({"outcome": outcome, "uid": uid, "at": at}).encode()
        await self._wire.completed(self._task.task_token, self._details()[:-1] + b"," + ended[1:])
        self._made_durable(self._recorded)

    async def give_back(self, why: str) -> None:
        """Let whoever is there run the instance on, from what is durable."""
        details = self._details(self._fitting()) if self.has_begun else b""
        with contextlib.suppress(RPCError):
            await self._wire.failed(self._task, why, details)
