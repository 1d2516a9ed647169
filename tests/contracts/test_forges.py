"""What a forge promises, each over its real thing: GitHub over a loopback server in its place, local over rows."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from ci_platform.errors import FailedError, InvalidInputError, UnauthorizedError, UnavailableError
from ci_platform.forges import Change, Comment, CommitStatus, Delivery, Forge
from ci_platform.forges.github import GitHubForge
from ci_platform.forges.local import LocalForge
from ci_platform.model import Repository, ShownComment, ShownStatus
from ci_platform.store import Store, col
from dynflow.clock import ManualClock
from tests.loopback import Answer, Call, Loopback, loopback

PAYLOADS = Path(__file__).parents[1] / "data" / "github"
REPO = "Codertocat/Hello-World"
SHA = "6113728f27ae82c7b1a177c8d03f9e96e0adf246"
SECRET = "It's a Secret to Everybody"
TOKEN = "the-token-that-must-not-show"
STATUS = CommitStatus(REPO, SHA, "dynflow/push", "success", "3 steps passed", "http://here/runs/1")
COMMENT = Comment(REPO, 2, "<!-- dynflow:ci -->", "| Step | Outcome |")


@dataclass
class GitHubState:
    """Enough of GitHub: comments with authors, and who the token is."""

    login: str | None = "dynflow-bot"
    statuses: list[dict[str, Any]] = field(default_factory=list)
    comments: dict[int, dict[str, Any]] = field(default_factory=dict)

    def behave(self, call: Call) -> Answer:
        path, _, query = call.path.partition("?")
        if path == "/user":
            return Answer(200, {"login": self.login}) if self.login else Answer(403, {"message": "no user"})
        if call.method == "POST" and "/statuses/" in path:
            self.statuses.append(call.body)
            return Answer(201, call.body)
        if path.endswith("/comments") and call.method == "POST":
            return Answer(201, self.add(self.login, call.body["body"]))
        if path.endswith("/comments"):
            page = int(re.search(r"[?&]page=(\d+)", f"?{query}")[1])  # type: ignore[index]
            return Answer(200, list(self.comments.values())[(page - 1) * 100 : page * 100])
        found = self.comments.get(int(path.rpartition("/")[2]))
        if found is None:
            return Answer(404, {"message": "Not Found"})
        found["body"] = call.body["body"]
        return Answer(200, found)

    def add(self, login: str | None, body: str) -> dict[str, Any]:
        number = 1000 + len(self.comments)
        user = {"login": login or "app[bot]", "type": "User" if login else "Bot"}
        self.comments[number] = {"id": number, "body": body, "user": user}
        return self.comments[number]


@pytest.fixture
def state() -> GitHubState:
    return GitHubState()


@pytest.fixture
def server(state: GitHubState) -> Iterator[Loopback]:
    with loopback(state.behave) as running:
        yield running


def github_forge(server: Loopback, **options: Any) -> GitHubForge:
    return GitHubForge(api_url=server.url, token=TOKEN, webhook_secret=SECRET, **options)


@pytest.fixture
def github(server: Loopback) -> GitHubForge:
    return github_forge(server)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/platform.db")
    await store.open()
    created_at = ManualClock().now()
    await store.write(lambda tx: tx.add(Repository(name=REPO, forge="local", created_at=created_at)))
    yield store
    await store.close()


@pytest.fixture
def local(store: Store) -> LocalForge:
    return LocalForge(store, ManualClock(), lambda repo: f"/mirrors/{repo}.git")


@pytest.fixture(params=["github", "local"])
def forge(request: pytest.FixtureRequest, github: GitHubForge, local: LocalForge) -> Forge:
    return {"github": github, "local": local}[request.param]


async def shown(
    forge: Forge, state: GitHubState, store: Store
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return context -> (state, description) of SHA, and the bodies of the comments."""
    if isinstance(forge, GitHubForge):
        statuses = {one["context"]: (one["state"], one["description"]) for one in state.statuses}
        return statuses, [one["body"] for one in state.comments.values()]
    rows = await store.read(lambda tx: tx.all(ShownStatus, col(ShownStatus.sha) == SHA))
    comments = await store.read(lambda tx: tx.all(ShownComment))
    return {row.context: (row.state, row.description) for row in rows}, [row.body for row in comments]


