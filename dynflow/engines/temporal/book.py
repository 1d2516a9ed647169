"""The book of one instance: what is known of it, and every change that a segment can make.

The interpreter keeps one inside of a workflow, and the segment that has the lease keeps a copy; both make the same
changes in the same order. So this has no clock, no I/O and no Temporal, and the same changes give the same book.
A change is an entry: a list of plain values that JSON can say. Values of tenants are encoded text, or references
to large ones (see `blobs.py`), and nothing here looks into them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any

from dynflow.engines import StepKey, StepRecord
from dynflow.engines.happened import (
    Happened,
    error_data,
    first_started,
    queued,
    step_data,
    step_ended,
)
from dynflow.engines.temporal.blobs import is_reference, size_of
from dynflow.errors import WorkflowInternalError
from dynflow.failure import Failure
from dynflow.serialization import decode, encode
from dynflow.step_config import StepConfig
from dynflow.types import Status

Entry = list[Any]
"""A change: its name, then its values."""

# What is counted of a step, a buffered event or a line of history beside its payload, for the state limit.
STEP_OVERHEAD = 100
_LINE_OVERHEAD = 64
# So many configs are kept once for all steps that have them; looking for one has to stay cheap.
_MOST_CONFIGS = 50
# What the history says of a cancelled step, by its kind and the state it had; else "step.cancelled".
_CANCELLED = {
    ("do", "running"): "attempt.cancelled+step.cancelled",
    ("sleep", "waiting"): "sleep.cancelled",
    ("sleep_until", "waiting"): "sleep.cancelled",
    ("wait_for_event", "waiting"): "wait.cancelled",
    ("wait_for_event", "complete"): "wait.cancelled",
}


@dataclass(slots=True)
class Letter:
    """An event that was sent: `uid` is its sender's, `payload` is encoded, `sent_at` in microseconds."""

    uid: str
    type: str
    payload: str
    sent_at: int


@dataclass(slots=True)
class Line:
    """A step. `taken` is the event that a wait was given, `failed` its attempts that did not succeed."""

    record: StepRecord
    started_event: int | None = None
    ended_event: int | None = None
    taken: Letter | None = None
    failed: list[Entry] = field(default_factory=list)


