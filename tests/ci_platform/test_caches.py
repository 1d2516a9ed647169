"""Caches: found by key or prefix, mounted beside the workspace, saved once, seen by whom they are meant for."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from ci_platform.caches import Budget
from ci_platform.caches.keys import KeyMaker
from ci_platform.caches.specs import checked
from ci_platform.copy_on_write import MethodName
from ci_platform.errors import CacheInvalidError, LimitExceededError
from ci_platform.model import Repository, RunCache
from ci_platform.sandboxes.container import ContainerSandbox
from ci_platform.store import col
from dynflow.clock import SystemClock
from pipelines import CacheSpec, hash_files, run_in_sandbox
from pipelines.contract import SandboxKind
from tests.ci_platform.cache_desk import REPO, RUNS, CacheDesk, opened_desk, remote_of, spec
from tests.ci_platform.harness import Harness
from tests.ci_platform.test_runs import finish
from tests.docker_engine import IMAGE, require_image

FILL = "echo made >deps/a; mkdir -p deps/b/c; echo deep >deps/b/c/d; ln -s a deps/link"


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[CacheDesk]:
    async with opened_desk(tmp_path) as made:
        yield made


@pytest.fixture(params=["best", "copy"])
async def any_desk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CacheDesk]:
    method: MethodName | None = None if request.param == "best" else "copy"
    async with opened_desk(tmp_path, method=method) as made:
        yield made


# --- what a command finds and leaves ---


async def test_what_a_command_leaves_is_there_for_the_next_and_never_changes(any_desk: CacheDesk) -> None:
    cache = spec("k1", "deps", "~/.cache/tool")
    await any_desk.run(
        FILL + "; ls -A ~/.cache/tool; echo x >~/.cache/tool/x; chmod 0 deps/b; umask 0", cache
    )
    missed, saved = await any_desk.said()
    assert missed == "miss: there is no 'k1' of refs/heads/main"
    assert saved.startswith("saved 'k1' of refs/heads/main, 6 files, ")
    for _ in range(2):
        script = (
            "cat deps/a deps/link ~/.cache/tool/x; rm -r deps/a ~/.cache/tool/x; echo no >deps/new; ls deps"
        )
        result = await any_desk.run(script, cache)
        assert result.output == "made\nmade\nx\nb\nlink\nnew\n"
        (hit,) = await any_desk.said()
        assert hit.startswith("hit: 'k1' of refs/heads/main, 6 files, ")
    assert [outcome for _, outcome, _ in await any_desk.records()] == ["miss", "hit", "hit"]
    assert (await any_desk.records())[0][2] == saved
    assert any_desk.leftovers() == []


async def test_the_workspace_has_nothing_of_it(any_desk: CacheDesk) -> None:
    cache = spec("k1", "deps", "sub/more/x", "sub/found")
    await any_desk.run("mkdir other; echo x >other/y; echo z >sub/more/x/z; cat sub/lock.json", cache)
    assert (await any_desk.run("find . -path ./.git -prune -o -print | sort")).output.split() == [
        ".", "./README.md", "./other", "./other/y", "./requirements.txt", "./sub", "./sub/lock.json",
    ]  # fmt: skip
    layers = [each for each in await any_desk.workspaces.snapshots("main.fork") if each.step]
    assert [each.paths for each in layers] == [2]


@pytest.mark.parametrize("mode", ["0", "555"])
async def test_a_closed_folder_on_the_way_leaves_a_cache_where_it_is(any_desk: CacheDesk, mode: str) -> None:
    """Also where workspaces are copies, and where the platform itself may not pass."""
    await any_desk.run(f"mkdir -p closed/inner; chmod {mode} closed")
    cache = spec("k", "closed/x", "closed/inner/y/z")
    for before in ("", "made\nmade\n"):
        script = "chmod 755 closed; cat closed/*/a closed/inner/y/z/a 2>/dev/null || true"
        script += f"; echo made | tee closed/x/a >closed/inner/y/z/a; chmod {mode} closed"
        assert (await any_desk.run(script, cache)).output == before
    assert [outcome for _, outcome, _ in await any_desk.records()] == ["miss", "hit"]
    assert (await any_desk.run("chmod 755 closed; find closed | sort")).output == "closed\nclosed/inner\n"
    assert any_desk.leftovers() == []


async def test_a_folder_of_the_repository_is_covered_while_a_cache_is_there(desk: CacheDesk) -> None:
    assert (await desk.run("ls sub; stat -c %a sub; echo x >sub/x", spec("k", "sub"))).output == "755\n"
    assert (await desk.run("ls sub", spec("k", "sub"))).output == "x\n"
    assert (await desk.run("ls sub")).output == "lock.json\n"
    # What the workspace has deleted is a place all the same.
    await desk.run("rm -r sub")
    assert (await desk.run("ls sub", spec("k", "sub"))).output == "x\n"
    assert (await desk.run("ls")).output == "README.md\nrequirements.txt\n"


async def test_a_command_that_fails_saves_nothing(desk: CacheDesk) -> None:
    assert (await desk.run(FILL + "; exit 3", spec("k"))).exit_code == 3
    assert desk.caches.entries() == []
    with pytest.raises(LimitExceededError):
        await desk.run(FILL + "; sleep 60", spec("k"), timeout=timedelta(seconds=0.2))
    assert desk.caches.entries() == []
    assert desk.leftovers() == []


async def test_the_newest_entry_that_begins_with_a_prefix_is_carried_on(any_desk: CacheDesk) -> None:
    await any_desk.run("echo 1 >deps/one; echo s >deps/same; mkdir deps/d; echo o >deps/d/old", spec("lib-1"))
    await any_desk.run("echo 2 >deps/two", spec("lib-2"))
    await any_desk.run("echo x >deps/x", spec("other"))
    await any_desk.run(
        "rm deps/one; rm -r deps/d; mkdir deps/d; echo n >deps/d/new; echo 3 >deps/three",
        spec("lib-3", restore=("none-", "lib-1", "lib-")),
    )
    restored, saved = await any_desk.said()
    assert restored.startswith("restored 'lib-1' of refs/heads/main, ")
    assert restored.endswith("for 'lib-3' is not there")
    assert saved.startswith("saved 'lib-3'")
    result = await any_desk.run("cd deps; find . | sort", spec("lib-4", restore=("lib-",)))
    assert result.output.split() == [".", "./d", "./d/new", "./same", "./three"]
    assert (await any_desk.run("cd deps; find . | sort", spec("lib-1"))).output.split() == [
        ".", "./d", "./d/old", "./one", "./same",
    ]  # fmt: skip


async def test_a_miss_says_why(desk: CacheDesk) -> None:
    await desk.run(FILL, spec("k"))
    await desk.run("true", spec("k", "elsewhere"), of="feature")
    assert (await desk.said("feature"))[0] == (
        "miss: there is no 'k' of refs/heads/feature or refs/heads/main; what has this key holds other paths"
    )
    await desk.run("true", spec("x", restore=("y", "z")))
    assert (await desk.said())[0] == (
        "miss: there is no 'x', and none that begins with 'y' or 'z', of refs/heads/main"
    )
    assert (await desk.said())[1] == "not saved: there is nothing in deps"
    assert await desk.caches.delete(desk.keys()["k"].id)
    await desk.run("true", spec("k"))
    assert "; it was evicted at " in (await desk.said())[0]


async def test_keys_follow_from_files_as_they_are_at_that_moment(any_desk: CacheDesk) -> None:
    key = f"pip-{hash_files('requirements*.txt', '**/lock.json')}"
    await any_desk.run(FILL, spec(key))
    (first,) = any_desk.keys()
    assert first.startswith("pip-")
    assert len(first) == len("pip-") + 32
    await any_desk.run("touch README.md; cat deps/a; echo x >>requirements.txt", spec(key))
    await any_desk.run("echo other >deps/a", spec(key, restore=("pip-",)))
    assert len(any_desk.keys()) == 2
    await any_desk.run("echo more >sub/requirements.txt", spec(key))
    assert (await any_desk.said())[0].startswith("hit: ")


@pytest.mark.docker
async def test_commands_in_containers_have_caches_too(tmp_path: Path) -> None:
    require_image()
    sandbox = ContainerSandbox(image=IMAGE)
    async with opened_desk(tmp_path, container=sandbox) as desk:
        cache = spec("k", "deps", "~/.cache/tool")
        script = FILL + "; echo x >~/.cache/tool/x; mkdir ~/.cache/other; echo built >out"
        assert (await desk.run(script, cache, sandbox="container")).ok
        assert (await desk.said())[1].startswith("saved 'k'")
        script = "cat deps/link ~/.cache/tool/x out; ls; rm deps/a"
        for kind in ("container", "isolate", "container"):
            result = await desk.run(script, cache, sandbox=kind)
            assert result.output == "made\nx\nbuilt\nREADME.md\ndeps\nout\nrequirements.txt\nsub\n"
        assert (await desk.run("ls", sandbox="container")).output == "README.md\nout\nrequirements.txt\nsub\n"
        # Nothing of a cache is in the home folder of the next command, and hostile ones have not led anywhere.
        script = "mv deps moved || rm -rf moved; mv ~/.cache ~/c; ln -s /proc ~/.cache; rm ~/c/tool/x"
        assert (await desk.run(script, cache, sandbox="container")).ok
        assert (await desk.run("ls -A ~", sandbox="container")).output == ""
        if os.geteuid() == 0:
            assert sum(map(len, sandbox._waiting._idle.values())) == 1, "all of them have had one container"
        assert desk.leftovers() == []


MATCHES = {
    "a.txt": {"a.txt"},
    "*.txt": {"a.txt", "b.txt"},
    "[!a].txt": {"b.txt"},
    "?.tx[st]": {"a.txt", "b.txt"},
    "**/*.txt": {"a.txt", "b.txt", "d/a.txt", "d/e/a.txt", "upper/a.txt"},
    "d/**": {"d/a.txt", "d/e/a.txt", "d/e/run.sh"},
    "**/e/*": {"d/e/a.txt", "d/e/run.sh"},
    "*/a.txt|b.txt": {"d/a.txt", "upper/a.txt", "b.txt"},
    ".hidden": {".hidden"},
    "A.TXT|b.txt": {"b.txt"},
}


@pytest.mark.parametrize("pattern", MATCHES)
def test_a_key_follows_from_the_files_that_match_and_from_no_other(tmp_path: Path, pattern: str) -> None:
    below = ["a.txt", "b.txt", ".hidden", "d/a.txt", "d/e/a.txt", "d/e/run.sh", "other.md", ".git/x.txt"]
    names = [*(f"lower/{each}" for each in below), "upper/upper/a.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "lower/link.txt").symlink_to("a.txt")

    def key() -> str:
        return KeyMaker([tmp_path / "upper", tmp_path / "lower"])(f"k-{{hash_files:{pattern}}}")

    before, found = key(), set()
    assert key() == before
    for name in names:
        (tmp_path / name).write_text("changed")
        if key() != before:
            found.add(name.partition("/")[2])
        (tmp_path / name).write_text(name)
    assert found == MATCHES[pattern]


async def test_what_a_run_was_told_of_caches_goes_with_it(platform: Harness) -> None:
    run, now = await platform.start(), platform.clock.now()
    known = {
        "run_id": run.id,
        "step": "s",
        "count": 1,
        "attempt": 1,
        "key": "k",
        "outcome": "hit",
        "reason": "r",
    }
    await platform.store.write(lambda tx: tx.add(RunCache.model_validate(known | {"opened_at": now})))
    assert [each.key for each in (await platform.runs.get(run.id)).caches] == ["k"]
    await finish(platform, run.id)
    await platform.runs.forget(run.id)
    assert await platform.store.read(lambda tx: tx.all(RunCache)) == []


# --- whose caches a run sees ---

SCOPES = {
    "main": {"main"},
    "feature": {"main", "feature"},
    "release": {"main", "release"},
    "tag": {"main", "tag"},
    "pull": {"main", "pull"},
    "torelease": {"main", "release", "torelease"},
    "fork": {"main", "fork"},
    "insider": {"main", "insider"},
    "pretender": {"main", "fork"},
    "other": {"other"},
}
"""Whose caches each run finds. `insider` and `pretender` have the number of a fork's pull request."""


