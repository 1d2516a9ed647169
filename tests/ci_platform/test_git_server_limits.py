"""What our git server takes and for how long, how much of it at once, and what a kill leaves of it."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import anyio.abc
import anyio.to_thread
import httpx
import psutil
import pytest

from ci_platform.api.git import GitLimits
from ci_platform.source import Source
from tests.ci_platform.git_repositories import ENVIRONMENT, WorkingCopy, working_copy
from tests.ci_platform.test_git_server import REPO, TOKEN, Served, _basic, git, push, serving

FETCH = "git-upload-pack"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path / "server") as running:
        await running.source.create(REPO)
        yield running


@pytest.fixture
def work(tmp_path: Path) -> WorkingCopy:
    return working_copy(tmp_path / "work")


def head(service: str, *lines: str, method: str = "POST") -> bytes:
    first = f"{method} /git/{REPO}.git/{service} HTTP/1.1"
    fixed = ("Host: here", f"Authorization: Basic {_basic('ada', TOKEN)}")
    kind = f"Content-Type: application/x-{service}-request"
    return "\r\n".join([first, *fixed, kind, *lines, "", ""]).encode()


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[anyio.abc.SocketStream]:
    parts = urlsplit(served.url)
    async with await anyio.connect_tcp(str(parts.hostname), int(parts.port or 0)) as stream:
        yield stream


async def read_until(stream: anyio.abc.SocketStream, wanted: bytes) -> bytes:
    found = b""
    with anyio.fail_after(20):
        while wanted not in found:
            found += await stream.receive()
    return found


def fsck(source: Source) -> str:
    command = ["git", "--git-dir", str(source.path(REPO)), "fsck", "--full", "--strict"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


async def test_protocol_1_is_spoken_where_it_is_asked_for(served: Served, work: WorkingCopy) -> None:
    work.commit({"a": b"1"})
    await push(work, served)
    async with httpx.AsyncClient(base_url=served.url, auth=("ada", TOKEN)) as client:
        for version, said in (("version=1", b"000eversion 1\n"), ("version=2", b"000eversion 2\n")):
            answer = await client.get(
                f"/git/{REPO}.git/info/refs", params={"service": FETCH}, headers={"Git-Protocol": version}
            )
            assert said in answer.content
        answer = await client.get(
            f"/git/{REPO}.git/info/refs",
            params={"service": FETCH},
            headers={"Git-Protocol": "version=2:evil; $(id)"},
        )
        assert b"version" not in answer.content


async def test_a_client_that_waits_to_be_told_to_go_on_is_told(served: Served, work: WorkingCopy) -> None:
    sha = work.commit({"a": b"1"})
    await push(work, served)
    body = gzip.compress(f"0032want {sha}\n00000009done\n".encode())
    async with connected(served) as stream:
        lines = ("Expect: 100-continue", "Content-Encoding: gzip", f"Content-Length: {len(body)}")
        await stream.send(head(FETCH, *lines))
        assert b"HTTP/1.1 100" in await read_until(stream, b"\r\n\r\n")
        await stream.send(body)
        assert b"PACK" in await read_until(stream, b"PACK")


async def test_who_may_not_push_is_told_before_a_byte_is_sent(served: Served) -> None:
    async with connected(served) as stream:
        wrong = head("git-receive-pack", "Expect: 100-continue", "Content-Length: 1000000000")
        await stream.send(wrong.replace(_basic("ada", TOKEN).encode(), b"d3Jvbmc6d3Jvbmc="))
        assert (await read_until(stream, b"\r\n\r\n")).startswith(b"HTTP/1.1 401")


async def test_a_fetch_with_much_to_ask_for_comes_packed(
    served: Served, work: WorkingCopy, tmp_path: Path
) -> None:
    """Git sends requests of more than a kilobyte as gzip."""
    for number in range(60):
        work.commit({"a": b"%d" % number})
        work.git("branch", f"b{number}")
    await push(work, served, "--all")
    clone = tmp_path / "clone"
    done = await git(work, "-c", "protocol.version=0", "clone", "-q", served.address(), str(clone))
    assert done.returncode == 0, done.stderr
    assert len(WorkingCopy(clone).git("branch", "--remotes").splitlines()) == 62


@pytest.mark.slow
async def test_no_pack_is_ever_whole_in_memory(served: Served, work: WorkingCopy, tmp_path: Path) -> None:
    size, own, peak = 64 << 20, psutil.Process(), 0
    work.commit({f"f{number}": os.urandom(size // 4) for number in range(4)})
    before = own.memory_info().rss

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, own.memory_info().rss - before)
            await anyio.sleep(0.005)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await push(work, served)
        done = await git(work, "clone", "-q", served.address(), str(tmp_path / "clone"))
        assert done.returncode == 0, done.stderr
        tasks.cancel_scope.cancel()
    assert peak < size // 2


async def test_a_request_that_finds_no_turn_is_told_to_come_back(tmp_path: Path) -> None:
    limits = GitLimits(at_once=1, queue=timedelta(seconds=0.2))
    async with serving(tmp_path / "server", limits) as served:
        await served.source.create(REPO)
        async with connected(served) as stream:
            await stream.send(head(FETCH, "Transfer-Encoding: chunked"))
            async with httpx.AsyncClient(base_url=served.url, auth=("ada", TOKEN)) as client:

                async def ask(wanted: int) -> httpx.Response:
                    address = f"/git/{REPO}.git/info/refs"
                    with anyio.fail_after(20):
                        while True:
                            found = await client.get(address, params={"service": FETCH})
                            if found.status_code == wanted:
                                return found

                busy = await ask(503)
                assert busy.headers["retry-after"] == "10"
                assert "too many" in busy.text
                await stream.aclose()
                await ask(200)


@pytest.mark.parametrize("service", ["git-upload-pack", "git-receive-pack"])
async def test_a_client_that_stands_still_is_given_up(tmp_path: Path, service: str) -> None:
    limits = GitLimits(at_once=1, stall=timedelta(seconds=0.2))
    async with serving(tmp_path / "server", limits) as served:
        await served.source.create(REPO)
        async with connected(served) as stream:
            await stream.send(head(service, "Transfer-Encoding: chunked") + b"2\r\n00\r\n")
            assert b"stood still" in await read_until(stream, b"again\n")
            done = await git(working_copy(tmp_path / "work"), "ls-remote", served.address())
            assert done.returncode == 0, done.stderr


async def test_a_client_that_takes_nothing_is_given_up(tmp_path: Path, work: WorkingCopy) -> None:
    limits = GitLimits(at_once=1, stall=timedelta(seconds=0.3))
    async with serving(tmp_path / "server", limits) as served:
        await served.source.create(REPO)
        sha = work.commit({"large": os.urandom(24 << 20)})
        await push(work, served)
        body = f"0032want {sha}\n00000009done\n".encode()
        async with connected(served) as stream:
            await stream.send(head(FETCH, f"Content-Length: {len(body)}") + body)
            done = await git(work, "ls-remote", served.address())
            assert done.returncode == 0, done.stderr


async def test_pushes_that_wait_for_each_other_keep_no_clone_waiting(
    tmp_path: Path, work: WorkingCopy
) -> None:
    limits = GitLimits(at_once=2, queue=timedelta(seconds=20))
    async with serving(tmp_path / "server", limits) as served:
        await served.source.create(REPO)
        work.commit({"a": b"1"})
        await push(work, served)
        async with anyio.create_task_group() as tasks, served.source.writing(REPO):
            for number in range(4):
                tasks.start_soon(push, work, served, f"main:b{number}")
            for number in range(3):
                done = await git(work, "clone", "-q", served.address(), str(tmp_path / f"clone{number}"))
                assert done.returncode == 0, done.stderr


async def test_clones_pushes_forks_and_packing_at_once_do_not_disturb_each_other(
    served: Served, tmp_path: Path
) -> None:
    first = working_copy(tmp_path / "first")
    first.commit({f"f{number}": os.urandom(2000) for number in range(50)})
    await push(first, served)
    clones: list[Path] = []

    async def pusher(number: int) -> None:
        own = working_copy(tmp_path / f"pusher{number}")
        for count in range(8):
            own.commit({f"p{number}": b"%d" % count})
            await push(own, served, f"+main:pusher{number}")

    async def cloner(number: int) -> None:
        for count in range(4):
            target = tmp_path / f"clone{number}-{count}"
            version = ("0", "1", "2")[count % 3]
            options = ["--depth=1"] if count == 3 else []
            done = await git(
                first,
                "-c",
                f"protocol.version={version}",
                "clone",
                "-q",
                *options,
                served.address(),
                str(target),
            )
            assert done.returncode == 0, done.stderr
            clones.append(target)

    async def packer() -> None:
        for number in range(6):
            await served.source.fork(REPO, f"forks/f{number}")
            async with served.source.writing(REPO):
                pass
            await served.source.maintain()

    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(pusher, number)
            tasks.start_soon(cloner, number)
        tasks.start_soon(packer)
    assert fsck(served.source) == ""
    assert len(await served.source.branches(REPO)) == 4
    assert len([update for _, updates, _ in served.pushes for update in updates]) == 25
    for clone in clones:
        WorkingCopy(clone).git("fsck", "--connectivity-only")


async def test_configuration_of_a_repository_runs_nothing(
    served: Served, work: WorkingCopy, tmp_path: Path
) -> None:
    witness, path = tmp_path / "witness", served.source.path(REPO)
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch {witness}\n")
    script.chmod(0o755)
    (path / "hooks").mkdir()
    for name in ("pre-receive", "post-receive", "update", "proc-receive", "push-to-checkout", "post-update"):
        (path / "hooks" / name).symlink_to(script)
    with (path / "config").open("a") as file:
        for key in ("hooksPath", "fsmonitor", "sshCommand", "askPass", "pager", "gitProxy"):
            file.write(f"[core]\n\t{key} = {path / 'hooks' if key == 'hooksPath' else script}\n")
        file.write(f"[uploadpack]\n\tpackObjectsHook = {script}\n[receive]\n\tprocReceiveRefs = refs\n")
        file.write(f"[credential]\n\thelper = {script}\n[gc]\n\tauto = 1\n[receive]\n\tautogc = true\n")
    work.commit({"a": b"1"})
    done = await git(work, "push", served.address(), "main")
    clone = await git(work, "clone", served.address(), str(tmp_path / "clone"))
    assert clone.returncode == 0, clone.stderr
    assert not witness.exists(), done.stderr


@pytest.mark.parametrize("ref", ["refs/dynflow/x", "refs/dynflow/heads/x"])
async def test_a_ref_of_the_platforms_own_cannot_be_pushed(
    served: Served, work: WorkingCopy, ref: str
) -> None:
    work.commit({"a": b"1"})
    done = await git(work, "push", served.address(), f"main:{ref}")
    assert done.returncode != 0
    assert "hidden ref" in done.stderr


SERVE = """
import sys, anyio
from pathlib import Path
from tests.ci_platform.test_git_server import REPO, Served, serving
async def never(self, repo, updates, actor):
    await anyio.sleep_forever()
