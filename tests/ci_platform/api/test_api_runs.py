"""Runs over HTTP: listed, shown, followed, logged, decided, cancelled, rerun."""

from __future__ import annotations

import io
import tarfile
import threading

import anyio
import anyio.to_thread
import httpx

from tests.ci_platform.api.world import FAILING, GATED, HEAD, QUICK, SLOW, World, assert_problem


async def test_files_beside_the_pipeline_are_modules_of_it(world: World) -> None:
    pipeline = (
        "import words, settings\nfrom data import raw\n"
        + HEAD
        + (
            "        text = '-'.join([words.say(), settings.value['region'], raw.value.hex()])\n"
            "        await step.do(text, lambda: text)\n"
        )
    )
    files = {
        ".dynflow/words.py": "def say(): return 'hi'",
        ".dynflow/settings.json": '{"region": "eu"}',
        ".dynflow/data/raw.bin": "\udcff\udcfe",
    }
    run = await world.concluded(await world.push(pipeline, files=files))
    assert run["conclusion"] == "success", run
    assert "hi-eu-fffe" in [step["name"] for step in run["steps"]]


async def test_a_push_becomes_a_run_with_steps_attempts_and_a_cause(world: World) -> None:
    run = await world.concluded(await world.push(QUICK))
    assert (run["status"], run["conclusion"]) == ("finished", "success")
    assert (run["repo"], run["branch"], run["event"], run["number"]) == (world.repo, "main", "push", 1)
    assert run["cause"]["forge"] == "local"
    assert [(step["name"], step["status"]) for step in run["steps"]] == [
        ("checkout", "complete"),
        ("greet", "complete"),
    ]
    (attempt,) = run["steps"][1]["attempts"]
    assert attempt["number"] == 1
    assert attempt["started_at"] <= attempt["ended_at"]
    assert attempt["error"] is None


async def test_a_failed_command_shows_with_its_output(world: World) -> None:
    run = await world.concluded(await world.push(FAILING))
    assert run["conclusion"] == "failure"
    error = run["steps"][1]["error"]
    assert error["name"] == "CommandFailedError"
    assert "exited with 3" in error["message"]
    assert "broken" in error["message"]


