"""Tenants' databases: what they do, what they refuse, and what a kill at any moment leaves."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynflow.errors import (
    FacetLimitError,
    FacetRefusedError,
    FacetSqlError,
    FacetUnavailableError,
    InvalidArgumentError,
)
from dynflow.facets import FacetLimits, Facets, TenantFacets
from dynflow.isolates import ProcessLoader, WorkerCode
from dynflow.isolates.syscalls import landlock_abi
from tests.dynflow.disks import Disk, memory_disk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def facets(tmp_path: Path) -> AsyncIterator[Facets]:
    async with Facets(tmp_path / "facets") as made:
        yield made


@pytest.fixture
def db(facets: Facets) -> TenantFacets:
    return facets.of("t-1")


def folder_of(facets: Facets, tenant: str) -> Path:
    digest = hashlib.sha256(tenant.encode()).hexdigest()
    return facets._folder / digest[:2] / digest


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the state of another process
            await asyncio.sleep(0)


# --- what they do --------------------------------------------------------------------------------


async def test_a_database_is_made_at_its_first_use(facets: Facets, db: TenantFacets) -> None:
    assert await db.databases() == []
    assert list(facets._folder.rglob("*.db")) == []
    assert await db.query("SELECT 1 AS one") == [{"one": 1}]
    assert [each["name"] for each in await db.databases()] == ["main"]


async def test_values_come_back_as_they_were(db: TenantFacets) -> None:
    await db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    values = [None, 1, -(2**63), 2**63 - 1, 1.5, float("inf"), "", "ö\n\0x", b"", b"\x00\xff"]
    await db.batch([("INSERT INTO t (v) VALUES (?)", [value]) for value in values])
    assert [row["v"] for row in await db.query("SELECT v FROM t ORDER BY id")] == values


async def test_execute_tells_rows_changes_and_the_last_id(db: TenantFacets) -> None:
    await db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    made = await db.execute("INSERT INTO t (v) VALUES (:a), (:b) RETURNING id", {"a": 1, "b": 2})
    assert made == {"rows": [{"id": 1}, {"id": 2}], "changes": 2, "last_row_id": 2}
    assert (await db.execute("DELETE FROM t"))["changes"] == 2


async def test_two_columns_of_one_name_are_refused_rather_than_lost(db: TenantFacets) -> None:
    with pytest.raises(InvalidArgumentError, match="two columns are called 'a'"):
        await db.query("SELECT 1 AS a, 2 AS a")


async def test_a_batch_happens_as_a_whole_or_not_at_all(db: TenantFacets) -> None:
    await db.execute("CREATE TABLE t (v UNIQUE)")
    results = await db.batch([("INSERT INTO t VALUES (?)", [1]), "SELECT v FROM t"])
    assert results[1]["rows"] == [{"v": 1}]
    with pytest.raises(FacetSqlError, match=r"statement 2: UNIQUE constraint failed: t\.v") as caught:
        await db.batch([("INSERT INTO t VALUES (?)", [2]), ("INSERT INTO t VALUES (?)", [1])])
    assert caught.value.name == "SQLITE_CONSTRAINT_UNIQUE"
    assert await db.query("SELECT v FROM t") == [{"v": 1}]


@pytest.mark.parametrize(
    "last",
    [
        "INSERT OR ROLLBACK INTO t VALUES (1)",
        "INSERT INTO rolling VALUES (1)",
        "INSERT OR FAIL INTO t VALUES (8), (1)",
        "SELECT nonsense",
        "ATTACH 'x' AS y",
        "COMMIT",
        "INSERT INTO child VALUES (99)",
    ],
)
async def test_whatever_ends_a_batch_takes_all_of_it_back(db: TenantFacets, last: str) -> None:
    await db.batch(
        [
            "CREATE TABLE t (v UNIQUE)",
            "INSERT INTO t VALUES (1)",
            "CREATE TABLE rolling (v)",
            "CREATE TRIGGER roll BEFORE INSERT ON rolling BEGIN SELECT RAISE(ROLLBACK, 'rolled'); END",
            "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
            "CREATE TABLE child (p REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)",
        ]
    )
    with pytest.raises((FacetSqlError, FacetRefusedError)):
        await db.batch(["INSERT INTO t VALUES (2)", last, "INSERT INTO t VALUES (3)"])
    assert await db.query("SELECT v FROM t") == [{"v": 1}]


async def test_a_clone_is_a_database_of_its_own(db: TenantFacets) -> None:
    await db.batch(["CREATE TABLE t (v)", "INSERT INTO t VALUES (1)"])
    await db.clone("main", "copy")
    await db.execute("INSERT INTO t VALUES (2)", name="copy")
    assert await db.query("SELECT v FROM t") == [{"v": 1}]
    assert await db.query("SELECT v FROM t", name="copy") == [{"v": 1}, {"v": 2}]
    with pytest.raises(InvalidArgumentError, match="there is a database 'copy' already"):
        await db.clone("main", "copy")
    with pytest.raises(InvalidArgumentError, match="there is no database 'nothing'"):
        await db.clone("nothing", "other")
    assert [each["name"] for each in await db.databases()] == ["copy", "main"]


async def test_a_deleted_database_begins_anew(db: TenantFacets) -> None:
    await db.execute("CREATE TABLE t (v)")
    assert await db.delete("main") is True
    assert await db.delete("main") is False
    await db.execute("CREATE TABLE t (v)")


async def test_a_dropped_tenant_leaves_nothing_and_others_stay(facets: Facets, db: TenantFacets) -> None:
    for tenant in ("t-1", "t-2"):
        await facets.of(tenant).execute("CREATE TABLE t (v)")
    await facets.drop("t-1")
    assert not folder_of(facets, "t-1").exists()
    assert await db.databases() == []
    assert await facets.of("t-2").query("SELECT * FROM t") == []


async def test_files_are_the_owners_alone_and_nothing_is_left_beside_them(
    facets: Facets, db: TenantFacets
) -> None:
    await db.execute("CREATE TABLE t (v)")
    await db.clone("main", "copy")
    found = {path.relative_to(folder_of(facets, "t-1")): path for path in facets._folder.rglob("*.*")}
    assert {str(name) for name in found} == {"main.db", "copy.db"}
    assert {path.stat().st_mode & 0o777 for path in found.values()} == {0o600}
    folders = [facets._folder, *folder_of(facets, "t-1").parents[:2], folder_of(facets, "t-1")]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


LOOKS_INTO_PROCESSES = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root looks into an undumpable process"
)


@LOOKS_INTO_PROCESSES
async def test_an_idle_database_is_a_file_and_nothing_else(facets: Facets) -> None:
    for number in range(50):
        await facets.of(f"t-{number}").execute("CREATE TABLE t (v)")
    assert facets._turns == {}
    for worker in facets._idle:
        assert [each.path for each in psutil.Process(worker.pid).open_files()] == []


# --- tenants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["t-2", "../t-1", "t-1/", "T-1", "t-1 ", "\0", "ö" * 500, "\ud800"])
async def test_tenants_have_databases_of_their_own(facets: Facets, db: TenantFacets, other: str) -> None:
    await db.execute("CREATE TABLE t (v)")
    with pytest.raises(FacetSqlError, match="no such table"):
        await facets.of(other).query("SELECT * FROM t")
    with pytest.raises(InvalidArgumentError, match="there is no database"):
        await facets.of(other).clone("other", "mine")
    assert all(path.parent.parent.parent == facets._folder for path in facets._folder.rglob("*.db"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        ".",
        "/etc/passwd",
        "../x/main",
        "a/b",
        "A",
        "-a",
        "a.db",
        "a\0",
        "a\n",
        "ä",
        "a" * 64,
        None,
        1,
        ["a"],
    ],
)
async def test_a_name_that_could_lead_elsewhere_is_refused(db: TenantFacets, name: Any) -> None:
    calls = [
        db.query("SELECT 1", name=name),
        db.execute("SELECT 1", name=name),
        db.batch(["SELECT 1"], name=name),
        db.clone(name, "a"),
        db.clone("a", name),
        db.delete(name),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="the name of a database"):
            await call
    assert await db.databases() == []


@pytest.mark.parametrize("tenant", ["", None, 7, b"t"])
def test_a_tenant_is_a_text(tmp_path: Path, tenant: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="a tenant is a text"):
        Facets(tmp_path).of(tenant)


# --- hostile SQL ---------------------------------------------------------------------------------

# What it tries, and whether it works where nothing is refused.
HOSTILE = [
    ("ATTACH '{other}' AS stolen", True),
    ("ATTACH 'file:{other}?mode=rw' AS stolen", True),
    ("ATTACH ':memory:' AS hog", True),
    ("ATTACH '' AS hog", True),
    ("ATTACH (SELECT '{other}') AS stolen", True),
    ("DETACH main", False),
    ("VACUUM", True),
    ("VACUUM INTO '{new}'", True),
    ("VACUUM main INTO (SELECT '{new}')", True),
    ("SELECT load_extension('{other}')", False),
    ("SELECT LOAD_EXTENSION('{other}', 'init')", False),
    ("SELECT fts3_tokenizer('simple')", False),
    ("SELECT fts3_tokenizer('simple', x'4141414141414141')", False),
    ("CREATE VIRTUAL TABLE v USING fts5(a)", True),
    ("CREATE VIRTUAL TABLE v USING rtree(a, b, c)", True),
    ("CREATE VIRTUAL TABLE temp.v USING dbstat", True),
    ("CREATE TEMP TABLE t2 (v)", True),
    ("CREATE TEMP TABLE t2 AS SELECT 1", True),
    ("CREATE TEMP VIEW v AS SELECT 1", True),
    ("CREATE TEMP TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END", True),
    ("CREATE TABLE temp.t3 (v)", True),
    ("PRAGMA writable_schema = ON", True),
    ("PRAGMA main.writable_schema = 1", True),
    ("PRAGMA WRITABLE_SCHEMA = 1", True),
    ("PRAGMA journal_mode = WAL", True),
    ("PRAGMA journal_mode = OFF", True),
    ("PRAGMA journal_mode = MEMORY", True),
    ("PRAGMA synchronous = OFF", True),
    ("PRAGMA temp_store_directory = '{folder}'", True),
    ("PRAGMA data_store_directory = '{folder}'", True),
    ("PRAGMA temp_store = FILE", True),
    ("PRAGMA max_page_count = 1000000000", True),
    ("PRAGMA page_size = 65536", True),
    ("PRAGMA cache_size = 1000000000", True),
    ("PRAGMA mmap_size = 1000000000", True),
    ("PRAGMA hard_heap_limit = 1000000000000", True),
    ("PRAGMA soft_heap_limit = 0", True),
    ("PRAGMA locking_mode = EXCLUSIVE", True),
    ("PRAGMA database_list", True),
    ("PRAGMA application_id = 7", True),
    ("PRAGMA schema_version = 7", True),
    ("PRAGMA trusted_schema = ON", True),
    ("PRAGMA foreign_keys = OFF", True),
    ("PRAGMA ignore_check_constraints = ON", True),
    ("PRAGMA cell_size_check = OFF", True),
    ("PRAGMA wal_checkpoint", True),
    ("PRAGMA wal_autocheckpoint = 0", True),
    ("PRAGMA busy_timeout = 1000000", True),
    ("PRAGMA threads = 8", True),
    ("PRAGMA module_list", True),
    ("PRAGMA function_list", True),
    ("PRAGMA compile_options", True),
    ("PRAGMA shrink_memory", True),
    ("PRAGMA optimize", True),
    ("PRAGMA no_such_pragma", True),
    ("EXPLAIN PRAGMA writable_schema = 1", True),
    ("SELECT * FROM pragma_database_list", True),
    ("SELECT * FROM pragma_compile_options", True),
    ("SELECT file FROM (SELECT * FROM pragma_database_list())", True),
    ("CREATE VIEW v AS SELECT * FROM pragma_database_list", False),
    ("SELECT * FROM dbstat", False),
    ("SELECT * FROM sqlite_stmt", False),
    ("SELECT data FROM sqlite_dbpage", False),
    ("SELECT * FROM fts3tokenize('simple')", False),
    ("SELECT sqlite_compileoption_get(1)", True),
    ("SELECT sqlite_source_id()", True),
    ("BEGIN", True),
    ("BEGIN EXCLUSIVE", True),
    ("COMMIT", False),
    ("END", False),
    ("ROLLBACK", False),
    ("SAVEPOINT s", True),
    ("RELEASE s", False),
    ("ANALYZE", True),
    ("CREATE TABLE t4 (v CHECK (load_extension('{other}')))", True),
    ("CREATE TABLE t5 (v DEFAULT (fts3_tokenizer('simple')))", True),
    ("CREATE TABLE t6 (v, w AS (sqlite_compileoption_get(v)))", False),
    ("CREATE INDEX i ON t (sqlite_source_id())", False),
    ("CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT load_extension('{other}'); END", True),
    ("CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT file FROM pragma_database_list; END", True),
    ("CREATE VIEW v2 AS SELECT load_extension('{other}')", False),
    ("WITH x AS (SELECT load_extension('{other}')) SELECT * FROM x", False),
    ("UPDATE t SET v = (SELECT file FROM pragma_database_list)", True),
    ("INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 2, 'CREATE TABLE x (a)')", False),
    ("UPDATE sqlite_schema SET sql = 'CREATE TABLE t (a)'", False),
    ("DELETE FROM sqlite_master", False),
    ("DROP TABLE sqlite_master", False),
    ("SELECT 1; ATTACH '{other}' AS stolen", False),
    ("SELECT 1; SELECT 2", False),
    ("/* hidden */ ATTACH /* in */ '{other}' /* comments */ AS stolen", True),
    (".shell id", False),
    ("SELECT readfile('{other}')", False),
    ("SELECT writefile('{new}', 'x')", False),
    ("SELECT edit('x')", False),
    ("SELECT 1\0; ATTACH '{other}' AS stolen", False),
]


def hostile_row(sql: str, folder: Path) -> str:
    return sql.format(other=folder / "other.db", new=folder / "new.db", folder=folder)


@pytest.fixture
def attacked(tmp_path: Path) -> Path:
    folder = tmp_path / "attacked"
    folder.mkdir()
    with closing(sqlite3.connect(folder / "other.db")) as other:
        other.executescript("CREATE TABLE secret (v); INSERT INTO secret VALUES ('of another')")
    return folder


async def test_sql_that_reaches_outside_of_its_file_is_refused(
    facets: Facets, db: TenantFacets, attacked: Path
) -> None:
    await db.execute("CREATE TABLE t (v)")
    files = [folder_of(facets, "t-1") / "main.db", attacked / "other.db"]
    before = {path: path.read_bytes() for path in files}
    # SQLite asks about views, triggers and defaults when they are used.
    uses = {
        "CREATE VIEW v ": "SELECT * FROM v",
        "CREATE VIEW v2": "SELECT * FROM v2",
        "CREATE TRIGGER": "INSERT INTO t VALUES (1)",
        "CREATE TABLE t5": "INSERT INTO t5 DEFAULT VALUES",
    }
    went_through = []
    for sql, _ in HOSTILE:
        later = [use for beginning, use in uses.items() if sql.startswith(beginning)]
        statements = [hostile_row(each, attacked) for each in (sql, *later)]
        try:
            went_through.append((sql, await db.batch(statements)))
        except (FacetRefusedError, FacetSqlError, InvalidArgumentError):
            continue
    assert went_through == []
    assert {path: path.read_bytes() for path in before} == before
    assert os.listdir(attacked) == ["other.db"]  # noqa: PTH208


@pytest.mark.parametrize("sql", [sql for sql, works in HOSTILE if works])
def test_the_same_sql_works_where_nothing_is_refused(tmp_path: Path, attacked: Path, sql: str) -> None:
    with closing(sqlite3.connect(f"file:{tmp_path}/own.db", uri=True, isolation_level=None)) as plain:
        plain.execute("CREATE TABLE t (v)")
        plain.execute(hostile_row(sql, attacked)).fetchall()
        if "directory" in sql:  # these two hold for the whole process
            plain.execute(f"PRAGMA {sql.split()[1]} = ''")
        if "heap_limit" in sql:
            plain.execute("PRAGMA hard_heap_limit = 0")


async def test_harmless_sql_is_run(db: TenantFacets) -> None:
    await db.batch(
        [
            "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, v TEXT NOT NULL, j, n AS (length(v)) STORED)",
            "CREATE INDEX i ON t (v) WHERE v LIKE 'a%'",
            "CREATE VIEW w AS SELECT v, count(*) OVER () AS n FROM t",
            "CREATE TRIGGER g AFTER INSERT ON t BEGIN UPDATE t SET j = json_object('v', v); END",
            "INSERT INTO t (v) VALUES ('a'), ('b') ON CONFLICT DO NOTHING",
            "ALTER TABLE t ADD COLUMN extra DEFAULT 1",
            "ALTER TABLE t RENAME COLUMN extra TO more",
            "REINDEX",
            "PRAGMA user_version = 3",
            "DROP VIEW w",
        ]
    )
    rows = await db.query("SELECT v, j ->> '$.v' AS j, upper(v) AS u, n, more FROM t WHERE v GLOB 'a*'")
    assert rows == [{"v": "a", "j": "a", "u": "A", "n": 1, "more": 1}]
    assert await db.query("PRAGMA user_version") == [{"user_version": 3}]
    assert len(await db.query("SELECT name FROM pragma_table_info('t')")) == 4
    numbers = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 9) SELECT sum(x) AS s FROM c"
    assert await db.query(numbers) == [{"s": 45}]
    assert await db.query("SELECT value FROM json_each('[1, 2]')") == [{"value": 1}, {"value": 2}]
    assert await db.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        ("SELECT ?", []),
        ("SELECT ?", [1, 2]),
        ("SELECT :a", {"b": 1}),
        ("SELECT ?", [2**63]),
        ("SELECT ?", [object()]),
        ("SELECT ?", [[1]]),
        ("SELECT ?", "text"),
        ("SELECT ?", 7),
        ("SELECT ?", ["\ud800"]),
        ("SELECT '\ud800'", []),
        (7, []),
        (None, []),
        (b"SELECT 1", []),
        ("SELECT :a", {1: 2}),
    ],
)
async def test_what_cannot_be_meant_is_the_callers_matter(db: TenantFacets, sql: Any, params: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        await db.query(sql, params)
    assert await db.query("SELECT 1 AS one") == [{"one": 1}]


# --- limits --------------------------------------------------------------------------------------

ENDLESS = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
SMALL = FacetLimits(
    size=1_000_000,
    databases=3,
    time=timedelta(seconds=2),
    rows=10,
    result=5_000,
    value=100_000,
    sql=2_000,
    statements=5,
    params=150_000,
    memory=8_000_000,
)


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[TenantFacets]:
    async with Facets(tmp_path / "facets", limits=SMALL) as facets:
        yield facets.of("t-1")


@pytest.mark.parametrize(
    ("limit", "sql", "params"),
    [
        ("time", ENDLESS + "SELECT count(*) FROM c", []),
        ("time", ENDLESS + "INSERT INTO t SELECT 1 FROM c WHERE x < 0", []),
        ("time", ENDLESS + "SELECT group_concat(hex(x)) FROM c", []),
        ("rows", ENDLESS + "SELECT x FROM c", []),
        ("result", "SELECT hex(zeroblob(4000)) AS h", []),
        ("result", "SELECT zeroblob(4500) AS z", []),
        ("value", "SELECT zeroblob(100001)", []),
        ("value", "SELECT hex(randomblob(90000))", []),
        ("value", "SELECT replace(hex(zeroblob(40000)), '0', 'xxxxxxxx')", []),
        ("value", "SELECT length(?) AS l", ["x" * 100_001]),
        ("memory", ENDLESS + "SELECT x, randomblob(90000) AS r FROM c ORDER BY r", []),
        ("memory", ENDLESS + "SELECT count(*) FROM (SELECT DISTINCT randomblob(90000) AS r FROM c)", []),
        ("memory", ENDLESS + "SELECT count(DISTINCT randomblob(90000)) FROM c", []),
        ("size", ENDLESS + "INSERT INTO t SELECT randomblob(90000) FROM c", []),
        ("size", "INSERT INTO t VALUES " + ", ".join(["(randomblob(90000))"] * 12), []),
        ("sql", "SELECT 1 " + "-" * 2_000, []),
        ("params", "SELECT ?, ?", ["x" * 80_000, "x" * 80_000]),
    ],
)
async def test_a_call_over_a_limit_is_stopped_and_changes_nothing(
    small: TenantFacets, limit: str, sql: str, params: list[Any]
) -> None:
    await small.batch(["CREATE TABLE t (v)", f"INSERT INTO t VALUES {', '.join(['(1)'] * 20)}"])
    with pytest.raises(FacetLimitError) as caught:
        await small.query(sql, params)
    told = {"time": 2.0}.get(limit, getattr(SMALL, limit))
    assert (caught.value.limit, caught.value.value) == (limit, told)
    assert await small.query("SELECT count(*) AS n FROM t") == [{"n": 20}]


async def test_the_number_of_databases_and_statements_has_an_end(small: TenantFacets) -> None:
    for name in ("a", "b", "c"):
        await small.query("SELECT 1", name=name)
    for call in (small.query("SELECT 1", name="d"), small.clone("a", "d")):
        with pytest.raises(FacetLimitError, match="'databases' of its database: 3"):
            await call
    with pytest.raises(FacetLimitError, match="'statements'"):
        await small.batch(["SELECT 1"] * 6, name="a")
    assert await small.delete("a")
    await small.clone("b", "d")


async def test_what_was_deleted_is_given_back(small: TenantFacets) -> None:
    await small.execute("CREATE TABLE t (v)")
    for _ in range(3):  # each time most of what there is
        for _ in range(9):
            await small.execute("INSERT INTO t VALUES (randomblob(90000))")
        await small.execute("DELETE FROM t")
        assert (await small.databases())[0]["bytes"] < 50_000


async def test_depth_and_breadth_of_statements_have_an_end(db: TenantFacets) -> None:
    for sql in (
        "SELECT " + "(" * 500 + "1" + ")" * 500,
        "SELECT 1" + " UNION ALL SELECT 1" * 100,
        "SELECT " + ", ".join(f"1 AS c{number}" for number in range(501)),
        "SELECT ?2000",
        "SELECT 'a' LIKE '" + "%a" * 1_000 + "'",
        "SELECT char(" + ", ".join(["65"] * 101) + ")",
    ):
        with pytest.raises((FacetSqlError, InvalidArgumentError)):
            await db.query(sql, [1] if "?" in sql else [])


async def test_a_chain_of_triggers_has_an_end(db: TenantFacets) -> None:
    for number in range(30):
        await db.execute(f"CREATE TABLE t{number} (v)")
    for number in range(29):
        trigger = f"AFTER INSERT ON t{number} BEGIN INSERT INTO t{number + 1} VALUES (1); END"
        await db.execute(f"CREATE TRIGGER g{number} {trigger}")
    with pytest.raises(FacetSqlError, match="too many levels of trigger recursion"):
        await db.execute("INSERT INTO t0 VALUES (1)")


async def test_a_function_that_nothing_interrupts_is_killed(tmp_path: Path) -> None:
    async with Facets(tmp_path / "facets") as facets:
        await facets.of("t-1").batch(["CREATE TABLE t (v)", "INSERT INTO t VALUES (1)"])
    limits = FacetLimits(time=timedelta(seconds=0.5))
    async with Facets(tmp_path / "facets", limits=limits) as facets:
        db = facets.of("t-1")
        assert await db.query("SELECT v FROM t") == [{"v": 1}]
        worker = psutil.Process(facets._idle[0].pid)
        with pytest.raises(FacetLimitError) as caught:  # half a minute in one operation of SQLite's machine
            await db.batch(
                ["DELETE FROM t", "SELECT instr(zeroblob(1000000), zeroblob(500000) || x'01') AS i"]
            )
        assert (caught.value.limit, caught.value.value) == ("time", 0.5)
        assert await db.query("SELECT v FROM t") == [{"v": 1}]
        await until(lambda: not worker.is_running())


async def test_calls_that_wait_have_an_end(tmp_path: Path) -> None:
    async with Facets(tmp_path / "facets", limits=FacetLimits(waiting=3)) as facets:
        calls = [facets.of("t-1").query("SELECT 1 AS one") for _ in range(5)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [list] * 3 + [FacetLimitError] * 2
        assert await facets.of("t-2").query("SELECT 1 AS one") == [{"one": 1}]


# --- many at once, and cancellation --------------------------------------------------------------


async def test_calls_of_one_tenant_are_performed_one_after_another(facets: Facets, db: TenantFacets) -> None:
    await db.batch(["CREATE TABLE t (n)", "INSERT INTO t VALUES (0)"])
    await asyncio.gather(*(db.execute("UPDATE t SET n = n + 1") for _ in range(20)))
    assert await db.query("SELECT n FROM t") == [{"n": 20}]
    assert facets._turns == {}


async def test_a_tenant_that_is_slow_does_not_hold_up_the_others(facets: Facets) -> None:
    slow = [
        asyncio.create_task(facets.of("slow").query(ENDLESS + "SELECT count(*) FROM c")) for _ in range(9)
    ]
    await until(lambda: facets._working)
    assert await facets.of("quick").query("SELECT 1 AS one") == [{"one": 1}]
    assert not any(task.done() for task in slow)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_cancelled_call_is_killed_and_has_not_happened(facets: Facets, db: TenantFacets) -> None:
    await db.execute("CREATE TABLE t (v)")
    endless = ENDLESS + "SELECT count(*) FROM c"
    task = asyncio.create_task(db.batch(["INSERT INTO t VALUES (1)", endless]))
    await until(lambda: facets._working)
    process = psutil.Process(next(iter(facets._working)).pid)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await db.query("SELECT * FROM t") == []
    await until(lambda: not process.is_running())


async def test_closing_ends_what_is_under_way_and_leaves_no_process(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    descriptors = psutil.Process().num_fds()
    async with Facets(tmp_path / "facets") as facets:
        calls = [facets.of(f"t-{n}").query(ENDLESS + "SELECT count(*) FROM c") for n in range(5)]
        tasks = [asyncio.create_task(call) for call in calls]
        await until(lambda: len(facets._working) == 2)
    with pytest.raises(FacetUnavailableError, match="closed"):
        await facets.of("t-1").query("SELECT 1")
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(answer) for answer in answers} == {FacetUnavailableError}
    assert {child.pid for child in psutil.Process().children()} == before
    gc.collect()
    assert psutil.Process().num_fds() <= descriptors


# --- kill -9 and damage --------------------------------------------------------------------------


async def test_a_batch_that_is_killed_at_any_moment_has_happened_as_a_whole_or_not_at_all(
    facets: Facets, db: TenantFacets
) -> None:
    await db.execute("CREATE TABLE t (v)")
    journal = folder_of(facets, "t-1") / "main.db-journal"
    batch = [
        ("INSERT INTO t VALUES (?)", [b"x" * 30_000])
    ] * 100  # more than the cache: written before its commit
    killed, whole = 0, 0
    for _ in range(15):
        task = asyncio.create_task(db.batch(batch))
        await until(lambda: journal.exists() or task.done())  # noqa: B023 - asked within this round
        for _ in range(random.randrange(2_000)):  # a moment
            if not facets._working:
                break
            await asyncio.sleep(0)
        for worker in facets._working:
            os.kill(worker.pid, signal.SIGKILL)
        try:
            await task
        except FacetUnavailableError:
            killed += 1
        count = (await db.query("SELECT count(*) AS n FROM t"))[0]["n"]
        assert count in {0, 100}
        whole += count == 100
        assert await db.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
        await db.execute("DELETE FROM t")
    assert killed > 0


async def test_a_worker_that_is_killed_while_it_is_idle_is_not_noticed(
    facets: Facets, db: TenantFacets
) -> None:
    await db.execute("CREATE TABLE t (v)")
    process = psutil.Process(facets._idle[0].pid)
    process.kill()
    await until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert await db.query("SELECT * FROM t") == []


async def test_a_killed_host_leaves_no_process_and_a_whole_database(tmp_path: Path) -> None:
    program = f"""