Served.on_push = never
async def main():
    async with serving(Path(sys.argv[1])) as served:
        await served.source.create(REPO)
        Path(sys.argv[2]).write_text(served.url)
        await anyio.sleep_forever()
anyio.run(main)
"""
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "written to": lambda root: any(root.glob("writing/*")),
    "quarantined": lambda root: any(root.glob("git/*/*.git/objects/tmp_objdir-*")),
    "a pack half there": lambda root: any(root.glob("git/*/*.git/objects/tmp_objdir-*/pack/*")),
    "moved, nobody told": lambda root: any(root.glob("git/*/*.git/refs/heads/main")),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_kill_in_the_middle_of_a_push_leaves_all_of_it_or_nothing(
    tmp_path: Path, work: WorkingCopy, moment: str
) -> None:
    root, address = tmp_path / "server", tmp_path / "address"
    sha = work.commit({f"f{number}": os.urandom(1 << 20) for number in range(8)})
    command = [sys.executable, "-c", SERVE, str(root), str(address)]
    server = subprocess.Popen(command, cwd=Path.cwd(), start_new_session=True)  # noqa: ASYNC220
    with anyio.fail_after(30):
        while not address.exists() or not address.read_text():  # noqa: ASYNC110
            await anyio.sleep(0.01)
        async with anyio.create_task_group() as tasks:
            url = address.read_text().replace("http://", f"http://ada:{TOKEN}@") + f"/git/{REPO}.git"
            tasks.start_soon(git, work, "push", url, "main")
            while not MOMENTS[moment](root):
                await anyio.lowlevel.checkpoint()
            server.send_signal(signal.SIGKILL)
            server.wait()
    source = Source(root)
    touched = await source.sweep()
    assert fsck(source) == ""
    for pattern in ("git/*/*.git/objects/tmp_objdir-*", "git/*/*.git/**/*.lock", "git/*/.push-*"):
        assert list(root.glob(pattern)) == []
    branches = await source.branches(REPO)
    assert branches in ({}, {"main": sha})
    # The name may not be in its file yet: then nothing has been written to the repository either.
    assert touched == {REPO} or moment == "written to", "the start knows where to look"
    await source.reconciled()
    async with serving(root) as served:
        assert (await git(work, "push", served.address(), "main")).returncode == 0
