"""Who gets in, and what is kept of a token."""

from __future__ import annotations

import base64
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ci_platform.access import Access
from ci_platform.errors import ForbiddenError, InvalidInputError, NotFoundError, UnauthorizedError
from ci_platform.model import Repository, Token
from ci_platform.store import Store, col
from dynflow.clock import ManualClock


@pytest.fixture
def access(store: Store, clock: ManualClock) -> Access:
    return Access(store, clock)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_a_token_gets_its_bearer_in_under_the_tokens_name(access: Access) -> None:
    _, secret = await access.create("alice", ("write",))
    for header in (f"Bearer {secret}", f"bearer  {secret} ", basic("git", secret), basic("", secret)):
        actor = await access.authenticate(header)
        assert (actor.name, sorted(actor.scopes)) == ("alice", ["read", "write"])


async def test_a_scope_holds_those_below_it_and_no_other(access: Access) -> None:
    _, secret = await access.create("alice", ("write",))
    actor = await access.authenticate(f"Bearer {secret}")
    actor.require("read")
    actor.require("write")
    with pytest.raises(ForbiddenError, match="admin"):
        actor.require("admin")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer nonsense", "Basic !", "Basic ", basic("u", ""), "Digest x", "é"],
)
async def test_anything_else_is_refused(access: Access, header: str | None) -> None:
    await access.create("alice")
    with pytest.raises(UnauthorizedError):
        await access.authenticate(header)


async def test_a_revoked_token_is_refused(access: Access) -> None:
    view, secret = await access.create("alice")
    await access.revoke(view.id)
    await access.revoke(view.id)
    with pytest.raises(UnauthorizedError):
        await access.authenticate(f"Bearer {secret}")


@pytest.mark.parametrize("token_id", [0, -1, 99, 2**40])
async def test_a_token_that_is_not_there_cannot_be_revoked(access: Access, token_id: int) -> None:
    with pytest.raises(NotFoundError):
        await access.revoke(token_id)


async def test_the_secret_is_kept_nowhere(access: Access, store: Store) -> None:
    _, secret = await access.create("alice")
    rows = await store.read(lambda tx: tx.all(Token))
    assert secret not in repr(rows)
    assert secret not in repr(await access.list())


async def test_names_are_unique_among_tokens_in_use(access: Access) -> None:
    view, _ = await access.create("alice")
    with pytest.raises(InvalidInputError, match="already"):
        await access.create("alice")
    await access.revoke(view.id)
    await access.create("alice")


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "x" * 101, "<b>", "-a", "é"])
async def test_a_name_that_could_mislead_is_refused(access: Access, name: str) -> None:
    with pytest.raises(InvalidInputError):
        await access.create(name)


@pytest.mark.parametrize("scopes", [(), ("root",), ("read", "")])
async def test_scopes_that_are_not_there_are_refused(access: Access, scopes: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInputError):
        await access.create("alice", scopes)


async def test_use_is_noted_to_the_minute(access: Access, clock: ManualClock) -> None:
    _, secret = await access.create("alice")
    start = clock.now()
    for seconds in (0, 30, 45):
        clock.advance(seconds)
        await access.authenticate(f"Bearer {secret}")
    (view,) = await access.list()
    assert view.last_used_at == start + timedelta(seconds=75)


async def test_the_local_token_is_made_once_and_is_its_owners_alone(access: Access, tmp_path: Path) -> None:
    path = tmp_path / "token"
    first = await access.ensure_local_token(path)
    assert await access.ensure_local_token(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (await access.authenticate(f"Bearer {first}")).require("admin")


async def test_a_lost_local_token_is_replaced_and_the_old_one_is_void(access: Access, tmp_path: Path) -> None:
    path = tmp_path / "token"
    first = await access.ensure_local_token(path)
    path.unlink()
    second = await access.ensure_local_token(path)
    await access.authenticate(f"Bearer {second}")
    with pytest.raises(UnauthorizedError):
        await access.authenticate(f"Bearer {first}")


async def test_a_token_of_one_repository_opens_nothing_else(access: Access) -> None:
    view, secret = await access.create("robot", ("write",), repo="o/r")
    assert view.repo == "o/r"
    actor = await access.authenticate(basic("git", secret), repo="o/r")
    assert sorted(actor.scopes) == ["read", "write"]
    for other in ("o/r2", "O/R", None):
        with pytest.raises(ForbiddenError, match="o/r alone"):
            await access.authenticate(basic("git", secret), repo=other)
    with pytest.raises(UnauthorizedError):
        await access.resume(view.id)


async def test_a_token_of_a_repository_that_is_not_there_is_refused(access: Access, store: Store) -> None:
    with pytest.raises(NotFoundError):
        await access.create("robot", repo="no/where")
    gone = {"deleted_at": datetime(2026, 1, 1, tzinfo=UTC)}
    await store.write(lambda tx: tx.change(Repository, gone, col(Repository.name) == "o/r"))
    with pytest.raises(NotFoundError):
        await access.create("robot", repo="o/r")


async def test_an_expired_token_is_refused_and_its_name_is_free(access: Access, clock: ManualClock) -> None:
    view, secret = await access.create("alice", lifetime=timedelta(days=1))
    clock.advance(86_399)
    await access.authenticate(f"Bearer {secret}")
    clock.advance(1)
    with pytest.raises(UnauthorizedError, match="expired"):
        await access.authenticate(f"Bearer {secret}")
    with pytest.raises(UnauthorizedError):
        await access.resume(view.id)
    await access.create("alice")


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(seconds=-1), timedelta(days=100_000)])
async def test_a_lifetime_that_cannot_be_meant_is_refused(access: Access, lifetime: timedelta) -> None:
    with pytest.raises(InvalidInputError):
        await access.create("alice", lifetime=lifetime)


async def test_all_tokens_of_a_repository_are_revoked_and_no_other(access: Access) -> None:
    _, one = await access.create("one", repo="o/r")
    _, other = await access.create("other")
    await access.revoke_all_of("o/r")
    with pytest.raises(UnauthorizedError):
        await access.authenticate(f"Bearer {one}", repo="o/r")
    await access.authenticate(f"Bearer {other}")
