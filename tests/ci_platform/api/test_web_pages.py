"""Pages and sessions over HTTP: who gets in, which forms count, nothing hostile gets through."""

from __future__ import annotations

import re
import resource
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx
import pytest

from ci_platform.serving import Running
from ci_platform.web.render import safe_path
from tests.ci_platform.api.world import GATED, HEAD, QUICK, World

HTML = {"Accept": "text/html"}


@pytest.fixture
async def browser(served: Running) -> AsyncIterator[httpx.AsyncClient]:
    """A browser that has logged in with the administrator's token."""
    async with httpx.AsyncClient(base_url=served.url, headers=HTML, timeout=30) as client:
        answer = await client.post("/login", data={"token": served.token, "next": "/gates"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/gates")
        yield client


def csrf_of(page: str) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', page)
    assert found, page
    return found[1]


async def test_who_is_not_logged_in_is_asked_to_and_comes_back(nobody: httpx.AsyncClient) -> None:
    answer = await nobody.get("/runs/abc?step=x", headers=HTML)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/login?next=%2Fruns%2Fabc%3Fstep%3Dx"
    page = await nobody.get(answer.headers["location"], headers=HTML)
    assert 'name="next" value="/runs/abc?step=x"' in page.text


async def test_a_wrong_token_is_refused_politely(nobody: httpx.AsyncClient) -> None:
    answer = await nobody.post("/login", data={"token": "wrong"}, headers=HTML)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert 'role="alert"' in answer.text


async def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(served: Running) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        answer = await client.post("/login", data={"token": served.token})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert served.token not in cookie


@pytest.mark.parametrize(
    "path", ["//evil.example", "/\\evil.example", "https://evil.example", "evil", "", None]
)
def test_a_login_never_leads_to_another_site(path: str | None) -> None:
    assert safe_path(path) == "/"


async def test_a_link_logs_in_once(
    served: Running, http: httpx.AsyncClient, nobody: httpx.AsyncClient
) -> None:
    link = urlsplit((await http.post("/api/v1/login-links")).json()["url"]).path
    first = await nobody.get(link, headers=HTML)
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert (await nobody.get("/", headers=HTML)).status_code == 200
    async with httpx.AsyncClient(base_url=served.url, headers=HTML) as other:
        assert (await other.get(link)).status_code == 401
        assert (await other.get("/")).status_code == 303


async def test_a_session_ends_with_its_token(served: Running, http: httpx.AsyncClient) -> None:
    made = (await http.post("/api/v1/tokens", json={"name": "guest", "scopes": ["read"]})).json()
    async with httpx.AsyncClient(base_url=served.url, headers=HTML) as guest:
        await guest.post("/login", data={"token": made["secret"]})
        assert (await guest.get("/")).status_code == 200
        await http.delete(f"/api/v1/tokens/{made['token']['id']}")
        assert (await guest.get("/")).status_code == 303


@pytest.mark.parametrize(
    "change", [lambda c: c[:-2] + "AA", lambda c: "2" + c[1:], lambda _c: "x.y.z", lambda _c: "."]
)
async def test_a_forged_cookie_is_none(browser: httpx.AsyncClient, served: Running, change: object) -> None:
    cookie = browser.cookies["dynflow_session"]
    forged = change(cookie)  # type: ignore[operator]
    async with httpx.AsyncClient(base_url=served.url, headers=HTML) as client:
        client.cookies.set("dynflow_session", forged)
        assert (await client.get("/")).status_code == 303


async def test_logging_out_takes_the_cookie_away(browser: httpx.AsyncClient) -> None:
    page = (await browser.get("/")).text
    answer = await browser.post("/logout", data={"csrf": csrf_of(page)})
    assert answer.status_code == 303
    assert (await browser.get("/")).status_code == 303


async def test_a_form_without_its_own_token_changes_nothing(world: World, browser: httpx.AsyncClient) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    decision = {"name": "approval", "decision": "approve"}
    for csrf in ({}, {"csrf": ""}, {"csrf": "guessed"}):
        answer = await browser.post(f"/runs/{run_id}/gates", data={**decision, **csrf})
        assert answer.status_code == 403
    own = csrf_of((await browser.get(f"/runs/{run_id}")).text)
    cross = await browser.post(
        f"/runs/{run_id}/gates",
        data={**decision, "csrf": own},
        headers={"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"},
    )
    assert cross.status_code == 403
    assert (await world.run(run_id))["gates"][0]["state"] == "open"
    # The JSON API takes no cookie for changes, so no form of another site can reach it.
    assert (await browser.post(f"/api/v1/runs/{run_id}/cancel")).status_code == 401
    answer = await browser.post(f"/runs/{run_id}/gates", data={**decision, "csrf": own})
    assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{run_id}")
    assert (await world.concluded(run_id))["conclusion"] == "success"


async def test_who_may_only_look_gets_no_buttons_and_no_way(
    served: Running, world: World, http: httpx.AsyncClient
) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    secret = (await http.post("/api/v1/tokens", json={"name": "viewer", "scopes": ["read"]})).json()["secret"]
    async with httpx.AsyncClient(base_url=served.url, headers=HTML) as viewer:
        await viewer.post("/login", data={"token": secret})
        page = await viewer.get(f"/runs/{run_id}")
        assert "Waits for a decision" in page.text
        assert 'value="approve"' not in page.text
        form = {"csrf": csrf_of(page.text), "name": "approval", "decision": "approve"}
        assert (await viewer.post(f"/runs/{run_id}/gates", data=form)).status_code == 403
        assert (await viewer.post(f"/runs/{run_id}/cancel", data=form)).status_code == 403
    await world.decide(run_id, "approve")
    await world.concluded(run_id)


async def test_cancel_and_rerun_work_from_the_page(world: World, browser: httpx.AsyncClient) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    csrf = csrf_of((await browser.get(f"/runs/{run_id}")).text)
    assert (await browser.post(f"/runs/{run_id}/cancel", data={"csrf": csrf})).status_code == 303
    assert (await world.concluded(run_id))["conclusion"] == "cancelled"
    form = {"csrf": csrf, "step": "before", "count": "1"}
    assert (await browser.post(f"/runs/{run_id}/rerun", data={**form, "count": "x"})).status_code == 400
    assert (await browser.post(f"/runs/{run_id}/rerun", data=form)).status_code == 303
    run = await world.at_gate(run_id)
    assert run["attempt"] == 2
    forked = await browser.post(f"/runs/{run_id}/what-if", data=form)
    assert forked.status_code == 303
    await world.at_gate(forked.headers["location"].removeprefix("/runs/"))
    await world.decide(run_id, "approve")
    await world.concluded(run_id)


async def test_pages_show_runs_steps_and_their_log(world: World, browser: httpx.AsyncClient) -> None:
    run_id = await world.push(QUICK)
    await world.concluded(run_id)
    listed = (await browser.get("/", params={"repo": world.repo})).text
    assert f'href="/runs/{run_id}"' in listed
    page = (await browser.get(f"/runs/{run_id}")).text
    assert "greet" in page
    assert re.search(r'id="L2".*>hello<', page)
    for path in ("/gates", "/repositories", "/?status=failure", "/?repo=no/such"):
        assert (await browser.get(path)).status_code == 200
    assert world.repo in (await browser.get("/repositories")).text


async def test_a_wrong_filter_and_a_missing_run_are_pages(browser: httpx.AsyncClient) -> None:
    wrong = await browser.get("/?status=great")
    assert (wrong.status_code, wrong.headers["content-type"]) == (400, "text/html; charset=utf-8")
    missing = await browser.get("/runs/nothing")
    assert missing.status_code == 404
    assert "there is no run nothing" in missing.text


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>'\\\"&"


async def test_nothing_hostile_becomes_markup(world: World, browser: httpx.AsyncClient) -> None:
    script = "printf '%s' \"$(cat evil)\"; printf '\\n\\033[31m<b>red</b>\\033[0m\\n\\033]0;title\\007done\\n'; exit 1"
    run_id = await world.push(
        HEAD + f"        await sh({HOSTILE!r}, {script!r})\n", files={"evil": HOSTILE}, branch="<b>x"
    )
    await world.concluded(run_id)
    for path in (f"/runs/{run_id}", f"/?repo={world.repo}", "/?ref=<script>alert(1)</script>", "/<script>"):
        page = (await browser.get(path)).text
        assert "<img src=x" not in page
        assert "<script>alert" not in page
        assert "<b>" not in page
        assert "\x1b" not in page
    page = (await browser.get(f"/runs/{run_id}")).text
    assert '<span class="fg-red">&lt;b&gt;red&lt;/b&gt;</span>' in page
    assert "\x07" not in page


async def test_pages_have_a_strict_policy_and_nothing_inline(
    world: World, browser: httpx.AsyncClient
) -> None:
    run_id = await world.push(QUICK)
    await world.concluded(run_id)
    for path in ("/", f"/runs/{run_id}", "/gates", "/repositories", "/login", "/nothing"):
        answer = await browser.get(path)
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "no-store" in answer.headers["cache-control"]
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", answer.text)


async def test_a_crash_of_the_server_writes_no_memory_to_disk(served: Running) -> None:
    assert served.url
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0


async def test_a_form_with_an_absurd_number_is_400(browser: httpx.AsyncClient) -> None:
    form = {"csrf": csrf_of((await browser.get("/gates")).text), "step": "x", "count": "9" * 5000}
    assert (await browser.post("/runs/x/rerun", data=form)).status_code == 400