import asyncio
from dynflow.facets import Facets
async def main():
    async with Facets({str(tmp_path / "facets")!r}) as facets:
        db = facets.of("t-1")
        await db.batch(["CREATE TABLE t (v)", "INSERT INTO t VALUES (1)"])
        print(facets._idle[0].pid, flush=True)
        await db.batch(["INSERT INTO t VALUES (2)", {ENDLESS + "SELECT count(*) FROM c"!r}])
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as host:  # noqa: ASYNC220
        assert host.stdout is not None
        worker = psutil.Process(int(await asyncio.to_thread(host.stdout.readline)))
        await until(lambda: worker.cpu_times().user > 0.2)
        host.kill()
        host.wait()
    await until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    async with Facets(tmp_path / "facets") as facets:
        assert await facets.of("t-1").query("SELECT v FROM t") == [{"v": 1}]


def _scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4_096 * 2 : 4_096 * 3] = b"\x5a" * 4_096
    path.write_bytes(data)


def _of_another_program(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (v)")


@pytest.mark.parametrize(
    "harm",
    [
        _scribble,
        _of_another_program,
        lambda path: path.write_bytes(b"no database at all" * 100),
        lambda path: path.write_bytes(b"x"),
        lambda path: path.write_bytes(path.read_bytes()[:5_000]),
    ],
)
async def test_a_damaged_file_is_refused_by_name_and_not_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    async with Facets(tmp_path / "facets") as facets:
        db = facets.of("t-1")
        await db.batch(["CREATE TABLE t (v)", "INSERT INTO t VALUES (zeroblob(90000))"], name="orders")
    path = folder_of(facets, "t-1") / "orders.db"
    harm(path)
    before = path.read_bytes()
    async with Facets(tmp_path / "facets") as facets:
        db = facets.of("t-1")
        for call in (
            db.execute("INSERT INTO t VALUES (1)", name="orders"),
            db.query("SELECT 1", name="orders"),
            db.clone("orders", "copy"),
        ):
            with (
                caplog.at_level(logging.ERROR),
                pytest.raises(FacetUnavailableError, match="'orders' is damaged") as caught,
            ):
                await call
            assert str(tmp_path) not in str(
                caught.value
            )  # the tenant is not told where it lies; the operator is
            assert str(path) in caplog.text
        assert path.read_bytes() == before
        assert sorted(each.name for each in path.parent.iterdir()) == ["orders.db"]
        assert await db.query("SELECT 1 AS one", name="another") == [{"one": 1}]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "disk")