# --- every forge ---------------------------------------------------------------------------------


async def test_a_status_is_shown_and_the_next_of_its_context_takes_its_place(
    forge: Forge, state: GitHubState, store: Store
) -> None:
    await forge.set_status(replace(STATUS, state="pending", description="running"))
    await forge.set_status(replace(STATUS, context="dynflow/pull_request", state="failure"))
    await forge.set_status(STATUS)
    statuses, _ = await shown(forge, state, store)
    assert statuses == {
        "dynflow/push": ("success", "3 steps passed"),
        "dynflow/pull_request": ("failure", "3 steps passed"),
    }


async def test_repeating_a_call_shows_the_same(forge: Forge, state: GitHubState, store: Store) -> None:
    for _ in range(2):
        await forge.set_status(STATUS)
        await forge.put_comment(COMMENT)
    statuses, comments = await shown(forge, state, store)
    assert list(statuses) == ["dynflow/push"]
    assert len(comments) == 1


async def test_a_pull_request_has_one_comment_under_a_marker_updated_in_place(
    forge: Forge, state: GitHubState, store: Store
) -> None:
    await forge.put_comment(COMMENT)
    await forge.put_comment(replace(COMMENT, body="new words"))
    await forge.put_comment(replace(COMMENT, marker="<!-- dynflow:other -->", body="another"))
    _, comments = await shown(forge, state, store)
    assert ["new words" in comments[0], "another" in comments[1], len(comments)] == [True, True, 2]


async def test_a_description_is_cut_to_what_forges_take(
    forge: Forge, state: GitHubState, store: Store
) -> None:
    await forge.set_status(replace(STATUS, description="x" * 500))
    statuses, _ = await shown(forge, state, store)
    assert len(statuses["dynflow/push"][1]) == 140


async def test_a_comment_is_cut_to_what_forges_take(forge: Forge, state: GitHubState, store: Store) -> None:
    await forge.put_comment(replace(COMMENT, body="é" * 70_000))
    _, (body,) = await shown(forge, state, store)
    assert len(body) <= 65_536


async def test_many_calls_at_once_all_arrive(forge: Forge, state: GitHubState, store: Store) -> None:
    async with anyio.create_task_group() as group:
        for number in range(25):
            group.start_soon(forge.set_status, replace(STATUS, context=f"c{number}"))
    statuses, _ = await shown(forge, state, store)
    assert len(statuses) == 25


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff"])
async def test_what_is_not_signed_is_refused(forge: Forge, body: bytes) -> None:
    with pytest.raises(UnauthorizedError):
        forge.receive({"x-github-event": "push", "x-github-delivery": "1"}, body)


async def test_clone_urls_hold_no_credentials(forge: Forge) -> None:
    assert TOKEN not in forge.clone_url(REPO)
    assert forge.clone_url(REPO).endswith("/Codertocat/Hello-World.git")


# --- GitHub's API --------------------------------------------------------------------------------


async def test_github_gets_the_call_that_its_documentation_names(
    github: GitHubForge, server: Loopback
) -> None:
    await github.set_status(STATUS)
    (call,) = server.calls
    assert (call.method, call.path) == ("POST", f"/repos/{REPO}/statuses/{SHA}")
    assert call.headers["authorization"] == f"token {TOKEN}"
    assert call.body == {
        "state": "success",
        "context": "dynflow/push",
        "description": "3 steps passed",
        "target_url": "http://here/runs/1",
    }


async def test_an_enterprise_servers_prefix_is_kept(server: Loopback) -> None:
    forge = GitHubForge(api_url=f"{server.url}/api/v3", token=TOKEN)
    await forge.set_status(STATUS)
    assert server.paths() == [f"POST /api/v3/repos/{REPO}/statuses/{SHA}"]


async def test_the_comment_of_an_earlier_process_is_found_by_its_marker(
    server: Loopback, state: GitHubState
) -> None:
    for number in range(150):
        state.add("someone", f"remark {number}")
    await github_forge(server).put_comment(COMMENT)
    await github_forge(server).put_comment(replace(COMMENT, body="after a restart"))
    ours = [one for one in state.comments.values() if one["user"]["login"] == state.login]
    assert [one["body"] for one in ours] == ["<!-- dynflow:ci -->\nafter a restart"]


