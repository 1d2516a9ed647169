"""What callers see of instances: status, history, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from dynflow.clock import Clock
from dynflow.engines import InstanceRef
from dynflow.engines.happened import ENDS, Happened
from dynflow.engines.telling import End, Telling
from dynflow.engines.temporal.blobs import Aside
from dynflow.engines.temporal.book import Book
from dynflow.engines.temporal.journal import shown
from dynflow.engines.temporal.names import Names
from dynflow.engines.temporal.reading import Reader
from dynflow.engines.view import InstanceRow, end_of, history_events, instance_status, result_of
from dynflow.errors import InstanceNotFoundError
from dynflow.instance import FINISHED
from dynflow.types import HistoryEvent, InstanceStatus

# Between looks at what another process may have changed, in seconds: the first, and the longest.
FIRST_LOOK, _LONGEST_LOOK = 0.02, 1.0


class Views:
    """Answers for one engine; `check_open` raises once it has closed. References are with their tenant."""

    def __init__(
        self,
        reader: Reader,
        names: Names,
        aside: Callable[[str], Aside],
        clock: Clock,
        telling: Telling,
        check_open: Callable[[], None],
    ) -> None:
        self._reader, self._names, self._aside = reader, names, aside
        self._clock, self._telling, self._check_open = clock, telling, check_open

    async def book(self, ref: InstanceRef) -> Book:
        """Return the book with all that is durable. Raises InstanceNotFoundError."""
        self._check_open()
        book = await self._reader.book(self._names.workflow_id(ref))
        if book is None or (book.expires_at is not None and book.expires_at <= self._clock.now_us()):
            raise InstanceNotFoundError(f"there is no instance {ref.id!r} of workflow {ref.workflow!r}")
        return book

    async def status(self, ref: InstanceRef) -> InstanceStatus:
        """Return status, result and steps."""
        book, aside = await self.book(ref), self._values(ref)
        steps = await asyncio.gather(*(shown(line, aside) for line in book.lines.values()))
        attempts = {
            seq: [
                (number, began, ended, _bytes(failure), retry)
                for number, began, ended, failure, retry in line.failed
            ]
            for seq, line in book.lines.items()
        }
        row = await self._row(book, aside)
        return instance_status(row, {record.key: record for record in steps}, attempts)

    async def history(self, ref: InstanceRef, cursor: int) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what happened after `cursor`, then what happens, up to the end of the instance."""
        with self._telling.followed(ref) as follower:
            pause = FIRST_LOOK
            while True:
                try:
                    book = await self.book(ref)
                except InstanceNotFoundError:
                    if pause == FIRST_LOOK and not cursor:
                        raise
                    return
                found = book.history(cursor)
                if not found and book.status in FINISHED:
                    return
                pause = FIRST_LOOK if found else min(2 * pause, _LONGEST_LOOK)
                new: list[Happened] | None = found
                while new is not None:
                    for event in history_events(new):
                        if event.event_id > cursor:
                            cursor = event.event_id
                            yield event
                    if new and new[-1].types[-1] in ENDS:
                        break
                    try:
                        async with asyncio.timeout(pause):
                            new = await follower.after(cursor)
                    except TimeoutError:
                        new = None

    async def result(self, ref: InstanceRef) -> Any:
        """Wait for the end; return the output or raise the instance's error."""
        end = self._telling.end_of(ref)
        pause = FIRST_LOOK
        try:
            while True:
                if await self._reader.status(self._names.workflow_id(ref)) in FINISHED:
                    return result_of(await self.end(ref), ref.id)
                await asyncio.wait({end}, timeout=pause)
                pause = min(2 * pause, _LONGEST_LOOK)
                if end.done():
                    how = end.result()
                    if how is None:
                        raise InstanceNotFoundError(f"instance {ref.id!r} was deleted before its end")
                    return result_of(how, ref.id)
        finally:
            self._telling.forget(ref, end)

    async def end(self, ref: InstanceRef) -> End:
        """Return how an instance ended."""
        return end_of(await self._row(await self.book(ref), self._values(ref)))

    def _values(self, ref: InstanceRef) -> Aside:
        return self._aside(self._names.workflow_id(ref))

    @staticmethod
    async def _row(book: Book, aside: Aside) -> InstanceRow:
        return InstanceRow(
            0, book.workflow, book.tenant, book.id, book.status, book.created_at, book.started_at, book.ended_at,
            book.paused_at, book.ending, await aside.get(book.output), _bytes(book.failure), _bytes(book.rollback),
        )  # fmt: skip


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
