"""Submodules in workspaces: whole, clean and shared; read by leave alone; named by hostile commits."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ci_platform import layers, submodules
from ci_platform.cones import Cone
from ci_platform.copy_on_write import MethodName
from ci_platform.errors import (
    ConflictError,
    FailedError,
    ForbiddenError,
    LimitExceededError,
    NotFoundError,
    PlatformError,
)
from ci_platform.guarded import Guard
from ci_platform.source.names import is_module_mirror
from ci_platform.submodules import Declared
from tests.ci_platform.forge_server import TOKEN, Asked
from tests.ci_platform.git_repositories import Script, WorkingCopy
from tests.ci_platform.grafting import OWN, REPO, Platform, opened_platform

CLEAN = "git status --porcelain; git diff; git diff --cached; git submodule --quiet foreach --recursive git status -s"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Platform]:
    async with opened_platform(tmp_path) as opened:
        yield opened


def add(into: WorkingCopy, path: str, url: str, sha: str, name: str | None = None) -> str:
    """Commit a submodule, past all that git would say to it."""
    key = f"submodule.{name or path}"
    into.git("config", "--file", ".gitmodules", f"{key}.path", path)
    into.git("config", "--file", ".gitmodules", f"{key}.url", url)
    into.git("add", ".gitmodules")
    into.git("update-index", "--add", "--cacheinfo", f"160000,{sha},{path}")
    into.git("commit", "--quiet", "--message", "submodule")
    return into.git("rev-parse", "HEAD")


def write(into: WorkingCopy, text: str, path: str = "vendor/lib", sha: str = "1" * 40) -> str:
    (into.path / ".gitmodules").write_text(text)
    into.git("add", ".gitmodules")
    into.git("update-index", "--add", "--cacheinfo", f"160000,{sha},{path}")
    into.git("commit", "--quiet", "--message", "submodule")
    return into.git("rev-parse", "HEAD")


@pytest.mark.parametrize("method", [None, "copy"])
async def test_submodules_are_there_with_their_own_and_all_is_clean(
    tmp_path: Path, method: MethodName | None
) -> None:
    async with opened_platform(tmp_path, method) as world:
        inner, lib = world.forge.repository("bob/inner"), world.forge.repository("bob/lib")
        deep = inner.commit({"deep.txt": b"deep", "x/y": b"z"})
        lib.commit({"run.sh": Script(b"#!/bin/sh\necho hello"), "src/a.c": b"int a;"})
        middle = add(lib, "third/inner", "../inner.git", deep)
        app = await world.register(REPO)
        app.commit({"main": b"1", "libs/README": b"mine"})
        sha = add(app, "libs/lib", "../../bob/lib.git", middle, name="the lib")
        sha = add(app, "inner", world.forge.address("bob/inner"), deep)
        workspace = await world.fork(sha)
        assert await world.run(workspace, CLEAN) == ""
        listed = await world.run(workspace, "git submodule status --recursive")
        assert [line.split()[:2] for line in listed.splitlines()] == [
            [deep, "inner"], [middle, "libs/lib"], [deep, "libs/lib/third/inner"],
        ]  # fmt: skip
        assert not [line for line in listed.splitlines() if line[0] != " "], "in use, and at the right commit"
        shown = await world.run(workspace, "./libs/lib/run.sh; cat libs/lib/third/inner/deep.txt libs/README")
        assert shown == "hello\ndeepmine"
        changed = (
            "echo x >> libs/lib/src/a.c; rm inner/deep.txt; git status --porcelain; cd inner; git status -s"
        )
        assert await world.run(workspace, changed) == " M inner\n M libs/lib\n D deep.txt\n"
        first = (await world.workspaces._base(world.workspaces._stack(workspace)))[0]
        (app.path / "main").write_text("2")
        app.git("commit", "--quiet", "--message", "later", "main")
        later = app.git("rev-parse", "HEAD")
        again = await world.fork(later)
        assert (await world.workspaces._base(world.workspaces._stack(again)))[0] == first, "shared"
        assert await world.run(again, CLEAN + "; cat main inner/deep.txt") == "2deep"


async def test_what_all_submodules_of_a_commit_bring_together_has_an_end(world: Platform) -> None:
    app, sha = await world.register(REPO), ""
    for name in ("one", "two"):
        large = world.forge.repository(f"bob/{name}").commit({"random": os.urandom(60_000)})
        sha = add(app, name, f"../../bob/{name}.git", large)
    world.with_guard(Guard([world.forge.host], most=100_000))
    with pytest.raises(LimitExceededError, match=r"'two' .* 100,000 bytes together .*max_fetch"):
        await world.fork(sha)
    # What came is here, and whoever may bring as much as is left has all of it.
    workspace = await world.fork(sha)
    assert await world.run(workspace, "cat */random | wc -c") == "120000\n"


async def test_without_being_asked_for_folders_of_submodules_are_empty(world: Platform) -> None:
    app = await world.register(REPO)
    sha = add(app, "lib", "../../bob/lib.git", "1" * 40)
    workspace = await world.fork(sha, submodules=False)
    assert await world.run(workspace, "ls -A lib; git status --porcelain") == ""
    with pytest.raises(ConflictError, match="submodules"):
        await world.workspaces.fork(workspace, REPO, sha, submodules=True)
    assert [asked for asked in world.forge.asked if "bob" in asked.path] == []


async def test_a_sparse_fork_fetches_the_submodules_inside_of_it_alone(world: Platform) -> None:
    lib = world.forge.repository("bob/lib")
    one = lib.commit({"a": b"1"})
    app = await world.register(REPO)
    add(app, "wanted/lib", "../../bob/lib.git", one)
    sha = add(app, "other/lib", "../../bob/nowhere.git", one)
    workspace = await world.fork(sha, cone=Cone.of(["wanted"]))
    assert await world.run(workspace, f"ls; cat wanted/lib/a; {CLEAN}") == "wanted\n1"


# Who may read what


async def test_a_private_repository_is_read_as_a_submodule_by_leave_alone(world: Platform) -> None:
    secret = await world.register("bob/secret")
    hidden = secret.commit({"key": b"SECRET"})
    world.forge.private |= {"bob/secret", REPO}
    app, other = await world.register(REPO), await world.register("eve/app")
    sha, evil = (
        add(app, "lib", "../../bob/secret.git", hidden),
        add(other, "lib", "../../bob/secret.git", hidden),
    )
    with pytest.raises(FailedError, match=r"'lib'.*bob/secret.*credentials"):
        await world.fork(sha)
    assert [a for a in world.forge.asked if a.path.startswith("/bob/secret") and world.forge.who(a)] == []
    await world.repositories.change(REPO, reads=["bob/secret"])
    workspace = await world.fork(sha)
    assert await world.run(workspace, "cat lib/key") == "SECRET"
    config = await world.run(workspace, "cat .git/config .git/modules/lib/config; env")
    assert TOKEN not in config
    # It is here now, and all the same nobody else's.
    with pytest.raises(FailedError, match="credentials"):
        await world.fork(evil, "eve/app")
    # Nor that of who may open a pull request from a fork, with an address of their choice.
    with pytest.raises(PlatformError, match="lib"):
        await world.fork(sha, alone=True)
    await world.repositories.change(REPO, reads=[])
    with pytest.raises(FailedError, match="credentials"):
        await world.fork(sha)


async def test_what_one_repository_fetched_is_no_other_repositorys(world: Platform) -> None:
    lib = world.forge.repository("bob/lib")
    one = lib.commit({"a": b"public, today"})
    app, other = await world.register(REPO), await world.register("eve/app")
    sha, evil = add(app, "lib", "../../bob/lib.git", one), add(other, "lib", "../../bob/lib.git", one)
    await world.fork(sha)
    world.forge.private.add("bob/lib")
    assert await world.run(await world.fork(sha), "cat lib/a") == "public, today", "it was given that"
    with pytest.raises(FailedError, match="credentials"):
        await world.fork(evil, "eve/app")
    with pytest.raises(PlatformError, match="lib"):
        await world.fork(sha, alone=True)


async def test_a_repository_of_the_platforms_own_is_no_submodule_without_leave(world: Platform) -> None:
    await world.repositories.register("bob/own", forge="local")
    await world.source.create("bob/own")
    work = world.forge.repository("work/own")
    one = work.commit({"a": b"own"})
    work.git("push", "--quiet", str(world.source.path("bob/own")), "main")
    app = await world.register(REPO)
    sha = add(app, "lib", f"{OWN}/git/bob/own.git", one)
    with pytest.raises(ForbiddenError, match=r"'lib'.*dynflow repo set ada/app --reads"):
        await world.fork(sha)
    await world.repositories.change(REPO, reads=["bob/own"])
    assert await world.run(await world.fork(sha), "cat lib/a") == "own"
    missing = add(app, "more", f"{OWN}/git/bob/own.git", "2" * 40)
    with pytest.raises(FailedError, match=r"'more'.*no such commit"):
        await world.fork(missing)
    with pytest.raises(ForbiddenError):
        await world.fork(sha, alone=True)
    await world.repositories.forget("bob/own")
    await world.repositories.register("bob/own", forge="local")
    assert (await world.repositories.get(REPO)).reads == (), "another one may have the name"
    with pytest.raises(NotFoundError):
        await world.repositories.change(REPO, reads=["no/where"])


async def test_a_file_of_this_machine_is_no_submodule(world: Platform, tmp_path: Path) -> None:
    """Although the operator allows `file:` for repositories that an administrator registers."""
    work = world.forge.repository("bob/lib")
    one = work.commit({"a": b"1"})
    app = await world.register(REPO)
    for url in (work.url, f"file://{world.source.path(REPO)}"):
        with pytest.raises(ForbiddenError, match="file://"):
            await world.fork(add(app, "lib", url, one))
    await world.repositories.register("bob/lib", forge="github", clone_url=work.url)
    await world.repositories.change(REPO, reads=["bob/lib"])
    assert await world.run(await world.fork(add(app, "lib", work.url, one)), "cat lib/a") == "1"


async def test_a_submodule_never_leads_to_an_inner_address(world: Platform) -> None:
    lib = world.forge.repository("bob/lib")
    one = lib.commit({"a": b"1"})
    app = await world.register(REPO)
    sha = add(app, "lib", "../../bob/lib.git", one)
    with pytest.raises(ForbiddenError, match=r"'lib'.*127\.0\.0\.1.*loopback"):
        await world.fork(sha, alone=True)
    # The host that the operator has opened sends on to one that is not.
    port = world.forge.url.rpartition(":")[2]

    def elsewhere(asked: Asked) -> tuple[int, dict[str, str], bytes] | None:
        if not asked.path.startswith("/bob/moved"):
            return None
        return 302, {"Location": f"http://127.0.0.2:{port}{asked.path.replace('moved', 'lib')}"}, b""

    world.forge.more = elsewhere
    with pytest.raises(ForbiddenError, match=r"127\.0\.0\.2.*loopback"):
        await world.fork(add(app, "lib", "../../bob/moved.git", one))
    assert await world.run(await world.fork(sha), "cat lib/a") == "1", (
        "the operator's own exception, for pushes"
    )
    world.with_guard(Guard(allowed=False))
    with pytest.raises(ForbiddenError, match="allow_network"):
        await world.fork(add(app, "other", "../../bob/lib.git/", one))


async def test_a_repository_takes_what_it_fetched_along_when_it_is_deleted(
    world: Platform, tmp_path: Path
) -> None:
    lib = world.forge.repository("bob/lib")
    one = lib.commit({"a": b"1"})
    app = await world.register(REPO)
    await world.fork(add(app, "lib", "../../bob/lib.git", one))
    mirrors = tmp_path / "source" / "mirrors"
    assert len(list(mirrors.glob("_modules-*/*.git"))) == 1
    await world.source.delete(REPO)
    assert list(mirrors.glob("_modules-*")) == []


async def test_what_is_gone_from_the_disk_is_fetched_and_written_again(
    world: Platform, tmp_path: Path
) -> None:
    lib = world.forge.repository("bob/lib")
    one = lib.commit({"a": b"1"})
    app = await world.register(REPO)
    workspace = await world.fork(add(app, "lib", "../../bob/lib.git", one))
    (pack,) = (tmp_path / "source" / "mirrors").glob("_modules-*/*.git/objects/pack/*.pack")
    pack.chmod(0o600)
    pack.write_bytes(pack.read_bytes()[:20])
    for number in range(2):
        layer = (await world.workspaces._base(world.workspaces._stack(workspace)))[0]
        layer.parent.rename(tmp_path / f"away{number}")
        assert await world.run(workspace, "cat lib/a; " + CLEAN) == "1"
        (mirror,) = [each for each in await world.source.mirrors() if is_module_mirror(each.repo)]
        assert await world.source.remove_mirror(mirror.repo, time.time() + 60), "collected as garbage"


async def test_runs_that_go_on_at_once_do_not_take_away_what_another_one_fetches(
    world: Platform, tmp_path: Path
) -> None:
    app, sha = await world.register(REPO), ""
    for name in ("one", "two"):
        content = world.forge.repository(f"bob/{name}").commit({"a": name.encode()})
        sha = add(app, name, f"../../bob/{name}.git", content)
    waiting = [await world.fork(sha) for _ in range(4)]
    for mirror in [each.repo for each in await world.source.mirrors() if is_module_mirror(each.repo)]:
        assert await world.source.remove_mirror(mirror, time.time() + 60)
    for layer in (tmp_path / "source" / "trees" / REPO).glob("modules-*"):
        layers.remove_tree(layer)
    async with anyio.create_task_group() as tasks:
        for workspace in waiting:
            tasks.start_soon(world.workspaces.read, workspace, "one/a")
    assert [await world.workspaces.read(each, "two/a") for each in waiting] == [b"two"] * 4


# Hostile commits

GOOD = "https://example.org/x.git"


@pytest.mark.parametrize(
    ("name", "path", "url", "named"),
    [
        ("lib", "vendor/lib", "ext::sh -c id", "ext::sh"),
        ("lib", "vendor/lib", "ext::touch", "ext::touch"),
        ("lib", "vendor/lib", "ssh://git@example.org/x", "example.org/x"),
        ("lib", "vendor/lib", "git@example.org:x/y.git", "example.org:x/y"),
        ("lib", "vendor/lib", "--upload-pack=id", "--upload-pack=id"),
        ("lib", "vendor/lib", "-u./x", "-u./x"),
        ("lib", "vendor/lib", "https://user:pass@example.org/x", "example.org/x"),
        ("lib", "vendor/lib", "https://example.org/a\\nb", "example"),
        ("lib", "vendor/lib", "https:///etc/passwd", "https:///etc/passwd"),
        ("lib", "vendor/lib", "https://example.org:port/x", "example.org:port"),
        ("lib", "vendor/lib", "https://example.org/a/../../b", "a/../../b"),
        ("lib", "vendor/lib", "https://example.org/x?y=z", "x?y=z"),
        ("lib", "vendor/lib", "../../../../../../etc", "../../etc"),
        ("lib", "vendor/lib", "../x/../../y", "../x/../../y"),
        ("lib", "vendor/lib", "/etc", "'/etc'"),
        ("lib", "vendor/lib", "git://example.org/x", "git://example.org/x"),
        ("lib", "vendor/lib", "", "no url"),
        ("lib", "../outside", GOOD, "../outside"),
        ("lib", "/etc", GOOD, "/etc"),
        ("lib", ".git/hooks", GOOD, ".git/hooks"),
        ("lib", "vendor/.GIT", GOOD, ".GIT"),
        ("lib", "vendor//lib", GOOD, "vendor//lib"),
        ("lib", "./vendor/lib", GOOD, "./vendor/lib"),
        ("lib", "-x", GOOD, "-x"),
        ("lib", "a\\\\b", GOOD, "b"),
        ("../../hooks", "vendor/lib", GOOD, "../../hooks"),
        ("..", "vendor/lib", GOOD, "'..'"),
        ("-x", "vendor/lib", GOOD, "-x"),
        ("a\\u0007b", "vendor/lib", GOOD, "a"),
        ("x" * 300, "vendor/lib", GOOD, "xxx"),
    ],
)  # fmt: skip
async def test_a_hostile_submodule_is_refused_by_the_value_at_fault(
    tmp_path: Path, name: str, path: str, url: str, named: str
) -> None:
    name = name.replace("\\u0007", "\a")
    text = f'[submodule "{name}"]\n\tpath = {path}\n\turl = {url}\n'

    async def read() -> None:
        for declared in await submodules.parse(text.encode()):
            submodules.resolve(declared, "https://example.org/ada/app.git")

    with pytest.raises(FailedError) as caught:
        await read()
    assert named in str(caught.value)
    assert "pass@" not in str(caught.value)


async def test_what_a_commit_includes_is_not_read(tmp_path: Path) -> None:
    """Git's own reader of configuration opens any file that one says to include."""
    host = tmp_path / "host"
    text = f'[include]\n\tpath = {host}\n[submodule "lib"]\n\tpath = vendor/lib\n\turl = -x\n'.encode()
    for content in ('[submodule "lib"]\n\turl = SECRET\n', "SECRET OF THE HOST\n"):
        host.write_text(content)
        assert await submodules.parse(text) == [Declared("lib", "vendor/lib", "-x")]
    for broken in (b"[submodule", b"\0\0\0", b'[submodule "lib"\n', b"= = =", b"\xff\xfe"):
        with pytest.raises(FailedError, match=r"\.gitmodules cannot be read"):
            await submodules.parse(broken)
    for empty in (b"", b"# nothing\n", b"[core]\n\tfsmonitor = id\n", b"[submodule]\n\trecurse = true\n"):
        assert await submodules.parse(empty) == []


