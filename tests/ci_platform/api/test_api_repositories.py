"""Repositories over HTTP: forked, imported, read, closed, deleted, and opened by tokens of their own."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx

from ci_platform.serving import Running
from tests.ci_platform.api.world import QUICK, World, assert_problem
from tests.ci_platform.git_repositories import ENVIRONMENT, WorkingCopy, working_copy


async def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    def run() -> subprocess.CompletedProcess[str]:
        command = ["git", "-c", "protocol.version=2", *arguments]
        return subprocess.run(
            command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

    return await anyio.to_thread.run_sync(run)


def address(served: Running, repo: str, secret: str) -> str:
    return served.url.replace("http://", f"http://git:{secret}@") + f"/git/{repo}.git"


async def token(http: httpx.AsyncClient, **fields: Any) -> str:
    answer = await http.post("/api/v1/tokens", json=fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["secret"])


async def pushed(world: World, tmp_path: Path, repo: str) -> WorkingCopy:
    await world.http.post("/api/v1/repos", json={"name": repo})
    work = working_copy(tmp_path / f"work-{repo.replace('/', '-')}")
    work.commit({"a": b"1", "folder/b": b"22"}, "first")
    done = await git(work.path, "push", address(world.served, repo, world.served.token), "main")
    assert done.returncode == 0, done.stderr
    return work


async def test_commits_and_folders_are_read(world: World, tmp_path: Path) -> None:
    work = await pushed(world, tmp_path, world.repo)
    sha, path = work.git("rev-parse", "HEAD"), f"/api/v1/repos/{world.repo}"
    log = (await world.http.get(f"{path}/log")).json()
    assert [(item["sha"], item["title"]) for item in log["items"]] == [(sha, "first")]
    assert log["next_skip"] is None
    commit = (await world.http.get(f"{path}/commits/{sha}")).json()
    assert (commit["author"], commit["parents"]) == ("Ada", [])
    tree = (await world.http.get(f"{path}/tree", params={"path": "folder", "ref": "main"})).json()
    assert tree["sha"] == sha
    assert [(item["name"], item["kind"], item["size"]) for item in tree["items"]] == [("b", "file", 2)]
    for wrong, status, code in (
        ("log?ref=nowhere", 404, "not_found"),
        ("log?limit=0", 400, "invalid_input"),
        ("log?skip=-1", 400, "invalid_input"),
        ("commits/nonsense", 400, "invalid_input"),
        (f"commits/{'1' * 40}", 404, "not_found"),
        ("tree?path=../..", 404, "not_found"),
    ):
        assert_problem(await world.http.get(f"{path}/{wrong}"), status, code)
    assert_problem(await world.http.get("/api/v1/repos/no/where/log"), 404, "not_found")


async def test_a_fork_is_a_repository_of_its_own(world: World, tmp_path: Path) -> None:
    work = await pushed(world, tmp_path, world.repo)
    fork = f"{world.repo}-fork"
    answer = await world.http.post(f"/api/v1/repos/{world.repo}/fork", json={"name": fork})
    assert answer.status_code == 201, answer.text
    assert (answer.json()["parent"], answer.json()["default_branch"]) == (world.repo, "main")
    assert_problem(
        await world.http.post(f"/api/v1/repos/{world.repo}/fork", json={"name": fork}), 409, "conflict"
    )
    clone = tmp_path / "clone"
    url = address(world.served, fork, world.served.token)
    assert (await git(tmp_path, "clone", "-q", url, str(clone))).returncode == 0
    assert WorkingCopy(clone).git("rev-parse", "HEAD") == work.git("rev-parse", "HEAD")
    work.commit({"a": b"2", ".dynflow/ci.py": QUICK.encode()})
    assert "follow the run" in (await git(work.path, "push", url, "main")).stderr
    assert len(await world.runs()) == 0
    assert (await world.http.delete(f"/api/v1/repos/{world.repo}")).status_code == 204
    assert_problem(await world.http.get(f"/api/v1/repos/{world.repo}"), 404, "not_found")
    done = await git(tmp_path, "ls-remote", address(world.served, world.repo, world.served.token))
    assert "not found" in done.stderr
    again = tmp_path / "again"
    assert (await git(tmp_path, "clone", "-q", "--depth=1", url, str(again))).returncode == 0


async def test_nobody_pushes_to_a_repository_that_is_read_only(world: World, tmp_path: Path) -> None:
    work = await pushed(world, tmp_path, world.repo)
    url = address(world.served, world.repo, world.served.token)
    changed = await world.http.patch(f"/api/v1/repos/{world.repo}", json={"read_only": True})
    assert changed.json()["read_only"] is True
    work.commit({"a": b"2"})
    done = await git(work.path, "push", url, "main")
    assert done.returncode != 0
    assert "read-only" in done.stderr
    assert (await git(work.path, "fetch", url)).returncode == 0
    await world.http.patch(f"/api/v1/repos/{world.repo}", json={"read_only": False})
    assert (await git(work.path, "push", url, "main")).returncode == 0


async def test_a_token_of_one_repository_opens_that_one_alone(
    world: World, tmp_path: Path, nobody: httpx.AsyncClient
) -> None:
    work = await pushed(world, tmp_path, world.repo)
    other = f"{world.repo}-other"
    await pushed(world, tmp_path, other)
    secret = await token(
        world.http, name=f"of-{world.repo.replace('/', '-')}", repo=world.repo, scopes=["read"]
    )
    headers = {"Authorization": f"Bearer {secret}"}
    assert (await git(tmp_path, "ls-remote", address(world.served, world.repo, secret))).returncode == 0
    assert (await nobody.get(f"/api/v1/repos/{world.repo}/log", headers=headers)).status_code == 200
    done = await git(work.path, "push", address(world.served, world.repo, secret), "main:other")
    assert "403" in done.stderr
    done = await git(tmp_path, "ls-remote", address(world.served, other, secret))
    assert "403" in done.stderr
    for path in (f"/api/v1/repos/{other}", f"/api/v1/repos/{other}/log", "/api/v1/repos", "/api/v1/runs"):
        assert_problem(await nobody.get(path, headers=headers), 403, "forbidden")
    assert_problem(await nobody.post("/api/v1/login-links", headers=headers), 403, "forbidden")
    assert_problem(await nobody.post("/api/v1/tokens", headers=headers, json={"name": "x"}), 403, "forbidden")


async def test_a_token_of_a_repository_that_is_deleted_opens_no_later_one(
    world: World, tmp_path: Path
) -> None:
    await pushed(world, tmp_path, world.repo)
    secret = await token(world.http, name=f"gone-{world.repo.replace('/', '-')}", repo=world.repo)
    assert (await world.http.delete(f"/api/v1/repos/{world.repo}")).status_code == 204
    await world.http.post("/api/v1/repos", json={"name": world.repo})
    done = await git(tmp_path, "ls-remote", address(world.served, world.repo, secret))
    assert "Authentication failed" in done.stderr
    found = await git(tmp_path, "ls-remote", address(world.served, world.repo, world.served.token))
    assert (found.returncode, found.stdout) == (0, ""), "nothing of the first one is in the second"


async def test_tokens_that_cannot_be_are_refused(world: World) -> None:
    await world.http.post("/api/v1/repos", json={"name": world.repo})
    for fields, status, code in (
        ({"repo": "no/where"}, 404, "not_found"),
        ({"repo": world.repo, "scopes": ["admin"]}, 400, "invalid_input"),
        ({"expires_in": "soon"}, 400, "invalid_input"),
        ({"expires_in": "1 second"}, 400, "invalid_input"),
        ({"expires_in": "1000 years"}, 400, "invalid_input"),
    ):
        answer = await world.http.post("/api/v1/tokens", json={"name": "odd", **fields})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code


async def test_an_import_is_filled_refreshed_by_its_webhook_and_served(
    world: World, nobody: httpx.AsyncClient, tmp_path: Path, new_repo: Callable[[], str]
) -> None:
    upstream, name = world.repo, new_repo()
    work = await pushed(world, tmp_path, upstream)
    secret = await token(world.http, name=f"up-{upstream.replace('/', '-')}", repo=upstream, scopes=["read"])
    body = {
        "name": name,
        "url": f"{world.served.url}/git/{upstream}.git",
        "username": "x",
        "password": secret,
    }
    answer = await world.http.post("/api/v1/imports", json=body)
    assert answer.status_code == 202, answer.text
    assert secret not in answer.text
    hook = answer.json()["hook_secret"]

    async def until(sha: str) -> None:
        with anyio.fail_after(30):
            while True:
                found = (await world.http.get(f"/api/v1/repos/{name}/import")).json()
                if found["state"] == "ready" and found["due_at"] is None:
                    log = (await world.http.get(f"/api/v1/repos/{name}/log")).json()
                    if log["items"][0]["sha"] == sha:
                        return
                await anyio.sleep(0.01)

    await until(work.git("rev-parse", "HEAD"))
    sha = work.commit({".dynflow/ci.py": QUICK.encode()})
    await git(work.path, "push", address(world.served, upstream, world.served.token), "main")
    signature = "sha256=" + hmac.new(hook.encode(), b"{}", hashlib.sha256).hexdigest()
    told = await nobody.post(
        f"/webhooks/refresh/{name}", content=b"{}", headers={"X-Hub-Signature-256": signature}
    )
    assert told.status_code == 202, told.text
    await until(sha)
    with anyio.fail_after(30):
        while not (await world.http.get("/api/v1/runs", params={"repo": name})).json()["items"]:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    refused = await nobody.post(f"/webhooks/refresh/{name}", content=b"{}")
    assert_problem(refused, 401, "unauthorized")
    clone = tmp_path / "clone"
    assert (
        await git(tmp_path, "clone", "-q", address(world.served, name, world.served.token), str(clone))
    ).returncode == 0
    await world.http.patch(f"/api/v1/repos/{name}", json={"read_only": False})
    done = await git(clone, "push", address(world.served, name, world.served.token), "main:other")
    assert "read-only" in done.stderr
    refreshed = await world.http.post(f"/api/v1/repos/{name}/refresh", json={"verify": True})
    assert refreshed.status_code == 202


async def test_imports_that_cannot_be_are_refused(world: World, new_repo: Callable[[], str]) -> None:
    await world.http.post("/api/v1/repos", json={"name": world.repo})
    url = "https://example.org/x.git"
    for fields, status in (
        ({"name": world.repo, "url": url}, 409),
        ({"name": new_repo(), "url": "file:///etc"}, 400),
        ({"name": new_repo(), "url": "https://u:p@h/x"}, 400),
        ({"name": new_repo(), "url": url, "username": "x"}, 400),
        ({"name": new_repo(), "url": url, "depth": 0}, 400),
        ({"name": new_repo(), "url": url, "depth": 1, "blobs": False}, 400),
        ({"name": "../x", "url": url}, 400),
        ({"name": new_repo(), "url": url, "password": "a\nb"}, 400),
    ):
        answer = await world.http.post("/api/v1/imports", json=fields)
        assert answer.status_code == status, (fields, answer.text)
    assert_problem(await world.http.get(f"/api/v1/repos/{world.repo}/import"), 404, "not_found")
    body: dict[str, Any] = {}
    assert_problem(await world.http.post(f"/api/v1/repos/{world.repo}/refresh", json=body), 404, "not_found")


READING = """
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, artifacts = event.payload["repo"], self.env.ARTIFACTS
        commits = await step.do("log", lambda: artifacts.log(repo, "main", limit=5))
        commit = await step.do("commit", lambda: artifacts.read_commit(repo, commits[-1].sha))
        entries = await step.do("folder", lambda: artifacts.read_tree(repo, path="docs"))
        workspace = await step.do("checkout", lambda: artifacts.fork(repo, submodules=True, lfs=True))
        said = f"{len(commits)} {commit.message.strip()} {entries[0].name}"
        script = f"git status --porcelain; cat lib/a; echo; echo {said}"
        await step.do("show", lambda: run_in_sandbox(workspace, ["sh", "-c", script]))
