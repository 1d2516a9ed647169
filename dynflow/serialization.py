"""Plain data to bytes and back, with its types kept.

JSON, in which whatever JSON cannot say is an object with the one key `$`: `{"$": ["bytes", "aGk="]}`.
Never pickle: bytes that come out of an isolate are hostile. Stdlib only: isolates speak this too.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

from dynflow.errors import UnserializableError, ValueTooLargeError

MEBIBYTE = 1024 * 1024

# Deeper data is refused: this module and json recurse, and Python's stack is 1,000 frames deep.
_MAX_DEPTH = 100
# Larger integers travel as hexadecimal: Python refuses decimal strings of more than 4,300 digits.
_MAX_DECIMAL_INT = 1 << 1024

# Hashes of numbers are known to whoever makes them up; by chance, hardly two of a set are the same.
_MOST_OF_ONE_HASH = 1_000

_DataclassT = TypeVar("_DataclassT")
_by_tag: dict[str, type] = {}
_tag_of: dict[type, str] = {}


def register(cls: type[_DataclassT]) -> type[_DataclassT]:
    """Let instances of the dataclass `cls` be stored and sent; usable as a decorator.

    The tag is the class's name, so a name can be registered once. Fields must be plain data themselves.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass")
    if _by_tag.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"another dataclass is registered as {cls.__name__!r}")
    _tag_of[cls] = cls.__name__
    return cls


def pack(value: object) -> Any:
    """Return `value` as what `json` can say. Raises UnserializableError with the path inside the value."""
    return _pack(value, "value", 0)


def unpack(data: Any) -> Any:
    """Return the value that `pack` made `data` from. Raises ValueError for what `pack` never makes."""
    kind = type(data)
    if kind is dict:
        if "$" in data and len(data) == 1:
            return _unpack_tagged(data["$"])
        return {key: unpack(item) for key, item in data.items()}
    if kind is list:
        return [unpack(item) for item in data]
    return data


def encode(value: object, *, limit: int | None = None, what: str = "value") -> bytes:
    """Return `value` as bytes. Raises UnserializableError, or ValueTooLargeError above `limit` bytes."""
    packed = _pack(value, what, 0)
    data = (repr(packed) if type(packed) is int else _to_json(packed)).encode()
    if limit is not None and len(data) > limit:
        raise ValueTooLargeError(f"{what} is {len(data):,} bytes when stored; the limit is {limit:,} bytes")
    return data


