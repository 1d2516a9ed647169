"""What becomes of an instance between segments: how they end, and what its callers tell it. Changes its book.

Only the interpreter makes these moves, and only while no segment has the lease, except where `live` says so. Like
the book: no clock, no I/O, no Temporal.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from dynflow.clock import MICROSECOND
from dynflow.engines import WITHIN, NewFork, StepKey, shown_name
from dynflow.engines.happened import error_data
from dynflow.engines.temporal.blobs import size_of
from dynflow.engines.temporal.book import STEP_OVERHEAD, Book, Letter
from dynflow.errors import InvalidArgumentError
from dynflow.instance import FINISHED
from dynflow.serialization import decode
from dynflow.types import Status

# The longest retention: far enough, and its time still fits 64 bits.
_LONGEST_RETENTION = timedelta(days=36_500)
_ENDED: dict[str, tuple[Status, str]] = {
    "completed": ("complete", "workflow.completed"),
    "failed": ("errored", "workflow.errored"),
    "terminated": ("terminated", "workflow.terminated"),
}
_TAKEN = frozenset({"do", "sleep", "sleep_until"})
_OVER = frozenset({"complete", "errored", "cancelled"})

OK = "ok"
FULL = "full"


# --- how segments end ----------------------------------------------------------------------------


def settle(book: Book, outcome: Mapping[str, Any], at: int) -> None:
    """Note how a segment ended; then the instance has ended, is paused, waits, or is queued again."""
    if outcome["kind"] in _ENDED:
        finish(book, outcome, at)
    elif book.status == "waiting_for_pause":
        _paused(book, at)
    elif outcome["kind"] != "blocked" or _any_ended(book, outcome["waits"], at):
        requeue(book)
    else:
        book.status, book.wake_at = "waiting", outcome["wake_at"]
        book.write(at, "workflow.waiting")


def finish(book: Book, outcome: Mapping[str, Any], at: int) -> None:
    """End an instance. Events that nobody waited for go when it is deleted."""
    book.status, kind = _ENDED[outcome["kind"]]
    failure = outcome.get("failure")
    kept: Mapping[str, timedelta] = {} if book.retention is None else decode(book.retention)
    keep = min(kept.get(book.status, outcome["keep"] * MICROSECOND), _LONGEST_RETENTION)
    book.output, book.failure, book.rollback = outcome.get("output"), failure, outcome.get("rollback")
    book.ended_at, book.expires_at = at, at + keep // MICROSECOND
    book.wake_at = book.paused_at = book.ending = None
    book.write(at, kind, None if failure is None else {"error": error_data(decode(failure))})


def _any_ended(book: Book, waits: list[int], at: int) -> bool:
    deliver(book, at)
    return any(book.lines[seq].record.state != "waiting" for seq in waits)


def _paused(book: Book, at: int) -> None:
    book.status, book.wake_at, book.paused_at = "paused", None, at
    book.write(at, "workflow.paused")


def requeue(book: Book) -> None:
    """Queue an instance that goes on."""
    book.status, book.wake_at, book.paused_at = "queued", None, None


def deliver(book: Book, at: int) -> bool:
    """Give buffered events to waits; returns whether there was one to give."""
    given = book.deliveries(at)
    for _, *values in given:
        book.take(*values)
    return bool(given)


# --- what callers tell it ------------------------------------------------------------------------


def receive(book: Book, letter: Letter, limit: int, *, live: bool) -> str:
    """Take an event: give it to a wait, or buffer it. Returns OK, FULL, or the status that forbids it."""
    if book.status in FINISHED:
        return book.status
    if book.size >= limit and not _is_awaited(book, letter):
        return FULL
    book.receive(letter)
    if not live and book.status in {"waiting", "queued"} and deliver(book, letter.sent_at):
        requeue(book)
    return OK


def _is_awaited(book: Book, letter: Letter) -> bool:
    return any(
        line.record.state == "waiting" and line.record.event_type == letter.type
        for line in book.lines.values()
    )


def pause(book: Book, at: int, *, live: bool) -> str:
    """Pause: at once where nothing runs, else once the segment has ended."""
    if book.status in {"queued", "running", "waiting"}:
        if live:
            book.status = "waiting_for_pause"
        else:
            _paused(book, at)
    return OK


def resume(book: Book, at: int) -> str:
    """Go on: shift every deadline by the time paused. Takes a pause back that had no effect yet."""
    if book.status == "waiting_for_pause":
        book.status = "running"
    elif book.status == "paused":
        book.write(at, "workflow.queued")
        _shift_deadlines(book, at)
        requeue(book)
        deliver(book, at)
    return OK


def terminate(book: Book, keep: int, at: int, *, rollback: bool) -> str:
    """End the instance, after its rollback where that is wanted and anything has started."""
    if book.status in FINISHED:
        return book.status
    if not rollback or book.started_at is None:
        finish(book, {"kind": "terminated", "keep": keep}, at)
    elif book.ending is None:
        book.write(at, "workflow.queued")
        requeue(book)
        book.ending = "terminated"
    return OK


def restart(book: Book, first: int, at: int) -> str:
    """Forget results, timers and events from the step `first` on (0: all) and queue again.

    Waits that began before get what came for them during a pause: it is theirs, though nobody has resumed it.
    """
    book.write(at, "workflow.queued")
    before = book.references()
    for seq in [seq for seq in book.lines if seq >= first]:
        line = book.lines.pop(seq)
        del book.seqs[line.record.key]
        kept = Book("", "", "", "", 0, lines={seq: line})
        book.log += kept.history(1)
    book.log.sort()
    _shift_deadlines(book, at)
    deliver(book, at)
    book.inbox.clear()
    book.status = "queued"
    book.wake_at = book.paused_at = book.started_at = book.ended_at = book.expires_at = None
    book.ending = book.output = book.failure = book.rollback = None
    book.dropped = [value for value in before if value not in {book.params, book.schedule}]
    if not first:
        book.size = 0
    return OK


def _shift_deadlines(book: Book, at: int) -> None:
    by = max(at - (book.paused_at or at), 0)
    for line in book.lines.values():
        if line.record.state == "waiting" and line.record.deadline is not None:
            line.record.deadline += by


# --- looking for a step --------------------------------------------------------------------------


def started_as(book: Book, step: StepKey) -> int:
    """Return which of its instance's steps it was, counted by their starts. Raises InvalidArgumentError."""
    kind, name, count = step
    found = [book.seqs[step]] if step in book.seqs else []
    if not found:  # maybe a step within another one
        found = [
            line.record.seq
            for line in book.lines.values()
            if (line.record.kind, line.record.count) == (kind, count)
            and line.record.name.endswith(WITHIN + name)
        ]
    if len(found) != 1:
        which = f"step {name!r:.300} (kind {kind}, count {count}) to begin at"
        raise InvalidArgumentError(
            f"instance {book.id!r} has no {which}"
            if not found
            else f"instance {book.id!r} has more than one {which}: begin at the step that it is within"
        )
    return found[0]


def fork(book: Book, before: StepKey, new: NewFork, params: str, retention: str | None, at: int) -> Book:
    """Return the book of another instance, with what this one had ended of the steps before `before`."""
    first = started_as(book, before)
    outer = book.lines[first].record.name
    forked = Book(book.workflow, new.id, book.tenant, params, at, book.schedule, retention)
    for seq, line in sorted(book.lines.items()):
        record = line.record
        if (
            seq < first
            and record.kind in _TAKEN
            and record.state in _OVER
            and not outer.startswith(record.path)
        ):
            forked.add(record).failed = line.failed
            output = None if record.output is None else record.output.decode()
            forked.size += len(record.name) + size_of(output) + STEP_OVERHEAD
            record.deadline = None
    kind, name, number = before
    data = {
        "from": book.id,
        "step": shown_name(name),
        "count": number,
        "kind": kind,
        "kept": len(forked.lines),
    }
    forked.write(at, "workflow.forked", data)
    return forked
