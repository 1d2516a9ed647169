"""What a segment reads and records of its instance: changes of the book, durable with the lease's heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dynflow.clock import Clock, to_datetime
from dynflow.engines import Journal, Limits, StepRecord, Told, shown_name
from dynflow.engines.happened import Happened
from dynflow.engines.temporal.blobs import Aside, is_inline
from dynflow.engines.temporal.book import Book, Entry, Letter, Line, failure_text
from dynflow.engines.temporal.lease import Lease
from dynflow.errors import LeaseLostError, StorageError, WorkflowInternalError, WorkflowTimeoutError
from dynflow.failure import Failure
from dynflow.loop import outside
from dynflow.serialization import decode, encode
from dynflow.types import Event

Tell = Callable[[Sequence[Happened]], None]


class TemporalJournal(Journal):
    """The journal of one segment."""

    def __init__(
        self, book: Book, lease: Lease, aside: Aside, clock: Clock, limits: Limits, tell: Tell
    ) -> None:
        self.steps = {}
        self._book, self._lease, self._aside = book, lease, aside
        self._clock, self._limits, self._tell = clock, limits, tell
        self._putting: set[asyncio.Task[None]] = set()

    async def read(self) -> None:
        """Read the steps that the book has. Raises ValueError where one cannot be read."""
        lines = list(self._book.lines.values())
        for record in await asyncio.gather(*(shown(line, self._aside) for line in lines)):
            self.steps[record.key] = record

    def begin_attempt(self, record: StepRecord, told: Told) -> None:
        """Store that an attempt starts."""
        try:
            self._book.check_room(self._limits.state)
        except WorkflowInternalError as error:
            told(error)
            return
        config = self._book.config_of(record.config)
        self._tell_when_made(
            ["begin", record.seq, list(record.key), record.attempt, config, record.attempt_at], told
        )

    def finish_step(self, record: StepRecord, told: Told) -> None:
        """Store a step's final state."""
        if is_inline(record.output):
            self._finish(record, None if record.output is None else record.output.decode(), told)
            return
        putting = asyncio.get_running_loop().create_task(self._put_and_finish(record, told))
        self._putting.add(putting)
        putting.add_done_callback(self._putting.discard)

    async def _put_and_finish(self, record: StepRecord, told: Told) -> None:
        try:
            output = await outside(self._aside.put(record.output))
        except Exception as error:  # noqa: BLE001 - whatever keeps it from being stored is for `told`
            told(error)
            return
        if record.state == "cancelled":  # by the workflow, meanwhile
            told(None)
        else:
            self._finish(record, output, told)

    def _finish(self, record: StepRecord, output: str | None, told: Told) -> None:
        failure = failure_text(record.failure) if record.state == "errored" else None
        self._tell_when_made(["finish", record.seq, record.state, output, failure, record.ended_at], told)

    async def delay_retry(self, record: StepRecord) -> None:
        """Store a failed attempt."""
        at = record.ended_at or record.attempt_at
        await self._record(["delay", record.seq, failure_text(record.failure), at, record.deadline])

    async def begin_wait(self, record: StepRecord) -> None:
        """Store a sleep or a wait; a buffered event of the type completes it here and now."""
        self._book.check_room(self._limits.state)
        letter = None if record.event_type is None else self._book.letter_for(record.event_type)
        uid = None if letter is None else letter.uid
        if record.event_type is not None:
            self._lease.listen()
        record.state = "waiting"
        await self._record(
            ["wait", record.seq, list(record.key), record.started_at, record.deadline, record.event_type, uid]
        )  # fmt: skip
        await self._read_back(record)

    async def end_wait(self, record: StepRecord) -> None:
        """End a wait whose deadline has passed, unless an event that was sent before it has come."""
        line, now = self._book.lines[record.seq], self._clock.now_us()
        kept = line.record
        if kept.state == "waiting" and kept.deadline is not None and kept.deadline <= now:
            if record.event_type is None:
                await self._record(["end", record.seq, None, now])
            else:
                await self._lease.caught_up()
                await self._time_out(kept, now)
        await self._read_back(record)

    async def _time_out(self, kept: StepRecord, now: int) -> None:
        if kept.state != "waiting":
            return
        letter = self._book.letter_for(kept.event_type or "", before=kept.deadline)
        if letter is not None:
            await self._record(["take", kept.seq, letter.uid, now])
            return
        timed_out = WorkflowTimeoutError(
            f"wait_for_event {shown_name(kept.name)!r}: no event of type {kept.event_type!r} came in time"
        )
        await self._record(["end", kept.seq, failure_text(Failure.of(timed_out)), now])

    async def cancel(self, record: StepRecord) -> list[StepRecord]:
        """Store that the workflow cancelled the step, unless it has ended."""
        line = self._book.lines.get(record.seq)
        if line is None:  # cancelled before it was stored
            record.state = "cancelled"
            return []
        if line.record.state not in {"running", "waiting"} and line.taken is None:
            record.state = line.record.state
            return []
        now, gave_back = self._clock.now_us(), line.taken is not None
        record.state = "cancelled"
        entry: Entry = ["cancel", record.seq, now]
        entries = [entry]
        happened = self._book.apply(entry)
        if gave_back and self._book.status == "running":
            for given in self._book.deliveries(now):
                happened += self._book.apply(given)
                entries.append(given)
        await self._made(entries, happened)
        return await self.given(entries[1:])

    async def pin(self, digest: str, modules: Mapping[str, str]) -> Mapping[str, str]:
        """Return the pinned code."""
        if self._book.code is None:
            kept = await self._aside.put(encode(dict(modules)))
            await self._record(["pin", digest, kept])
        pinned, stored = self._book.code or [digest, ""]
        if pinned == digest:
            return dict(modules)
        found: dict[str, str] = decode(await self._aside.get(stored) or b"{}")
        return found

    async def deliver(self) -> list[StepRecord]:
        """Give buffered events to waits; returns the waits that this ended."""
        entries = self._book.deliveries(self._clock.now_us())
        await self._made(entries, [happened for entry in entries for happened in self._book.apply(entry)])
        return await self.given(entries)

    async def given(self, entries: Sequence[Entry]) -> list[StepRecord]:
        """Return the waits that these entries gave events to."""
        return [await shown(self._book.lines[seq], self._aside) for _, seq, *_ in entries]

    async def _record(self, entry: Entry) -> None:
        await self._made([entry], self._book.apply(entry))

    async def _made(self, entries: Sequence[Entry], happened: list[Happened]) -> None:
        """Return when the entries, which the book has, are durable; then what happened is told, whoever waits."""
        if entries:
            await asyncio.shield(self._keep(entries, happened))

    def _tell_when_made(self, entry: Entry, told: Told) -> None:
        """Have the book and the lease keep an entry, and say when it is durable."""
        try:
            last = self._keep([entry], self._book.apply(entry))
        except (LeaseLostError, StorageError) as error:
            told(error)
        else:
            last.add_done_callback(lambda done: None if done.cancelled() else told(done.exception()))

    def _keep(self, entries: Sequence[Entry], happened: list[Happened]) -> asyncio.Future[None]:
        last = [self._lease.record(entry) for entry in entries][-1]
        last.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() is not None else self._tell(happened)
        )
        return last

    async def _read_back(self, record: StepRecord) -> None:
        kept = await shown(self._book.lines[record.seq], self._aside)
        record.state, record.output, record.failure = kept.state, kept.output, kept.failure
        record.ended_at, record.deadline = kept.ended_at, kept.deadline


async def shown(line: Line, aside: Aside) -> StepRecord:
    """Return a step of a book with its values. Raises ValueError where one cannot be read."""
    record = replace(line.record)
    if line.taken is not None:
        record.output = encode(await event_of(line.taken, aside))
    elif record.output is not None:
        record.output = await aside.get(record.output.decode())
    return record


async def event_of(letter: Letter, aside: Aside) -> Event:
    """Return an event as workflows get it."""
    payload = await aside.get(letter.payload)
    return Event(letter.type, decode(payload or b"null"), to_datetime(letter.sent_at))
