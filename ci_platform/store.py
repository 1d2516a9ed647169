"""Transactions over the tables: one door to the database, SQLite or Postgres by URL, asynchronous outside.

A transaction is a plain function of a `Transaction`, run in a thread of this door's own limiter.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import anyio.to_thread
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from anyio import CapacityLimiter
from sqlalchemy import Connection, Engine, event, make_url
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, OperationalError
from sqlmodel import Session, col, create_engine, delete, func, or_, select, update

from ci_platform.errors import InvalidInputError, UnavailableError
from ci_platform.model import Counter, Row

__all__ = ["Store", "Transaction", "chosen", "col", "decode_cursor", "encode_cursor", "folded", "or_"]

_T = TypeVar("_T")
_RowT = TypeVar("_RowT", bound=Row)

# Readers do not wait for the writer in WAL mode; a handful of threads serves the pages of one machine.
_READERS = 8
# Postgres takes writers in parallel; SQLite has one, and queueing here is fairer than its busy loop.
_POSTGRES_WRITERS = 8
_MIGRATIONS = Path(__file__).parent / "migrations"


class Transaction:
    """What a transaction's function may do. Conditions are made with `col(Table.column)`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, table: type[_RowT], key: Any) -> _RowT | None:
        """Return the row with this primary key."""
        return self._session.get(table, key)

    def lock(self, table: type[_RowT], *where: Any) -> _RowT | None:
        """Return the first row that meets all conditions; who else locks it waits for this transaction's end.

        What is read after it is what earlier holders of the lock left. SQLite's writers take turns anyway.
        """
        return self._session.exec(
            select(table).where(*where).limit(1).with_for_update(),
            execution_options={"populate_existing": True},
        ).first()

    def first(self, table: type[_RowT], *where: Any, order: Any = None) -> _RowT | None:
        """Return the first row that meets all conditions."""
        return next(iter(self.all(table, *where, order=order, limit=1)), None)

    def all(
        self, table: type[_RowT], *where: Any, order: Any = None, limit: int | None = None
    ) -> Sequence[_RowT]:
        """Return the rows that meet all conditions, in `order`."""
        query = select(table).where(*where)
        if order is not None:
            query = query.order_by(order)
        return self._session.exec(query if limit is None else query.limit(limit)).all()

    def values(self, columns: Sequence[Any], *where: Any) -> Sequence[Any]:
        """Return columns of one table, as tuples, of the rows that meet all conditions; a tenth of what rows cost."""
        found: Sequence[Any] = self._session.exec(select(*columns).where(*where)).all()
        return found

    def add(self, row: _RowT) -> _RowT:
        """Insert `row` and return it with its key. Raises IntegrityError if it exists."""
        self._session.add(row)
        self._session.flush()
        return row

    def add_once(self, row: Row) -> bool:
        """Insert `row` unless a unique column says it is there already; return whether it is new."""
        try:
            with self._session.begin_nested():
                self._session.add(row)
                self._session.flush()
        except IntegrityError:
            return False
        return True

    def change(self, table: type[Row], values: Mapping[str, Any], *where: Any) -> int:
        """Set `values` in the rows that meet all conditions, atomically; return how many there were."""
        statement = update(table).where(*where).values(**values)
        result = self._session.exec(statement, execution_options={"synchronize_session": "fetch"})
        return cast("CursorResult[Any]", result).rowcount

    def remove(self, table: type[Row], *where: Any) -> int:
        """Delete the rows that meet all conditions; return how many there were."""
        result = self._session.exec(delete(table).where(*where))
        return cast("CursorResult[Any]", result).rowcount

    def count(self, name: str) -> None:
        """Raise the counter `name` by one."""
        plus_one, where = {"value": Counter.value + 1}, col(Counter.name) == name
        if not self.change(Counter, plus_one, where) and not self.add_once(Counter(name=name, value=1)):
            self.change(Counter, plus_one, where)  # another transaction has just made it