async def test_a_full_disk_is_the_hosts_matter_and_harms_nothing(disk: Disk) -> None:
    async with Facets(disk.folder / "facets") as facets:
        db = facets.of("t-1")
        await db.batch(["CREATE TABLE t (v)", "INSERT INTO t VALUES (1)"])
        disk.fill()
        with pytest.raises(FacetUnavailableError, match="the disk is full"):
            await db.batch(["INSERT INTO t VALUES (2)", ("INSERT INTO t VALUES (?)", [b"x" * 100_000])])
        with pytest.raises(FacetUnavailableError):
            await facets.of("t-2").execute("CREATE TABLE t (v)")
        disk.empty()
        assert await db.query("SELECT v FROM t") == [{"v": 1}]
        await db.execute("INSERT INTO t VALUES (2)")
        await facets.of("t-2").execute("CREATE TABLE t (v)")


async def test_a_disk_that_cannot_be_written_is_the_hosts_matter(disk: Disk) -> None:
    async with Facets(disk.folder / "facets") as facets:
        db = facets.of("t-1")
        await db.batch(["CREATE TABLE t (v)", "INSERT INTO t VALUES (1)"])
        disk.remount("ro")
        with pytest.raises(FacetUnavailableError, match="out of reach"):
            await db.execute("INSERT INTO t VALUES (2)")
        disk.remount("rw")
        assert await db.query("SELECT v FROM t") == [{"v": 1}]


