"""Images of containers on a real engine: by name, pulled with progress from a registry, named by digest."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest

from ci_platform.errors import ImageNotFoundError, InvalidInputError, UnavailableError
from ci_platform.images import PinnedImages, read_names
from ci_platform.model import Repository, Run, RunImage
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.sandboxes.container.engine import Engine
from ci_platform.sandboxes.container.images import Images
from ci_platform.store import Store, Transaction
from dynflow.clock import SystemClock
from tests.docker_engine import require_engine
from tests.registry import Registry, serve_registry
from tests.tiny_image import docker, forget_image, make_image

pytestmark = pytest.mark.docker


@pytest.fixture
def registry() -> Iterator[Registry]:
    require_engine()
    with serve_registry() as served:
        yield served


@pytest.fixture
def name(registry: Registry) -> Iterator[str]:
    """An image in the registry that is not on this machine."""
    name = f"{registry.host}/test/tiny:1"
    make_image(name, {"etc/motd": uuid.uuid4().hex})
    docker("push", name)
    forget_image(name)
    yield name
    digests = docker("images", "--digests", "--format", "{{.ID}}", name.rpartition(":")[0])
    forget_image(*digests.split())


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    yield engine
    await engine.close()


def push_another(name: str) -> None:
    make_image(name, {"etc/motd": uuid.uuid4().hex})
    docker("push", name)
    forget_image(name)


async def test_an_image_is_pulled_and_named_by_the_registrys_digest(
    engine: Engine, registry: Registry, name: str
) -> None:
    said: list[str] = []
    exact = await Images(engine, pull=True, every=0).resolve(name, said.append)
    assert exact == f"{registry.host}/test/tiny@{registry.tags['test/tiny:1']}"
    assert said[0] == f"pulling {name}"
    assert any(" MiB, 1 layers" in line for line in said), said
    assert said[-1].startswith(f"pulled {name} in ")


async def test_an_image_that_is_here_is_not_asked_for_again(
    engine: Engine, registry: Registry, name: str
) -> None:
    images = Images(engine, pull=True)
    exact = await images.resolve(name, lambda _: None)
    asked = len(registry.pulled)
    said: list[str] = []
    assert await images.resolve(name, said.append) == exact
    assert (said, len(registry.pulled)) == ([], asked)


async def test_side_by_side_an_image_is_pulled_once(engine: Engine, registry: Registry, name: str) -> None:
    images, said = Images(engine, pull=True), list[str]()

    async def one() -> None:
        await images.resolve(name, said.append)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(one)
    assert [line for line in said if line.startswith("pulling")] == [f"pulling {name}"]


async def test_an_image_made_here_is_named_by_its_id(engine: Engine) -> None:
    require_engine()
    made = make_image("dynflow-test/local:1", {"etc/motd": uuid.uuid4().hex})
    try:
        assert await Images(engine, pull=False).resolve("dynflow-test/local:1", lambda _: None) == made
        assert await Images(engine, pull=False).resolve(made, lambda _: None) == made
    finally:
        forget_image(made)


async def test_an_image_that_no_registry_has_is_an_error_of_its_own_with_the_name(
    engine: Engine, registry: Registry
) -> None:
    for missing in (f"{registry.host}/test/nothing:9", f"{registry.host}/test/nothing@sha256:{'0' * 64}"):
        with pytest.raises(ImageNotFoundError, match=missing) as caught:
            await Images(engine, pull=True).resolve(missing, lambda _: None)
        assert (caught.value.code, caught.value.conclusion) == ("image_not_found", "failure")


@pytest.mark.parametrize(
    "name",
    ["", "UPPER/case", "a b", "x" * 600, "../../etc", "a:b:c", "-flag", "../containers/x", "a?b", "a#b"],
)
async def test_what_cannot_be_an_image_is_refused_by_name(engine: Engine, name: str) -> None:
    require_engine()
    with pytest.raises(ImageNotFoundError, match="cannot be the name"):
        await Images(engine, pull=True).resolve(name, lambda _: None)


async def test_a_registry_that_does_not_do_its_part_is_no_fault_of_the_tenants(
    engine: Engine, registry: Registry
) -> None:
    registry.broken = True
    with pytest.raises(UnavailableError, match="cannot be pulled now"):
        await Images(engine, pull=True).resolve(f"{registry.host}/test/tiny:1", lambda _: None)
    with pytest.raises(UnavailableError, match="refused"):
        await Images(engine, pull=True).resolve("127.0.0.1:9/test/tiny:1", lambda _: None)


async def test_no_registry_is_asked_for_images_of_the_platforms_own(engine: Engine) -> None:
    require_engine()
    with pytest.raises(ImageNotFoundError, match=r"not on this machine \(scripts/build_images"):
        await Images(engine, pull=True).resolve("dynflow/nothing:latest", lambda _: None)


async def test_where_pulling_is_switched_off_the_machines_images_are_all_there_is(
    engine: Engine, name: str
) -> None:
    with pytest.raises(ImageNotFoundError, match="docker pull"):
        await Images(engine, pull=False).resolve(name, lambda _: None)


# --- what a run remembers ---


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'platform.db'}")
    await store.open()
    now = SystemClock().now()

    def add(tx: Transaction) -> None:
        tx.add(Repository(name="o/r", forge="local", created_at=now))
        for number in (1, 2):
            tx.add(
                Run(
                    id=f"run{number}",
                    repo="o/r",
                    number=number,
                    event="push",
                    action="push",
                    sha="a" * 40,
                    ref="refs/heads/main",
                    branch="main",
                    created_at=now,
                )
            )

    await store.write(add)
    yield store
    await store.close()


async def test_a_name_means_the_same_image_for_the_whole_run(
    store: Store, registry: Registry, name: str
) -> None:
    sandbox = ContainerSandbox(pull=True)
    pins, said = PinnedImages(store, SystemClock()), list[str]()
    first = await pins.pin(sandbox, "run1", name, said.append)
    assert said[-1] == f"image {name} is {first}, for the whole run"
    forget_image(name, first)
    push_another(name)
    # A later step, or a rerun, of the same run; and one after a restart, which knows nothing but the database.
    assert await pins.pin(sandbox, "run1", name, said.append) == first
    assert await PinnedImages(store, SystemClock()).pin(sandbox, "run1", name, said.append) == first
    assert await pins.pin(sandbox, "run2", name, said.append) != first
    rows = await store.read(lambda tx: tx.all(RunImage))
    assert {(row.run_id, row.name): row.exact == first for row in rows} == {
        ("run1", name): True,
        ("run2", name): False,
    }
    await sandbox.close()


async def test_a_short_name_stands_for_an_image(store: Store, name: str) -> None:
    sandbox = ContainerSandbox(named={"tiny": name}, image="tiny", pull=True)
    pins = PinnedImages(store, SystemClock())
    exact = await pins.pin(sandbox, "run1", "tiny", lambda _: None)
    assert "@sha256:" in exact
    assert await pins.pin(sandbox, "run1", None, lambda _: None) == exact
    await sandbox.close()


def test_the_images_file_gives_names(tmp_path: Path) -> None:
    file = tmp_path / "images.toml"
    file.write_text('[base]\nsuite = "bookworm"\n[db]\nreference = "postgres:16"\n')
    assert read_names(file) == {"base": "dynflow/base:latest", "db": "postgres:16"}
    assert read_names(None)["python"] == "dynflow/python:latest"
    file.write_text("[base\n")
    with pytest.raises(InvalidInputError, match=r"images\.toml"):
        read_names(file)
