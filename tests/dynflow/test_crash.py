"""A process is killed at every journal operation in turn, before and after its commit, and started again."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.dynflow.crashing import SCENARIOS, Ended, Moment, run

OUTCOMES = {
    "saga": "['a', 'b', 'c', 'd', [0, 1], 'e']",
    "undone": "no taxi, pity, rollback complete",
}
# They mostly wait for the disk.
AT_A_TIME = 4

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS)


def check(ended: Ended, scenario: str) -> None:
    assert ended.code == 0, ended.said
    assert ended.outcome == OUTCOMES[scenario]


def check_effects(folder: Path, scenario: str, killed: int) -> None:
    attempts: dict[str, list[int]] = {}
    for line in (folder / "effects").read_text().splitlines():
        name, attempt = line.split()
        attempts.setdefault(name, []).append(int(attempt))
    # Attempt numbers grow: none is used twice.
    for name, numbers in attempts.items():
        assert numbers == sorted(set(numbers)), (name, numbers)
    # Only what the kill cut off, or what lost its answer by it, was done again: one step attempt per kill, or
    # those that ran side by side or within each other.
    repeated = Counter({name: len(numbers) - 1 - (name == "flaky") for name, numbers in attempts.items()})
    assert sum(repeated.values()) <= 3 * killed, attempts
    assert all(count <= killed for count in repeated.values()), attempts
    # As in the undisturbed run: each at least once, and undone in the opposite order.
    expected = {
        "saga": ["first", "flaky", "outer", "inner", "fails", "last"],
        "undone": ["flight", "hotel", "car", "undo-car", "undo-hotel", "undo-flight"],
    }[scenario]
    assert set(attempts) == set(expected)
    assert [name for name in attempts if "undo" in name] == [name for name in expected if "undo" in name]


@each_scenario
async def test_an_undisturbed_run_does_everything_once(tmp_path: Path, scenario: str) -> None:
    ended = await run(tmp_path, scenario, 0, "before")
    check(ended, scenario)
    assert ended.operations > 12
    check_effects(tmp_path, scenario, 0)


@pytest.mark.slow
@each_scenario
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.timeout(300)
async def test_killed_at_every_operation_the_workflow_ends_the_same(
    tmp_path: Path, scenario: str, moment: Moment
) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    total, turn = (await run(undisturbed, scenario, 0, moment)).operations, asyncio.Semaphore(AT_A_TIME)

    async def kill_at(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        async with turn:
            ended = await run(folder, scenario, number, moment)
            # Timing decides how operations are grouped, so a few less than `total` may happen.
            if ended.code == 0:
                assert number > total - 6, (number, total)
                return
            assert ended.code == -signal.SIGKILL, ended.said
            check(await run(folder, scenario, 0, moment), scenario)
        check_effects(folder, scenario, 1)

    await asyncio.gather(*(kill_at(number) for number in range(1, total + 1)))


@pytest.mark.slow
@each_scenario
async def test_killed_again_and_again_it_still_ends_the_same(tmp_path: Path, scenario: str) -> None:
    kills = 0
    for number in (3, 2, 4, 3, 5, 3, 2, 4, 6, 3, 5):
        ended = await run(tmp_path, scenario, number, "after" if number % 2 else "before")
        if ended.code == 0:
            check(ended, scenario)
            break
        assert ended.code == -signal.SIGKILL, ended.said
        kills += 1
    check(await run(tmp_path, scenario, 0, "before"), scenario)
    check_effects(tmp_path, scenario, kills)