async def test_a_folder_that_cannot_be_made_is_the_hosts_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FacetUnavailableError, match="cannot make the folder"):
        async with Facets(tmp_path / "file" / "facets"):
            pass


async def test_what_is_left_of_a_deleted_database_does_not_become_part_of_the_next(
    facets: Facets, db: TenantFacets
) -> None:
    await db.execute("CREATE TABLE t (v)")
    folder = folder_of(facets, "t-1")
    whole = (folder / "main.db").read_bytes()
    await db.delete("main")
    (folder / "main.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + whole)
    (folder / "copy.partial").write_bytes(b"x")
    await db.execute("CREATE TABLE u (v)")
    await db.clone("main", "copy")
    assert await db.query("SELECT name FROM sqlite_master", name="copy") == [{"name": "u"}]


# --- the process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_confined", [True, False])
def test_the_process_that_runs_sql_reaches_nothing_but_its_folder(
    tmp_path: Path, *, is_confined: bool
) -> None:
    if is_confined and not landlock_abi():
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "facets").mkdir()
    (tmp_path / "secret").write_text("of the host")
    program = f"""
import pathlib, sys
from dynflow.facets import FacetLimits, worker
folder = pathlib.Path({str(tmp_path)!r})
if {is_confined}:
    worker.confine(folder / "facets", FacetLimits().plain(), [str(folder / "facets")])
(folder / "facets" / "own").write_text("x")
for attempt in (lambda: (folder / "secret").read_text(), lambda: (folder / "new").write_text("x")):
    try:
        attempt()
        print("done")
    except PermissionError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == (["refused"] * 2 if is_confined else ["done"] * 2)


@LOOKS_INTO_PROCESSES
async def test_the_process_that_runs_sql_has_no_environment_and_is_given_no_descriptor(
    facets: Facets,
) -> None:
    await facets.of("t-1").query("SELECT 1")
    process = psutil.Process(facets._idle[0].pid)
    assert process.environ() == {}
    assert process.num_fds() == 3


# --- out of an isolate ---------------------------------------------------------------------------

TENANT = """
from dynflow import WorkerEntrypoint
from dynflow.errors import FacetLimitError, FacetRefusedError, FacetSqlError

