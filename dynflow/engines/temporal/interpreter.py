"""The one workflow that Temporal runs for us: the life of an instance, between and around its segments.

This is the only code that Temporal replays, so it must make the same calls in the same order for ever: a change
of it goes behind `workflow.patched`, and recorded histories are replayed in tests. It keeps the book. What callers
tell an instance comes as mail (signals), in order; a segment is an activity, and what it has recorded comes with its
result, or as mail when that is much. An instance is a workflow that is open for as long as the instance is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy, SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError
from temporalio.exceptions import TimeoutError as ActivityTimeoutError

from dynflow.clock import MICROSECOND, to_datetime
from dynflow.engines.temporal import moves, search_attributes
from dynflow.engines.temporal.book import Book, Letter, compact, dump, load, plain_of
from dynflow.instance import FINISHED

NAME = "dynflow.Instance"
_STATUS = SearchAttributeKey.for_keyword(search_attributes.STATUS)
SEGMENT, SHELVE = "dynflow.segment", "dynflow.shelve"
POST, BOOK, TOLD = "post", "book", "told"

# A segment runs for as long as it runs; a lost one is noticed by its heartbeats.
_FOREVER = timedelta(days=3650)
# The server never runs a segment again by itself: what a lost one has recorded would be forgotten, were it asked to
# end before somebody has taken it again. So each loss comes here, with its records.
_ONCE = RetryPolicy(maximum_attempts=1)
# In seconds: after the first loss in a row, long enough for a process that gave it back to have stopped polling (one
# that is dead is not waited for), and at most; and how long one that was sent back stays away.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.3, 10.0
_STAYS_AWAY = (0.5, 2.0)
_RETRY = RetryPolicy(
    initial_interval=timedelta(milliseconds=100),
    backoff_coefficient=2.0,
    maximum_interval=timedelta(seconds=10),
)
# A book of more characters is asked for by whoever needs it, and is put aside when a new run begins.
_SMALL = 16_000
_INLINE = 256_000
# How many characters of a book one query answers.
PAGE = 1_000_000
# A run of the workflow with more events than this, or more bytes, goes on as a new run.
_MOST_EVENTS = 4_000
_MOST_BYTES = 8_000_000
# For how many pieces of mail their senders can ask what became of them.
_REMEMBERED = 500


@workflow.defn(name=NAME)
class Interpreter:
    """Runs one instance."""

    def __init__(self) -> None:
        self._mail: deque[dict[str, Any]] = deque()
        self._handled: dict[str, list[Any]] = {}
        self._segment: asyncio.Task[bytes] | None = None
        self._losses, self._was_given_back = 0, False
        self._posted = 0  # since this run of the workflow began
        self._is_gone = self._has_expired = self._is_over = self._is_told = False

    @workflow.run
    async def run(self, given: bytes) -> None:
        """Live until the instance is deleted or has expired."""
        start = json.loads(given)
        self._options = start["options"]
        self._book: Book = load(start["book"] or await self._unshelved(start["shelf"]))
        self._is_over = self._book.status in FINISHED
        self._handled.update(start.get("handled", {}))
        self._mail.extendleft(reversed(start.get("mail", [])))
        while not self._is_gone:
            if self._book.status == "queued" and not self._mail:
                await self._run_segment()
            else:
                await self._rest()
            if self._is_long() and not self._is_gone:
                await self._go_on_as_new()
        if self._has_expired and (
            references := self._book.references()
        ):  # who deletes one looks to it itself
            await self._ask_host({"op": "forget", "references": references})

    # --- mail ---

    @workflow.signal(name=POST)
    def post(self, mail: bytes) -> None:
        """Take mail; it is handled by the loop, in order."""
        self._posted += 1
        self._mail.append(json.loads(mail))

    @workflow.query(name=BOOK)
    def book(self, page: bytes) -> bytes:
        """Return a page of the book, before which stands how many there are."""
        text = dump(self._book)
        pages = max(1, -(-len(text) // PAGE))
        first = int(page) * PAGE
        stamp = f"{self._book.entries}.{self._book.events}.{self._book.size}"
        return f"{pages} {stamp} {text[first : first + PAGE]}".encode()

    @workflow.query(name=TOLD)
    def told(self, uids: bytes) -> bytes:
        """Return what became of mail: [[how, what happened] or None of each, status, when to look again, size]."""
        answers: list[Any] = []
        for uid in json.loads(uids):
            found = self._handled.get(uid)
            if found is None:
                answers.append(None)
            else:
                how, first, last = found
                happened = self._book.history(first) if last > first else []
                answers.append([how, [item for item in happened if item.number <= last]])
        return json.dumps([answers, self._book.status, self._look_at(), self._book.size]).encode()

    def _look_at(self) -> int | None:
        return self._book.expires_at if self._book.status in FINISHED else self._book.wake_at

    def _handle_mail(self) -> None:
        """Handle what can be handled now; where a segment has to end first, it is told to."""
        while self._mail and not self._is_gone:
            mail = self._mail[0]
            if self._segment is not None and (mail["op"] == "pause" or self._takes(mail)):
                if not self._is_told:  # it looks at its mail; one that has not started ends at once
                    self._is_told = self._segment.cancel()
                if self._takes(mail):
                    return
            self._mail.popleft()
            self._handle(mail["uid"], lambda mail=mail: self._obey(mail))  # type: ignore[misc]

    def _takes(self, mail: dict[str, Any]) -> bool:
        """Whether this takes the instance from its segment."""
        return mail["op"] == "restart" or (
            mail["op"] == "terminate" and not (mail["rollback"] and self._book.ending is not None)
        )

    def _handle(self, uid: str, move: Callable[[], str]) -> None:
        before = self._book.events
        how = move()
        self._handled[uid] = [how, before, self._book.events]
        while len(self._handled) > _REMEMBERED:
            del self._handled[next(iter(self._handled))]
        if (
            self._book.status in FINISHED
        ) != self._is_over:  # whoever only describes the workflow sees it too
            self._is_over = not self._is_over
            workflow.upsert_memo({"status": self._book.status})
            if self._options.get("attributes"):
                workflow.upsert_search_attributes([_STATUS.value_set(self._book.status)])

    def _obey(self, mail: dict[str, Any]) -> str:
        book, at, live = self._book, mail["at"], self._segment is not None
        match mail["op"]:
            case "flush":
                self._merge(mail["first"], mail["entries"])
            case "event":
                letter = Letter(mail["uid"], mail["type"], mail["payload"], at)
                return moves.receive(book, letter, mail["limit"], live=live)
            case "pause":
                return moves.pause(book, at, live=live)
            case "resume":
                return moves.resume(book, at)
            case "terminate":
                return moves.terminate(book, mail["keep"], at, rollback=mail["rollback"])
            case "restart":
                return moves.restart(book, mail["first"], at)
            case "wake":
                self._wake(at)
            case "delete":
                self._is_gone = True
        return moves.OK

    def _wake(self, at: int) -> None:
        due = self._look_at()
        if due is not None and due <= at:
            if self._book.status == "waiting":
                moves.requeue(self._book)
            elif self._book.status in FINISHED:
                self._is_gone = self._has_expired = True

    def _merge(self, first: int, entries: list[list[Any]]) -> None:
        """Make the changes of a segment that have not been made yet: `first` is the number of the first."""
        for entry in entries[max(self._book.entries + 1 - first, 0) :]:
            self._book.apply(entry)

    def _merge_flushed(self) -> None:
        """Make the changes that an ended segment sent as mail, though mail before it waited for that end."""
        for mail in [mail for mail in self._mail if mail["op"] == "flush"]:
            self._mail.remove(mail)
            self._merge(mail["first"], mail["entries"])

    # --- the loop ---

    async def _rest(self) -> None:
        """Wait for mail, or for the time that something is due at. Nothing is held meanwhile."""
        due = self._look_at()
        if due is None or self._options["clock"] == "host":
            await workflow.wait_condition(lambda: bool(self._mail))
        elif not self._mail:
            left = to_datetime(due) - workflow.now()
            try:
                if left > timedelta(0):
                    await workflow.wait_condition(lambda: bool(self._mail), timeout=left)
                else:
                    self._wake(due)
            except TimeoutError:
                self._wake(due)
        self._handle_mail()

    async def _run_segment(self) -> None:
        asked = {"mail": self._posted, "book": plain_of(self._book)}
        if len(text := compact(asked)) > _SMALL:
            text = compact(self._header() | {"mail": self._posted})
        self._segment = task = workflow.start_activity(
            SEGMENT,
            text.encode(),
            result_type=bytes,
            start_to_close_timeout=_FOREVER,
            heartbeat_timeout=timedelta(seconds=self._options["heartbeat"]),
            retry_policy=_ONCE,
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            priority=Priority(
                priority_key=3 if self._book.started_at is None else 2, fairness_key=self._fairness_key()
            ),
        )
        while not task.done():
            await workflow.wait_condition(
                lambda: task.done() or bool(self._mail and not self._is_held_back())
            )
            self._handle_mail()
            if self._is_gone:
                return
        self._segment, self._is_told = None, False
        ended = self._ended(task)
        self._merge_flushed()
        self._merge(ended["first"], ended["entries"])
        outcome = ended["outcome"]
        if outcome["kind"] not in {"busy", "lost"} or not (self._mail and self._takes(self._mail[0])):
            self._handle(ended["uid"], lambda: self._settle(outcome, ended["at"]))
        self._handle_mail()
        if self._book.status in {"running", "waiting_for_pause"}:
            self._settle({"kind": "lost"}, ended["at"])
        if outcome["kind"] == "busy":
            await self._stay_away(workflow.random().uniform(*_STAYS_AWAY))
        elif self._losses > 1 or (self._losses and self._was_given_back):
            await self._stay_away(min(_FIRST_PAUSE * 2 ** min(self._losses - 1, 10), _LONGEST_PAUSE))

    async def _stay_away(self, seconds: float) -> None:
        """Have no segment for a while, unless there is news."""
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(lambda: bool(self._mail), timeout=timedelta(seconds=seconds))

    def _is_held_back(self) -> bool:
        """Whether the next piece of mail waits for the end of a segment that has been told to end."""
        return self._is_told and self._takes(self._mail[0])

    def _settle(self, outcome: dict[str, Any], at: int) -> str:
        moves.settle(self._book, outcome, at)
        return moves.OK

    def _ended(self, task: asyncio.Task[bytes]) -> dict[str, Any]:
        """Return what a segment's activity answered, or had recorded when it was lost."""
        nothing: dict[str, Any] = {
            "first": 1,
            "entries": [],
            "uid": "",
            "at": self._now(),
            "outcome": {"kind": "lost"},
        }
        losses, self._losses = self._losses, 0
        try:
            answer: dict[str, Any] = nothing | json.loads(task.result())
        except ActivityError as error:
            if not isinstance(error.cause, CancelledError):
                self._losses = losses + 1
                self._was_given_back = not isinstance(error.cause, ActivityTimeoutError)
            kept: Sequence[Any] = ()
            if isinstance(error.cause, ActivityTimeoutError):
                kept = error.cause.last_heartbeat_details
            elif isinstance(error.cause, ApplicationError):
                kept = error.cause.details
            recorded: dict[str, Any] = json.loads(kept[0]) if kept else {}
            return nothing | recorded
        except asyncio.CancelledError:
            return nothing
        return answer

    def _now(self) -> int:
        return (workflow.now() - to_datetime(0)) // MICROSECOND

    def _header(self) -> dict[str, Any]:
        book = self._book
        return {"workflow": book.workflow, "id": book.id, "tenant": book.tenant}

    def _fairness_key(self) -> str:
        return self._book.tenant[:64].encode("ascii", "replace").decode() or "-"

    # --- going on as a new run ---

    def _is_long(self) -> bool:
        info = workflow.info()
        return (
            info.is_continue_as_new_suggested()
            or info.get_current_history_length() > _MOST_EVENTS
            or info.get_current_history_size() > _MOST_BYTES
        )

    async def _go_on_as_new(self) -> None:
        book: dict[str, Any] | None = plain_of(self._book)
        shelf = None
        if len(compact(book)) > _INLINE:
            book, shelf = None, json.loads(await self._ask_host({"op": "shelve"}))
        start = {"options": self._options, "book": book, "shelf": shelf} | {
            "handled": self._handled,
            "mail": list(self._mail),
        }
        workflow.continue_as_new(compact(start).encode())

    async def _unshelved(self, shelf: list[str]) -> str:
        parts = [await self._ask_host({"op": "unshelve", "part": part}) for part in shelf]
        return zlib.decompress(b"".join(parts)).decode()

    async def _ask_host(self, asked: dict[str, Any]) -> bytes:
        answer: bytes = await workflow.execute_activity(
            SHELVE,
            json.dumps(asked).encode(),
            result_type=bytes,
            start_to_close_timeout=timedelta(minutes=5),
            retry_policy=_RETRY,
        )
        return answer
