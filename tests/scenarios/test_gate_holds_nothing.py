"""At the gate nothing of a run is left in the platform's own process either: no task, no thread, no descriptor."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from ci_platform.assembly import Platform, open_platform
from ci_platform.settings import load_settings
from tests.scenarios.pipelines import DEMO, make_repository
from tests.scenarios.test_main_job import REPO, push_to_main

SECRET = "a webhook secret"
SECONDS = 60.0


def what_lives() -> tuple[Counter[str], Counter[str]]:
    """Return the tasks by their coroutines, and the threads that are not idle workers of a pool."""
    tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
    threads = Counter(thread.name for thread in threading.enumerate() if "worker thread" not in thread.name)
    return tasks, threads


async def deliver(platform: Platform, payload: Any, delivery_id: str) -> None:
    body = json.dumps(payload).encode()
    headers = {
        "content-type": "application/json",
        "x-github-event": "push",
        "x-github-delivery": delivery_id,
        "x-hub-signature-256": "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest(),
    }
    await platform.deliveries.accept(platform.forges["github"].receive(headers, body))


async def at_gate(platform: Platform, ref: str) -> str:
    """Wait until the run of `ref` waits at its gate; return its id."""
    async with asyncio.timeout(SECONDS):
        while True:
            runs = (await platform.runs.list(ref=ref)).runs
            if runs and await platform.gates.of_run(runs[0].id) and runs[0].status == "waiting":
                return runs[0].id
            await asyncio.sleep(0.02)  # until the next look at the tables


def descriptors() -> int:
    """Return how many descriptors are open, but for the pooled connections to the platform's database."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists the folder is gone by now
            found.append(str(link.readlink()))
    return len([target for target in found if "platform.db" not in target])


async def settled() -> tuple[Counter[str], Counter[str], int]:
    """Return what lives, and the number of descriptors, once that stays the same for a while."""
    seen: list[tuple[Counter[str], Counter[str], int]] = []
    async with asyncio.timeout(SECONDS):
        while len(seen) < 20 or any(one != seen[-1] for one in seen[-20:]):
            await asyncio.sleep(0.02)
            seen.append((*what_lives(), descriptors()))
    return seen[-1]


async def test_waiting_runs_have_no_task_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    bare, sha = make_repository(tmp_path / "repo", DEMO.replace('if branch == "main"', "if branch"))
    options = {
        "data": tmp_path / "data",
        "github_webhook_secret": SECRET,
        "allow_file_remotes": True,
        "allow_containers": False,
        "github_api_url": "http://127.0.0.1:9",  # nobody listens there: reports wait, runs do not
    }
    async with open_platform(load_settings(options, {})) as platform:
        await platform.repositories.register(REPO, forge="github", clone_url=bare.as_uri())
        refs = [f"refs/heads/branch-{number}" for number in range(4)]
        waiting = []
        for ref in refs[:2]:  # what is made once, for all runs, is made by the first
            await deliver(platform, push_to_main(sha) | {"ref": ref}, ref.rpartition("/")[2])
            waiting.append(await at_gate(platform, ref))
        two_wait = await settled()
        for ref in refs[2:]:
            await deliver(platform, push_to_main(sha) | {"ref": ref}, ref.rpartition("/")[2])
        waiting += [await at_gate(platform, ref) for ref in refs[2:]]
        assert await settled() == two_wait
        for run_id in waiting:
            await platform.runs.decide(run_id, "approval", "approve", by="a tester")
        async with asyncio.timeout(SECONDS):
            ended = [await platform.runs.concluded(run_id) for run_id in waiting]
        assert [run.conclusion for run in ended] == ["success"] * 4
