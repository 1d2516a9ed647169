"""What the engine runs in a container that is there already (`docker exec`), and what that prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
from docker.utils.socket import frames_iter


@contextmanager
def started(client: docker.DockerClient, execution: str) -> Iterator[Iterator[bytes]]:
    """Start an execution that was made, and give what it prints, until it ends. Blocks."""
    connection: Any = client.api.exec_start(execution, socket=True)
    raw = connection._sock  # noqa: SLF001
    try:
        # Commands are silent for longer than calls to the engine may take.
        raw.settimeout(None)
        yield (piece for _, piece in frames_iter(connection, tty=False))  # type: ignore[no-untyped-call]
    finally:
        connection._response.close()  # noqa: SLF001 - where the library hangs it to keep it
        connection.close()
        raw.close()
