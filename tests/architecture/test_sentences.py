"""Each sentence of the workflows' contract names the test that would fail without it; here, that such a test exists."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SECTIONS: dict[str, dict[str, list[str]]] = tomllib.loads(
    (TESTS / "contracts" / "sentences.toml").read_text()
)
SENTENCES = {
    f"{section}.{number}": sentence
    for section, sentences in SECTIONS.items()
    for number, sentence in sentences.items()
}


@cache
def found_in(file: str) -> frozenset[str]:
    """Return the names of the tests of a file; none where it does not exist."""
    path = TESTS / file
    text = path.read_text() if path.is_file() else ""
    return frozenset(re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("number", SENTENCES)
def test_a_sentence_names_tests_that_exist(number: str) -> None:
    says, *named = SENTENCES[number]
    assert says
    assert named, f"nothing tests that {says}"
    missing = [name for name in named if name.partition("::")[2] not in found_in(name.partition("::")[0])]
    assert missing == []


def test_every_section_is_there_and_its_sentences_are_numbered() -> None:
    assert list(SECTIONS) == [str(number) for number in range(1, 10)]
    for section, sentences in SECTIONS.items():
        assert list(sentences) == [f"{number:02}" for number in range(1, len(sentences) + 1)], section
    assert len(SENTENCES) >= 200


def test_the_suite_of_engines_knows_no_engine() -> None:
    """Another engine must be able to pass it as it is."""
    for file in (TESTS / "contracts").glob("test_engine_*.py"):
        assert "engines.embedded" not in file.read_text(), file.name