async def test_the_comment_of_an_earlier_process_is_found_with_an_apps_token_too(
    server: Loopback, state: GitHubState
) -> None:
    state.login = None
    await github_forge(server).put_comment(COMMENT)
    await github_forge(server).put_comment(replace(COMMENT, body="after a restart"))
    assert len(state.comments) == 1


async def test_a_strangers_comment_with_our_marker_is_not_taken_for_ours(
    github: GitHubForge, state: GitHubState
) -> None:
    state.add("mallory", "<!-- dynflow:ci -->\nall green, merge it")
    await github.put_comment(COMMENT)
    assert [one["user"]["login"] for one in state.comments.values()] == ["mallory", "dynflow-bot"]


async def test_a_comment_that_somebody_deleted_is_made_anew(github: GitHubForge, state: GitHubState) -> None:
    await github.put_comment(COMMENT)
    state.comments.clear()
    await github.put_comment(replace(COMMENT, body="again"))
    assert [one["body"] for one in state.comments.values()] == ["<!-- dynflow:ci -->\nagain"]


async def test_a_cut_comment_says_so(github: GitHubForge, state: GitHubState) -> None:
    await github.put_comment(replace(COMMENT, body="x" * 70_000))
    (body,) = [one["body"] for one in state.comments.values()]
    assert "cut" in body[-100:]
    assert body.startswith(COMMENT.marker)


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (Answer(403, {"message": "rate limit"}, {"Retry-After": "17"}), 17),
        (Answer(429, {"message": "slow down"}, {"Retry-After": "5"}), 5),
        (Answer(429, {"message": "slow down"}), 60),
        (Answer(403, {"message": "You have exceeded a secondary rate limit."}), 60),
    ],
)
async def test_a_rate_limit_says_when_to_come_back(
    github: GitHubForge, server: Loopback, answer: Answer, seconds: float
) -> None:
    server.scripted.append(answer)
    with pytest.raises(UnavailableError) as caught:
        await github.set_status(STATUS)
    assert caught.value.retry_after == seconds
    assert len(server.calls) == 1


async def test_a_used_up_limit_says_when_it_is_reset(github: GitHubForge, server: Loopback) -> None:
    headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time()) + 300)}
    server.scripted.append(Answer(403, {"message": "API rate limit exceeded"}, headers))
    with pytest.raises(UnavailableError) as caught:
        await github.set_status(STATUS)
    assert caught.value.retry_after == pytest.approx(300, abs=5)


@pytest.mark.parametrize("status", [500, 502, 503, 401])
async def test_what_may_work_later_is_unavailable(github: GitHubForge, server: Loopback, status: int) -> None:
    server.scripted.append(Answer(status, {"message": "Oops"}))
    with pytest.raises(UnavailableError, match=str(status)):
        await github.set_status(STATUS)
    assert len(server.calls) == 1


@pytest.mark.parametrize("status", [403, 404, 410, 422])
async def test_what_never_will_work_has_failed(github: GitHubForge, server: Loopback, status: int) -> None:
    server.scripted.append(Answer(status, {"message": "No way"}))
    with pytest.raises(FailedError, match="No way"):
        await github.set_status(STATUS)


async def test_a_server_that_is_not_there_is_unavailable_and_the_token_is_not_told() -> None:
    forge = GitHubForge(api_url="http://127.0.0.1:1", token=TOKEN)
    with pytest.raises(UnavailableError) as caught:
        await forge.set_status(STATUS)
    assert TOKEN not in repr(caught.value)
    assert TOKEN not in repr(forge)


async def test_a_server_that_does_not_answer_in_time_is_unavailable(state: GitHubState) -> None:
    done = threading.Event()

    def hang(call: Call) -> Answer:
        done.wait(30)
        return state.behave(call)

    with loopback(hang) as server:
        try:
            with pytest.raises(UnavailableError):
                await github_forge(server, timeout=timedelta(seconds=1)).set_status(STATUS)
        finally:
            done.set()


async def test_a_commit_id_that_is_none_is_not_put_into_an_address(
    github: GitHubForge, server: Loopback
) -> None:
    with pytest.raises(FailedError):
        await github.set_status(replace(STATUS, sha="../../../user"))
    assert server.calls == []


