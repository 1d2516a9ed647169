"""Files of older releases: brought to today's schema, all or nothing."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynflow.engines.embedded import database
from dynflow.engines.embedded.database import SCHEMA_VERSION, Database
from dynflow.errors import StorageError
from tests.dynflow import recorded
from tests.dynflow.test_recorded_histories import go_on

ROOT = Path(__file__).parents[2]
MIGRATIONS = ROOT / "dynflow" / "engines" / "embedded" / "migrations"
NEXT = SCHEMA_VERSION + 1
# As large a change as there can be: a table that others refer to is made anew, with all its rows.
NEXT_MIGRATION = """
CREATE TABLE new_code (digest TEXT PRIMARY KEY, modules BLOB NOT NULL, kept TEXT NOT NULL DEFAULT 'yes');
INSERT INTO new_code (digest, modules) SELECT digest, modules FROM code;
DROP TABLE code;
ALTER TABLE new_code RENAME TO code;
CREATE TABLE copied AS SELECT * FROM instances;
DROP TABLE instances;
CREATE TABLE instances (key INTEGER PRIMARY KEY, id TEXT NOT NULL, status TEXT NOT NULL);
INSERT INTO instances SELECT key, id, status FROM copied;
DROP TABLE copied;
"""

both_recordings = pytest.mark.parametrize("recording", recorded.RECORDINGS, ids=lambda path: path.stem)


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """The migrations that there are, and one more."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for file in MIGRATIONS.glob("*.sql"):
        shutil.copy(file, folder)
    (folder / f"{NEXT:04}_next.sql").write_text(NEXT_MIGRATION)
    return folder


def rows(file: Path, *queries: str) -> list[Any]:
    db = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    found = [db.execute(query).fetchall() for query in queries]
    db.close()
    return found


def everything(file: Path) -> str:
    db = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
    version = db.execute("PRAGMA user_version").fetchone()
    text = "\n".join([str(version), *db.iterdump()])
    db.close()
    return text


def schema_of(file: Path) -> dict[tuple[str, str], str]:
    """Every table and index with its SQL, without comments, spaces, and the quotes that renaming a table leaves."""
    found = rows(file, "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_autoindex%'")[0]
    return {(kind, name): re.sub(r"--[^\n]*|[\s\"]", "", sql or "") for kind, name, sql in found}


@both_recordings
def test_a_migrated_file_has_the_schema_of_a_new_one(recording: Path, tmp_path: Path) -> None:
    recorded.load(recording, tmp_path / "old.db")
    for name in ("old.db", "new.db"):
        Database(tmp_path / name, "FULL").close()
    assert schema_of(tmp_path / "old.db") == schema_of(tmp_path / "new.db")
    version = f"[[({SCHEMA_VERSION},)], []]"
    for name in ("old.db", "new.db"):
        assert str(rows(tmp_path / name, "PRAGMA user_version", "PRAGMA foreign_key_check")) == version


def test_there_is_a_migration_to_every_version() -> None:
    files = sorted(file.name for file in MIGRATIONS.glob("*")) if MIGRATIONS.exists() else []
    assert [int(name[:4]) for name in files] == list(range(2, SCHEMA_VERSION + 1))
    for name in files:
        assert re.fullmatch(r"\d{4}_[a-z0-9_]+\.sql", name)
        # The one transaction around all of them is not theirs to end.
        sql = (MIGRATIONS / name).read_text().upper()
        assert not re.search(
            r"^\s*(BEGIN|COMMIT|ROLLBACK|VACUUM|PRAGMA user_version)\b[^,]*?;",
            sql,
            re.IGNORECASE | re.MULTILINE,
        )


def test_there_is_a_recording_of_every_version() -> None:
    versions = re.findall(
        r"PRAGMA user_version = (\d+);", "".join(file.read_text() for file in recorded.RECORDINGS)
    )
    assert {int(version) for version in versions} == set(range(1, SCHEMA_VERSION + 1))


def run(file: Path, migrations: Path, number: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, Path(__file__).with_name("migrating.py"), file, migrations, str(NEXT), str(number)],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@both_recordings
async def test_a_migration_that_is_killed_has_not_happened(
    recording: Path, tmp_path: Path, migrations: Path
) -> None:
    recorded.load(recording, tmp_path / "whole.db")
    whole = run(tmp_path / "whole.db", migrations, 0)
    assert whole.returncode == 0, whole.stderr
    migrated, commit = everything(tmp_path / "whole.db"), int(whole.stdout)
    assert commit > 10

    file = tmp_path / "flow.db"
    recorded.load(recording, file)
    before = everything(file)
    for number in range(2, commit + 1):
        assert run(file, migrations, number).returncode == -signal.SIGKILL
        assert everything(file) == before, number
    shutil.copytree(tmp_path, tmp_path / "killed", ignore=lambda *_: {"killed", "migrations"})
    assert run(file, migrations, commit + 1).returncode == -signal.SIGKILL
    assert everything(file) == migrated
    # What was killed just before its commit opens today as if nothing had happened.
    await go_on(tmp_path / "killed" / "flow.db")


