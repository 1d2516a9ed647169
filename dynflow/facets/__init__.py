"""A private SQLite database per tenant and name, for a worker's `env`: `env={"DB": facets.of(tenant)}`.

SQL of tenants runs in processes of its own (`worker.py`), which are limited, and killed where they do not obey.
An idle database is a file and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from dynflow.errors import (
    DynflowError,
    FacetLimitError,
    FacetRefusedError,
    FacetSqlError,
    FacetUnavailableError,
    InvalidArgumentError,
)
from dynflow.facets.process import WorkerProcess
from dynflow.isolates import Capability
from dynflow.serialization import MEBIBYTE

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_VALUES = (type(None), bool, int, float, str, bytes)
# How long a worker may go on after the time of a call is over, before it is killed: it looks at the clock itself,
# but for what one function of SQLite does in one go.
_GRACE = 1.0
# Databases that were found whole by this process, so that only their first use reads all of them.
_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class FacetLimits:
    """What one tenant's databases and calls may use."""

    size: int = 64 * MEBIBYTE
    """Bytes of one database."""
    databases: int = 20
    """Databases of one tenant."""
    time: timedelta = timedelta(seconds=5)
    """How long one call may run, waiting for its turn not included."""
    rows: int = 10_000
    """Rows that one call returns."""
    result: int = 2 * MEBIBYTE
    """Bytes that one call returns, encoded."""
    value: int = MEBIBYTE
    """Bytes of one text or blob, and of one row."""
    sql: int = 100_000
    """Bytes of one statement."""
    statements: int = 1_000
    """Statements of one batch."""
    params: int = 4 * MEBIBYTE
    """Bytes of the parameters of one call."""
    memory: int = 64 * MEBIBYTE
    """Bytes that SQLite may use for one call, for sorting among others."""
    waiting: int = 100
    """Calls of one tenant that are under way or wait for their turn."""

    def plain(self) -> dict[str, Any]:
        """Return them as numbers; `time` in seconds."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**found, "time": self.time.total_seconds()}


class Facets:
    """The databases below one folder, which is made where missing and should hold nothing else.

    *Order of calls*: inside `async with facets` only. *Concurrency*: one event loop and one process per folder;
    the calls of one tenant are performed one after another, `workers` of all tenants at a time.
    *Cancellation*: a call that is cancelled is killed, and has not happened unless it was about to be answered.
    *Idempotency*: none; where the host ends in the middle of a call, it may have happened.
    *Errors*: FacetError and InvalidArgumentError; see `TenantFacets`.
    """

    def __init__(self, folder: Path | str, *, limits: FacetLimits | None = None, workers: int = 2) -> None:
        if workers < 1:
            raise InvalidArgumentError(f"workers is at least 1, not {workers!r}")
        self.limits = FacetLimits() if limits is None else limits
        self._folder = Path(folder).absolute()
        self._turns: dict[str, _Turn] = {}
        self._workers = workers
        self._room = asyncio.Semaphore(workers)
        self._idle: list[WorkerProcess] = []
        self._working: set[WorkerProcess] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._whole: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._is_open = False

    def of(self, tenant: str) -> TenantFacets:
        """Return the databases of `tenant`, as a binding for its `env`. It costs nothing until it is used.

        `tenant` is what the host knows the tenant by, any text. Nothing that a tenant says changes it.
        """
        if type(tenant) is not str or not tenant:
            raise InvalidArgumentError(f"a tenant is a text that is not empty, not {tenant!r:.100}")
        return TenantFacets(self, tenant)

    async def drop(self, tenant: str) -> None:
        """Delete all databases of `tenant`."""
        self.of(tenant)
        await self.perform(tenant, "drop")

    async def walls(self) -> list[str]:
        """Return the names of the walls around the processes that run SQL: `limits`, and `landlock` where it stands."""
        async with self._room:
            worker = await self._take()
            self._give_back(worker)
            return list(worker.walls)

    async def __aenter__(self) -> Self:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FacetUnavailableError(f"cannot make the folder {self._folder}: {error.strerror}") from None
        self._is_open = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """End the workers; calls that are under way fail."""
        self._is_open = False
        for worker in (*self._working, *self._idle):
            self._end(worker)
        self._idle.clear()
        for _ in range(self._workers):  # until all that was under way has failed
            await self._room.acquire()
        await asyncio.gather(*self._ending)
        for _ in range(self._workers):
            self._room.release()

    async def perform(self, tenant: str, do: str, name: str = "", **request: Any) -> Any:
        """Perform one request of `tenant`; for TenantFacets alone."""
        digest = hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()
        request |= {"do": do, "name": name, "folder": str(self._folder / digest[:2] / digest)}
        async with self._turn(digest), self._room:
            request["check"] = (digest, name) not in self._whole
            answer = await self._ask(request)
            if "ok" in answer:
                if do == "run":
                    self._remember(digest, name)
                return answer["ok"]
            self._whole.pop((digest, name), None)
            kind, *details = answer["error"]
            raise _error(kind, details, tenant, name, request["folder"])

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        worker = await self._take()
        self._working.add(worker)
        try:
            async with asyncio.timeout(self.limits.time.total_seconds() + _GRACE):
                answer = await worker.ask(request)
        except TimeoutError:
            self._end(worker)
            raise FacetLimitError("time", self.limits.time.total_seconds()) from None
        except BaseException:
            self._end(worker)
            raise
        finally:
            self._working.discard(worker)
        self._give_back(worker)
        return answer

    async def _take(self) -> WorkerProcess:
        if not self._is_open:
            raise FacetUnavailableError("facets are closed: use them inside `async with facets`")
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            self._end(worker)
        return await WorkerProcess.start(self._folder, self.limits.plain())

    def _give_back(self, worker: WorkerProcess) -> None:
        if self._is_open:
            self._idle.append(worker)
        else:
            self._end(worker)

    def _end(self, worker: WorkerProcess) -> None:
        if worker.is_ending:
            return
        worker.kill()
        task = asyncio.get_running_loop().create_task(worker.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _remember(self, digest: str, name: str) -> None:
        self._whole[digest, name] = None
        self._whole.move_to_end((digest, name))
        if len(self._whole) > _REMEMBERED:
            self._whole.popitem(last=False)

    @contextlib.asynccontextmanager
    async def _turn(self, digest: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(digest, _Turn(asyncio.Lock()))
        if turn.calls >= self.limits.waiting:
            raise FacetLimitError("waiting", self.limits.waiting)
        turn.calls += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.calls -= 1
            if not turn.calls:
                del self._turns[digest]


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock
    calls: int = 0


class TenantFacets(Capability):
    """The databases of one tenant: what `facets.of(tenant)` returns, and what tenants' code has as `env.DB`.

    A database is made at the first call that names it. A name is 1 to 63 of `a-z 0-9 _ -`, and begins with a
    letter or digit. Each call is one transaction: it happens as a whole, or raises and has changed nothing.
    Parameters are a list for `?` or a dict for `:name`; values are None, bool, int, float, str, bytes.

    *Errors*: FacetRefusedError for SQL that reaches outside of the database; FacetLimitError; FacetSqlError, what
    SQLite says; InvalidArgumentError; FacetUnavailableError, the host's own matter, which may have happened.
    """

    def __init__(self, facets: Facets, tenant: str) -> None:
        self._facets, self._tenant = facets, tenant

    async def execute(self, sql: str, params: Any = (), *, name: str = "main") -> dict[str, Any]:
        """Run one statement; return `rows` (dicts), `changes` (rows written), `last_row_id` (or None)."""
        return (await self._run([(sql, params)], name))[0]

    async def query(self, sql: str, params: Any = (), *, name: str = "main") -> list[dict[str, Any]]:
        """Run one statement; return its rows as dicts by column."""
        rows: list[dict[str, Any]] = (await self._run([(sql, params)], name))[0]["rows"]
        return rows

    async def batch(self, statements: Sequence[Any], *, name: str = "main") -> list[dict[str, Any]]:
        """Run statements, each `sql` or `(sql, params)`, in one transaction; return what `execute` does, of each."""
        if not isinstance(statements, (list, tuple)):
            raise InvalidArgumentError(f"statements are a list, not {type(statements).__name__}")
        if len(statements) > self._facets.limits.statements:
            raise FacetLimitError("statements", self._facets.limits.statements)
        return await self._run([_statement(each) for each in statements], name)

    async def clone(self, source: str, target: str) -> None:
        """Copy the database `source` to `target`, which must not exist."""
        await self._facets.perform(self._tenant, "clone", _named(source), target=_named(target))

    async def delete(self, name: str) -> bool:
        """Delete a database; return whether it existed."""
        deleted: bool = await self._facets.perform(self._tenant, "delete", _named(name))
        return deleted

    async def databases(self) -> list[dict[str, Any]]:
        """Return `name` and `bytes` of each database."""
        found: list[dict[str, Any]] = await self._facets.perform(self._tenant, "databases")
        return found

    async def _run(self, statements: list[tuple[str, Any]], name: str) -> list[dict[str, Any]]:
        limits, size = self._facets.limits, 0
        _named(name)
        checked = []
        for sql, params in statements:
            if type(sql) is not str:
                raise InvalidArgumentError(f"SQL is a text, not {type(sql).__name__}")
            if len(sql) > limits.sql:
                raise FacetLimitError("sql", limits.sql)
            size += len(sql) + _size(params)
            if size > limits.params:
                raise FacetLimitError("params", limits.params)
            checked.append([sql, params])
        results: list[dict[str, Any]] = await self._facets.perform(
            self._tenant, "run", name, statements=checked
        )
        return results


def _statement(given: Any) -> tuple[str, Any]:
    if isinstance(given, (list, tuple)):
        if len(given) != 2:
            raise InvalidArgumentError("a statement of a batch is `sql` or `(sql, params)`")
        return given[0], given[1]
    return given, ()


def _named(name: Any) -> str:
    if type(name) is not str or not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"the name of a database is 1 to 63 of a-z 0-9 _ -, the first a letter or digit, not {name!r:.100}"
        )
    return name


def _size(params: Any) -> int:
    """Return about how many bytes parameters have. Raises InvalidArgumentError for what SQLite cannot hold."""
    if type(params) is dict:
        if any(type(key) is not str for key in params):
            raise InvalidArgumentError("keys of parameters are texts")
        values = list(params.values())
    elif type(params) in (list, tuple):
        values = list(params)
    else:
        raise InvalidArgumentError(f"parameters are a list or a dict, not {type(params).__name__}")
    for value in values:
        if type(value) not in _VALUES:
            raise InvalidArgumentError(
                f"a parameter is None, bool, int, float, str or bytes, not {type(value).__name__}"
            )
    return sum(len(value) if isinstance(value, (str, bytes)) else 16 for value in values)


def _error(kind: str, details: Sequence[Any], tenant: str, name: str, folder: str) -> DynflowError:
    """Return the error that a worker's answer stands for. What is the host's matter is logged, with the path."""
    if kind == "invalid":
        return InvalidArgumentError(details[0])
    if kind == "refused":
        return FacetRefusedError(f"facets do not run {details[0]}")
    if kind == "limit":
        return FacetLimitError(*details)
    if kind == "sql":
        return FacetSqlError(*details)
    _log.error("the database %r of tenant %r (%s/%s.db) %s: %s", name, tenant, folder, name, kind, details)
    if kind == "damaged":
        return FacetUnavailableError(
            f"the database {name!r} is damaged ({details[0]}) and was left as it is: it has to be restored"
        )
    return FacetUnavailableError(f"the database {name!r} is out of reach: {details[0]}")


__all__ = ["FacetLimits", "Facets", "TenantFacets"]