async def test_lists_are_filtered_and_paged(world: World) -> None:
    for branch in ("main", "topic", "other"):
        await world.concluded(await world.push(QUICK, branch=branch, files={"branch": branch}))
    assert [run["branch"] for run in await world.runs()] == ["other", "topic", "main"]
    assert [run["branch"] for run in await world.runs(ref="topic")] == ["topic"]
    assert [run["branch"] for run in await world.runs(ref="refs/heads/main")] == ["main"]
    assert len(await world.runs(status="success")) == 3
    assert await world.runs(status="failure") == []
    seen, cursor = [], None
    while True:
        more = f"&cursor={cursor}" if cursor else ""
        page = (await world.http.get(f"/api/v1/runs?repo={world.repo}&limit=2{more}")).json()
        seen += [run["branch"] for run in page["items"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert seen == ["other", "topic", "main"]


async def test_events_are_history_then_live_and_go_on_from_an_id(world: World) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    path = f"/api/v1/runs/{run_id}/events"
    seen = []
    with anyio.fail_after(60):
        async with world.events(path) as events:
            async for event in events:
                seen.append(event)
                if event.event == "history" and event.data["type"] == "workflow.waiting":
                    await world.decide(run_id, "approve")
    types = [event.data.get("type") for event in seen]
    assert types[:2] == ["workflow.queued", "workflow.started"]
    assert types[-2] == "workflow.completed"
    assert seen[-1].event == "end"
    ids = [int(event.id) for event in seen if event.event == "history" and event.id]
    assert ids == sorted(set(ids))
    assert len(ids) == len(seen) - 1
    with anyio.fail_after(30):
        async with world.events(path, headers={"Last-Event-ID": str(ids[4])}) as events:
            rest = [event.id async for event in events]
    assert rest == [*map(str, ids[5:]), None]


async def test_a_log_is_plain_text_with_times_where_asked_for(world: World) -> None:
    run_id = await world.push(QUICK)
    await world.concluded(run_id)
    path = f"/api/v1/runs/{run_id}/steps/greet/log"
    answer = await world.http.get(path)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    lines = answer.text.splitlines()
    assert lines[0].startswith("$ sh -c")
    assert lines[1:3] == ["hello", "world"]
    timed = (await world.http.get(path, params={"timestamps": "1"})).text.splitlines()
    assert timed[1].endswith("Z hello")


async def test_a_log_is_followed_while_it_grows_and_goes_on_from_an_id(world: World) -> None:
    run_id = await world.push(SLOW)
    await world.working_on(run_id, "wait")
    path = f"/api/v1/runs/{run_id}/steps/wait/log"
    texts, cursors = [], []
    with anyio.fail_after(60):
        async with world.events(path, params={"follow": "1"}) as events:
            async for event in events:
                if event.event == "end":
                    break
                cursors.append(event.id)
                texts += [line["text"] for line in event.data["lines"]]
                if "begun" in texts:
                    await world.http.post(f"/api/v1/runs/{run_id}/cancel")
    assert "begun" in texts
    async with world.events(
        path, params={"follow": "1"}, headers={"Last-Event-ID": str(cursors[-1])}
    ) as events:
        assert [event.event async for event in events] == ["end"]


async def test_the_log_of_a_step_that_is_not_there_is_404(world: World) -> None:
    run_id = await world.push(QUICK)
    await world.concluded(run_id)
    for step in ("nothing", "greet/../../checkout", "%2e%2e", "greet?count=2"):
        answer = await world.http.get(f"/api/v1/runs/{run_id}/steps/{step}/log")
        assert_problem(answer, 404, "not_found")


async def test_open_gates_are_listed_and_the_first_decision_wins(world: World) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    gates = (await world.http.get("/api/v1/gates", params={"state": "open", "repo": world.repo})).json()[
        "items"
    ]
    assert [(gate["run_id"], gate["name"], gate["state"]) for gate in gates] == [(run_id, "approval", "open")]
    decided = await world.decide(run_id, "approve", comment="fine")
    assert decided.status_code == 200
    assert (decided.json()["state"], decided.json()["decided_by"]) == ("approved", "local-admin")
    error = assert_problem(await world.decide(run_id, "reject"), 409, "conflict")
    assert "local-admin" in error["message"]
    run = await world.concluded(run_id)
    assert run["conclusion"] == "success"
    assert run["gates"][0]["comment"] == "fine"
    assert (await world.http.get("/api/v1/gates", params={"repo": world.repo})).json() == {"items": []}


async def test_a_rejection_ends_the_run(world: World) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    assert (await world.decide(run_id, "reject", comment="not today")).json()["state"] == "rejected"
    run = await world.concluded(run_id)
    assert run["conclusion"] == "failure"
    assert "rejected by local-admin: not today" in run["reason"]
    assert "after" not in {step["name"] for step in run["steps"]}


async def test_what_is_no_decision_is_400_and_no_gate_404(world: World) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    assert_problem(await world.decide(run_id, "perhaps"), 400, "invalid_input")
    assert_problem(await world.decide(run_id, "approve", comment="x" * 5000), 400, "invalid_input")
    assert_problem(await world.decide(run_id, "approve", gate="other"), 404, "not_found")
    await world.http.post(f"/api/v1/runs/{run_id}/cancel")
    await world.concluded(run_id)


async def test_a_run_that_works_is_cancelled(world: World) -> None:
    run_id = await world.push(SLOW)
    await world.working_on(run_id, "wait")
    answer = await world.http.post(f"/api/v1/runs/{run_id}/cancel", json={"reason": "enough"})
    assert answer.status_code == 202
    run = await world.concluded(run_id)
    assert run["conclusion"] == "cancelled"
    assert run["reason"] == "cancelled by local-admin: enough"
    assert_problem(await world.http.post(f"/api/v1/runs/{run_id}/cancel"), 409, "conflict")


async def test_a_run_is_rerun_from_a_step_and_whole(world: World) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    assert_problem(await world.http.post(f"/api/v1/runs/{run_id}/rerun"), 409, "conflict")
    await world.decide(run_id, "approve")
    first = await world.concluded(run_id)
    path = f"/api/v1/runs/{run_id}/rerun"
    assert_problem(await world.http.post(path, json={"from_step": "nothing"}), 404, "not_found")
    assert (await world.http.post(path, json={"from_step": "after"})).status_code == 202
    second = await world.concluded(run_id)
    assert (second["attempt"], second["conclusion"]) == (2, "success")
    kept = [step["started_at"] for step in first["steps"][:3]]
    assert [step["started_at"] for step in second["steps"][:3]] == kept
    assert second["steps"][3]["started_at"] > first["steps"][3]["started_at"]
    assert (await world.http.post(path)).status_code == 202
    await world.at_gate(run_id)
    await world.decide(run_id, "approve")
    third = await world.concluded(run_id)
    assert third["steps"][0]["started_at"] > first["steps"][0]["started_at"]


async def test_repositories_are_registered_once(world: World, http: httpx.AsyncClient) -> None:
    made = await http.post("/api/v1/repos", json={"name": world.repo})
    assert made.status_code == 201
    assert (await http.post("/api/v1/repos", json={"name": world.repo})).json() == made.json()
    assert made.json() in (await http.get("/api/v1/repos")).json()["items"]
    other = await http.post("/api/v1/repos", json={"name": world.repo, "forge": "github"})
    assert_problem(other, 409, "conflict")
    for name in ("x", "../../etc", "a/b/c", "-a/b", "a/..", "a/b.git"):
        assert_problem(await http.post("/api/v1/repos", json={"name": name}), 400, "invalid_input")


FAILS_LATER = HEAD + (
    '        await sh("build", "mkdir out; echo built > out/it; ln -s /etc/passwd out/passwd")\n'
    '        again = await step.do("again", lambda: self.env.ARTIFACTS.fork_snapshot(workspace, "build"))\n'
    '        await step.do("look", lambda: run_in_sandbox(again, ["grep", "built", "out/it"]))\n'
    '        await sh("test", "echo partly > report; exit 3")\n'
)


async def test_a_runs_snapshots_are_looked_at_and_downloaded(world: World, nobody: httpx.AsyncClient) -> None:
    run_id = await world.push(FAILS_LATER)
    assert [step["status"] for step in (await world.concluded(run_id))["steps"]][:3] == ["complete"] * 3
    listed = (await world.http.get(f"/api/v1/runs/{run_id}/snapshots")).json()["items"]
    assert [(item["workspace"].partition(".")[2], item["outcome"], item["step"]) for item in listed] == [
        ("again-1", "forked", None),
        ("again-1", "committed", "(snapshot)"),
        ("checkout-1", "forked", None),
        ("checkout-1", "committed", "build"),
        ("checkout-1", "failed", "test"),
    ]
    failed = f"/api/v1/runs/{run_id}/snapshots/{listed[4]['workspace']}/{listed[4]['name']}"
    read = await world.http.get(f"{failed}/file", params={"path": "report"})
    assert (read.content, read.headers["content-disposition"]) == (b"partly\n", 'attachment; filename="file"')
    files = (await world.http.get(f"{failed}/files", params={"path": "out"})).json()["items"]
    assert [(item["name"], item["kind"], item["target"]) for item in files] == [
        ("it", "file", None),
        ("passwd", "symlink", "/etc/passwd"),
    ]
    answer = await world.http.get(f"{failed}/tar")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert {"report", "out/it", "out/passwd"} <= set(archive.getnames())
        assert not [name for name in archive.getnames() if name.startswith(".git/")]
    for path in ("out/passwd", "nothing", "../../server.json", "/etc/passwd", "out"):
        assert (await world.http.get(f"{failed}/file", params={"path": path})).status_code == 404, path
    for place in ("/files", "/file?path=report", "/tar"):
        assert (await nobody.get(failed + place)).status_code == 401
        assert (await world.http.get(f"/api/v1/runs/{run_id}/snapshots/other.x/0{place}")).status_code == 404
        gone = await world.http.get(f"{failed.rpartition('/')[0]}/99{place}")
        assert gone.status_code == 404
        assert "99" in gone.json()["error"]["message"]
    assert (await world.http.get(f"/api/v1/runs/{'0' * 32}/snapshots")).status_code == 404


async def test_a_download_that_is_given_up_leaves_nothing_open(world: World) -> None:
    run_id = await world.push(
        FAILS_LATER.replace("echo built", "head -c 30000000 /dev/zero > out/large; echo built")
    )
    await world.concluded(run_id)
    place = f"/api/v1/runs/{run_id}/snapshots/{run_id}.checkout-1/1/tar"
    async with world.http.stream("GET", place) as answer:
        async for _ in answer.aiter_raw(1000):
            break
    with anyio.fail_after(30):
        for thread in threading.enumerate():
            if thread.name == "snapshot tar":
                await anyio.to_thread.run_sync(thread.join)
