"""Garbage: collected when asked for, or only said what would be."""

from __future__ import annotations

from dataclasses import dataclass

from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from ci_platform.garbage.collector import Collector
from ci_platform.garbage.operating import Garbage, collect_now
from ci_platform.garbage.room import Room


@dataclass(frozen=True, slots=True)
class Collection:
    """`dry_run` changes nothing."""

    dry_run: bool = False


@post("/gc", status_code=200, opt={"scope": "admin"}, tags=["garbage"], summary="Collect garbage")
async def collect_garbage(
    data: JSONBody[Collection], collector: NamedDependency[Collector], room: NamedDependency[Room]
) -> Garbage:
    """Collect what is above its budget, and more where the disk is short of room; or say what would be.

    `items` are those that are gone, and why; `kinds` say in sums what stays, and why.
    """
    return await collect_now(collector, room, dry_run=data.dry_run)
