"""What all isolates of a loader may take together, where the host may make control groups."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from dynflow.errors import IsolateError, IsolateLimitError
from dynflow.isolates import Capability, ProcessLoader, WorkerCode, cgroup, describe_walls, zygotes

MEBIBYTE = 1024 * 1024


@pytest.fixture(autouse=True)
def may_make_groups() -> None:
    if describe_walls()["cgroup"] != "up":
        pytest.skip("this user may make no control group here")


def left_over(owner: int | None = None) -> list[Path]:
    """Return the groups of a process, None: of this one; others on this machine have theirs."""
    homes = {*cgroup._homes_v1(), *cgroup._homes_v2()}
    return [folder for home in homes for folder in home.glob(f"isolates-{owner or os.getpid()}-*")]


class Meet(Capability):
    def __init__(self, expected: int) -> None:
        self.here, self.expected = 0, expected
        self.all_here = asyncio.Event()

    async def wait(self) -> None:
        self.here += 1
        if self.here == self.expected:
            self.all_here.set()
        await self.all_here.wait()


SOURCE = """
async def fetch(request, env):
    held = bytearray(request.json())
    for page in range(0, len(held), 4096):
        held[page] = 1
    await env.MEET.wait()
    return len(held)
"""


def stubs(loader: ProcessLoader, count: int, meet: Meet) -> list[Any]:
    code = WorkerCode("index.py", {"index.py": SOURCE}, env={"MEET": meet})
    return [loader.load(code).get_entrypoint() for _ in range(count)]


async def answer_once_there_is_room(loader: ProcessLoader) -> Any:
    """Call until those that have just ended are gone for the kernel, too."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(IsolateError):
                return await stubs(loader, 1, Meet(1))[0].fetch(2)


async def test_memory_of_all_isolates_together_has_an_end() -> None:
    before = left_over()
    async with ProcessLoader(ready=0, total_memory=300 * MEBIBYTE) as loader:
        assert "cgroup" in loader.walls
        calls = [stub.fetch(120 * MEBIBYTE) for stub in stubs(loader, 3, Meet(3))]
        running = [asyncio.ensure_future(call) for call in calls]
        done, others = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        error = next(iter(done)).exception()
        assert isinstance(error, IsolateLimitError)
        assert error.limit == "memory"
        for call in others:
            call.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert await stubs(loader, 1, Meet(1))[0].fetch(MEBIBYTE) == MEBIBYTE  # the next tenant is served
    assert left_over() == before


async def test_where_there_is_no_room_for_another_isolate_its_call_fails_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zygotes, "_TASKS", 5)  # the outer process, the zygote, three isolates
    async with ProcessLoader(ready=0, warm=0) as loader:
        meet = Meet(4)
        calls = [asyncio.ensure_future(stub.fetch(1)) for stub in stubs(loader, 3, meet)]
        more = [stub.fetch(1) for stub in stubs(loader, 3, Meet(9))]
        refused = await asyncio.gather(*more, return_exceptions=True)
        assert all(isinstance(error, IsolateError) and "no room" in str(error) for error in refused), refused
        meet.all_here.set()
        assert await asyncio.gather(*calls) == [1, 1, 1]
        assert await answer_once_there_is_room(loader) == 2


def test_groups_of_hosts_that_were_killed_are_removed() -> None:
    group = cgroup.IsolateGroup.create(MEBIBYTE * 100, 10)
    assert group is not None
    killed = 900_000_000 + os.getpid()  # no process has such a number, and no other run of this test
    for folder in group.folders:
        (folder.parent / f"isolates-{killed}-1-1").mkdir()
    other = cgroup.IsolateGroup.create(MEBIBYTE * 100, 10)
    assert other is not None
    assert left_over(killed) == []
    assert all(folder.is_dir() for folder in group.folders)  # its host lives
    group.close()
    other.close()
    assert not any(folder.exists() for folder in (*group.folders, *other.folders))
