"""Plain data to bytes and back, with its types kept; hostile bytes are refused."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, make_dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynflow.errors import UnserializableError, ValueTooLargeError
from dynflow.serialization import decode, encode, register
from dynflow.types import Event, StepInfo

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**1020, max_value=2**1030)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[]))
    | st.binary()
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.just(timezone(timedelta(hours=5, minutes=45))))
    | st.dates()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
)
HASHABLE = st.recursive(LEAVES, lambda inner: st.tuples(inner, inner), max_leaves=3)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.sets(HASHABLE, max_size=4)
        | st.dictionaries(st.text() | st.just("$"), inner)
    ),
    max_leaves=20,
)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, datetime):
        return (left, left.utcoffset(), left.fold) == (right, right.utcoffset(), right.fold)
    if isinstance(left, (float, Decimal)):
        return repr(left) == repr(right)
    return bool(left == right)


@given(PLAIN)
def test_values_come_back_with_their_types(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_nan_and_infinities_come_back() -> None:
    back = decode(encode([math.nan, math.inf, -math.inf, -0.0, Decimal("NaN"), Decimal("-Infinity")]))
    assert [repr(value) for value in back] == [
        "nan",
        "inf",
        "-inf",
        "-0.0",
        "Decimal('NaN')",
        "Decimal('-Infinity')",
    ]


@given(st.binary())
def test_arbitrary_bytes_are_decoded_or_refused_with_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode(data)


@pytest.mark.parametrize(
    "text",
    [
        '{"$": 1}', '{"$": []}', '{"$": ["what", 1]}', '{"$": ["data", "os.system", {}]}', '{"$": ["data"]}',
        '{"$": ["bytes", "%%%"]}', '{"$": ["bytes", 5]}', '{"$": ["int", "zz"]}', '{"$": ["set", []]}',
        '{"$": ["datetime", "never"]}', '{"$": ["decimal", "x"]}', '{"$": ["uuid", "x"]}', '{"$": ["dict", 5]}',
        '{"$": ["timedelta", 999999999999, 0, 0]}', '{"$": ["data", "StepInfo", {"nope": 1}]}', "NaN", "[" * 100_000,
        '{"$": [["set"]]}', '{"$": ["date", 1]}',
    ],
)  # fmt: skip
def test_what_encode_never_makes_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any message
        decode(text)


class Colour(IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "value is"), ([1, object()], r"value\[1\]"), ({"a": {"b": {1j}}}, r"\['a'\]\['b'\]\{"),
        ({1: 2}, "key 1"), (Colour.RED, "Colour"), (Text("x"), "Text"), (iter([1]), "iterator"),
        (ValueError("x"), "ValueError"), (frozenset(), "frozenset"), (bytearray(), "bytearray"),
        (Event("t", object(), datetime(2026, 1, 1, tzinfo=UTC)), r"value\.payload"),
    ],
)  # fmt: skip
def test_what_is_no_plain_data_is_refused_with_its_path(value: Any, path: str) -> None:
    with pytest.raises(UnserializableError, match=path):
        encode(value)


def test_endless_data_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnserializableError, match="contains itself"):
        encode(loop)


def test_the_limit_counts_stored_bytes() -> None:
    assert encode("x" * 98, limit=100)
    with pytest.raises(ValueTooLargeError, match=r"params is 101 bytes .* limit is 100"):
        encode("x" * 99, limit=100, what="params")


def test_registered_dataclasses_alone_come_back() -> None:
    assert decode(encode(StepInfo("a", 1))) == StepInfo("a", 1)

    @dataclass
    class Unknown:
        x: int = 1

    with pytest.raises(UnserializableError, match="Unknown"):
        encode(Unknown())
    impostor = make_dataclass("StepInfo", ["x"])
    with pytest.raises(ValueError, match="StepInfo"):
        register(impostor)
    with pytest.raises(TypeError):
        register(dict)


def test_leaves_have_one_encoding() -> None:
    assert encode({3, 1, 2}) == encode({2, 3, 1})
    assert encode(date(2026, 1, 1)) != encode(datetime(2026, 1, 1))  # noqa: DTZ001
    assert decode(encode(UUID(int=1))) == UUID(int=1)