def open_next(
    monkeypatch: pytest.MonkeyPatch, file: Path, folder: Path, synchronous: database.Synchronous = "FULL"
) -> None:
    monkeypatch.setattr(database, "SCHEMA_VERSION", NEXT)
    Database(file, synchronous, folder).close()


def test_making_a_table_anew_deletes_nothing_that_refers_to_it(
    tmp_path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flow.db"
    recorded.load(recorded.RECORDINGS[-1], file)
    queries = ("SELECT id, status FROM instances", "SELECT count(*) FROM steps", "SELECT * FROM events")
    before = rows(file, *queries)
    open_next(monkeypatch, file, migrations)
    assert rows(file, *queries) == before


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("CREATE TABLE made (x); SELECT nonsense;", "no such column: nonsense"),
        ("CREATE TABLE made (x); DELETE FROM instances;", "a row of .* belongs to nothing in instances"),
    ],
)
def test_a_migration_that_fails_changes_nothing(
    tmp_path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch, sql: str, said: str
) -> None:
    file = tmp_path / "flow.db"
    recorded.load(recorded.RECORDINGS[-1], file)
    before = everything(file)
    (migrations / f"{NEXT:04}_next.sql").write_text(sql)
    with pytest.raises(StorageError, match=said):
        open_next(monkeypatch, file, migrations)
    assert everything(file) == before


def old(file: Path) -> None:
    recorded.load(recorded.RECORDINGS[-1], file)


def old_and_damaged(file: Path) -> None:
    old(file)
    data = bytearray(file.read_bytes())
    data[4096 * 2 : 4096 * 12] = b"\xa5" * (4096 * 10)
    file.write_bytes(data)


def newer(file: Path) -> None:
    old(file)
    sqlite3.connect(file).execute(f"PRAGMA user_version = {NEXT + 1}").connection.close()


def foreign(file: Path) -> None:
    sqlite3.connect(file).executescript("CREATE TABLE theirs (x); PRAGMA user_version = 1").connection.close()


def left_with_a_log(file: Path, change: str) -> None:
    """Make a file as a kill leaves it: what was committed last is in the log beside it alone."""
    db = sqlite3.connect(file)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(change)
    for end in ("", "-wal"):
        shutil.copy(f"{file}{end}", f"{file}.kept{end}")
    db.close()
    for end in ("", "-wal"):
        Path(f"{file}.kept{end}").replace(f"{file}{end}")


def newer_with_a_log(file: Path) -> None:
    old(file)
    left_with_a_log(file, f"PRAGMA user_version = {NEXT + 1}")


def foreign_with_a_log(file: Path) -> None:
    left_with_a_log(file, "CREATE TABLE theirs (x)")


@pytest.mark.parametrize("make", [old_and_damaged, newer, newer_with_a_log, foreign, foreign_with_a_log])
def test_what_is_refused_is_not_migrated(
    tmp_path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    file = tmp_path / "flow.db"
    make(file)
    contents = {path.name: path.read_bytes() for path in tmp_path.glob("flow.db*")}
    with pytest.raises(StorageError, match=r"flow\.db"):
        open_next(monkeypatch, file, migrations)
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents


def test_a_file_that_was_killed_with_a_log_is_migrated_with_it(
    tmp_path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flow.db"
    old(file)
    left_with_a_log(file, "UPDATE instances SET status = 'complete' WHERE id = 'queued'")
    open_next(monkeypatch, file, migrations)
    assert rows(file, "SELECT status FROM instances WHERE id = 'queued'") == [[("complete",)]]


def test_a_file_with_a_transaction_that_was_cut_off_is_taken_back(tmp_path: Path) -> None:
    """As a kill leaves a backup that was being opened for the first time: a journal, from before there was a log."""
    file = tmp_path / "flow.db"
    old(file)
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA cache_size = 1")  # so that changed pages reach the file before the commit
    db.executescript("BEGIN; UPDATE history SET data = data || zeroblob(5000); UPDATE steps SET name = 'x'")
    for end in ("", "-journal"):
        shutil.copy(f"{file}{end}", tmp_path / f"killed.db{end}")
    db.close()
    Database(tmp_path / "killed.db", "FULL").close()
    assert not rows(tmp_path / "killed.db", "SELECT * FROM steps WHERE name = 'x'")[0]
