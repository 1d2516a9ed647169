"""Tells authors of workflows that `run` reads the clock or randomness outside of a step: a replay gets other values.

Functions of the standard library are wrapped once, in the zygote. A call is told where the code that makes it is the
tenant's own and part of `run`, once for each line. `datetime.now()` is a method of a C type that cannot be wrapped, so
it is looked for in the text of `run` itself. Stdlib only.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import random
import secrets
import sys
import time
import types
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

orchestrating: ContextVar[bool] = ContextVar("orchestrating", default=False)
"""Whether what runs is a workflow's `run`, outside of its steps."""

_WATCHED: Mapping[types.ModuleType, str] = {
    os: "urandom getrandom",
    random: "random randint randrange choice choices sample shuffle uniform gauss getrandbits randbytes",
    secrets: "choice randbelow randbits token_bytes token_hex token_urlsafe",
    time: "time time_ns",
    uuid: "uuid1 uuid4",
}
_CLOCK_METHODS = ("now", "utcnow", "today")

Tell = Callable[[str], None]

_files: Collection[str] = ()
_told: set[tuple[str, int | None]] = set()
_tell: Tell | None = None


def install() -> None:
    """Wrap the functions that are watched."""
    for module, names in _WATCHED.items():
        for name in names.split():
            if hasattr(module, name):
                setattr(module, name, _watched(f"{module.__name__}.{name}()", getattr(module, name)))


def begin(files: Mapping[str, Any], run: Callable[..., Any], tell: Tell) -> None:
    """Watch calls that the code in `files` makes while `run`, a method of a class of theirs, goes on."""
    global _files, _tell
    _files, _tell = files, tell
    orchestrating.set(True)
    function = inspect.unwrap(run)
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    source = files.get(file)
    if isinstance(source, str) and any(f".{method}(" in source for method in _CLOCK_METHODS):
        for name, line in _clocks_in_run(file, source, function.__qualname__.partition(".")[0]):
            _note(name, file, line)


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if orchestrating.get():
            frame = sys._getframe(1)  # noqa: SLF001 - whoever called, and nobody above
            if frame.f_code.co_filename in _files:
                _note(name, frame.f_code.co_filename, frame.f_lineno)
        return function(*args, **kwargs)

    return watched


def _note(name: str, file: str, line: int | None) -> None:
    if (file, line) not in _told and _tell is not None:
        _told.add((file, line))
        _tell(f"{file}:{line}: {name} outside of a step: a replay gets another value. Call it in a step\n")


def _clocks_in_run(file: str, source: str, name: str) -> Iterator[tuple[str, int]]:
    for cls in ast.parse(source, file).body:
        for method in cls.body if isinstance(cls, ast.ClassDef) and cls.name == name else ():
            if isinstance(method, ast.AsyncFunctionDef) and method.name == "run":
                for statement in method.body:
                    yield from _clocks(statement)


def _clocks(node: ast.AST) -> Iterator[tuple[str, int]]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return  # most likely the callback of a step
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        called = ast.unparse(node.func)
        owner = called.rpartition(".")[0].rpartition(".")[2]
        if node.func.attr in _CLOCK_METHODS and owner in {"datetime", "date"}:
            yield f"{called}()", node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _clocks(child)
