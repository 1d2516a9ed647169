"""The composition root's own part: services go on when what they need has been away."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from ci_platform import data_lock, services
from ci_platform.errors import ConflictError, InvalidInputError, UnavailableError


@pytest.mark.parametrize("nested", [False, True])
async def test_a_service_whose_database_was_away_begins_again(
    monkeypatch: pytest.MonkeyPatch,
    nested: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    monkeypatch.setattr(services, "_PAUSE_SECONDS", 0)
    begun: list[int] = []
    twice = anyio.Event()

    async def serve() -> None:
        begun.append(len(begun))
        if len(begun) == 1:
            error = UnavailableError("the database does not answer: database or disk is full")
            raise ExceptionGroup("in a task", [error]) if nested else error
        twice.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(services.kept_up, serve)
        with anyio.fail_after(10):
            await twice.wait()
        group.cancel_scope.cancel()
    assert begun == [0, 1]


async def test_a_defect_of_a_service_ends_the_platform() -> None:
    async def serve() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await services.kept_up(serve)


def test_one_process_holds_a_data_folder(tmp_path: Path) -> None:
    with data_lock.held(tmp_path), pytest.raises(ConflictError, match="in use"), data_lock.held(tmp_path):
        raise AssertionError("held twice")
    with data_lock.held(tmp_path):
        pass
    with pytest.raises(InvalidInputError, match="No such file"), data_lock.held(tmp_path / "nowhere"):
        raise AssertionError("held what is not there")
