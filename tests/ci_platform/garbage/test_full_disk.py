"""A platform on a disk that gets full: runs wait with the reason, nothing is lost, and it goes on by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from ci_platform.model import DeliveryRow, ShownStatus
from ci_platform.serving import Running, running
from ci_platform.settings import Settings, load_settings
from ci_platform.store import col
from tests.ci_platform.api.test_api_webhooks import RECORDED, post, signed
from tests.ci_platform.api.world import GATED, HEAD, QUICK, SECRET, World
from tests.ci_platform.garbage.test_gc_command import dynflow
from tests.dynflow.disks import Disk, memory_disk

MEBIBYTE = 1024 * 1024
BODY = (RECORDED / "push.json").read_bytes()
WHY = "room on the disk: less than 16.0 MiB are free (setting min_free)"

LARGE = HEAD + (
    '        await sh("large", "head -c 20000000 /dev/zero > large")\n'
    '        await sh("more", "head -c 10000000 /dev/zero > more")\n'
)
TALKING = HEAD + (
    '        await sh("talk", "x=$(printf %0500d 0); for n in $(seq 200); do echo line $n $x; sleep 0.01; done")\n'
    '        await sh("write", "echo done > done")\n'
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from memory_disk(tmp_path / "disk", 96)


def settings(disk: Disk, **options: Any) -> Settings:
    given = {"data": disk.folder / "data", "port": 0, "min_free": "16 MB", "allow_containers": False}
    return load_settings({**given, **options}, {})


@asynccontextmanager
async def world(disk: Disk, tmp_path: Path, **options: Any) -> AsyncIterator[World]:
    async with running(settings(disk, **options)) as served:
        headers = {"Authorization": f"Bearer {served.token}"}
        async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=30) as http:
            yield World(served, http, tmp_path, "o/r")


async def shown(served: Running, sha: str) -> list[tuple[str, str]]:
    """Return what the forge shows on a commit."""
    rows = await served.platform.store.read(lambda tx: tx.all(ShownStatus, col(ShownStatus.sha) == sha))
    return [(row.state, row.description) for row in rows]


async def until_shown(served: Running, sha: str, wanted: tuple[str, str]) -> None:
    with anyio.fail_after(30):
        while await shown(served, sha) != [wanted]:
            await anyio.lowlevel.checkpoint()


async def test_new_runs_wait_with_the_reason_and_begin_by_themselves_when_there_is_room(
    disk: Disk, tmp_path: Path
) -> None:
    async with world(disk, tmp_path) as it:
        gated = await it.push(GATED)
        await it.at_gate(gated)
        disk.fill(leave=8 * MEBIBYTE)
        waiting = await it.push(QUICK, branch="other")
        run = await it.until(waiting, lambda run: run["waiting_for"] is not None)
        assert (run["status"], run["waiting_for"], run["steps"]) == ("queued", WHY, [])
        await until_shown(it.served, run["sha"], ("pending", f"queued, waiting for {WHY}"))
        assert WHY in (await it.http.get(f"/runs/{waiting}")).text
        printed = await dynflow("show", waiting, DYNFLOW_DATA=str(disk.folder / "data"))
        assert f"queued, waiting for {WHY}" in printed.output
        ready = await it.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert ready.json()["parts"]["disk"] == "short of room: new runs wait"
        found = (await it.http.post("/api/v1/gc", json={"dry_run": True})).json()
        assert found["shortage"] == WHY
        assert (await it.decide(gated, "approve")).status_code == 200
        assert (await it.concluded(gated))["conclusion"] == "success", "what has begun goes on"
        assert (await it.run(waiting))["conclusion"] is None
        disk.empty()
        assert (await it.concluded(waiting))["conclusion"] == "success"
        assert (await it.http.get("/readyz")).json()["status"] == "ok"


async def test_garbage_is_collected_at_once_where_the_disk_is_short_of_room_and_runs_go_on(
    disk: Disk, tmp_path: Path
) -> None:
    async with world(disk, tmp_path, keep_recent="0 seconds", keep_newest="0 seconds") as it:
        old = await it.push(LARGE)
        assert (await it.concluded(old))["conclusion"] == "success"
        disk.fill(leave=4 * MEBIBYTE)
        new = await it.push(QUICK, branch="other")
        assert (await it.concluded(new))["conclusion"] == "success", "nobody had to make room"
        answer = await it.http.post(f"/api/v1/runs/{old}/rerun", json={"from_step": "more"})
        assert answer.status_code == 409
        assert "its files were collected to make room" in answer.json()["error"]["message"]
        disk.empty()
        assert (await it.http.post(f"/api/v1/runs/{old}/rerun")).status_code == 202
        assert (await it.concluded(old))["conclusion"] == "success"


async def test_nothing_acknowledged_is_lost_while_there_is_no_room_at_all(disk: Disk, tmp_path: Path) -> None:
    async with world(disk, tmp_path, github_webhook_secret=SECRET) as it:
        gated = await it.push(GATED)
        await it.at_gate(gated)
        talking = await it.push(TALKING, branch="other")
        await it.working_on(talking, "talk")
        disk.fill()
        acknowledged = await deliver_until_refused(it)
        disk.empty()
        assert (await it.concluded(talking))["conclusion"] == "success"
        log = (await it.http.get(f"/api/v1/runs/{talking}/steps/talk/log")).text.splitlines()
        assert [line for line in log if line.startswith("line")] == [
            f"line {n} {0:0500}" for n in range(1, 201)
        ]
        assert (await it.decide(gated, "approve")).status_code == 200
        assert (await it.concluded(gated))["conclusion"] == "success"
        stored = await it.served.platform.store.read(lambda tx: tx.all(DeliveryRow))
        assert {row.delivery_id for row in stored} >= acknowledged
        assert (await post(it.http, BODY, signed(BODY, "push"))).status_code == 202


async def deliver_until_refused(it: World) -> set[str]:
    """Deliver until there is no room; return what was taken."""
    taken = set[str]()
    for number in range(3000):
        answer = await post(it.http, BODY, signed(BODY, "push", delivery=f"delivery-{number}"))
        if answer.status_code == 503:
            assert "full" in answer.json()["error"]["message"]
            return taken
        assert answer.status_code == 202, answer.text
        taken.add(f"delivery-{number}")
    raise AssertionError("the disk is not full")
