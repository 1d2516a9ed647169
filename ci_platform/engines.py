"""The engine that keeps runs: chosen here by the settings, and nothing else of the platform knows which it is."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, Self

from ci_platform.errors import InvalidInputError
from ci_platform.settings import Settings
from dynflow.clock import Clock
from dynflow.engines import Listener
from dynflow.engines.embedded import EmbeddedEngine
from dynflow.workflow import WorkflowEntrypoint


class PlatformEngine(Protocol):
    """What the platform needs of an engine. It is used inside `async with`, after `register`."""

    def register(self, name: str, entrypoint: type[WorkflowEntrypoint]) -> None:
        """Make a workflow known."""

    def binding(self, name: str) -> Any:
        """Return the raw binding of a registered workflow."""

    def add_listener(self, listener: Listener) -> None:
        """Have `listener` called at what happens to instances, once it is durable."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...


async def make_engine(settings: Settings, clock: Clock) -> PlatformEngine:
    """Return the engine of these settings, and wait for its server where it has one that is not there yet.

    Raises InvalidInputError, and EngineRefusedError where the server does not take this platform.
    """
    if settings.engine == "temporal":
        engine: PlatformEngine = await temporal().make_engine(settings, clock)
        return engine
    return EmbeddedEngine(
        settings.engine_path,
        clock=clock,
        concurrency=settings.concurrency,
        tenant_concurrency=settings.repository_share,
    )


def temporal() -> Any:
    """Return the module `temporal_engine`, which needs libraries that are an extra. Raises InvalidInputError."""
    try:
        return importlib.import_module("ci_platform.temporal_engine")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "temporalio":
            raise
        raise InvalidInputError(
            "engine is temporal, and its client is not installed: pip install 'dynflow[platform,temporal]'"
        ) from None