async def test_runs_find_what_they_may_and_nothing_else(desk: CacheDesk) -> None:
    for writer in RUNS:
        if writer != "pretender":
            await desk.run(f"echo it >{writer}/was", spec(f"by-{writer}", writer), of=writer)
    writers = list(RUNS)
    for reader in RUNS:
        for how in (lambda key: (key, ()), lambda key: ("none", (key,))):
            found = set()
            for some in (writers[:5], writers[5:]):
                asked = [
                    CacheSpec(key, (name,), restore) for name in some for key, restore in [how(f"by-{name}")]
                ]
                # It fails, so that it leaves nothing for those after it.
                result = await desk.run("ls -d */was; exit 1", *asked, of=reader)
                found |= {line.partition("/")[0] for line in result.output.split() if line.endswith("/was")}
            assert found == SCOPES[reader], reader


async def test_a_pull_request_cannot_write_what_others_read(desk: CacheDesk) -> None:
    for writer in ("fork", "pull", "pretender"):
        await desk.run(f"echo {writer} >deps/who", spec("shared"), of=writer)
    assert {entry.scope for entry in desk.caches.entries()} == {"pull request 9 (fork)", "pull request 7"}
    await desk.run("echo main >deps/who", spec("shared"))
    for reader in ("main", "feature", "insider", "torelease"):
        assert (await desk.run("cat deps/who", spec("shared"), of=reader)).output == "main\n"


