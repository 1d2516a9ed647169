"""A fuzzer of kills: runs in many repositories, a server that dies at random moments, and what must hold anyway.

`Fuzz(folder, seed=…).run(kills=…)` raises AssertionError with the seed's trace. scripts/fuzz_kills.py runs it
for as long as one likes.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.scenarios.github_server import GitHubServer
from tests.scenarios.leftovers import Leftovers, below
from tests.scenarios.pipelines import git, make_repository
from tests.scenarios.server import Server
from tests.scenarios.test_main_job import recorded

PIPELINE = """\
import asyncio
from dynflow import WorkflowEntrypoint
from pipelines import run_in_sandbox, summarise

RETRY = {"retries": {"limit": 4, "delay": 0.1, "backoff": "constant"}}

class CIPipeline(WorkflowEntrypoint):
    async def run(self, event, step):
        repo, sha, pr = (event.payload[key] for key in ("repo", "sha", "pr"))
        workspace = await step.do("checkout", lambda: self.env.ARTIFACTS.fork(repo, sha=sha))

        def command(name, fails=False):
            end = "exit 7" if fails else f"echo {name}-finished"
            script = f"echo {name} >> all.txt && echo {name} >> ran-{name}.txt && sleep 0.1 && {end}"
            return run_in_sandbox(workspace, ["sh", "-c", script])

        await step.do("install", lambda: command("install"))
        results = await asyncio.gather(
            step.do("lint", lambda: command("lint")),
            step.do("test", lambda: command("test")),
            # The first attempt fails by itself; kills may cost it more.
            step.do("flaky", RETRY, lambda ctx: command("flaky", fails=ctx.attempt == 1)),
            step.sleep("pause", 0.3),
        )
        await step.do("pack", lambda: command("pack"))
        if pr:
            text = summarise(dict(zip(("lint", "test", "flaky"), results)))
            await step.do("comment", lambda: self.env.GITHUB.comment_on_pr(repo, pr, text))
        await step.wait_for_event("approval", type="deploy-approval", timeout="1 hour")
        await step.do("deploy", lambda: command("deploy"))
        shown = await step.do("show", lambda: run_in_sandbox(
            workspace, ["sh", "-c", "cat ran-*.txt | sort && echo : && sed -n '1p;$p' all.txt"]
        ))
        return shown.output.split()
