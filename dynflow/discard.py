"""Drop a suspended coroutine without running what is left of it.

Python finalises a suspended coroutine by throwing GeneratorExit into it: its `finally` blocks run, its
`except BaseException` sees an error. A workflow that hibernates must notice nothing, so in this process (an
isolate's process is simply killed) the coroutine is first marked as finished: the interpreter then releases its
frame and locals and runs none of its code. The mark is one byte of the object, which no API sets; where it
is was the same kind of place in CPython 3.11, 3.12 and 3.13, is found at import by comparing a coroutine before
and after its first step, and is tried there. Where the trial fails, coroutines are finalised as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import sys
import types
from collections.abc import Generator, Iterable
from typing import Any

# CPython's `FRAME_COMPLETED` (Include/internal/pycore_frame.h, 3.11 to 3.13): neither running nor resumable.
_COMPLETED = 1
# FRAME_CREATED and FRAME_SUSPENDED*, as signed bytes.
_RESUMABLE = range(-3, 0)
_GENERATORS = (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)
_OBJECT_HEADER = 16
_OWN_REFERENCES = 3


def discard_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Make pending `tasks` of a closed loop vanish when their last reference goes."""
    for task in tasks:
        if not task.done():
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - the documented-by-use switch
            discard(task.get_coro())


def discard(coroutine: Any) -> None:
    """Mark `coroutine`, and what it awaits, as finished. It must be suspended and never be resumed."""
    if _STATE_OFFSET is None:
        return
    for generator in _suspended_chain(coroutine):
        _state(generator, _STATE_OFFSET).value = _COMPLETED


def _suspended_chain(root: Any) -> list[Any]:
    """Return `root`, what it awaits, and the suspended generators and `with` blocks that its frames alone hold."""
    found: dict[int, Any] = {}
    todo = [root]
    while todo:
        item = todo.pop()
        if isinstance(item, types.MethodType):  # a `with` block keeps its manager's bound __exit__
            item = item.__self__
        if isinstance(item, contextlib._GeneratorContextManagerBase):  # noqa: SLF001 - it alone names the class
            item = item.gen
        if id(item) in found:
            continue
        if isinstance(item, _GENERATORS):
            if _STATE_OFFSET is not None and _state(item, _STATE_OFFSET).value in _RESUMABLE:
                found[id(item)] = item
                todo.extend(_held_by(item))
        elif type(item).__name__ in {"async_generator_asend", "async_generator_athrow", "coroutine_wrapper"}:
            todo.extend(gc.get_referents(item))
    return list(found.values())


def _held_by(generator: Any) -> list[Any]:
    """Return what goes when the frame of `generator` goes: a coroutine that somebody else drives stays whole."""
    held = [getattr(generator, name, None) for name in ("cr_await", "gi_yieldfrom", "ag_await")]
    referents = gc.get_referents(generator)
    while referents:
        referent = referents.pop()
        # Referred to by the frame, by `referent` and by getrefcount's argument, and by nobody else.
        if sys.getrefcount(referent) <= _OWN_REFERENCES or isinstance(referent, types.MethodType):
            held.append(referent)
    return held


def _state(generator: Any, offset: int) -> ctypes.c_int8:
    return ctypes.c_int8.from_address(id(generator) + offset)


@types.coroutine
def _suspend() -> Generator[None, None, None]:
    yield


async def _sample(finalised: list[bool]) -> None:
    try:
        await _suspend()
    finally:
        finalised.append(True)


def _find_state_offset() -> int | None:
    finalised: list[bool] = []
    sample = _sample(finalised)
    size = sample.__sizeof__()
    before = ctypes.string_at(id(sample), size)
    sample.send(None)
    after = ctypes.string_at(id(sample), size)
    offset = next((index for index in range(_OBJECT_HEADER, size) if before[index] != after[index]), None)
    if offset is None or before[offset] - 256 not in _RESUMABLE or after[offset] - 256 not in _RESUMABLE:
        sample.close()
        return None
    _state(sample, offset).value = _COMPLETED
    del sample
    return None if finalised else offset


_STATE_OFFSET = _find_state_offset()