async def test_a_repository_that_is_made_anew_finds_nothing_of_the_one_before(desk: CacheDesk) -> None:
    await desk.run(FILL, spec("k"))
    values = {"created_at": SystemClock().now()}
    await desk.store.write(lambda tx: tx.change(Repository, values, col(Repository.name) == REPO))
    assert (await desk.run("ls deps", spec("k"))).output == ""
    assert len(desk.caches.entries()) == 1
    assert await desk.caches.tidy() > 0
    assert desk.caches.entries() == []


# --- two at a time ---


async def test_of_two_that_save_one_key_the_first_wins(desk: CacheDesk) -> None:
    script = "for n in $(seq 50); do echo {0} >deps/$n; done; until [ -e ~/go/{0} ]; do sleep 0.02; done"
    go = spec("go", "~/go")
    await desk.run("touch ~/go/one ~/go/two", go)
    async with anyio.create_task_group() as tasks:
        for name in ("one", "two"):
            tasks.start_soon(lambda name=name: desk.run(script.format(name), spec("k"), go, step=name))  # type: ignore[misc]
    told = [text for step in ("one", "two") for text in await desk.said(step=step) if "saved" in text]
    assert sorted(text.partition(",")[0] for text in told) == [
        "not saved: another command has saved 'k' first",
        "saved 'k' of refs/heads/main",
    ]
    result = await desk.run("cat deps/* | sort | uniq -c | tr -s ' '", spec("k"))
    assert result.output in {" 50 one\n", " 50 two\n"}
    assert desk.leftovers() == []


