"""What a store promises, on each database."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.exc import StatementError

from ci_platform.errors import InvalidInputError, UnavailableError
from ci_platform.model import Counter, OutboxRow, Repository, Row, Run
from ci_platform.store import Store, Transaction, col, decode_cursor, encode_cursor
from tests.databases import DATABASES, database

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield found


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    opened = Store(url)
    await opened.open()
    yield opened
    await opened.close()


def repository(name: str = "o/r") -> Repository:
    return Repository(name=name, forge="local", created_at=NOW)


async def counter(store: Store, name: str = "n") -> int:
    row = await store.read(lambda tx: tx.get(Counter, name))
    return row.value if row else 0


async def test_what_was_written_is_there_for_another_store(store: Store, url: str) -> None:
    await store.write(lambda tx: tx.add(repository()))
    other = Store(url)
    await other.open()
    found = await other.read(lambda tx: tx.get(Repository, "o/r"))
    await other.close()
    assert found is not None
    assert found.created_at == NOW


async def test_times_keep_their_moment_and_come_back_in_utc(store: Store) -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5)))
    await store.write(lambda tx: tx.add(Repository(name="o/r", forge="local", created_at=elsewhere)))
    found = await store.read(lambda tx: tx.get(Repository, "o/r"))
    assert found is not None
    assert (found.created_at, found.created_at.utcoffset()) == (NOW, timedelta(0))


async def test_a_time_without_a_zone_is_refused(store: Store) -> None:
    naive = Repository(name="o/r", forge="local", created_at=datetime(2026, 1, 1))  # noqa: DTZ001 - the point
    with pytest.raises(StatementError, match="no time zone"):
        await store.write(lambda tx: tx.add(naive))


async def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    def fail(tx: Transaction) -> None:
        tx.add(repository())
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        await store.write(fail)
    assert await store.read(lambda tx: tx.all(Repository)) == []


async def test_what_a_read_changes_is_undone(store: Store) -> None:
    await store.read(lambda tx: tx.add(repository()))
    assert await store.read(lambda tx: tx.all(Repository)) == []


async def test_add_once_says_whether_it_was_new_and_the_transaction_goes_on(store: Store) -> None:
    def twice(tx: Transaction) -> list[bool]:
        outcomes = [tx.add_once(repository()), tx.add_once(repository())]
        tx.count("n")
        return outcomes

    assert await store.write(twice) == [True, False]
    assert await counter(store) == 1


async def test_concurrent_writers_lose_no_update(store: Store) -> None:
    await store.write(lambda tx: tx.count("n"))
    async with anyio.create_task_group() as group:
        for _ in range(40):
            group.start_soon(store.write, lambda tx: tx.count("n"))
    assert await counter(store) == 41


async def test_of_concurrent_conditional_changes_one_wins(store: Store) -> None:
    await store.write(lambda tx: tx.add(repository()))
    won = []

    async def claim(number: int) -> None:
        values = {"last_number": number}
        where = (col(Repository.name) == "o/r", col(Repository.last_number) == 0)
        if await store.write(lambda tx: tx.change(Repository, values, *where)):
            won.append(number)

    async with anyio.create_task_group() as group:
        for number in range(1, 21):
            group.start_soon(claim, number)
    assert len(won) == 1


async def test_readers_are_not_kept_waiting_by_a_writer(store: Store) -> None:
    await store.write(lambda tx: tx.count("n"))
    writing, read = anyio.Event(), anyio.Event()
    release = anyio.from_thread.run

    def slow(tx: Transaction) -> None:
        tx.count("n")
        anyio.from_thread.run_sync(writing.set)
        release(read.wait)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(store.write, slow)
            await writing.wait()
            assert await counter(store) == 1
            read.set()
    assert await counter(store) == 2


async def test_foreign_keys_are_enforced(store: Store) -> None:
    def orphan(tx: Transaction) -> bool:
        return tx.add_once(
            OutboxRow(run_id="no", forge="f", kind="status", key="k", payload={}, created_at=NOW, next_at=NOW)
        )

    assert not await store.write(orphan)


async def test_migrations_lead_to_the_tables_as_the_model_has_them(store: Store, url: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Row.metadata) == []
    engine.dispose()


async def test_a_database_of_a_later_release_is_refused(store: Store, url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    later = Store(url)
    with pytest.raises(UnavailableError, match="not one of this release"):
        await later.open()
    await later.close()


async def test_queries_that_every_page_makes_use_an_index(store: Store, url: str) -> None:
    if not store.is_sqlite:
        pytest.skip("plans are compared on SQLite")
    engine = create_engine(url)
    with engine.connect() as connection:
        for query in (
            "SELECT * FROM run WHERE id = 'x'",
            "SELECT id, repo FROM run WHERE conclusion IS NULL",
            "SELECT * FROM outbox WHERE key = 'x'",
            "SELECT * FROM gate WHERE run_id = 'x'",
        ):
            plan = connection.execute(text(f"EXPLAIN QUERY PLAN {query}")).all()
            assert all("USING" in row[3] for row in plan), plan
    engine.dispose()
    assert Run.__tablename__ == "run"


async def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/not/there.db")
    with pytest.raises(UnavailableError, match="No such file"):
        await store.open()
    await store.close()


async def test_a_server_that_is_not_there_is_unavailable_and_its_password_is_not_told() -> None:
    pytest.importorskip("psycopg")
    store = Store("postgresql+psycopg://user:hunter2@127.0.0.1:1/db")
    with pytest.raises(UnavailableError, match="does not answer") as caught:
        await store.open()
    assert "hunter2" not in str(caught.value)
    await store.close()


async def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/platform.db")
    await store.open()
    await store.write(lambda tx: tx.count("n"))
    modes = {name.name: name.stat().st_mode & 0o077 for name in os.scandir(tmp_path)}
    assert set(modes.values()) == {0}, modes
    await store.close()


@pytest.mark.parametrize("url", ["nonsense", "nosuchdriver://host/db", "mysql://u:hunter2@h/db"])
def test_a_url_that_cannot_be_used_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Store(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "cursor", ["", "!", "x" * 5000, "YWZ0ZXI6LTE", "YWZ0ZXI6MDE", "é", encode_cursor(2**40)]
)
def test_a_cursor_that_was_never_given_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidInputError):
        decode_cursor(cursor)


def test_a_cursor_leads_back_to_its_position() -> None:
    assert decode_cursor(encode_cursor(77)) == 77