@dataclass(slots=True)
class Book:
    """All that is known of an instance. Times are microseconds since the epoch.

    `entries` counts the changes that segments have made, `events` is the number of the last history event, `size`
    is what the state limit counts. `started_at` is None until the first segment since it was created or restarted.
    `configs` are those of its steps, each once: entries and lines have the place of theirs, or its text.
    """

    workflow: str
    id: str
    tenant: str
    params: str
    created_at: int
    schedule: str | None = None
    retention: str | None = None
    status: Status = "queued"
    started_at: int | None = None
    ended_at: int | None = None
    paused_at: int | None = None
    expires_at: int | None = None
    wake_at: int | None = None
    ending: str | None = None
    output: str | None = None
    failure: str | None = None
    rollback: str | None = None
    code: list[str] | None = None
    entries: int = 0
    events: int = 1
    size: int = 0
    lines: dict[int, Line] = field(default_factory=dict)
    inbox: list[Letter] = field(default_factory=list)
    log: list[Happened] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    seqs: dict[StepKey, int] = field(default_factory=dict)

    # --- what segments change ---

    def check_room(self, limit: int) -> None:
        """Raise WorkflowInternalError where the state has reached `limit` bytes."""
        if self.size >= limit:
            raise WorkflowInternalError(
                f"the instance's state is {self.size:,} bytes; the limit is {limit:,} bytes"
            )

    def apply(self, entry: Entry) -> list[Happened]:
        """Make a change; returns what happened."""
        name, *values = entry
        self.entries += 1
        return _CHANGES[name](self, *values)

    def claim(self, at: int) -> list[Happened]:
        """Note that a segment starts."""
        is_new = self.started_at is None
        self.started_at, self.wake_at = self.started_at or at, None
        if self.status == "queued":  # else it was told to pause meanwhile
            self.status = "running"
        return [self.write(at, "workflow.started+workflow.running" if is_new else "workflow.running")]

    def config_of(self, config: StepConfig | None) -> str | int | None:
        """Return a config as entries have it: its place, or its text where this is the first step that has it."""
        text = None if config is None else _config_text(config)
        return self.configs.index(text) if text in self.configs else text

    def begin(
        self, seq: int, step: list[Any], attempt: int, config: str | int | None, at: int
    ) -> list[Happened]:
        """Note that an attempt starts. A previous one without an end was cut off by a crash."""
        kind, name, number = step
        size = STEP_OVERHEAD + len(name)
        if isinstance(config, str) and config not in self.configs and len(self.configs) < _MOST_CONFIGS:
            self.configs.append(config)
        if attempt == 1:
            text = self.configs[config] if isinstance(config, int) else config
            record = StepRecord(kind, name, number, seq, "running", 1, _config(text), at, at)
            line = self.add(record)
            line.started_event = self.count(2, size)
            return [first_started(record, line.started_event)]
        line = self.lines[seq]
        record = line.record
        if not any(made[0] == record.attempt for made in line.failed):
            line.failed.append([record.attempt, record.attempt_at, None, None, None])
        record.state, record.attempt, record.attempt_at = "running", attempt, at
        record.ended_at = record.deadline = None
        self.size += size
        return [self.write(at, "attempt.started", step_data(record))]

    def finish(
        self, seq: int, state: Any, output: str | None, failure: str | None, at: int
    ) -> list[Happened]:
        """Note that a step ends."""
        line = self.lines[seq]
        record = line.record
        record.state, record.output, record.failure = state, _bytes(output), _failure(failure)
        record.ended_at, record.deadline = at, None
        line.ended_event = self.count(2, size_of(output) + len(failure or ""))
        return [step_ended(record, line.ended_event)]

    def delay(self, seq: int, failure: str | None, at: int, deadline: int) -> list[Happened]:
        """Note that an attempt failed; the next may start at `deadline`."""
        line = self.lines[seq]
        record = line.record
        line.failed = [made for made in line.failed if made[0] != record.attempt]
        line.failed.append([record.attempt, record.attempt_at, at, failure, deadline])
        record.state, record.failure, record.ended_at, record.deadline = (
            "waiting",
            _failure(failure),
            at,
            deadline,
        )
        data = step_data(record) | {"retry_at": deadline}
        if record.failure is not None:
            data["error"] = error_data(record.failure)
        self.size += 2 * len(failure or "")
        return [self.write(at, "attempt.errored", data)]

    def wait(
        self,
        seq: int,
        step: list[Any],
        at: int,
        deadline: int | None,
        event_type: str | None,
        uid: str | None,
    ) -> list[Happened]:
        """Begin a sleep or a wait; it is over at once where it takes the buffered event `uid`."""
        kind, name, number = step
        record = StepRecord(
            kind, name, number, seq, "waiting", started_at=at, deadline=deadline, event_type=event_type
        )
        self.add(record)
        self.size += STEP_OVERHEAD + len(name)
        verb = "wait" if kind == "wait_for_event" else "sleep"
        happened = [self.write(at, f"{verb}.started", step_data(record) | {"deadline": deadline})]
        return happened if uid is None else happened + self.take(seq, uid, at)

    def take(self, seq: int, uid: str, at: int) -> list[Happened]:
        """Give an event to a wait."""
        line = self.lines[seq]
        line.taken = next(letter for letter in self.inbox if letter.uid == uid)
        self.inbox.remove(line.taken)
        line.record.state, line.record.ended_at = "complete", at
        return [self.write(at, "wait.completed", step_data(line.record))]

    def end(self, seq: int, failure: str | None, at: int) -> list[Happened]:
        """Note that a sleep is over, or that a wait has timed out."""
        record = self.lines[seq].record
        record.state, record.failure, record.ended_at = (
            "complete" if failure is None else "errored",
            _failure(failure),
            at,
        )
        return [self.write(at, "sleep.completed" if failure is None else "wait.timed_out", step_data(record))]

    def cancel(self, seq: int, at: int) -> list[Happened]:
        """Note that a step was cancelled; an event that it was given is the first of the buffer again."""
        line = self.lines[seq]
        record = line.record
        kind = _CANCELLED.get((record.kind, record.state), "step.cancelled")
        if line.taken is not None:
            self.inbox.insert(0, line.taken)
            line.taken = None
        record.state, record.output, record.ended_at, record.deadline = "cancelled", None, at, None
        return [self.write(at, kind, step_data(record))]

    def pin(self, digest: str, modules: str) -> list[Happened]:
        """Pin the instance to this code."""
        self.code = [digest, modules]
        return []

    # --- deciding which event goes where ---

    def letter_for(self, event_type: str, before: int | None = None) -> Letter | None:
        """Return the first buffered event of a type (that was sent before a time)."""
        fitting = (letter for letter in self.inbox if letter.type == event_type)
        return next((letter for letter in fitting if before is None or letter.sent_at < before), None)

    def deliveries(self, at: int) -> list[Entry]:
        """Return the changes that give buffered events to waits, in the order of both."""
        free = list(self.inbox)
        given: list[Entry] = []
        for seq in sorted(self.lines) if free else ():
            record = self.lines[seq].record
            if record.state == "waiting" and record.event_type is not None:
                letter = next((one for one in free if one.type == record.event_type), None)
                if letter is not None and (record.deadline or 0) > letter.sent_at:
                    free.remove(letter)
                    given.append(["take", seq, letter.uid, max(at, letter.sent_at)])
        return given

    def has_had(self, uid: str) -> bool:
        """Whether an event has come already."""
        return any(letter.uid == uid for letter in self.inbox) or any(
            line.taken is not None and line.taken.uid == uid for line in self.lines.values()
        )

    def receive(self, letter: Letter) -> None:
        """Buffer an event."""
        self.inbox.append(letter)
        self.size += size_of(letter.payload) + STEP_OVERHEAD

    # --- inside ---

    def add(self, record: StepRecord) -> Line:
        """Add a step."""
        line = self.lines[record.seq] = Line(record)
        self.seqs[record.key] = record.seq
        return line

    def count(self, events: int, size: int = 0) -> int:
        """Count events and bytes; returns the last event's number."""
        self.events += events
        self.size += size
        return self.events

    def write(self, at: int, kinds: str, data: dict[str, Any] | None = None) -> Happened:
        """Write a line of history (`"a+b"`: two events)."""
        types = tuple(kinds.split("+"))
        happened = Happened(self.count(len(types), _LINE_OVERHEAD), at, types, data or {})
        self.size += len(json.dumps(data)) if data else 2
        self.log.append(happened)
        return happened

    # --- reading ---

    def references(self) -> list[str]:
        """Return the references to all values that are kept aside for the instance; `dropped` are a restart's."""
        values = [self.params, self.schedule, self.output, *self.dropped, self.code[1] if self.code else None]
        values += [letter.payload for letter in self.inbox]
        for line in self.lines.values():
            values.append(None if line.record.output is None else line.record.output.decode())
            values.append(None if line.taken is None else line.taken.payload)
        return list(dict.fromkeys(value for value in values if value is not None and is_reference(value)))

    def history(self, after: int) -> list[Happened]:
        """Return what happened after the event `after`."""
        found = [happened for happened in self.log if happened.number > after]
        if after < 1:
            found.append(queued(self.created_at))
        for line in self.lines.values():
            found += _of_step(line, after)
        return sorted(found)


