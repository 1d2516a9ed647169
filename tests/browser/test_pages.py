"""The pages as a person uses them: live, decided, followed, and unmoved by hostile output."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import Page, expect

from tests.ci_platform.api.world import FAILING, GATED, HEAD, QUICK, SLOW, World

pytestmark = pytest.mark.browser


async def test_a_run_is_watched_approved_and_concludes_without_a_reload(world: World, page: Page) -> None:
    run_id = await world.push(GATED)
    await page.goto(f"/runs/{run_id}")
    await page.evaluate("window.same = true")
    await expect(page.locator(".live-mark")).to_have_text("live")
    gate = page.get_by_role("region", name="Gate approval")
    await gate.get_by_label("Comment").fill("looks good")
    await gate.get_by_role("button", name="Approve").click()
    await expect(page.locator("#run-head .state")).to_have_text("success")
    await expect(page.locator(".steps .name")).to_have_text(["checkout", "before", "approval", "after"])
    await expect(page.locator("#run-steps")).to_contain_text("approved by local-admin")
    await expect(page.locator("#run-steps")).to_contain_text("looks good")
    await expect(gate).to_have_count(0)


async def test_a_decision_made_elsewhere_shows_by_itself(world: World, page: Page) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    await page.goto(f"/runs/{run_id}")
    await page.evaluate("window.same = true")
    await expect(page.get_by_role("button", name="Approve")).to_be_visible()
    await world.decide(run_id, "approve")
    await expect(page.locator("#run-head .state")).to_have_text("success")
    assert await page.evaluate("window.same") is True
    await expect(page.locator("#run-log")).to_contain_text("after")


async def test_a_log_grows_while_it_is_looked_at(world: World, page: Page) -> None:
    run_id = await world.push(SLOW)
    await world.working_on(run_id, "wait")
    await page.goto(f"/runs/{run_id}?step=wait")
    await expect(page.locator("#log .output .t")).to_have_text("begun")
    page.on("dialog", lambda dialog: dialog.accept())
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.locator("#run-head .state")).to_have_text("cancelled")


async def test_the_list_of_runs_is_live_and_leads_to_a_run(world: World, page: Page) -> None:
    await page.goto(f"/?repo={world.repo}")
    await expect(page.locator("#runs")).to_contain_text("No run matches")
    await world.push(QUICK)
    row = page.locator("#runs tbody tr")
    await expect(row.locator(".state")).to_have_text("success")
    await row.get_by_role("link").first.click()
    await expect(page.locator("h1")).to_have_text("A change")


async def test_a_line_has_a_link_of_its_own(world: World, page: Page) -> None:
    run_id = await world.push(QUICK)
    await world.concluded(run_id)
    await page.goto(f"/runs/{run_id}?step=greet")
    await page.get_by_role("link", name="line 2").click()
    await expect(page).to_have_url(re.compile(r"#L2$"))
    await expect(page.locator("#L2")).to_have_class(re.compile("chosen"))
    await page.reload()
    await expect(page.locator("#L2")).to_have_class(re.compile("chosen"))


async def test_a_long_log_is_shown_to_its_end_and_a_line_far_down_has_its_link(
    world: World, page: Page
) -> None:
    run_id = await world.push(HEAD + "        await sh('count', 'seq 5000')\n")
    await world.concluded(run_id)
    await page.goto(f"/runs/{run_id}?step=count#L4321")
    await expect(page.locator("#L5001 .t")).to_have_text("5000")
    await expect(page.locator("#L4321")).to_have_class(re.compile("chosen"))
    await expect(page.locator("#L4321")).to_be_in_viewport()


async def test_a_failure_is_opened_at_its_log_and_run_again_from_there(world: World, page: Page) -> None:
    run_id = await world.push(FAILING)
    await world.concluded(run_id)
    await page.goto(f"/runs/{run_id}")
    await expect(page.locator("#log")).to_contain_text("broken")
    await expect(page.locator("#run-steps .why")).to_contain_text("exited with 3")
    await (
        page.locator("#run-steps li", has_text="break")
        .get_by_role("button", name="Run again from here")
        .click()
    )
    await expect(page.locator(".facts")).to_contain_text("rerun 1")
    await expect(page.locator("#run-head .state")).to_have_text("failure")


async def test_hostile_output_stays_text_also_when_it_comes_live(world: World, page: Page) -> None:
    evil = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    script = "cat evil; printf '\\033[31mred\\033[0m\\n'; while [ ! -e /nothing ]; do sleep 0.1; done"
    run_id = await world.push(HEAD + f"        await sh('evil', {script!r})\n", files={"evil": evil + "\n"})
    await world.working_on(run_id, "evil")
    await page.goto(f"/runs/{run_id}?step=evil")
    await expect(page.locator("#log .fg-red")).to_have_text("red")
    await expect(page.locator("#log")).to_contain_text(evil)
    assert await page.evaluate("window.hacked") is None
    await world.http.post(f"/api/v1/runs/{run_id}/cancel")


async def test_without_javascript_everything_can_be_read_and_decided(world: World, page: Page) -> None:
    run_id = await world.push(GATED)
    await world.at_gate(run_id)
    browser = page.context.browser
    assert browser is not None
    plain = await browser.new_context(
        base_url=world.served.url,
        java_script_enabled=False,
        storage_state=await page.context.storage_state(),
    )
    page = await plain.new_page()
    await page.goto(f"/runs/{run_id}")
    await expect(page.locator("#log")).to_contain_text("before")
    await page.get_by_role("button", name="Approve").click()
    await world.concluded(run_id)
    await page.reload()
    await expect(page.locator("#run-head .state")).to_have_text("success")
    await plain.close()


async def test_logging_out_ends_at_the_login_page(page: Page) -> None:
    await page.goto("/gates")
    await page.get_by_role("button", name="Log out").click()
    await expect(page).to_have_url(re.compile("/login$"))
    await expect(page.get_by_label("Token")).to_be_visible()
