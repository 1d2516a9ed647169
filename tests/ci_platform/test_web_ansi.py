"""Terminal output turned into harmless data."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ci_platform.web.ansi import Terminal, plain


def test_plain_text_is_one_run() -> None:
    assert Terminal().render("hello world\n") == [("", "hello world")]


def test_markup_stays_text() -> None:
    assert Terminal().render("<script>alert(1)</script>") == [("", "<script>alert(1)</script>")]


@pytest.mark.parametrize(
    ("sequence", "classes"),
    [
        ("31", "fg-red"),
        ("1;32", "fg-green bold"),
        ("97;41", "fg-bright-white bg-red"),
        ("38;5;9", "fg-bright-red"),
        ("38;2;250;10;10", "fg-bright-red"),
        ("38;5;22", "fg-green"),
        ("38:5:4", "fg-blue"),
        ("4;9;3;7;2", "dim inverse italic strike underline"),
    ],
)
def test_colours_become_class_names(sequence: str, classes: str) -> None:
    assert Terminal().render(f"\x1b[{sequence}mx") == [(classes, "x")]


def test_a_colour_holds_until_it_is_reset_over_lines() -> None:
    terminal = Terminal()
    assert terminal.render("\x1b[31mred") == [("fg-red", "red")]
    assert terminal.render("still\x1b[0m plain") == [("fg-red", "still"), ("", " plain")]


def test_a_progress_bar_shows_its_last_state() -> None:
    assert plain("10%\r50%\r100%\r\n") == "100%"


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b]0;title\x07x",
        "\x1b]8;;http://evil.example\x1b\\x\x1b]8;;\x1b\\",
        "\x1b[2J\x1b[Hx",
        "\x1b[?1049hx",
        "\x1bcx",
        "\x9b31mx".replace("31m", ""),
        "\u202ex",
        "\x00\x07\x08x",
    ],
)
def test_other_control_sequences_are_dropped(hostile: str) -> None:
    assert plain(hostile) == "x"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_no_input_leaves_a_control_character_or_an_unknown_class(line: str) -> None:
    for classes, text in Terminal().render(line):
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert re.fullmatch(r"[a-z -]*", classes)


@given(st.lists(st.integers(0, 300), max_size=12))
def test_no_sequence_of_codes_breaks_it(codes: list[int]) -> None:
    assert "".join(text for _, text in Terminal().render(f"\x1b[{';'.join(map(str, codes))}mx")) == "x"
