"""Which repositories can be registered."""

from __future__ import annotations

import pytest

from ci_platform.errors import ConflictError, InvalidInputError, NotFoundError
from ci_platform.repositories import Repositories
from ci_platform.store import Store
from dynflow.clock import ManualClock


@pytest.fixture
def repositories(store: Store, clock: ManualClock) -> Repositories:
    return Repositories(store, ["github", "local"], clock)


async def test_a_registered_repository_is_found(repositories: Repositories) -> None:
    made = await repositories.register("octo/Hello-World", forge="github", default_branch="master")
    assert await repositories.get("octo/Hello-World") == made
    assert [one.name for one in await repositories.list()] == ["o/r", "octo/Hello-World"]


async def test_registering_the_same_again_answers_the_same(repositories: Repositories) -> None:
    first = await repositories.register("a/b", forge="github")
    assert await repositories.register("a/b", forge="github") == first


@pytest.mark.parametrize(("name", "forge"), [("O/R", "local"), ("o/r", "github")])
async def test_a_name_is_taken_once_whatever_its_case(
    repositories: Repositories, name: str, forge: str
) -> None:
    with pytest.raises(ConflictError):
        await repositories.register(name, forge=forge)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        "a/",
        "/b",
        "a/b/c",
        "a/..",
        "a/.",
        "../b",
        "a/b.git",
        "-a/b",
        "a/b c",
        "a/b\n",
        "a/\x00",
        "é/b",
        "_a/b",
    ],
)
async def test_a_name_that_is_none_is_refused(repositories: Repositories, name: str) -> None:
    with pytest.raises(InvalidInputError):
        await repositories.register(name, forge="github")


@pytest.mark.parametrize("branch", ["", "-b", "a..b", "a b", "a~1", "a:b", "a/", "x" * 300, "a\n", "@{u}"])
async def test_a_branch_that_git_would_refuse_is_refused(repositories: Repositories, branch: str) -> None:
    with pytest.raises(InvalidInputError):
        await repositories.register("a/b", forge="github", default_branch=branch)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ext::sh -c id",
        "ssh://h/r",
        "-oProxyCommand=id",
        "/etc",
        "https://u:p@h/r",
        "https://token@h/r",
        "https://h",
        "https://h/a b",
        "http://[::1/x",
    ],
)
async def test_a_clone_url_that_could_do_harm_is_refused(repositories: Repositories, url: str) -> None:
    with pytest.raises(InvalidInputError):
        await repositories.register("a/b", forge="github", clone_url=url)


async def test_a_forge_that_is_not_there_is_refused(repositories: Repositories) -> None:
    with pytest.raises(InvalidInputError, match="github, local"):
        await repositories.register("a/b", forge="gitlab")


async def test_a_repository_can_be_disabled_and_enabled(repositories: Repositories) -> None:
    assert (await repositories.set_enabled("o/r", enabled=False)).enabled is False
    assert (await repositories.set_enabled("o/r", enabled=True)).enabled is True
    with pytest.raises(NotFoundError):
        await repositories.set_enabled("no/where", enabled=True)


async def test_what_is_not_registered_is_not_found(repositories: Repositories) -> None:
    with pytest.raises(NotFoundError):
        await repositories.get("no/where")
