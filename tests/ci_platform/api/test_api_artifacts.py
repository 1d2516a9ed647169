"""Artifacts over HTTP: what a pipeline kept comes back byte by byte, to whom it may, and never as a page of ours."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zipfile
from typing import Any

import httpx
import pytest

from ci_platform.api.ranges import NOT_SATISFIABLE, range_of
from ci_platform.serving import Running
from tests.ci_platform.api.test_web_pages import HTML, browser
from tests.ci_platform.api.world import HEAD, World, assert_problem

__all__ = ["browser"]

PAGE = "<script>alert(1)</script>"
PIPELINE = HEAD + (
    "        script = 'mkdir -p site/deep; printf %s \"$0\" >site/index.html; seq 100000 >site/deep/numbers; '\n"
    "        script += 'echo x >\"site/<b>.txt\"; chmod 755 site/deep/numbers; ln -s deep/numbers site/link'\n"
    f"        await step.do('make', lambda: run_in_sandbox(workspace, ['sh', '-c', script, {PAGE!r}]))\n"
    "        keep = self.env.ARTIFACTS.upload\n"
    "        await step.do('keep', lambda: keep('site', workspace, ['site'], retention='2 days'))\n"
    "        made = await step.do('one', lambda: keep('page', workspace, ['site/index.html']))\n"
    "        return made.digest\n"
)
NUMBERS = "".join(f"{n}\n" for n in range(1, 100001)).encode()


async def kept(world: World) -> str:
    """Run the pipeline; return where its artifacts are."""
    run_id = await world.push(PIPELINE)
    run = await world.concluded(run_id)
    assert run["conclusion"] == "success", run
    return f"/api/v1/runs/{run_id}/artifacts"


async def test_artifacts_are_listed_browsed_and_downloaded_byte_by_byte(world: World) -> None:
    path = await kept(world)
    site, page = (await world.http.get(path)).json()["items"]
    assert (site["name"], site["files"], site["file"], site["step"]) == ("site", 4, None, "keep")
    assert (page["name"], page["files"], page["file"], page["size"]) == (
        "page",
        1,
        "site/index.html",
        len(PAGE),
    )
    assert site["trusted"]
    assert site["deleted_at"] is None
    one = await world.http.get(f"{path}/page/download")
    assert one.content == PAGE.encode()
    assert one.headers["content-disposition"].startswith('attachment; filename="index.html"')
    files = (await world.http.get(f"{path}/site/files", params={"path": "site"})).json()["items"]
    assert [(each["name"], each["kind"]) for each in files] == [
        ("<b>.txt", "file"),
        ("deep", "folder"),
        ("index.html", "file"),
        ("link", "symlink"),
    ]
    whole = [await world.http.get(f"{path}/site/download") for _ in range(2)]
    assert whole[0].content == whole[1].content
    assert int(whole[0].headers["content-length"]) == len(whole[0].content)
    with zipfile.ZipFile(io.BytesIO(whole[0].content)) as found:
        assert found.namelist() == ["site/<b>.txt", "site/deep/numbers", "site/index.html", "site/link"]
        assert found.read("site/deep/numbers") == NUMBERS
        assert found.getinfo("site/deep/numbers").external_attr >> 16 == stat.S_IFREG | 0o755
    answer = await world.http.get(f"{path}/site/download", params={"format": "tar"})
    assert answer.headers["content-disposition"].startswith('attachment; filename="site.tar"')
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        member = archive.extractfile("site/deep/numbers")
        assert member is not None
        assert member.read() == NUMBERS
    for query, status in ({"path": "no"}, 404), ({"path": "site/link"}, 404), ({"path": "../x"}, 404):
        assert_problem(await world.http.get(f"{path}/site/download", params=query), status, "not_found")
    wrong: dict[str, Any]
    for wrong in ({"format": "file"}, {"format": "rar"}, {"path": "site/index.html", "format": "zip"}):
        assert (await world.http.get(f"{path}/site/download", params=wrong)).status_code == 400
    assert_problem(await world.http.get(f"{path}/nothing/download"), 404, "not_found")
    assert_problem(await world.http.get("/api/v1/runs/nothing/artifacts"), 404, "not_found")
    # A rerun from a step takes back what that step and those after it have uploaded, and they upload it again.
    run_id = path.split("/")[4]
    again = await world.http.post(f"/api/v1/runs/{run_id}/rerun", json={"from_step": "one"})
    assert again.status_code < 300, again.text
    assert (await world.concluded(run_id))["conclusion"] == "success"
    items = (await world.http.get(path)).json()["items"]
    assert [each["name"] for each in items] == ["site", "page"]
    assert items[0] == site
    assert items[1]["created_at"] > page["created_at"]
    assert items[1]["digest"] == page["digest"]


async def test_files_come_in_parts_and_are_not_sent_again_to_who_has_them(world: World) -> None:
    path = await kept(world)
    address, query = f"{path}/site/download", {"path": "site/deep/numbers"}
    whole = await world.http.get(address, params=query)
    tag = whole.headers["etag"]
    assert (whole.content, tag) == (NUMBERS, f'"{hashlib.sha256(NUMBERS).hexdigest()}"')

    async def ask(**headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await world.http.get(address, params=query, headers=named)

    part = await ask(range="bytes=100-199")
    assert (part.status_code, part.content) == (206, NUMBERS[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(NUMBERS)}"
    assert (await ask(range="bytes=-7", if_range=tag)).content == NUMBERS[-7:]
    assert (await ask(range="bytes=-7", if_range='"other"')).content == NUMBERS
    assert (await ask(range="bytes=0-1,5-6")).content == NUMBERS
    beyond = await ask(range=f"bytes={len(NUMBERS)}-")
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(NUMBERS)}")
    same = await ask(if_none_match=f'"x", W/{tag}')
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    archive = await world.http.get(address)
    again = await world.http.get(address, headers={"if-none-match": archive.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, None),
        ("bytes=-", None),
        ("bytes=5-2", None),
        ("lines=1-2", None),
        ("bytes=0-", (0, 10)),
        ("bytes=9-99", (9, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=10-", NOT_SATISFIABLE),
        ("bytes=-0", NOT_SATISFIABLE),
    ],
)
def test_ranges_are_what_the_rfc_says(header: str | None, part: tuple[int, int] | None) -> None:
    assert range_of(header, 10) == part


async def test_an_artifact_is_a_download_and_never_a_page_of_ours(
    world: World, browser: httpx.AsyncClient
) -> None:
    path = await kept(world)
    for query in ("page/download", "site/download", "site/download?path=site/index.html"):
        answer = await browser.get(f"{path}/{query}")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment;")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    hostile = await browser.get(f"{path}/site/download", params={"path": "site/<b>.txt"})
    assert hostile.headers["content-disposition"] == (
        "attachment; filename=\"_b_.txt\"; filename*=UTF-8''%3Cb%3E.txt"
    )
    run = path.split("/")[4]
    page = (await browser.get(f"/runs/{run}")).text
    assert f'href="{path}/page/download"' in page
    assert f'href="/runs/{run}/artifacts/site">4 files</a>' in page
    page = (await browser.get(f"/runs/{run}/artifacts/site", params={"path": "site"})).text
    assert "&lt;b&gt;.txt" in page
    assert "<b>.txt" not in page
    assert "link → deep/numbers" in page
    assert f'href="/runs/{run}/artifacts/site?path=site%2Fdeep"' in page
    assert "1 file, 25 bytes" in (await browser.get(f"/runs/{run}/artifacts/page")).text
    assert (await browser.get(f"/runs/{run}/artifacts/nothing", headers=HTML)).status_code == 404


async def test_who_may_not_look_at_a_run_gets_none_of_its_artifacts(
    world: World, nobody: httpx.AsyncClient, served: Running
) -> None:
    path = await kept(world)
    addresses = (path, f"{path}/site/files", f"{path}/site/download")
    for address in addresses:
        assert_problem(await nobody.get(address), 401, "unauthorized")
    made = await world.http.post("/api/v1/tokens", json={"name": "look", "scopes": ["read"]})
    other = await world.http.post(
        "/api/v1/tokens", json={"name": "one", "scopes": ["write"], "repo": world.repo}
    )
    for address in addresses:
        looks = {"Authorization": f"Bearer {made.json()['secret']}"}
        assert (await nobody.get(address, headers=looks)).status_code == 200
        # A token of one repository opens its git, commits and files alone, as everywhere.
        one = {"Authorization": f"Bearer {other.json()['secret']}"}
        assert_problem(await nobody.get(address, headers=one), 403, "forbidden")
    looks = {"Authorization": f"Bearer {made.json()['secret']}"}
    assert_problem(await nobody.delete(f"{path}/site", headers=looks), 403, "forbidden")
    # What was deleted says why, and goes with its run and its repository.
    run_id, platform = path.split("/")[4], served.platform
    (row, _) = await platform.artifacts.records.of_run(run_id)
    for status in (204, 404):
        assert (await world.http.delete(f"{path}/site")).status_code == status
    site, page = (await world.http.get(path)).json()["items"]
    assert (site["why_deleted"], page["why_deleted"]) == ("local-admin deleted it", None)
    gone = assert_problem(await world.http.get(f"{path}/site/download"), 404, "not_found")
    assert "local-admin deleted it" in gone["message"]
    assert (await world.http.delete(f"/api/v1/repos/{world.repo}")).status_code == 204
    gone = assert_problem(await world.http.get(f"{path}/page/download"), 404, "not_found")
    assert "deleted with its repository" in gone["message"]
    assert len((await world.http.get(path)).json()["items"]) == 2
    report = await platform.collector.collect()
    assert [item.name for item in report.items if item.kind == "artifacts"] != []
    assert list((platform.settings.artifacts_path / row.tenant).glob("[!.]*")) == []
