"""Every dangerous system call, by its number, past all of Python: it is the filter that refuses it.

Each is tried twice, with all walls and with all but the filter: what EPERM says the first time is then something else,
or it is named what else refuses it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynflow.errors import IsolateCrashedError
from dynflow.isolates import ProcessLoader
from dynflow.isolates.confinement import WALLS
from tests.security.support import PROBER, tenant
from tests.security.system_calls import ATTEMPTS, Attempt

_HERE = [attempt for attempt in ATTEMPTS if attempt.call() is not None]
_SEEN = [attempt for attempt in _HERE if attempt.also is None]


def by_name(attempts: list[Attempt]) -> dict[str, Any]:
    return {attempt.name: attempt.call() for attempt in attempts}


@pytest.fixture(scope="module")
async def confined() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader(ready=0) as loader:
        yield loader


@pytest.fixture(scope="module")
async def refused(confined: ProcessLoader) -> Any:
    return await tenant(confined, PROBER).call("try_calls", by_name(_HERE))


@pytest.fixture(scope="module")
async def without_filter() -> Any:
    async with ProcessLoader(walls=set(WALLS) - {"seccomp"}, allow_unconfined=True, ready=0) as loader:
        yield await tenant(loader, PROBER).call("try_calls", by_name(_SEEN))


@pytest.mark.parametrize("attempt", _HERE, ids=lambda attempt: attempt.name)
async def test_a_dangerous_system_call_is_refused_by_the_filter(refused: Any, attempt: Attempt) -> None:
    assert refused[attempt.name] == "EPERM"


@pytest.mark.parametrize("attempt", _SEEN, ids=lambda attempt: attempt.name)
async def test_it_is_the_filter_and_nothing_else_that_refuses_it(
    without_filter: Any, attempt: Attempt
) -> None:
    assert without_filter[attempt.name] != "EPERM"


async def test_a_newer_way_to_fork_does_not_exist(confined: ProcessLoader) -> None:
    # ENOSYS and not EPERM: the C library then falls back to clone, which is refused.
    assert await tenant(confined, PROBER).call("try_calls", {"clone3": [435, 0, 0]}) == {"clone3": "ENOSYS"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86_64 has three tables of system calls")
@pytest.mark.parametrize("number", [0, 59, 520, 545])  # read; execve, the old and the own one; recvmsg
async def test_numbers_of_the_x32_table_kill(confined: ProcessLoader, number: int) -> None:
    with pytest.raises(IsolateCrashedError, match="SIGSYS"):
        await tenant(confined, PROBER).call("x32", number)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86_64 has three tables of system calls")
async def test_the_door_for_32_bit_programs_kills(confined: ProcessLoader) -> None:
    if await tenant(confined, PROBER).call("gadget") is None:
        pytest.skip("this C library has no such instruction in it")
    with pytest.raises(IsolateCrashedError, match="SIGSYS"):
        await tenant(confined, PROBER).call("int80")