def test_fetching_uses_githubs_user_name_for_tokens(github: GitHubForge) -> None:
    assert github.credentials(REPO) == ("x-access-token", TOKEN)
    assert GitHubForge().credentials(REPO) is None


# --- GitHub's deliveries -------------------------------------------------------------------------


def recorded(name: str) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads((PAYLOADS / f"{name}.json").read_text())
    return payload


def signature(body: bytes, secret: str = SECRET) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def receive(event: str, payload: Any, **headers: str) -> Delivery:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    given = {
        "x-github-event": event,
        "x-github-delivery": "72d3162e-cc78-11e3-81ab-4c9367dc0958",
        "x-hub-signature-256": signature(body),
        "content-type": "application/json",
    }
    return GitHubForge(webhook_secret=SECRET).receive({**given, **headers}, body)


def change_in(event: str, payload: Any) -> Change:
    delivery = receive(event, payload)
    assert delivery.change is not None, delivery.ignored
    return delivery.change


def test_githubs_own_test_vector_is_accepted() -> None:
    body = b"Hello, World!"
    expected = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert signature(body) == expected
    headers = {"x-github-event": "push", "x-github-delivery": "1", "x-hub-signature-256": expected}
    with pytest.raises(InvalidInputError, match="not JSON"):  # past the signature
        GitHubForge(webhook_secret=SECRET).receive(headers, body)


@pytest.mark.parametrize(
    "given", ["", "sha256=", "sha256=" + "0" * 64, signature(b"{}", "other"), "sha1=00", "é", "\udcff" * 9]
)
def test_a_wrong_signature_is_refused_before_the_body_is_read(given: str) -> None:
    with pytest.raises(UnauthorizedError):
        receive("push", b"{}", **{"x-hub-signature-256": given})


def test_without_a_secret_nothing_is_accepted() -> None:
    headers = {
        "x-github-event": "push",
        "x-github-delivery": "1",
        "x-hub-signature-256": signature(b"{}", ""),
    }
    with pytest.raises(UnauthorizedError, match="github_webhook_secret"):
        GitHubForge().receive(headers, b"{}")


def test_a_recorded_push_is_a_change_of_its_branch() -> None:
    delivery = receive("push", recorded("push"))
    assert (delivery.forge, delivery.repo, delivery.event) == ("github", REPO, "push")
    assert delivery.change == Change(
        event="push",
        action="push",
        repo=REPO,
        sha=SHA,
        ref="refs/heads/master",
        branch="master",
        before="0" * 40,
        actor="Codertocat",
        title="Initial commit",
        clone_url="https://github.com/Codertocat/Hello-World.git",
    )


def test_a_recorded_push_of_a_tag_is_a_change_of_the_tags_commit() -> None:
    payload = recorded("push.tag")
    payload["after"] = "f" * 40  # as with an annotated tag: the tag's own object
    change = change_in("push", payload)
    assert (change.ref, change.branch, change.sha) == ("refs/tags/simple-tag", "simple-tag", SHA)


def test_a_recorded_deletion_says_so() -> None:
    assert change_in("push", recorded("push.deleted")).deleted


@pytest.mark.parametrize("action", ["opened", "synchronize", "reopened"])
def test_a_recorded_pull_request_is_a_change_of_its_head(action: str) -> None:
    change = change_in("pull_request", recorded(f"pull_request.{action}"))
    assert (change.event, change.action, change.pr) == ("pull_request", action, 2)
    assert (change.ref, change.branch, change.base_branch) == ("refs/pull/2/head", "changes", "master")
    assert (change.sha, change.trusted) == ("ec26c3e57ca3a959ca5aad62de7213c562f8c821", True)


def test_a_pull_request_from_a_fork_is_not_trusted() -> None:
    payload = recorded("pull_request.opened")
    payload["pull_request"]["head"]["repo"]["full_name"] = "mallory/Hello-World"
    assert change_in("pull_request", payload).trusted is False


def test_a_pull_request_whose_fork_was_deleted_is_not_trusted() -> None:
    payload = recorded("pull_request.opened")
    payload["pull_request"]["head"]["repo"] = None
    assert change_in("pull_request", payload).trusted is False


