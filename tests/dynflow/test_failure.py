"""Failures are data that may come from a tenant: what they say of a class must not do anything."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from dynflow.errors import EngineClosedError, LeaseLostError, StepFailedError, StorageError
from dynflow.failure import Failure
from dynflow.isolates.wire import Peer, WireLimits, decode_frame, encode_frame
from dynflow.serialization import pack


@pytest.mark.parametrize(
    "error",
    [
        LeaseLostError("x"),
        StorageError("x"),
        EngineClosedError("x"),
        StopIteration("x"),
        StopAsyncIteration("x"),
    ],
)
def test_a_step_never_raises_what_engines_say_to_each_other(error: Exception) -> None:
    assert type(Failure.of(error).as_step_error("a", 1)) is StepFailedError


def test_any_other_error_of_a_step_is_raised_as_itself() -> None:
    assert type(Failure.of(KeyError("x")).as_step_error("a", 1)) is KeyError


def test_looking_for_a_class_runs_no_code_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

    monkeypatch.setitem(sys.modules, "lazy_module", Lazy("lazy_module"))
    assert Failure("E", "x", "lazy_module:Error", ("x",)).rebuild(only_loaded=True) is None


def test_text_that_no_database_holds_is_taken_off() -> None:
    failure = Failure.of(ValueError("a\ud800b\0c"))
    assert failure.message.encode().decode() == "a?b\ufffdc"
    failure.traceback.encode()


async def test_text_that_no_database_holds_is_taken_off_what_an_isolate_sends() -> None:
    async def perform(_: Any) -> None:
        raise AssertionError

    sent: list[bytes] = []
    peer = Peer(sent.append, perform, WireLimits())
    future = peer.call("t", "m")
    call = decode_frame(sent[0][4:])
    failure = Failure("N\ud800", "m\0", "t\ud800:x", None, "\ud800", "yes")
    peer.feed(encode_frame(["error", call[1], pack(failure), None, None]))
    with pytest.raises(Exception, match="N") as caught:
        await future
    got: Failure = caught.value.failure  # type: ignore[attr-defined]
    assert (got.name, got.message, got.type, got.traceback) == ("N?", "m\ufffd", "t?:x", "?")
