"""Secrets stay out of logs, however they are written and wherever the stream is cut."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ci_platform.redaction import Redactor, redact_text, warnings

TOKEN = "tok3n/with+odd=chars&more"
KEY = "-----BEGIN KEY-----\nMIIEpAIBAAKCAQEA7\nq83mZ0fFvYw1Lz\n-----END KEY-----\n"


def redact(text: str, *secrets: str) -> str:
    return redact_text(text, secrets)


def test_a_secret_is_masked_wherever_it_is() -> None:
    assert redact(f"a {TOKEN} b{TOKEN}{TOKEN}", TOKEN) == "a *** b******"


def test_what_is_no_secret_stays() -> None:
    assert redact("tok3n tok3n/with", TOKEN) == "tok3n tok3n/with"


def test_each_line_of_a_secret_is_masked_alone() -> None:
    assert redact("x MIIEpAIBAAKCAQEA7 y", KEY) == "x *** y"
    assert "q83" not in redact("log: " + KEY.replace("\n", "\r\n"), KEY)


def test_the_values_inside_of_json_are_masked_and_its_braces_are_not() -> None:
    secret = json.dumps(
        {"user": "deploy-bot", "keys": [{"password": "hunter2-long"}], "port": 54321, "on": True}
    )
    assert redact("deploy-bot uses hunter2-long at 54321 {} true", secret) == "*** uses *** at *** {} true"
    assert redact(f"all: {secret}", secret) == "all: ***"


@pytest.mark.parametrize(
    "encode",
    [
        quote,
        lambda secret: quote(secret, safe=""),
        quote_plus,
        lambda secret: json.dumps(secret)[1:-1],
        lambda secret: base64.b64encode(secret.encode()).decode(),
    ],
)
def test_encoded_forms_are_masked(encode: object) -> None:
    assert callable(encode)
    secret = 'say "hi" & \\ pass/word+1'
    assert redact(f"<{encode(secret)}", secret).startswith("<***")


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", "user:"])
@pytest.mark.parametrize("after", ["", "\n", "xy"])
def test_base64_of_a_longer_text_hides_the_secret_at_every_position(before: str, after: str) -> None:
    encoded = base64.b64encode((before + TOKEN + after).encode()).decode()
    shown = redact(f"Authorization: Basic {encoded}", TOKEN)
    assert "***" in shown
    kept = shown.replace("***", "")
    # At most the characters that the secret shares with its neighbours are left.
    assert len(kept) - len("Authorization: Basic ") <= len(encoded) - len(TOKEN) * 4 // 3 + 3


def test_wrapped_base64_is_masked() -> None:
    secret = "".join(chr(33 + n % 90) for n in range(300))
    wrapped = base64.encodebytes(secret.encode()).decode()
    shown = redact(wrapped, secret)
    assert not any(line in shown for line in wrapped.splitlines()[:-1])


def test_tiny_secrets_are_not_masked_but_warned_of() -> None:
    assert redact("every e stays", "e", "abc") == "every e stays"
    assert warnings([("SHORT", "abc"), ("LONG", "abcd")]) == [
        "secret 'SHORT' has fewer than 4 characters and is not masked in logs"
    ]


def test_without_secrets_nothing_is_held_back() -> None:
    assert Redactor([]).feed(b"any") == b"any"


def test_text_that_cannot_begin_a_secret_passes_at_once() -> None:
    assert Redactor([TOKEN]).feed(b"progress: 10%") == b"progress: 10%"


def test_a_beginning_is_held_back_until_it_is_decided() -> None:
    redactor = Redactor([TOKEN])
    assert redactor.feed(b"x tok3n/") == b"x "
    assert redactor.feed(b"without it") == b"tok3n/without i"
    assert redactor.feed(b" ") == b"t "
    assert redactor.feed(b"tok3n") == b""
    assert redactor.flush() == b"tok3n"


def test_overlapping_secrets_are_masked_whole_across_a_cut() -> None:
    redactor = Redactor(["wxyzABCD", "ABCDefgh", "ABCD"])
    shown = redactor.feed(b"1 wxyzABCD") + redactor.feed(b"efgh 2") + redactor.flush()
    assert shown == b"1 *** 2"
    redactor = Redactor(["wxyzABCD", "ABCDefgh"])
    assert redactor.feed(b"wxyzABCD") + redactor.feed(b"efg! 2") + redactor.flush() == b"***efg! 2"


SECRETS = st.lists(st.text("abAB", min_size=4, max_size=8), min_size=1, max_size=3)


@given(SECRETS, st.lists(st.text("abAB \n", max_size=12), max_size=8))
def test_cuts_change_nothing(secrets: list[str], pieces: list[str]) -> None:
    redactor = Redactor(secrets)
    cut = b"".join([*(redactor.feed(piece.encode()) for piece in pieces), redactor.flush()])
    assert cut.decode() == redact_text("".join(pieces), secrets)
    assert not any(secret in cut.decode() for secret in secrets)