def _of_step(line: Line, after: int) -> list[Happened]:
    found = []
    if line.started_event is not None and line.started_event > after:
        found.append(first_started(line.record, line.started_event))
    if line.ended_event is not None and line.ended_event > after:
        found.append(step_ended(line.record, line.ended_event))
    return found


_CHANGES: dict[str, Callable[..., list[Happened]]] = {
    "claim": Book.claim,
    "begin": Book.begin,
    "finish": Book.finish,
    "delay": Book.delay,
    "wait": Book.wait,
    "take": Book.take,
    "end": Book.end,
    "cancel": Book.cancel,
    "pin": Book.pin,
}


_NEW: dict[str, Any] = {one.name: [] if one.default is MISSING else one.default for one in fields(Book)}


# --- as text -----------------------------------------------------------------------------------------


def compact(value: Any) -> str:
    """Return JSON without a space."""
    return json.dumps(value, separators=(",", ":"))


def plain_of(book: Book) -> dict[str, Any]:
    """Return a book as JSON has it. What a new book has anyway is left out: a history has its book twice at least."""
    plain = {one.name: getattr(book, one.name) for one in fields(Book) if one.name != "seqs"}
    plain["lines"] = [_dump_line(line, book) for line in book.lines.values()]
    plain["inbox"] = [_dump_letter(letter) for letter in book.inbox]
    return {name: value for name, value in plain.items() if value != _NEW[name]}


