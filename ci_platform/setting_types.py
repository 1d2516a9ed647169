"""How values of settings are written: durations, sizes, hosts."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator, Field

from ci_platform.egress.policy import Rule
from dynflow.durations import parse_duration

MEBIBYTE = 1024 * 1024
_UNITS = {"B": 1, "KB": 1024, "MB": MEBIBYTE, "GB": 1024 * MEBIBYTE}


def _parse_duration(value: object) -> timedelta:
    if isinstance(value, str) and value.replace(".", "", 1).isdecimal():
        return parse_duration(float(value))
    return parse_duration(value)


def _parse_size(value: object) -> object:
    if isinstance(value, str):
        number, _, unit = value.strip().partition(" ")
        if number.isdecimal() and unit.upper() in _UNITS:
            return int(number) * _UNITS[unit.upper()]
    return value


def _parse_hosts(value: object) -> object:
    texts = [text.strip() for text in value.split(",") if text.strip()] if isinstance(value, str) else value
    for text in texts if isinstance(texts, list | tuple) else ():
        Rule.parse(str(text))
    return texts


Duration = Annotated[timedelta, BeforeValidator(_parse_duration)]
Hosts = Annotated[tuple[str, ...], BeforeValidator(_parse_hosts)]
Size = Annotated[int, BeforeValidator(_parse_size), Field(gt=0)]
