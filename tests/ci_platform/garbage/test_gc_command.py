"""`dynflow gc`: through a server that runs, and on a data folder that none holds; the same words from both."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest
from click.testing import CliRunner, Result

from ci_platform.cli import main
from ci_platform.doctor import examine
from ci_platform.serving import running
from ci_platform.settings import load_settings
from tests.ci_platform.api.world import QUICK, World

OPTIONS = {
    "port": 0,
    "allow_containers": False,
    "keep_recent": "0",
    "keep_newest": "0",
    "log_budget": 1,
}


async def dynflow(*arguments: str, **environ: str) -> Result:
    """Call the command line as a user does, in a thread of its own."""
    named = {name: os.environ[name] for name in ("PATH", "HOME")}
    invoked = lambda: CliRunner(env={**named, **environ}).invoke(main, arguments)  # noqa: E731
    return await anyio.to_thread.run_sync(invoked)


def gone(found: dict[str, Any]) -> list[str]:
    return [item["kind"] for item in found["items"]]


async def test_gc_says_what_would_go_then_it_goes_with_a_server_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DYNFLOW_URL", raising=False)
    data = tmp_path / "data"
    async with running(load_settings({"data": data, **OPTIONS}, {})) as served:
        headers = {"Authorization": f"Bearer {served.token}"}
        async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=30) as http:
            it = World(served, http, tmp_path, "o/r")
            run_id = await it.push(QUICK)
            await it.concluded(run_id)
            said = await dynflow("gc", "--dry-run", "--data", str(data))
            assert said.exit_code == 0, said.output
            (would,) = [line for line in said.output.splitlines() if line.startswith("would go")]
            assert f"{run_id}: all logs may take 1 bytes and take" in would
            assert "trees (budget 10.0 GiB): would go 0 of 0 bytes; stay 2 of" in said.output
            assert "used a short while ago" in said.output
            assert f"disk of {data}:" in said.output
            log = f"/api/v1/runs/{run_id}/steps/greet/log"
            assert "hello" in (await http.get(log)).text
            assert gone((await http.post("/api/v1/gc", json={})).json()) == ["logs"]
            assert (await http.get(log)).text == "! this log was deleted to make room\n"
            made = await http.post("/api/v1/tokens", json={"name": "w", "scopes": ["write"]})
            refused = await http.post(
                "/api/v1/gc", json={}, headers={"Authorization": f"Bearer {made.json()['secret']}"}
            )
            assert refused.status_code == 403
    for folder in (data / "source" / "trees").glob("[!.]*/*/*"):
        os.utime(folder, (time.time() - 50_000,) * 2)
    environ = {"DYNFLOW_TREE_CACHE": "1", "DYNFLOW_KEEP_NEWEST": "0"}
    done = await dynflow("gc", "--json", "--data", str(data), **environ)
    assert gone(json.loads(done.output)) == ["trees", "trees"]
    assert list((data / "source" / "trees").glob("[!.]*/*/*")) == []


async def test_gc_of_a_folder_that_is_no_platform_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DYNFLOW_URL", raising=False)
    refused = await dynflow("gc", "--data", str(tmp_path / "nothing"))
    assert refused.exit_code == 2
    assert f"dynflow: there is no platform in {tmp_path / 'nothing'}" in refused.output


async def test_the_doctor_says_that_new_runs_wait_for_room(tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).total
    options = {"data": tmp_path / "data", "allow_containers": False, "min_free": 2 * size}
    (finding,) = [each for each in await examine(load_settings(options, {})) if each.name == "free disk"]
    assert finding.state == "bad"
    assert "new runs wait for room on the disk" in finding.advice
    assert "dynflow gc" in finding.advice


def listing(root: Path) -> dict[str, tuple[Any, ...]]:
    """All that there is below a folder, with modes, times and contents."""
    found = dict[str, tuple[Any, ...]]()
    for path in [root, *root.rglob("*")]:
        about = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        sides = (
            about.st_mode,
            about.st_uid,
            about.st_nlink,
            about.st_size,
            about.st_mtime_ns,
            about.st_ctime_ns,
        )
        found[str(path.relative_to(root))] = (*sides, content)
    return found


async def test_a_dry_run_without_a_server_changes_nothing_whatever_a_killed_one_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DYNFLOW_URL", raising=False)
    data = tmp_path / "data"
    async with running(load_settings({"data": data, **OPTIONS}, {})) as served:
        headers = {"Authorization": f"Bearer {served.token}"}
        async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=30) as http:
            it = World(served, http, tmp_path, "o/r")
            run_id = await it.push(QUICK)
            await it.concluded(run_id)
        # As a kill leaves them: what was written last is in the log alone.
        killed = [data / f"platform.db{more}" for more in ("", "-wal")]
        as_killed = {path: path.read_bytes() for path in killed}
        assert as_killed[data / "platform.db-wal"]
    for path, content in as_killed.items():
        path.write_bytes(content)
    (data / "server.json").unlink(missing_ok=True)
    for half in (
        "workspaces/.new/half/layers",
        "workspaces/.trash/gone/tree",
        "workspaces/.caches/.open/half",
        "workspaces/.caches/.trash/gone",
        "workspaces/.caches/tenant/unreadable/files",
        "source/trees/.building/half/tree",
        "source/trees/o/r/base-unreadable",
        "source/git/o/.new-half/objects",
        "source/trash/gone",
        "commands/half",
    ):
        (data / half).mkdir(parents=True)
    environ = {f"DYNFLOW_{name.upper()}": str(value) for name, value in OPTIONS.items()}
    assert load_settings({"data": data}, {}).caches_path == data / "workspaces/.caches"
    before = listing(data)
    for missing in ("", "source/mirrors", "source/trees/.building", "commands"):
        if missing:  # as a release has left it that did not make this folder
            (data / missing).rename(tmp_path / "away")
        before = listing(data)
        said = await dynflow("gc", "--dry-run", "--json", "--data", str(data), **environ)
        assert said.exit_code == 0, said.output
        assert gone(json.loads(said.output)) == ["logs"]
        assert listing(data) == before
        if missing:
            (tmp_path / "away").rename(data / missing)
    done = await dynflow("gc", "--json", "--data", str(data), **environ)
    assert gone(json.loads(done.output)) == ["logs"]
    assert listing(data) != before