class Shop(WorkerEntrypoint):
    async def order(self, what):
        db = self.env.DB
        await db.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, what TEXT UNIQUE)")
        await db.batch([("INSERT INTO orders (what) VALUES (?)", [what]), "SELECT 1 AS one"])
        return await db.query("SELECT id, what FROM orders")

    async def attack(self, sql):
        try:
            return await self.env.DB.query(sql)
        except (FacetRefusedError, FacetSqlError, FacetLimitError) as error:
            return [type(error).__name__, str(error)]

    async def reach(self, method, args):
        try:
            return await getattr(self.env.DB, method)(*args)
        except (AttributeError, ValueError) as error:
            return str(error)
"""


async def test_isolates_of_two_tenants_have_databases_of_their_own(facets: Facets) -> None:
    async with ProcessLoader(ready=0) as loader:
        shops = {
            tenant: loader.load(
                WorkerCode("index.py", {"index.py": TENANT}, env={"DB": facets.of(tenant)})
            ).get_entrypoint("Shop")
            for tenant in ("a", "b")
        }
        assert await shops["a"].order("tea") == [{"id": 1, "what": "tea"}]
        assert await shops["b"].order("tea") == [{"id": 1, "what": "tea"}]
        assert await shops["a"].order("milk") == [{"id": 1, "what": "tea"}, {"id": 2, "what": "milk"}]


async def test_an_isolate_gets_errors_that_it_can_catch(facets: Facets, attacked: Path) -> None:
    async with ProcessLoader(ready=0) as loader:
        code = WorkerCode("index.py", {"index.py": TENANT}, env={"DB": facets.of("a")})
        shop = loader.load(code).get_entrypoint("Shop")
        assert await shop.attack("ATTACH 'x' AS y") == ["FacetRefusedError", "facets do not run ATTACH"]
        assert await shop.attack("SELECT absent") == [
            "FacetSqlError",
            "no such column: absent (SQLITE_ERROR)",
        ]
        assert (await shop.attack(ENDLESS + "SELECT x FROM c"))[0] == "FacetLimitError"
        names = {"FacetRefusedError", "FacetSqlError"}
        for sql, _ in HOSTILE[:55]:
            if ";" in sql:
                continue  # a trigger
            assert (await shop.attack(hostile_row(sql, attacked)))[0] in names, sql


async def test_an_isolate_reaches_the_six_methods_and_nothing_else(facets: Facets) -> None:
    async with ProcessLoader(ready=0) as loader:
        code = WorkerCode("index.py", {"index.py": TENANT}, env={"DB": facets.of("a")})
        shop = loader.load(code).get_entrypoint("Shop")
        for method, args in (
            ("of", ["b"]),
            ("drop", ["b"]),
            ("perform", ["b", "drop"]),
            ("_run", [[["SELECT 1", []]], "main"]),
            ("_facets", []),
        ):
            said = await shop.reach(method, args)
            assert said in (method, f"DB has no method {method!r}")
        assert "the name of a database" in await shop.reach("delete", ["../b/main"])
        assert await shop.reach("databases", []) == []


async def test_the_surface_of_the_binding_is_what_the_documentation_says() -> None:
    public = {name for name in vars(TenantFacets) if not name.startswith("_")}
    assert public == {"execute", "query", "batch", "clone", "delete", "databases"}


def test_the_limits_in_the_documentation_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "facets.md").read_text().split("## Limits")[1]
    documented = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert documented == [each.name for each in dataclasses.fields(FacetLimits)]
