"""What several handlers do to values on their way out."""

from __future__ import annotations

from typing import Any

from litestar.serialization import encode_json


def as_json(value: Any) -> str:
    """Return `value` as JSON text, dataclasses and datetimes as everywhere in the API."""
    return encode_json(value).decode()