def decode(data: bytes | str) -> Any:
    """Return the value that `encode` made `data` from. Raises ValueError for anything else."""
    try:
        return unpack(_from_json(data if isinstance(data, str) else data.decode()))
    except (AttributeError, KeyError, TypeError, IndexError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not an encoded value: {error!r}") from error


# Nobody can change a value of these types, and what `decode` makes of it is equal.
_UNCHANGING = frozenset({type(None), bool, int, float, str})


def copy_of(value: object, encoded: bytes | None) -> Any:
    """Return what `decode` makes of `value` as it was encoded; nothing has to be decoded for plain scalars."""
    if encoded is None or type(value) in _UNCHANGING:
        return value
    return decode(encoded)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not part of the format")


# Made once: `json.dumps` and `json.loads` make a new one at every call with options.
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
_scan = json.JSONDecoder(parse_constant=_refuse_constant).scan_once  # type: ignore[attr-defined]


def _from_json(text: str) -> Any:
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        raise ValueError("not an encoded value") from None
    if end != len(text):
        raise ValueError(f"not an encoded value: more follows after character {end}")
    return value


def _pack(value: Any, path: str, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_MAX_DECIMAL_INT < value < _MAX_DECIMAL_INT else {"$": ["int", hex(value)]}
    if kind is float:
        return value if math.isfinite(value) else {"$": ["float", repr(value)]}
    if depth >= _MAX_DEPTH:
        raise UnserializableError(f"{path} is nested more than {_MAX_DEPTH} levels deep (or contains itself)")
    if kind is dict:
        return _pack_dict(value, path, depth)
    if kind is list:
        return [_pack(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    return _pack_tagged(value, kind, path, depth)


def _pack_tagged(value: Any, kind: type, path: str, depth: int) -> Any:
    pack_leaf = _LEAVES.get(kind)
    if pack_leaf is not None:
        return {"$": pack_leaf(value)}
    if kind is tuple:
        return {
            "$": ["tuple", *(_pack(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value))]
        }
    if kind is set:
        packed = [_pack(item, f"{path}{{…}}", depth + 1) for item in value]
        return {"$": ["set", *sorted(packed, key=json.dumps)]}  # sorted: equal sets have equal bytes
    if kind in _tag_of:
        fields = {
            field.name: _pack(getattr(value, field.name), f"{path}.{field.name}", depth + 1)
            for field in dataclasses.fields(value)
        }
        return {"$": ["data", _tag_of[kind], fields]}
    raise UnserializableError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which is not plain data: "
        "return None, bool, int, float, str, bytes, list, tuple, set, dict with string keys, "
        "datetime, date, timedelta, Decimal or UUID"
    )


def _pack_dict(value: dict[Any, Any], path: str, depth: int) -> Any:
    packed = {}
    for key, item in value.items():
        if type(key) is not str:
            raise UnserializableError(f"{path} has the key {key!r:.100}; keys must be strings")
        packed[key] = _pack(item, f"{path}[{key!r}]", depth + 1)
    if "$" in packed and len(packed) == 1:
        return {"$": ["dict", packed]}
    return packed


_LEAVES: dict[type, Callable[[Any], list[Any]]] = {
    bytes: lambda value: ["bytes", base64.b64encode(value).decode()],
    datetime: lambda value: (
        ["datetime", value.isoformat(), value.fold] if value.fold else ["datetime", value.isoformat()]
    ),
    date: lambda value: ["date", value.isoformat()],
    timedelta: lambda value: ["timedelta", value.days, value.seconds, value.microseconds],
    Decimal: lambda value: ["decimal", str(value)],
    UUID: lambda value: ["uuid", str(value)],
}


def _unpack_tagged(tagged: Any) -> Any:
    if type(tagged) is not list or not tagged:
        raise ValueError(f"not a tagged value: {tagged!r:.100}")
    tag, *rest = tagged
    if tag == "tuple":
        return tuple(unpack(item) for item in rest)
    if tag == "set":
        return _unpack_set([unpack(item) for item in rest])
    if tag == "dict":
        return {key: unpack(item) for key, item in _fields(rest[0])}
    if tag == "data":
        return _unpack_dataclass(*rest)
    if tag not in _UNPACK_LEAF:
        raise ValueError(f"unknown tag {tag!r:.100}")
    return _UNPACK_LEAF[tag](*rest)


def _unpack_set(items: list[Any]) -> set[Any]:
    # Each of the items with one hash is compared with all of the others: a hostile set takes minutes.
    if len(items) > _MOST_OF_ONE_HASH:
        ((_, most),) = Counter(map(hash, items)).most_common(1)
        if most > _MOST_OF_ONE_HASH:
            raise ValueError(f"{most:,} items of a set collide")
    return set(items)


def _unpack_dataclass(name: str, fields: dict[str, Any]) -> Any:
    if name not in _by_tag:
        raise ValueError(f"no dataclass is registered as {name!r:.100}")
    return _by_tag[name](**{key: unpack(item) for key, item in _fields(fields)})


def _fields(data: Any) -> Iterable[tuple[str, Any]]:
    if type(data) is not dict:  # a stub, which isolates put among data, would take `items` for a call
        raise ValueError("not an object")
    return data.items()


_UNPACK_LEAF: dict[Any, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "datetime": lambda text, fold=0: datetime.fromisoformat(text).replace(fold=fold),
    "date": date.fromisoformat,
    "timedelta": timedelta,
    "decimal": Decimal,
    "uuid": lambda text: UUID(str(text)),
}
