"""What-if runs over HTTP: real workspaces, real isolates, real commits."""

from __future__ import annotations

from typing import Any

import httpx

from tests.ci_platform.api.world import HEAD, World, assert_problem

PIPELINE = HEAD + (
    '        await sh("install", "echo installed >> made.txt; echo ran")\n'
    '        await sh("test", "cat a.txt made.txt; echo tested >> made.txt; git status --short")\n'
    '        await sh("publish", "cat made.txt; echo on " + event.payload["branch"])\n'
)
# The same, except that `install` has another name, and that it says so.
OTHER = PIPELINE.replace('"install", "echo installed', '"setup", "echo set-up')
FILES = {"a.txt": "one\ntwo\nthree\n", "b.txt": "b\n"}
PATCH = """\
--- a/a.txt
+++ b/a.txt
@@ -1,3 +1,3 @@
 one
-two
+TWO
 three
diff --git a/b.txt b/b.txt
deleted file mode 100644
--- a/b.txt
+++ /dev/null
@@ -1 +0,0 @@
-b
diff --git a/sub/new.sh b/sub/new.sh
new file mode 100755
--- /dev/null
+++ b/sub/new.sh
@@ -0,0 +1 @@
+echo new
"""


async def source(world: World, pipeline: str = PIPELINE, **options: Any) -> dict[str, Any]:
    return await world.concluded(await world.push(pipeline, files=FILES, **options))


async def what_if(world: World, run: dict[str, Any], **body: Any) -> dict[str, Any]:
    answer = await world.http.post(f"/api/v1/runs/{run['id']}/what-if", json=body)
    assert answer.status_code == 201, answer.text
    return await world.concluded(answer.json()["id"])


async def log(world: World, run: dict[str, Any], step: str) -> str:
    return (await world.http.get(f"/api/v1/runs/{run['id']}/steps/{step}/log")).text