def dump(book: Book) -> str:
    """Return a book as text."""
    return compact(plain_of(book))


def load(dumped: str | Mapping[str, Any]) -> Book:
    """Return the book that `dump` made this text from, or `plain_of` this mapping."""
    plain = json.loads(dumped) if isinstance(dumped, str) else dict(dumped)
    configs = plain.get("configs", [])
    lines = [_load_line(line, configs) for line in plain.pop("lines", [])]
    plain["inbox"] = [Letter(*letter) for letter in plain.get("inbox", [])]
    plain["log"] = [
        Happened(number, at, tuple(types), data) for number, at, types, data in plain.get("log", [])
    ]
    return Book(
        **plain,
        lines={line.record.seq: line for line in lines},
        seqs={line.record.key: line.record.seq for line in lines},
    )


def _dump_letter(letter: Letter) -> list[Any]:
    return [letter.uid, letter.type, letter.payload, letter.sent_at]


def _dump_line(line: Line, book: Book) -> list[Any]:
    record = line.record
    return [
        record.kind, record.name, record.count, record.seq, record.state, record.attempt, book.config_of(record.config),
        record.started_at, record.attempt_at, record.ended_at,
        None if record.output is None else record.output.decode(),
        failure_text(record.failure), record.deadline, record.event_type,
        line.started_event, line.ended_event, None if line.taken is None else _dump_letter(line.taken), line.failed,
    ]  # fmt: skip


def _load_line(plain: Sequence[Any], configs: Sequence[str]) -> Line:
    (kind, name, count, seq, state, attempt, config, started_at, attempt_at, ended_at, output, failure, deadline,
     event_type, started_event, ended_event, taken, failed) = plain  # fmt: skip
    text = configs[config] if isinstance(config, int) else config
    record = StepRecord(
        kind, name, count, seq, state, attempt, _config(text), started_at, attempt_at, ended_at,
        _bytes(output), _failure(failure), deadline, event_type,
    )  # fmt: skip
    return Line(record, started_event, ended_event, None if taken is None else Letter(*taken), failed)


@lru_cache(maxsize=256)
def _config_text(config: StepConfig) -> str:
    return encode(config.as_stored()).decode()


@lru_cache(maxsize=256)
def _config(text: str | None) -> StepConfig | None:
    return None if text is None else StepConfig.from_stored(decode(text))


def failure_text(failure: Failure | None) -> str | None:
    """Return a failure as entries have it."""
    return None if failure is None else encode(failure).decode()


def _failure(text: str | None) -> Failure | None:
    return None if text is None else decode(text)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
