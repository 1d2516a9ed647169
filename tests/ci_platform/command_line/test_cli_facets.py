"""Tenants' databases in `dynflow backup`, `restore` and `doctor`."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from dynflow.engines.embedded import EmbeddedEngine
from dynflow.errors import FacetUnavailableError
from dynflow.facets import Facets
from dynflow.facets.backup import copy_facets
from dynflow.isolates.syscalls import landlock_abi
from tests.ci_platform.command_line.conftest import CommandLine, Served


@pytest.fixture
async def facets(tmp_path: Path) -> AsyncIterator[Facets]:
    async with Facets(tmp_path / "facets") as made:
        yield made


async def fill(facets: Facets, *tenants: str) -> None:
    for tenant in tenants:
        await facets.of(tenant).batch(["CREATE TABLE t (v)", ("INSERT INTO t VALUES (?)", [tenant])])


async def test_all_databases_of_a_folder_are_copied_and_come_back(
    facets: Facets, dynflow: CommandLine, tmp_path: Path
) -> None:
    await fill(facets, "a", "b")
    await facets.of("a").clone("main", "second-one")
    backup, back = tmp_path / "backup", tmp_path / "back"
    done = await asyncio.to_thread(dynflow, "backup", str(backup), "--facets", str(tmp_path / "facets"))
    assert (done.returncode, done.stderr, len(done.stdout.split())) == (0, "", 3)
    await facets.of("a").execute("DELETE FROM t")
    done = await asyncio.to_thread(dynflow, "restore", str(backup), "--facets", str(back))
    assert (done.returncode, done.stderr) == (0, "")
    async with Facets(back) as restored:
        for tenant in ("a", "b"):
            assert await restored.of(tenant).query("SELECT v FROM t") == [{"v": tenant}]
        assert [each["name"] for each in await restored.of("a").databases()] == ["main", "second-one"]
    modes = {path.stat().st_mode & 0o777 for path in (back, *back.rglob("*"))}
    assert modes == {0o700, 0o600}
    again = await asyncio.to_thread(dynflow, "restore", str(backup), "--facets", str(back))
    assert (again.returncode, "File exists" in again.stderr) == (4, True)


async def test_a_copy_is_one_moment_of_a_database_that_is_written(facets: Facets, tmp_path: Path) -> None:
    db, stop = facets.of("busy"), asyncio.Event()
    await db.batch(["CREATE TABLE one (n)", "CREATE TABLE two (n)"])

    async def write() -> int:
        number = 0
        while not stop.is_set():
            number += 1
            await db.batch([(f"INSERT INTO {table} VALUES (?)", [number]) for table in ("one", "two")])
        return number

    writing = asyncio.create_task(write())
    for number in range(5):
        assert len((await copy_facets(tmp_path / "facets", tmp_path / f"copy-{number}")).made) == 1
    stop.set()
    written = await writing
    counted = []
    for number in range(5):
        async with Facets(tmp_path / f"copy-{number}") as copied:
            sql = "SELECT (SELECT count(*) FROM one) AS one, (SELECT count(*) FROM two) AS two"
            (row,) = await copied.of("busy").query(sql)
        assert row["one"] == row["two"]
        counted.append(row["one"])
    assert counted == sorted(counted)
    assert counted[-1] <= written


async def test_a_damaged_database_is_left_out_said_and_holds_up_no_other(
    facets: Facets, dynflow: CommandLine, tmp_path: Path
) -> None:
    await fill(facets, "a", "b", "c")
    damaged = sorted((tmp_path / "facets").rglob("*.db"))[1]
    damaged.write_bytes(b"no database" * 100)
    backup = tmp_path / "backup"
    done = await asyncio.to_thread(dynflow, "backup", str(backup), "--facets", str(tmp_path / "facets"))
    assert (done.returncode, len(done.stdout.split())) == (4, 2)
    assert f"{damaged} is damaged: it is no SQLite database, and was left out" in done.stderr
    copied = next(backup.rglob("*.db"))
    copied.write_bytes(b"no database" * 100)
    done = await asyncio.to_thread(dynflow, "restore", str(backup), "--facets", str(tmp_path / "back"))
    assert (done.returncode, str(copied) in done.stderr) == (4, True)
    assert not (tmp_path / "back").exists()


async def test_what_is_not_a_tenants_is_not_copied(facets: Facets, tmp_path: Path) -> None:
    await fill(facets, "a")
    (file,) = (tmp_path / "facets").rglob("*.db")
    (tmp_path / "secret.db").write_bytes(file.read_bytes())
    (file.parent / "link.db").symlink_to(tmp_path / "secret.db")
    (file.parent / "main.partial").write_text("x")
    (tmp_path / "facets" / "other.db").write_text("x")
    copies = await copy_facets(tmp_path / "facets", tmp_path / "copy")
    assert [path.name for path in copies.made] == ["main.db"]
    with pytest.raises(FacetUnavailableError, match="File exists"):
        await copy_facets(tmp_path / "facets", tmp_path / "copy")


async def test_facets_of_a_data_folder_are_in_its_backup(
    served: Served, dynflow: CommandLine, tmp_path: Path
) -> None:
    backup, elsewhere = tmp_path / "backup", tmp_path / "elsewhere"
    async with Facets(served.data / "facets") as facets:
        await fill(facets, "tenant")
        done = await asyncio.to_thread(served.dynflow, "backup", str(backup))
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in backup.iterdir()} == {"engine.db", "platform.db", "facets"}
    done = await asyncio.to_thread(dynflow, "restore", str(backup), "--data", str(elsewhere))
    assert (done.returncode, done.stderr) == (0, "")
    async with Facets(elsewhere / "facets") as restored:
        assert await restored.of("tenant").query("SELECT v FROM t") == [{"v": "tenant"}]
    for path in (elsewhere / "engine.db", elsewhere / "platform.db"):
        path.unlink()
    (backup / "engine.db").write_text("no database")
    done = await asyncio.to_thread(dynflow, "restore", str(backup), "--data", str(tmp_path / "third"))
    assert done.returncode == 4
    assert {path.name for path in (tmp_path / "third").iterdir()} <= {"lock"}


async def test_a_folder_that_is_none_and_two_sources_are_refused(
    dynflow: CommandLine, tmp_path: Path
) -> None:
    async with EmbeddedEngine(tmp_path / "flow.db"):
        pass
    both = ["--engine", str(tmp_path / "flow.db"), "--facets", str(tmp_path)]
    assert (await asyncio.to_thread(dynflow, "backup", str(tmp_path / "b"), *both)).returncode == 2
    missing = await asyncio.to_thread(
        dynflow, "backup", str(tmp_path / "b"), "--facets", str(tmp_path / "no")
    )
    assert (missing.returncode, "Traceback" in missing.stderr) == (4, False)
    assert not (tmp_path / "b").exists()


async def test_the_process_that_copies_reaches_the_two_folders_alone(facets: Facets, tmp_path: Path) -> None:
    """A database that is opened may be a tenant's attack on SQLite: it is opened in the same confined process."""
    await fill(facets, "a")
    (file,) = (tmp_path / "facets").rglob("*.db")
    with closing(sqlite3.connect(tmp_path / "outside.db")) as db:
        db.execute("CREATE TABLE t (v)")
    if not landlock_abi():
        pytest.skip("this kernel has no Landlock")
    from dynflow.facets import FacetLimits
    from dynflow.facets.process import WorkerProcess

    target = tmp_path / "target"
    target.mkdir()
    worker = await WorkerProcess.start(tmp_path / "facets", FacetLimits().plain(), also=target)
    try:
        request = {"do": "copy", "name": "", "path": str(file), "target": str(target / "aa" / "b" / "m.db")}
        (target / "aa").mkdir()
        assert await worker.ask(request) == {"ok": True}
        outside = await worker.ask({**request, "path": str(tmp_path / "outside.db")})
        assert outside["error"][0] in {"unavailable", "sql"}
        elsewhere = await worker.ask({**request, "target": str(tmp_path / "elsewhere" / "m.db")})
        assert elsewhere["error"][0] == "unavailable"
    finally:
        await worker.end()


async def test_doctor_shows_what_confines_sql(dynflow: CommandLine) -> None:
    done = await asyncio.to_thread(dynflow, "doctor", "--json")
    found = {item["name"]: item["state"] for item in json.loads(done.stdout) if item["area"] == "facets"}
    assert found == {"limits": "good", "landlock": "good" if landlock_abi() else "fair"}
