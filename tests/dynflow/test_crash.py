"""A process is killed at every journal operation in turn, before and after its commit, and started again."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("crashing.py")
ROOT = Path(__file__).parents[2]
EXPECTED = "['a', 'b', 'c', 'd', [0, 1], 'e']"
# Each process runs for a second or so and mostly waits for its own start.
AT_A_TIME = 4


async def run(folder: Path, number: int, moment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, folder / "flow.db", folder / "effects", str(number), moment,
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def operations(output: str) -> int:
    found = re.fullmatch(r"(\[.*\]) (\d+)\n", output)
    assert found is not None, output
    assert found[1] == EXPECTED
    return int(found[2])


def check_effects(folder: Path, killed: int) -> None:
    attempts: dict[str, list[int]] = {}
    for line in (folder / "effects").read_text().splitlines():
        name, attempt = line.split()
        attempts.setdefault(name, []).append(int(attempt))
    # Attempt numbers grow: none is used twice.
    for name, numbers in attempts.items():
        assert numbers == sorted(set(numbers)), (name, numbers)
    # Only what the kill cut off, or what lost its answer by it, was done again: one step attempt per kill, or the
    # two that ran in parallel.
    repeated = Counter({name: len(numbers) - 1 - (name == "flaky") for name, numbers in attempts.items()})
    assert sum(repeated.values()) <= 2 * killed, attempts
    assert all(count <= killed for count in repeated.values()), attempts


async def test_an_undisturbed_run_does_everything_once(tmp_path: Path) -> None:
    code, out, err = await run(tmp_path, 0, "before")
    assert code == 0, err
    assert operations(out) > 15
    check_effects(tmp_path, 0)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.timeout(300)
async def test_killed_at_every_operation_the_workflow_ends_the_same(tmp_path: Path, moment: str) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    _, out, _ = await run(undisturbed, 0, moment)
    total, turn = operations(out), asyncio.Semaphore(AT_A_TIME)

    async def kill_at(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        async with turn:
            code, _, err = await run(folder, number, moment)
            # Timing decides how operations are grouped, so a few less than `total` may happen.
            if code == 0:
                assert number > total - 6, (number, total)
                return
            assert code == -signal.SIGKILL, err
            code, out, err = await run(folder, 0, moment)
        assert code == 0, err
        operations(out)
        check_effects(folder, 1)

    await asyncio.gather(*(kill_at(number) for number in range(1, total + 1)))


@pytest.mark.slow
async def test_killed_again_and_again_it_still_ends_the_same(tmp_path: Path) -> None:
    kills = 0
    for number in (3, 2, 4, 3, 5, 3, 2, 4, 6, 3, 5):
        code, out, err = await run(tmp_path, number, "after" if number % 2 else "before")
        if code == 0:
            operations(out)
            break
        assert code == -signal.SIGKILL, err
        kills += 1
    code, out, err = await run(tmp_path, 0, "before")
    assert code == 0, err
    assert out.startswith(EXPECTED)
    check_effects(tmp_path, kills)