async def test_entries_in_use_stay(desk: CacheDesk) -> None:
    await desk.run(FILL, spec("k"))
    (entry,) = desk.caches.entries()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(desk.run, "echo up; sleep 600", spec("k"))
        with anyio.fail_after(20):
            while not desk.caches.entries()[0].pinned:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)
        assert not await desk.caches.delete(entry.id)
        tasks.cancel_scope.cancel()
    assert [each.pinned for each in desk.caches.entries()] == [False]
    assert await desk.caches.delete(entry.id)
    assert not await desk.caches.delete(entry.id)
    assert desk.leftovers() == []


# --- bad input ---

BAD: dict[str, tuple[Any, str]] = {
    "no tuple": ([spec("k")], "at most 8 caches"),
    "no spec": ((3,), "paths= is a list of text, not None"),
    "too many": (tuple(spec("k", f"p{n}") for n in range(9)), "at most 8 caches"),
    "no paths": ((CacheSpec("k", ()),), "takes 1 to 16 paths, not 0"),
    "many paths": ((CacheSpec("k", tuple(map(str, range(17)))),), "not 17"),
    "text for paths": ((CacheSpec("k", "deps"),), "list of text, not 'deps'"),
    "odd paths": ((CacheSpec("k", (3,)),), "list of text"),  # type: ignore[arg-type]
    "empty key": ((spec(""),), "keys are printable text"),
    "odd key": ((spec(3),), "keys are printable text"),  # type: ignore[arg-type]
    "long key": ((spec("k" * 5000),), "keys are printable text"),
    "key with a line": ((spec("a\nb"),), "keys are printable text"),
    "many prefixes": ((spec("k", restore=("p",) * 11),), "at most 10, not 11"),
    "empty prefix": ((spec("k", restore=("",)),), "keys are printable text"),
    "absolute": ((spec("k", "/etc"),), "'/etc' is outside"),
    "the home of another": ((spec("k", "~root/x/../../.."),), "may leave its folder"),
    "upwards": ((spec("k", "a/../../b"),), "may leave its folder"),
    "upwards from home": ((spec("k", "~/../../etc"),), "may leave its folder"),
    "everything": ((spec("k", "."),), "is a whole folder"),
    "all of home": ((spec("k", "~/"),), "is a whole folder"),
    "git": ((spec("k", "./.Git/hooks"),), "the workspace's .git"),
    "a bind": ((spec("k", "deps:/etc"),), "'deps:/etc' has a ':'"),
    "NUL": ((spec("k", "a\0b"),), "not printable"),
    "a long name": ((spec("k", "a" * 256),), "names that no file can have"),
    "deep": ((spec("k", "/".join("a" * 41)),), "nested too deep"),
    "long": ((spec("k", "a/" * 600),), "too long for a path"),
    "twice": ((spec("k", "a", "./a/"),), "overlap"),
    "inside of each other": ((spec("k", "a"), spec("j", "a/b/c")), "'a' and 'a/b/c' overlap"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_cache_is_refused_with_the_value(name: str) -> None:
    specs, told = BAD[name]
    with pytest.raises(CacheInvalidError) as caught:
        checked(specs)
    assert told in str(caught.value)


BAD_HERE: dict[str, tuple[CacheSpec, type[Exception], str]] = {
    "a file": (spec("k", "README.md"), CacheInvalidError, "'README.md' is no folder in the workspace"),
    "below a file": (spec("k", "README.md/x"), CacheInvalidError, "'README.md' is no folder"),
    "a link": (spec("k", "link"), CacheInvalidError, "'link' is a link"),
    "below a link": (spec("k", "link/passwd"), CacheInvalidError, "'link' is a link"),
    "no such file": (spec(hash_files("nothing*")), CacheInvalidError, "hash_files('nothing*'): no file"),
    "through a link": (
        spec(hash_files("link/passwd")),
        CacheInvalidError,
        "no file of the workspace matches",
    ),
    "a link itself": (spec(hash_files("link")), CacheInvalidError, "no file of the workspace matches"),
    "git": (spec(hash_files(".git/HEAD")), CacheInvalidError, "no file of the workspace matches"),
    "outside": (spec("{hash_files:/etc/passwd}"), CacheInvalidError, "relative to the workspace"),
    "upwards": (spec("{hash_files:../x}"), CacheInvalidError, "relative to the workspace"),
    "empty": (spec("{hash_files:}"), CacheInvalidError, "relative to the workspace"),
    "many": (spec("{hash_files:" + "|".join("a" * 21) + "}"), CacheInvalidError, "at most 20 patterns"),
    "deep patterns": (
        spec("{hash_files:" + "**/" * 1200 + "x}"),
        CacheInvalidError,
        "at most 40 folders deep",
    ),
    "braces": (spec("{key}"), CacheInvalidError, "has braces"),
    "long": (spec(hash_files("README.md") * 17), CacheInvalidError, "longer than 512"),
    "no end": (spec(hash_files("/".join(["**", "*"] * 8))), LimitExceededError, "names would have to be"),
}


async def test_what_the_workspace_does_not_allow_fails_the_command(any_desk: CacheDesk) -> None:
    await any_desk.run("ln -s /etc link; mkdir -p " + "/".join(f"d{n}" for n in range(24)), step="setup")
    for cache, error, told in BAD_HERE.values():
        with pytest.raises(error) as caught:
            await any_desk.run("echo ran", cache)
        assert told in str(caught.value)
    assert any_desk.caches.entries() == []
    assert any_desk.leftovers() == []
    assert "README.md" in (await any_desk.run("ls")).output


async def test_pipelines_are_told_at_once_what_is_no_list() -> None:
    with pytest.raises(TypeError, match=r"paths of a cache must be a list, such as \['deps'\]"):
        await run_in_sandbox(None, ["true"], cache=CacheSpec("k", "deps"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without braces and bars"):
        hash_files("a|b")
    with pytest.raises(ValueError, match="takes patterns"):
        hash_files()


# --- budgets, restarts ---


async def test_what_is_too_large_is_not_saved_and_said(tmp_path: Path) -> None:
    async with opened_desk(tmp_path, budget=Budget(repository=100_000)) as desk:
        assert (await desk.run("head -c 200000 /dev/zero >deps/big", spec("k"))).ok
        assert (await desk.said())[1].startswith("not saved: 1 files, 0.2 MiB are more than a repository may")
        await desk.run("head -c 60000 /dev/zero >deps/a", spec("a"))
        await desk.run("head -c 60000 /dev/zero >deps/b", spec("b"))
        assert set(desk.keys()) == {"b"}
        await desk.run("head -c 60000 /dev/zero >deps/c", spec("c"), of="fork")
        assert (await desk.said("fork"))[1].startswith("not saved: there is no room")
        assert set(desk.keys()) == {"b"}
        assert desk.leftovers() == []


async def test_entries_are_found_after_a_restart_with_their_last_use(tmp_path: Path) -> None:
    async with opened_desk(tmp_path) as first:
        await first.run(FILL, spec("k"))
        await first.run("true", spec("k"))
        before = first.caches.entries()
        (tmp_path / "workspaces/.caches/.open/left").mkdir()
        (tmp_path / "workspaces/.caches" / before[0].tenant / "torn").mkdir()
    async with opened_desk(tmp_path) as second:
        (found,) = second.caches.entries()
        assert abs(found.used_at - before[0].used_at) < timedelta(milliseconds=1)
        assert (found.key, found.size, found.files) == ("k", before[0].size, before[0].files)
        assert (await second.run("cat deps/a", spec("k"))).output == "made\n"
        assert second.leftovers() == []


DOOMED = """
import asyncio, sys
from pathlib import Path
from tests.ci_platform import test_caches

asyncio.run(test_caches.be_doomed(Path(sys.argv[1]), *sys.argv[2:4]))
"""
SURVIVES = (
    "cat ~/held/x; echo made >deps/a; echo up; while [ $((i=i+1)) -lt 15 ]; do sleep 0.1; done; echo down"
)


def containers(kind: SandboxKind) -> ContainerSandbox | None:
    return ContainerSandbox(image=IMAGE) if kind == "container" else None


async def be_doomed(root: Path, script: str, kind: SandboxKind) -> None:
    """Be a platform that runs a command until it is killed."""
    async with opened_desk(root, container=containers(kind)) as desk:
        await desk.run(script, spec("new"), spec("held", "~/held"), step="long", sandbox=kind)


@pytest.mark.parametrize("kind", ["isolate", pytest.param("container", marks=pytest.mark.docker)])
async def test_a_command_that_outlives_the_platform_keeps_its_caches(
    tmp_path: Path, kind: SandboxKind
) -> None:
    if kind == "container":
        require_image()
        if os.geteuid() != 0:
            pytest.skip("containers are kept warm by root alone, and others do not survive")
    remote_of(tmp_path)
    async with opened_desk(tmp_path) as first:
        await first.run("echo held >~/held/x", spec("held", "~/held"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DOOMED, str(tmp_path), SURVIVES, kind, cwd=Path(__file__).parents[2]
    )
    logs = tmp_path / "logs"
    with anyio.fail_after(30):
        while not any("oup\n" in file.read_text() for file in logs.rglob("*.log")):  # noqa: ASYNC110 - a file
            await anyio.sleep(0.02)
    process.kill()
    await process.wait()
    async with opened_desk(tmp_path, container=containers(kind)) as second:
        held = second.keys()["held"]
        assert held.pinned
        assert not await second.caches.delete(held.id)
        result = await second.run(
            SURVIVES, spec("new"), spec("held", "~/held"), step="long", attempt=2, sandbox=kind
        )
        assert result.output == "held\nup\ndown\n"
        missed, hit, saved = await second.said()
        assert missed.startswith("miss: there is no 'new'"), "it has been opened once"
        assert (hit[:4], saved[:11]) == ("hit:", "saved 'new'")
        assert (await second.run("cat deps/a", spec("new"))).output == "made\n"
        assert [each.pinned for each in second.caches.entries()] == [False, False]
        assert second.leftovers() == []