async def snapshots(world: World, run: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = (await world.http.get(f"/api/v1/runs/{run['id']}/snapshots")).json()["items"]
    return [(each["name"], each["step"], each["paths"]) for each in found]


async def test_a_step_is_tried_on_the_files_before_it_and_on_patched_ones(world: World) -> None:
    run = await source(world)
    before = await snapshots(world, run)
    plain = await what_if(world, run, from_step="test")
    assert (plain["conclusion"], [step["kept"] for step in plain["steps"]]) == (
        "success",
        [True, True, False, False],
    )
    assert "one\ntwo\nthree\ninstalled\n?? made.txt\n" in await log(world, plain, "test")
    assert await snapshots(world, plain) == before
    patched = await what_if(world, run, from_step="test", patch=PATCH)
    printed = await log(world, patched, "test")
    assert "one\nTWO\nthree\ninstalled\n" in printed
    assert all(line in printed for line in (" M a.txt\n", " D b.txt\n", "?? sub/\n"))
    assert (await snapshots(world, patched))[:3] == [before[0], before[1], ("2", "(patch)", 4)]
    assert patched["forked"]["patched_files"] == ["a.txt", "b.txt", "sub/new.sh"]
    # Once more, of the fork: what came before, the patch too, and whose workspaces those are.
    twice = await what_if(world, patched, from_step="publish", inputs={"branch": "elsewhere"})
    assert "installed\ntested\non elsewhere\n" in await log(world, twice, "publish")
    again = await world.http.post(f"/api/v1/runs/{twice['id']}/rerun")
    assert (again.status_code, (await world.concluded(twice["id"]))["conclusion"]) == (202, "success")
    assert await snapshots(world, run) == before
    now = await world.run(run["id"])
    assert [fork["run"] for fork in now["forks"]] == [plain["id"], patched["id"]]
    assert now["steps"] == run["steps"]


async def test_other_code_runs_what_it_calls_and_what_it_leaves_out_is_told(world: World) -> None:
    run, other = await source(world), await source(world, OTHER, branch="other")
    tried = await what_if(world, run, from_step="test", code=other["sha"])
    assert tried["conclusion"] == "success"
    assert [(step["name"], step["kept"]) for step in tried["steps"]] == [
        ("checkout", True),
        ("install", True),
        ("setup", False),
        ("test", False),
        ("publish", False),
    ]
    assert (tried["forked"]["unused_steps"], tried["forked"]["reached"]) == (["install #1"], True)
    assert (tried["sha"], tried["pipeline_digest"]) == (run["sha"], other["pipeline_digest"])
    assert "installed\nset-up\n" in await log(world, tried, "test")  # files as they were: install's too
    by_branch = await what_if(world, run, from_step="install", code="other")
    assert (by_branch["forked"]["code"], by_branch["forked"]["reached"]) == (other["sha"], False)


async def test_what_cannot_be_tried_is_refused_and_leaves_nothing(
    world: World, nobody: httpx.AsyncClient
) -> None:
    run = await source(world)
    token = (await world.http.post("/api/v1/tokens", json={"name": "reader", "scopes": ["read"]})).json()
    reads = {"authorization": f"Bearer {token['secret']}"}
    path = f"/api/v1/runs/{run['id']}/what-if"
    wrong = PATCH.replace("-two", "-2")
    error = assert_problem(
        await world.http.post(path, json={"from_step": "test", "patch": wrong}), 422, "patch_refused"
    )
    assert error["message"].startswith("'a.txt', hunk 1 (line 1) does not apply")
    for body, status, code in (
        (
            {"from_step": "test", "patch": "--- /dev/null\n+++ b/../x\n@@ -0,0 +1 @@\n+x\n"},
            422,
            "patch_refused",
        ),
        ({"from_step": "checkout", "patch": PATCH}, 400, "invalid_input"),
        ({"from_step": "test", "patch": PATCH, "workspace": "test"}, 400, "invalid_input"),
        ({"from_step": "nothing"}, 404, "not_found"),
        ({"from_step": "test", "code": "f" * 40}, 403, "forbidden"),
        ({"from_step": "test", "code": "no-such-branch"}, 404, "not_found"),
        ({"from_step": "test", "inputs": {"repo": "a/b"}}, 400, "invalid_input"),
        ({"from_step": "test", "inputs": 7}, 400, "invalid_input"),
    ):
        assert_problem(await world.http.post(path, json=body), status, code)
    assert_problem(await nobody.post(path, json={}, headers=reads), 403, "forbidden")
    assert_problem(await nobody.post(path, json={}), 401, "unauthorized")
    assert_problem(await world.http.post("/api/v1/runs/nothing/what-if"), 404, "not_found")
    assert (await world.run(run["id"]))["forks"] == []
    await world.served.platform.workspaces.delete_run(run["id"])
    assert_problem(await world.http.post(path, json={"from_step": "test"}), 409, "conflict")
    run = await source(world)
    large = await what_if(world, run, from_step="publish", patch=PATCH + "# " + "é" * 200_000)
    assert large["conclusion"] == "success"


async def test_pages_lead_from_one_to_the_other_and_back(world: World) -> None:
    run = await source(world)
    tried = await what_if(world, run, from_step="test", inputs={"title": "<b>"}, patch=PATCH)
    page = (await world.http.get(f"/runs/{tried['id']}", headers={"accept": "text/html"})).text
    assert f'href="/runs/{run["id"]}"' in page
    assert "patched a.txt, b.txt, sub/new.sh" in page
    assert "input title = &#34;&lt;b&gt;&#34;" in page
    page = (await world.http.get(f"/runs/{run['id']}", headers={"accept": "text/html"})).text
    assert f'href="/runs/{tried["id"]}"' in page
    kept = await world.http.get(
        f"/runs/{tried['id']}", params={"step": "install"}, headers={"accept": "text/html"}
    )
    assert f'href="/runs/{run["id"]}?step=install"' in kept.text
