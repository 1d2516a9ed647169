"""Each attack of the hostile tenant fails behind the walls, and works without them."""

from __future__ import annotations

import ast
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynflow.errors import InstanceFailedError, InvalidArgumentError
from dynflow.isolates import ProcessLoader, WorkerCode
from dynflow.isolates.confinement import ESSENTIAL, WALLS
from tests.dynflow.isolates.support import HOSTILE, host_to_attack, hostile, without_walls

_NO_ATTACKS = {"syscall"}
_OTHER_TESTS = [
    "environment",
    "open_descriptors",
    "everything_in_sight",
    "arguments_and_paths",
    "spin",
    "spin_while_claiming_to_wait",
    "take_memory",
    "take_memory_and_hide_it",
    "print_without_end",
    "recurse",
    "answer_with_a_giant",
    "crash",
    "leave",
    "ignore_signals",
    "write_to_the_host",
]
ATTACKS = [
    node.name
    for node in ast.parse(HOSTILE).body
    if isinstance(node, ast.FunctionDef) and node.name not in {*_NO_ATTACKS, *_OTHER_TESTS}
]
# Not worth a control: they need more than root, or what this kernel was built with.
_ROOT_ONLY = {
    "mount_something",
    "set_the_host_name",
    "climb_out_with_chroot",
    "unshare_in_place",
    "become_root",
}
_ROOT_ONLY |= {"enter_a_namespace", "load_a_bpf_program", "create_a_file_beside_the_standard_library"}
_ROOT_ONLY |= {"raise_ones_own_limits", "watch_performance_counters"}


@pytest.fixture(scope="module")
def about(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with host_to_attack(tmp_path_factory.mktemp("host")) as told:
        yield told


@pytest.fixture(scope="module")
async def confined() -> AsyncIterator[ProcessLoader]:
    async with ProcessLoader() as loader:
        yield loader


@pytest.fixture(scope="module")
async def open_to_all() -> AsyncIterator[ProcessLoader]:
    async with without_walls() as loader:
        yield loader


def left_in(about: dict[str, Any]) -> list[str]:
    """Return what is in the host's folder, and remove what an attack has left there."""
    names = sorted(path.name for path in Path(about["folder"]).iterdir())
    Path(about["folder"], "written").unlink(missing_ok=True)
    return names


async def test_all_walls_are_up(confined: ProcessLoader) -> None:
    assert set(confined.walls) >= ESSENTIAL


@pytest.mark.parametrize("attack", ATTACKS)
async def test_the_attack_fails_behind_the_walls(
    confined: ProcessLoader, about: dict[str, Any], attack: str
) -> None:
    with pytest.raises(
        (OSError, RuntimeError, ValueError, InstanceFailedError, StopIteration, ZeroDivisionError)
    ):
        await hostile(confined).get_entrypoint().call(attack, about)
    assert left_in(about) == ["file", "socket"]


@pytest.mark.parametrize("attack", ATTACKS)
async def test_the_attack_works_without_the_walls(
    open_to_all: ProcessLoader, about: dict[str, Any], attack: str
) -> None:
    if attack in _ROOT_ONLY and os.geteuid() != 0:
        pytest.skip("works for root only")
    try:
        assert await hostile(open_to_all, attack).get_entrypoint().call(attack, about) is not None
    except (OSError, ValueError, ZeroDivisionError) as error:
        pytest.skip(f"this host refuses it to everybody: {error}")
    finally:
        left_in(about)


async def test_an_isolate_has_no_environment_no_arguments_and_four_descriptors(
    confined: ProcessLoader,
) -> None:
    assert os.environ  # there is something that could leak
    stub = hostile(confined).get_entrypoint()
    assert await stub.environment({}) == {}
    assert await stub.open_descriptors({}) == [0, 1, 2, 3]
    arguments, _, _, folder = await stub.arguments_and_paths({})
    assert (arguments, folder) == ([""], "/")


async def test_an_isolate_sees_the_standard_library_and_nothing_else(confined: ProcessLoader) -> None:
    library = str(Path(ast.__file__).parent)
    seen = await hostile(confined).get_entrypoint().everything_in_sight({})
    assert [path for path in seen if not path.startswith((library, "/usr/share/zoneinfo"))] == []
    assert [path for path in seen if "site-packages" in path or "dist-packages" in path] == []


async def test_a_tenant_does_not_meet_what_another_left_behind(confined: ProcessLoader) -> None:
    source = "import builtins\ndef leave(): builtins.left = 1\ndef look(): return hasattr(builtins, 'left')"
    first = confined.get("first", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    second = confined.get("second", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    await first.leave()
    assert await first.look() is True
    assert await second.look() is False


async def test_stdlib_modules_can_be_imported_behind_the_walls(confined: ProcessLoader) -> None:
    names = "asyncio json re datetime decimal hashlib tomllib csv sqlite3 statistics uuid pipelines dynflow graphlib"
    source = f"""
import importlib
def load():
    found = []
    for name in {names!r}.split():
        try:
            importlib.import_module(name)
        except ImportError:
            found.append(name)
    import zoneinfo
    return [found, zoneinfo.ZoneInfo("Europe/Vienna").key, importlib.import_module("wave").__name__]
"""
    stub = confined.get("imports", lambda: WorkerCode("index.py", {"index.py": source})).get_entrypoint()
    assert await stub.load() == [["sqlite3"], "Europe/Vienna", "wave"]


def test_a_loader_without_essential_walls_must_be_asked_for_by_name() -> None:
    with pytest.raises(InvalidArgumentError, match=r"need the walls namespaces.*allow_unconfined=True"):
        ProcessLoader(walls=set(WALLS) - {"namespaces"})