class Store:
    """The platform's database.

    *Order of calls*: `open`, then transactions, then `close`. *Concurrency*: safe; on SQLite writers take
    turns. *Idempotency*: none of its own. *Cancellation*: a transaction that has begun runs to its end.
    *Errors*: UnavailableError where the database does not answer; what the function raises, after rollback.
    """

    def __init__(self, url: str) -> None:
        self._engine = _make_engine(url)
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        self._readers: CapacityLimiter | None = None
        self._writers: CapacityLimiter | None = None

    async def open(self, *, look_only: bool = False) -> None:
        """Bring the schema up to date and be ready. Raises UnavailableError.

        With `look_only` the schema stays as it is, and has to be this release's.
        """
        self._readers = CapacityLimiter(_READERS)
        self._writers = CapacityLimiter(1 if self.is_sqlite else _POSTGRES_WRITERS)
        await anyio.to_thread.run_sync(self._check if look_only else self._migrate, limiter=self._writers)

    async def close(self) -> None:
        """Let go of all connections."""
        await anyio.to_thread.run_sync(self._engine.dispose)

    async def read(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` in a transaction that changes nothing, and return what it returns."""
        return await anyio.to_thread.run_sync(self._run, work, False, limiter=self._readers)  # noqa: FBT003

    async def write(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` in a transaction; what it did is durable when this returns, undone when it raises."""
        return await anyio.to_thread.run_sync(self._run, work, True, limiter=self._writers)  # noqa: FBT003

    def _run(self, work: Callable[[Transaction], _T], writes: bool) -> _T:  # noqa: FBT001 - run_sync is positional
        with _speaking_plainly(), Session(self._engine, expire_on_commit=False) as session:
            if self.is_sqlite and writes:
                session.connection(execution_options={"dynflow_writes": True})
            result = work(Transaction(session))
            if writes:
                session.commit()
            return result

    def _check(self) -> None:
        with _speaking_plainly(), self._engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
            if found != ScriptDirectory(str(_MIGRATIONS)).get_current_head():
                raise UnavailableError("the database's schema is of another release: start the server once")

    def _migrate(self) -> None:
        database = self._engine.url.database
        if self.is_sqlite and database:
            _make_private(Path(database))
        with _speaking_plainly(), self._engine.connect() as connection:
            migrate(connection)


def migrate(connection: Connection) -> None:
    """Bring the schema up to date. Raises UnavailableError for a database newer than this release."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise UnavailableError(f"the database's schema is not one of this release: {error}") from error


def chosen(column: Any, *where: Any) -> Any:
    """Return the values of a column in the rows that meet all conditions, to ask of another one with `in_`."""
    return select(column).where(*where)


def folded(column: Any) -> Any:
    """Return a text column in lower case, to be compared with."""
    return func.lower(column)


def encode_cursor(position: int) -> str:
    """Return an opaque cursor to go on from after the row at `position`."""
    return base64.urlsafe_b64encode(f"after:{position}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """Return the position in a cursor. Raises InvalidInputError for what `encode_cursor` never made."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
        position = int(text.removeprefix("after:"))
    except (ValueError, binascii.Error):
        raise InvalidInputError("the cursor is not one that this server gave") from None
    # Within what the database's integers hold, whatever was sent.
    if encode_cursor(position) != cursor or not 0 <= position < 2**31:
        raise InvalidInputError("the cursor is not one that this server gave")
    return position


def _make_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = create_engine(parsed, connect_args={"timeout": 30, "isolation_level": None})
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        return create_engine(parsed, pool_size=_READERS + _POSTGRES_WRITERS, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        # The URL may hold a password: the message names the kind of problem alone.
        raise InvalidInputError(f"database_url cannot be used: {type(error).__name__}") from None


def file_of(url: str) -> Path | None:
    """Return where a database of SQLite is; None of others."""
    parsed = make_url(url)
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return Path(str(parsed.database)) if is_file else None


def _make_private(path: Path) -> None:
    """Make the file before SQLite does, for its owner alone; what SQLite puts beside it takes over the mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UnavailableError(f"the database {path} cannot be opened: {error.strerror}") from error


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # FULL: an answered delivery survives a power cut, which NORMAL does not promise in WAL mode.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # Writers lock at once: a reader that turns writer later would meet SQLITE_BUSY, which no timeout cures.
    writes = connection.get_execution_options().get("dynflow_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _speaking_plainly() -> Generator[None]:
    try:
        yield
    except (OperationalError, DBAPIError) as error:
        if isinstance(error, IntegrityError) or not (
            isinstance(error, OperationalError) or error.connection_invalidated
        ):
            raise
        # The driver's text names host and reason; statement and parameters stay out of the message.
        raise UnavailableError(f"the database does not answer: {error.orig}") from error