"""


async def test_a_pipeline_reads_history_and_has_submodules_by_leave(world: World, tmp_path: Path) -> None:
    lib = await pushed(world, tmp_path, f"{world.repo}-lib")
    await world.http.post("/api/v1/repos", json={"name": world.repo})
    work = working_copy(tmp_path / "app")
    url = f"../{world.repo.partition('/')[2]}-lib.git"
    modules = f'[submodule "lib"]\n\tpath = lib\n\turl = {url}\n'.encode()
    work.commit({"docs/x": b"1", ".gitmodules": modules, ".dynflow/ci.py": READING.encode()}, "first")
    work.git("update-index", "--add", "--cacheinfo", f"160000,{lib.git('rev-parse', 'HEAD')},lib")

    async def run() -> dict[str, Any]:
        work.git("commit", "--quiet", "--allow-empty", "--message", "more")
        done = await git(work.path, "push", address(world.served, world.repo, world.served.token), "main")
        assert done.returncode == 0, done.stderr
        sha = work.git("rev-parse", "HEAD")
        with anyio.fail_after(30):
            while True:
                for each in await world.runs():
                    if each["sha"] == sha:
                        return await world.concluded(each["id"])
                await anyio.sleep(0.01)

    refused = await run()
    assert refused["conclusion"] == "failure"
    assert f"dynflow repo set {world.repo} --reads" in str(refused)
    answer = await world.http.patch(f"/api/v1/repos/{world.repo}", json={"reads": [f"{world.repo}-lib"]})
    assert answer.json()["reads"] == [f"{world.repo}-lib"]
    shown = await run()
    assert shown["conclusion"] == "success", shown
    log = (await world.http.get(f"/api/v1/runs/{shown['id']}/steps/show/log")).text
    assert log.splitlines()[1:3] == ["1", "3 first x"], log
    assert_problem(
        await world.http.patch(f"/api/v1/repos/{world.repo}", json={"reads": ["no/where"]}), 404, "not_found"
    )