async def test_two_submodules_at_one_place_and_too_many_are_refused(world: Platform) -> None:
    app = await world.register(REPO)
    twice = "".join(f'[submodule "{n}"]\n\tpath = vendor/lib\n\turl = {GOOD}\n' for n in "ab")
    with pytest.raises(FailedError, match="two submodules at 'vendor/lib'"):
        await world.fork(write(app, twice))
    many = "".join(f'[submodule "{n}"]\n\tpath = v{n}\n\turl = {GOOD}\n' for n in range(201))
    with pytest.raises(FailedError, match="more than 200"):
        await world.fork(write(app, many))


async def test_submodules_without_end_are_refused(world: Platform) -> None:
    """A repository that is its own submodule, at an older commit each time."""
    loop = world.forge.repository("bob/loop")
    sha = loop.commit({"a": b"1"})
    for _ in range(7):
        sha = add(loop, "again", "../loop.git", sha)
    app = await world.register(REPO)
    with pytest.raises(LimitExceededError, match="5 deep"):
        await world.fork(add(app, "lib", "../../bob/loop.git", sha))


async def test_a_submodule_behind_a_link_is_not_written_through_it(world: Platform, tmp_path: Path) -> None:
    """A path that goes through a symbolic link of the commit names no submodule."""
    app = await world.register(REPO)
    app.git("config", "core.symlinks", "true")
    (app.path / "out").symlink_to(tmp_path)
    app.git("add", "out")
    text = f'[submodule "lib"]\n\tpath = out/evil\n\turl = {GOOD}\n'
    workspace = await world.fork(write(app, text, path="elsewhere"))
    assert await world.run(workspace, "ls -A elsewhere") == ""
    assert not (tmp_path / "evil").exists()
