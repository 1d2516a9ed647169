"""What the engine runs in a container that is there already (`docker exec`), and what that prints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
from docker.errors import APIError, NotFound
from docker.utils.socket import frames_iter

from ci_platform.sandboxes import SandboxJob
from ci_platform.sandboxes.container import walls
from ci_platform.sandboxes.container.places import CODE, OUTPUT, PIPE, Place

_COMMAND = f'(exec "$@") 1<>{OUTPUT}/{PIPE} 2>&1; code=$?; echo %d $code >{OUTPUT}/{CODE}; exit $code'
"""The outer shell stays, and holds the streams by whose end the engine tells that the command is over. `exec` runs
programs alone, never what the shell has of the same name. The pipe is opened for both ways, so that it has a reader
though the platform is killed: the command then waits, once the pipe is full, for the next platform."""


class ColdError(Exception):
    """This image cannot be kept warm; nothing has run."""


def prepare(client: docker.DockerClient, container: str, number: int, job: SandboxJob) -> str:
    """Have a command ready to be started, the `number`th of its container; returns its execution's id."""
    try:
        made: dict[str, str] = client.api.exec_create(
            container,
            ["sh", "-c", _COMMAND % number, "sh", *job.argv],
            environment=walls.environment(job),
            user=walls.user(),
            workdir=walls.place(job.cwd),
        )
    except NotFound:
        raise ColdError(container) from None
    except APIError as error:
        if error.status_code == 409:  # its first process has ended: the image has no shell, or no sleep
            raise ColdError(container) from None
        raise
    return made["Id"]


def execute(client: docker.DockerClient, execution: str, place: Place, number: int) -> int:
    """Start a command, wait for its end, and return its exit code."""
    with started(client, execution) as pieces:
        # What it prints goes elsewhere: here is only what the engine itself has to say.
        said = b"".join(itertools.islice(pieces, 10))
    written = None if said else place.written_end(number)
    # The engine takes three milliseconds to say what its shell has written, unless that was killed.
    code = int(client.api.exec_inspect(execution)["ExitCode"] or 0) if written is None else written
    if said and code and b"OCI runtime exec failed" in said:
        raise ColdError(said.decode("utf-8", "replace"))
    return code


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
