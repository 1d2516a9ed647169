"""Which changes ask for which runs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ci_platform.forges import Change
from ci_platform.triggers import RunRequest, Skipped, match, run_id_of, skip_marker

PUSH = Change("push", "push", "o/r", "a" * 40, "refs/heads/main", "main", title="Add")
PULL = Change("pull_request", "opened", "o/r", "a" * 40, "refs/pull/7/head", "topic", pr=7)


def run_ids(change: Change) -> list[str]:
    matched = match("github", change)
    assert not isinstance(matched, Skipped), matched
    return [request.run_id for request in matched]


@pytest.mark.parametrize("change", [PUSH, PULL, replace(PUSH, ref="refs/tags/v1", branch="v1")])
def test_a_push_a_tag_and_a_pull_request_ask_for_one_run_each(change: Change) -> None:
    assert match("github", change) == (RunRequest(run_id_of("github", change), change),)


def test_the_same_cause_has_the_same_run() -> None:
    assert run_ids(PULL) == run_ids(replace(PULL, action="reopened", title="Another title", actor="x"))


@pytest.mark.parametrize(
    "other",
    [
        replace(PUSH, sha="b" * 40),
        replace(PUSH, ref="refs/heads/topic"),
        replace(PUSH, repo="o/other"),
        PULL,
    ],
)
def test_another_cause_has_another_run(other: Change) -> None:
    assert run_ids(PUSH) != run_ids(other)


def test_forges_and_manual_runs_are_told_apart() -> None:
    ids = {run_id_of("github", PUSH), run_id_of("local", PUSH), run_id_of("github", PUSH, nonce="1")}
    assert len(ids) == 3


@given(st.text(), st.text(), st.text(), st.text())
def test_run_ids_are_fit_for_folders_and_addresses(forge: str, repo: str, sha: str, ref: str) -> None:
    change = replace(PUSH, repo=repo, sha=sha, ref=ref)
    assert re.fullmatch(r"[0-9a-f]{32}", run_id_of(forge, change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace(PUSH, deleted=True), "deleted"),
        (replace(PUSH, sha="main"), "not a commit"),
        (replace(PUSH, sha="-" + "a" * 39), "not a commit"),
        (replace(PUSH, ref="refs/notes/commits"), "neither a branch nor a tag"),
        (replace(PUSH, title="Typo [skip ci]"), "[skip ci]"),
    ],
)
def test_what_asks_for_nothing_says_why(change: Change, reason: str) -> None:
    skipped = match("github", change)
    assert isinstance(skipped, Skipped)
    assert reason in skipped.reason


@pytest.mark.parametrize(
    "message",
    [
        "[skip ci] wip",
        "Subject\n\nbody [CI SKIP]",
        "x [no ci]",
        "x [skip actions]",
        "x [actions skip]",
        "Subject\n\nskip-checks: true",
    ],
)
def test_markers_are_found_anywhere_in_the_message(message: str) -> None:
    assert skip_marker(message) is not None


@pytest.mark.parametrize("message", ["skip ci", "[skip]", "Explain skip-checks: true", "[skip  ci]", ""])
def test_words_that_are_no_marker_skip_nothing(message: str) -> None:
    assert skip_marker(message) is None


def test_the_whole_message_counts_where_it_is_known() -> None:
    assert isinstance(match("github", PUSH, "Add\n\n[skip ci]"), Skipped)


def test_a_manual_run_is_not_skipped() -> None:
    manual = replace(PUSH, event="manual", title="Typo [skip ci]")
    assert len(run_ids(manual)) == 1
