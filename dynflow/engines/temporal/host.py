"""The segments that run in this process: takes them from the task queue, runs them, says how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
from typing import Any

from temporalio.api.workflowservice.v1 import PollActivityTaskQueueResponse
from temporalio.service import RPCError

from dynflow.engines.temporal.activation import Activation, Workplace
from dynflow.engines.temporal.interpreter import SHELVE
from dynflow.errors import (
    LeaseLostError,
    StorageError,
)

# How many polls wait for segments at a time, and how many segments wait here for a slot at most.
_POLLS = 4
_MOST_WAITING = 200
# How long polls may still bring something when the engine closes, and until their end is noticed, in seconds.
_LAST_POLLS, _NOTICED = 0.1, 0.05
# After the server failed a poll, the next comes this much later, in seconds.
_AGAIN = 0.5


class Host:
    """Polls the task queue while there is room, and runs what comes."""

    def __init__(self, place: Workplace) -> None:
        self._place = place
        self.active: dict[str, Activation] = {}
        self._context = contextvars.Context()
        self._polls: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusals: set[asyncio.Task[None]] = set()
        self._has_room = asyncio.Event()
        self.is_closing = False

    def start(self) -> None:
        """Begin to poll."""
        self.is_closing = False
        self._context = contextvars.copy_context()
        self.look_for_room()
        loop = asyncio.get_running_loop()
        for _ in range(_POLLS):
            task = loop.create_task(self._poll())
            self._polls.add(task)
            task.add_done_callback(self._polls.discard)

    async def stop(self) -> None:
        """Poll no more, and hand over what runs: it goes on where somebody takes it.

        What a cancelled poll was just being handed is lost until its heartbeat is missed. So polls get a moment to
        bring it, which is handed over as well, and nothing is handed over before the server knows that they are gone.
        """
        self.is_closing = True
        while self._polls:  # one that has brought something ends; what comes seldom comes alone
            done, _ = await asyncio.wait(
                self._polls, timeout=_LAST_POLLS, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
        for task in self._polls:
            task.cancel()
        await asyncio.sleep(_NOTICED)
        for task in self._tasks:
            task.cancel()
        while left := [*self._tasks, *self._polls, *self._refusals]:
            await asyncio.wait(left)

    def look_for_room(self) -> None:
        """Poll only while not too many wait for a slot."""
        if self._place.room.waiting < _MOST_WAITING:
            self._has_room.set()
        else:
            self._has_room.clear()
            self._send_one_back()

    def _send_one_back(self) -> None:
        """Make room, where those who wait all wait for one tenant's slots: one comes again later."""
        last = self._place.room.last_of_the_most()
        for activation in self.active.values():
            if activation.guest is last and last is not None:
                activation.send_back()
                return

    async def _refuse(self, task: PollActivityTaskQueueResponse) -> None:
        """Give back what came too late to be begun here."""
        with contextlib.suppress(RPCError):
            await self._place.wire.failed(task, "the worker has shut down")

    def _is_closed(self) -> bool:
        return self.is_closing

    async def _poll(self) -> None:
        while not self._is_closed():
            await self._has_room.wait()
            try:
                task = await self._place.wire.poll()
            except RPCError:
                await asyncio.sleep(_AGAIN)
                continue
            if task is not None and self._is_closed():  # not here: this poll is about to be cancelled
                refusing = asyncio.get_running_loop().create_task(self._refuse(task))
                self._refusals.add(refusing)
                refusing.add_done_callback(self._refusals.discard)
            elif task is not None:
                # Not in the context of whoever opened the engine: nothing of theirs is the tenant's.
                serving = asyncio.get_running_loop().create_task(
                    self._serve(task), context=self._context.copy()
                )
                self._tasks.add(serving)
                serving.add_done_callback(self._tasks.discard)

    async def _serve(self, task: PollActivityTaskQueueResponse) -> None:
        asked = json.loads(await self._place.wire.unpack(task.input) or b"{}")
        if task.activity_type.name == SHELVE:
            await self._shelve(task, asked)
            return
        activation = Activation(self._place, task, asked, self.look_for_room)
        before = self.active.get(activation.workflow_id)
        if before is not None:  # a lease that was lost and is not yet given up
            await asyncio.wait([asyncio.ensure_future(before.over.wait())])
        self.active[activation.workflow_id] = activation
        try:
            await activation.run()
        finally:
            if self.active.get(activation.workflow_id) is activation:
                del self.active[activation.workflow_id]
            self.look_for_room()

    async def _shelve(self, task: PollActivityTaskQueueResponse, asked: dict[str, Any]) -> None:
        """Put a book aside that is too large to travel with its workflow, or bring a part of it back."""
        workflow_id = task.workflow_execution.workflow_id
        aside = self._place.aside(workflow_id)
        try:
            if asked["op"] == "forget":
                await aside.delete(asked["references"])
                answer = b""
            elif asked["op"] == "unshelve":
                answer = await aside.get(asked["part"]) or b""
            else:
                shelf = await aside.shelve(await self._place.reader.text(workflow_id))
                answer = json.dumps(shelf).encode()
            await self._place.wire.completed(task.task_token, answer)
        except (LeaseLostError, StorageError, OSError) as error:
            await self._place.wire.failed(task, str(error))