@pytest.mark.parametrize(
    ("event", "name", "reason"),
    [
        ("ping", "ping", "webhook works"),
        ("pull_request", "pull_request.closed", "closed"),
        ("issue_comment", "issue_comment.created", "issue_comment"),
        ("deployment_protection_rule", "ping", "deployment_protection_rule"),
    ],
)
def test_what_starts_nothing_is_ignored_with_a_reason(event: str, name: str, reason: str) -> None:
    delivery = receive(event, recorded(name))
    assert delivery.change is None
    assert reason in (delivery.ignored or "")


def test_a_form_with_the_payload_in_it_is_read_as_well() -> None:
    body = (
        b"payload="
        + json.dumps(recorded("push")).replace("%", "%25").replace("&", "%26").replace("+", "%2B").encode()
    )
    headers = {"content-type": "application/x-www-form-urlencoded"}
    change = receive("push", body, **headers).change
    assert change is not None
    assert change.sha == SHA


def altered(payload: dict[str, Any], path: str, value: Any = ...) -> dict[str, Any]:
    """Return a copy with the field at `path` gone, or with another value."""
    copy: dict[str, Any] = json.loads(json.dumps(payload))
    *parents, last = path.split(".")
    holder = copy
    for parent in parents:
        holder = holder[parent]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return copy


NEEDED = [
    ("push", "push", "ref"),
    ("push", "push", "after"),
    ("push", "push", "repository"),
    ("push", "push", "repository.full_name"),
    ("pull_request", "pull_request.opened", "action"),
    ("pull_request", "pull_request.opened", "pull_request"),
    ("pull_request", "pull_request.opened", "pull_request.number"),
    ("pull_request", "pull_request.opened", "pull_request.head"),
    ("pull_request", "pull_request.opened", "pull_request.head.sha"),
    ("pull_request", "pull_request.opened", "pull_request.head.ref"),
    ("pull_request", "pull_request.opened", "pull_request.base.ref"),
    ("pull_request", "pull_request.opened", "repository.full_name"),
]


@pytest.mark.parametrize(("event", "name", "path"), NEEDED)
@pytest.mark.parametrize("value", [..., None, [], {}, 0, True, "", "a\x00b", "x" * 5000, "\ud800"])
def test_a_needed_field_that_is_missing_or_absurd_starts_nothing(
    event: str, name: str, path: str, value: Any
) -> None:
    payload = altered(recorded(name), path, value)
    if path == "action" and isinstance(
        value, str
    ):  # an action that we do not know is ignored, whatever it is
        assert receive(event, payload).change is None
        return
    with pytest.raises(InvalidInputError, match=path.rpartition(".")[2]):
        receive(event, payload)


@pytest.mark.parametrize("path", ["pusher", "sender", "head_commit", "repository.clone_url", "before"])
def test_a_field_that_is_only_shown_may_be_missing(path: str) -> None:
    assert change_in("push", altered(recorded("push"), path)).sha == SHA


HOSTILE = [
    b"",
    b"null",
    b"[]",
    b'"push"',
    b"{",
    b'{"a": NaN',
    b"\xff\xfe",
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"n": ' + b"9" * 100_000 + b"}",
    b'{"ref": ' + b"[" * 5000 + b"]" * 5000 + b"}",
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("event", ["push", "pull_request"])
def test_a_hostile_body_is_refused_politely(event: str, body: bytes) -> None:
    with pytest.raises(InvalidInputError):
        receive(event, body)


@pytest.mark.parametrize("name", ["", "Push", "push;rm", "x" * 101])
def test_an_event_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError):
        receive("push", {}, **{"x-github-event": name})


@pytest.mark.parametrize("name", ["", "a b", "x" * 101, "../1"])
def test_a_delivery_id_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError):
        receive("push", {}, **{"x-github-delivery": name})


def test_texts_of_strangers_lose_what_no_terminal_or_database_takes() -> None:
    payload = recorded("pull_request.opened")
    payload["pull_request"]["title"] = "a\x00\x1b[31mb\u202ec\ud800" + "x" * 1000
    title = change_in("pull_request", payload).title
    assert title.startswith("a[31mbcx")
    assert len(title) <= 300
    assert title.isprintable()


# --- the local forge -----------------------------------------------------------------------------


async def test_the_local_forges_clone_url_is_the_mirror(local: LocalForge) -> None:
    assert local.clone_url("o/r") == "/mirrors/o/r.git"
    assert local.credentials("o/r") is None