"""
STEPS = ("install", "lint", "test", "flaky", "pack", "deploy")
# What the last step prints where nothing is disturbed: each command's file once, first and last in their places.
UNDISTURBED = [*sorted(STEPS), ":", "install", "deploy"]
_BEFORE_RERUN = ("checkout", "install")


@dataclass
class Wanted:
    """One run that is asked for, and what was answered about it."""

    repo: str
    sha: str
    payload: Any
    event: str
    delivery: str = field(default_factory=lambda: str(uuid.uuid4()))
    accepted: bool = False
    to_cancel: bool = False
    to_rerun: bool = False
    cancelled_at: str | None = None
    rerun_at: int | None = None
    complete: dict[tuple[str, int], Any] = field(default_factory=dict)


class Fuzz:
    """One world: repositories, GitHub, a data folder and the server that is killed."""

    def __init__(
        self, folder: Path, github: GitHubServer, *, seed: int, repositories: int = 2, pushes: int = 3
    ) -> None:
        self._random = random.Random(seed)
        self._github = github
        self.trace: list[str] = [f"seed {seed}"]
        temporary = folder / "tmp"
        temporary.mkdir()
        settings = {
            "TMPDIR": str(temporary),
            "DYNFLOW_GITHUB_API_URL": github.url,
            "DYNFLOW_ALLOW_FILE_REMOTES": "true",
            "DYNFLOW_ALLOW_CONTAINERS": "false",
        }
        self.server = Server(folder / "data", settings)
        self._children: set[Any] = set()
        self._leftovers = Leftovers(folder / "data", temporary, self.server.pids)
        self.wanted = list(self._make_world(folder, repositories, pushes))
        for one in self._random.sample(self.wanted, len(self.wanted) // 3):
            if self._random.random() < 0.5:
                one.to_cancel = True
            else:
                one.to_rerun = True

    def _make_world(self, folder: Path, repositories: int, pushes: int) -> Iterator[Wanted]:
        self._bare: dict[str, Path] = {}
        for number in range(repositories):
            repo = f"fuzz/repository-{number}"
            self._bare[repo], _ = make_repository(folder / f"repository-{number}", PIPELINE)
            work = folder / f"repository-{number}" / "work"
            for push in range(pushes):
                git(work, "commit", "--quiet", "--allow-empty", "-m", f"Change {push} of {repo}")
                git(work, "push", "--quiet", str(self._bare[repo]), f"HEAD:refs/heads/branch-{push}")
                sha = git(work, "rev-parse", "HEAD")
                opened = push == pushes - 1
                payload = _opened(repo, sha, number) if opened else pushed(repo, sha, f"branch-{push}")
                yield Wanted(repo, sha, payload, "pull_request" if opened else "push")

    def run(self, kills: int, *, longest: float = 2.5) -> None:
        """Kill `kills` times, then let everything end, and check all that must hold."""
        self.server.start()
        for repo, bare in self._bare.items():
            self.server.register(repo, bare)
        try:
            for number in range(kills):
                self._live_and_die(number, *self._lifetime(longest))
            self._live_to_the_end()
            self._check()
            self.server.stop()
            self._leftovers.wait_for_end_of(self._children)
            self._leftovers.check()
        except BaseException:
            sys.stderr.write("\n".join([*self.trace[-60:], self.server.log(), ""]))
            raise

    def end(self) -> None:
        """End the server, whatever became of it."""
        if self.server.process is not None and self.server.process.poll() is None:
            self.server.kill()

    # --- lives ---

    def _lifetime(self, longest: float) -> tuple[bool, float]:
        """Return how many seconds the server may live: counted from when it answers, or (True) from its start."""
        starting = self._random.random() < 0.3
        return starting, self._random.uniform(0.02, longest)

    def _live_and_die(self, number: int, starting: bool, lifetime: float) -> None:  # noqa: FBT001 - of _lifetime
        if self.server.process is None or self.server.process.poll() is not None:
            self.server.spawn()
        assert self.server.process is not None
        process = self.server.process
        killer = threading.Thread(target=self._kill_later, args=(starting, lifetime))
        killer.start()
        self._say(f"kill {number}: {lifetime:.2f} s after it {'was started' if starting else 'answered'}")
        children: set[Any] = set()
        while process.poll() is None:
            children |= below(process.pid)
            self._act()
        killer.join()
        # Commands go on without it, and end with their runs.
        self._children |= children

    def _kill_later(self, starting: bool, lifetime: float) -> None:  # noqa: FBT001 - of _lifetime
        if not starting:
            self.server.wait_until(self.server.is_ready, "the server to be ready")
        time.sleep(lifetime)  # a random moment is what this is about
        self.server.kill()

    def _live_to_the_end(self) -> None:
        self._say("the last life")
        if self.server.process is None or self.server.process.poll() is not None:
            self.server.start()
        deadline = time.monotonic() + 90
        while not self._all_done():
            self._act(settle=True)
            assert time.monotonic() < deadline, json.dumps(self._runs(), indent=1)[-4000:] + self.server.log()

    def _all_done(self) -> bool:
        runs = {run["sha"]: run for run in self._runs()}
        return all(
            one.accepted
            and one.sha in runs
            and runs[one.sha]["conclusion"] is not None
            and (not one.to_rerun or one.rerun_at is not None)
            for one in self.wanted
        )

    def _act(self, *, settle: bool = False) -> None:
        """Do one thing that a user or GitHub might; whatever is answered may never have been."""
        try:
            undelivered = [one for one in self.wanted if not one.accepted]
            if undelivered and (settle or self._random.random() < 0.3):
                self._deliver(self._random.choice(undelivered))
            else:
                self._touch(self._random.choice(self.wanted), settle=settle)
        except (httpx.HTTPError, FileNotFoundError, AssertionError) as error:
            if settle:
                raise
            time.sleep(0.02)  # it is dead or not up yet
            if isinstance(error, AssertionError) and "answered" in str(error):
                raise

    def _deliver(self, one: Wanted) -> None:
        answer = self.server.deliver(one.event, one.payload, delivery=one.delivery)
        assert answer.status_code == 202, f"answered {answer.status_code}: {answer.text}"
        one.accepted = True
        self._say(f"delivered {one.sha[:8]}")

    def _touch(self, one: Wanted, *, settle: bool) -> None:
        found = [run for run in self._runs(one.repo) if run["sha"] == one.sha]
        if not found:
            time.sleep(0.02)  # the other process's turn
            return
        run = self.server.api("GET", f"/runs/{found[0]['id']}")
        self._note_complete(one, run)
        if run["conclusion"] is not None:
            if one.to_rerun and one.rerun_at is None and run["conclusion"] == "success":
                self._rerun(one, run)
        elif one.to_cancel and one.cancelled_at is None and (settle or self._random.random() < 0.2):
            self._cancel(one, run)
        elif any(gate["state"] == "open" for gate in run["gates"]) and (
            settle or self._random.random() < 0.5
        ):
            answer = self._post(f"/runs/{run['id']}/gates/approval", {"decision": "approve"})
            self._say(f"approved {one.sha[:8]}: {answer.status_code}")

    def _cancel(self, one: Wanted, run: dict[str, Any]) -> None:
        answer = self._post(f"/runs/{run['id']}/cancel", {})
        self._say(f"cancelled {one.sha[:8]} ({run['waiting_for']}): {answer.status_code}")
        if answer.status_code == 202:
            one.cancelled_at = run["waiting_for"] or "at work"

    def _rerun(self, one: Wanted, run: dict[str, Any]) -> None:
        if run["attempt"] == 1:
            answer = self._post(f"/runs/{run['id']}/rerun", {"from_step": "lint"})
            self._say(f"rerun {one.sha[:8]}: {answer.status_code}")
            assert answer.status_code == 202, f"answered {answer.status_code}: {answer.text}"
        one.rerun_at = len(self._github.statuses(one.sha))
        one.complete = {key: kept for key, kept in one.complete.items() if key[0] in _BEFORE_RERUN}

    def _post(self, path: str, body: Any) -> httpx.Response:
        url = f"{self.server.url}/api/v1{path}"
        return httpx.post(url, json=body, headers=self.server.headers, timeout=30)

    def _runs(self, repo: str | None = None) -> list[dict[str, Any]]:
        params = {"limit": 100} | ({"repo": repo} if repo else {})
        items: list[dict[str, Any]] = self.server.api("GET", "/runs", params=params)["items"]
        return items

    def _note_complete(self, one: Wanted, run: dict[str, Any]) -> None:
        """Remember the attempts of finished steps: they must stay as they are."""
        if one.to_rerun and one.rerun_at is None and run["attempt"] > 1:
            one.rerun_at = 0  # it was carried out though its answer was lost
            one.complete = {key: kept for key, kept in one.complete.items() if key[0] in _BEFORE_RERUN}
        for step in run["steps"]:
            if step["status"] == "complete":
                key = step["name"], step["count"]
                before = one.complete.setdefault(key, step["attempts"])
                assert before == step["attempts"], (
                    f"answered: {key} was repeated: {before} {step['attempts']}"
                )

    def _say(self, text: str) -> None:
        self.trace.append(f"{time.strftime('%H:%M:%S')} {text}")

    # --- what must hold ---

    def _check(self) -> None:
        runs = self._runs()
        assert sorted(run["sha"] for run in runs) == sorted(one.sha for one in self.wanted)
        for one in self.wanted:
            found = next(run for run in runs if run["sha"] == one.sha)
            self._check_run(one, self.server.api("GET", f"/runs/{found['id']}"))
        self._check_comments(runs)

    def _check_run(self, one: Wanted, run: dict[str, Any]) -> None:
        self._note_complete(one, run)
        told = json.dumps(run, indent=1)[-6000:]
        if one.cancelled_at is not None and "approval" in one.cancelled_at:
            assert run["conclusion"] == "cancelled", told
        elif one.cancelled_at is not None:
            assert run["conclusion"] in {"cancelled", "success"}, told
        else:
            assert run["conclusion"] == "success", told
        if run["conclusion"] == "success":
            self._check_work(run, told)
        self._check_statuses(one, run["conclusion"])

    def _check_work(self, run: dict[str, Any], told: str) -> None:
        steps = {step["name"]: step for step in run["steps"]}
        for name in STEPS:
            ends = [attempt["ended_at"] is not None for attempt in steps[name]["attempts"]]
            assert ends, told
            finished = self._log(run, name).count(f"{name}-finished\n")
            # What is printed may have been cut off from being recorded by a kill, once for each other attempt.
            most = len(steps[name]["attempts"]) + (0 if run["attempt"] == 1 or name == "install" else 99)
            assert 1 <= finished <= most, (name, finished, told)
        shown = [line for line in self._log(run, "show").splitlines() if line in {*STEPS, ":"}]
        assert shown[-len(UNDISTURBED) :] == UNDISTURBED, (shown, told)

    def _log(self, run: dict[str, Any], step: str) -> str:
        path = f"{self.server.url}/api/v1/runs/{run['id']}/steps/{step}/log"
        return httpx.get(path, headers=self.server.headers, timeout=30).text

    def _check_statuses(self, one: Wanted, conclusion: str) -> None:
        wanted = "success" if conclusion == "success" else "error"
        self._github.wait_for(lambda: self._states(one)[-1:] == [wanted])
        states = self._states(one)[one.rerun_at or 0 :]
        final = [number for number, state in enumerate(states) if state != "pending"]
        if one.rerun_at != 0:
            assert all(state != "pending" for state in states[final[0] :]), (one.sha, states)

    def _states(self, one: Wanted) -> list[str]:
        return [body["state"] for body in self._github.statuses(one.sha)]

    def _check_comments(self, runs: list[dict[str, Any]]) -> None:
        made = [
            call.path for call in self._github.calls if call.method == "POST" and "/comments" in call.path
        ]
        assert len(made) == len(set(made)), made
        for run in runs:
            if run["pr"] is not None and run["conclusion"] == "success":
                assert any(f"/{run['repo']}/issues/{run['pr']}/" in path for path in made), made


def pushed(repo: str, sha: str, branch: str) -> Any:
    """Return the recorded push, as one to another repository and branch."""
    payload = recorded("push")
    payload |= {"ref": f"refs/heads/{branch}", "after": sha, "deleted": False}
    payload["head_commit"] = {"id": sha, "message": "A change", "timestamp": "2026-11-23T08:00:00Z"}
    payload["repository"]["full_name"] = repo
    return payload


def _opened(repo: str, sha: str, number: int) -> Any:
    payload = recorded("pull_request.opened")
    payload["repository"]["full_name"] = repo
    payload["number"] = payload["pull_request"]["number"] = 100 + number
    payload["pull_request"]["head"]["sha"] = sha
    payload["pull_request"]["head"]["repo"]["full_name"] = repo
    return payload
